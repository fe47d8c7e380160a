"""Duels, races and switches from the command line, in real processes that are really killed."""

from __future__ import annotations

import json
import re
import sqlite3
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
import tomlkit
from click.testing import CliRunner, Result

from overnight.agent.campaign import load_campaign
from overnight.agent.cli import overnight as command
from overnight.store.errors import InputError
from overnight.store.sql_store import SqlStore

from ..store_tests.trajectories import SEED_FILE
from .campaigns import run
from .contests import KNOBS
from .test_cli import DEADLINE_S, started, wait_until, write

UPHILL = {name: {**knob, "default": 0.1} for name, knob in KNOBS.items()}
"""Every change is an improvement, so that whoever answers banks something."""


def mute_against_random(folder: Path, **sections: Any) -> Path:
    """Write a campaign whose champion never gives a proposal, and whose challenger draws at random."""
    tables: dict[str, Any] = {
        "campaign": {"baseline": "fixed"},
        "budget": {"iterations": 11},
        "knobs": {"a": None, "b": None, **UPHILL},
        "trainer": {"optimum": dict.fromkeys(UPHILL, 10.0), "noise_sd": 0.001, "seed_sd": 0.002},
        "proposers": {"random": {"kind": "random"}, "mute": {"kind": "scripted", "replies": ["no"]}},
        "router": {"champion": "mute", "challenger": "random", "duel_share": 0.5, "alpha": 0.49, "explore": 0.0},
    }
    for name, table in sections.items():
        tables[name] = {**tables.get(name, {}), **table}
    return write(folder, **tables)


def asked(folder: Path, query: str) -> list[Any]:
    try:
        connection = sqlite3.connect(f"file:{folder / 'overnight.db'}?mode=ro", uri=True)
    except sqlite3.OperationalError:
        return []
    try:
        return connection.execute(query).fetchall()
    except sqlite3.OperationalError:
        return []
    finally:
        connection.close()


def history(folder: Path) -> dict[str, list[Any]]:
    """Return all that a contest leaves: turns, duels, switches, who stands where, what was measured."""
    return {
        "attempts": asked(
            folder, 'SELECT iteration, "try", role, knob, new_value, outcome FROM attempts ORDER BY 1, 2'
        ),
        "duels": asked(
            folder, "SELECT iteration, kind, seed, champion_gain, challenger_gain, item FROM duels ORDER BY 1"
        ),
        "promotions": asked(folder, "SELECT iteration, kind, from_proposer, to_proposer, reason FROM promotion_log"),
        "aliases": asked(folder, "SELECT alias, proposer_id, iteration FROM aliases ORDER BY 1"),
        "trials": asked(folder, "SELECT config_id, seed, replicate, purpose, metric FROM trials ORDER BY 1, 2, 3"),
    }


def kill_when(folder: Path, query: str, count: int) -> None:
    """Run the campaign and kill it with SIGKILL as soon as a query finds so many rows."""
    process = started("run", "mine", cwd=folder)
    assert process.stdout is not None
    wait_until(lambda: (folder / "overnight.db").exists() or process.poll() is not None)
    deadline = time.monotonic() + DEADLINE_S
    while len(asked(folder, query)) < count and process.poll() is None:
        assert time.monotonic() < deadline, "it did not come to that in time"
    assert process.poll() is None, process.stdout.read()
    children = psutil.Process(process.pid).children(recursive=True)
    process.kill()
    process.wait()
    process.stdout.close()
    psutil.wait_procs(children, timeout=DEADLINE_S)


@pytest.fixture(scope="module", name="calm")
def _calm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("calm")
    mute_against_random(folder / "mine")
    to_its_end(folder)
    return folder


def to_its_end(folder: Path) -> None:
    """Run the campaign, or what is left of it, in a process of its own."""
    process = started("run", "mine", cwd=folder)
    output, _ = process.communicate(timeout=4 * DEADLINE_S)
    assert process.returncode == 0, output


@pytest.mark.parametrize(
    ("query", "count"),
    [
        ("SELECT 1 FROM promotions", 1),  # between promotion and the next proposal, or just after it
        ("SELECT 1 FROM trials WHERE purpose = 'duel'", 1),  # between the baseline and the candidate of a duel
        pytest.param("SELECT 1 FROM duels", 2, marks=pytest.mark.slow),  # between the two sides
        pytest.param("SELECT 1 FROM race_items", 5, marks=pytest.mark.slow),  # in the middle of looking back
    ],
    ids=["promotion", "duel trial", "duel sides", "race"],
)
def test_a_contest_killed_at_its_worst_moments_ends_as_an_undisturbed_one(
    tmp_path: Path, calm: Path, query: str, count: int
) -> None:
    mute_against_random(tmp_path / "mine")
    kill_when(tmp_path, query, count)
    to_its_end(tmp_path)
    mine, undisturbed = history(tmp_path), history(calm)
    assert mine == undisturbed
    assert [kind for _, kind, *_ in mine["promotions"]] == ["promotion"]


def test_a_run_tells_of_duels_races_and_switches(calm: Path) -> None:
    kinds = [kind for (kind,) in asked(calm, "SELECT kind FROM event_log ORDER BY event_id")]
    assert kinds.index("weighed") < kinds.index("race_finished") < kinds.index("promoted")


def played(folder: Path, **sections: Any) -> None:
    """Run the campaign in this process, under the file that the commands will read."""
    of = load_campaign(mute_against_random(folder / "mine", **sections))
    store = SqlStore.open(folder / "overnight.db", create=True)
    run(of, store)
    store.close()


def invoked(folder: Path, *arguments: str) -> Result:
    """Run a command in this process."""
    return CliRunner().invoke(command, [*arguments, "--db", str(folder / "overnight.db")])


def test_status_and_report_tell_who_leads_and_why(tmp_path: Path) -> None:
    played(tmp_path, budget={"iterations": 4}, router={"alpha": 0.01})
    (row,) = json.loads(invoked(tmp_path, "status", "--format", "json").stdout)
    assert (row["champion"], row["challenger"], row["duels"]) == ("mute", "random", 2)
    assert (row["e_value"] > 1, row["threshold"] > 100, row["duels_needed"] > 0) == (True, True, True)
    why = r"e-value .* of 164 after 2 duels, about \d+ more .*not looked back at yet"
    assert re.search(why, row["why_no_promotion"])
    invoked(tmp_path, "report", "c", "-o", str(tmp_path / "c.html"))
    page = (tmp_path / "c.html").read_text()
    assert "No promotion of random over mute yet: e-value" in page
    assert "The last duels" in page


def test_race_prints_and_draws_every_turn(tmp_path: Path) -> None:
    played(tmp_path, budget={"iterations": 6}, distill={"holdout": 4})
    page = tmp_path / "race.html"
    raced = invoked(tmp_path, "race", "c", "--items", "--format", "json", "-o", str(page))
    assert raced.exit_code == 0, raced.output
    rows = json.loads(raced.stdout)
    assert {row["match"] for row in rows if row["proposer"] == "mute"} == {"blocked"}
    assert {row["iteration"] for row in rows} == {3, 4, 5, 6}
    assert "the gate" in raced.stderr
    assert 'id="chart-race"' in page.read_text()
    rates = json.loads(invoked(tmp_path, "sql", "select valid_rate from race_stats order by proposer", "--format",
                               "json").stdout)  # fmt: skip
    assert [row["valid_rate"] for row in rates] == [0.0, 1.0]
    table = invoked(tmp_path, "race", "c").stdout
    assert all(word in table for word in ("valid_rate", "p95_latency_s", "(blocked)", "tried"))


def test_a_race_without_a_held_out_turn_is_a_clear_no(tmp_path: Path) -> None:
    of = load_campaign(mute_against_random(tmp_path / "mine"))
    store = SqlStore.open(tmp_path / "overnight.db", create=True)
    store.open_campaign(name="c", path=str(of.path), spec=of.spec(), frozen_hash=of.frozen_hash(), knobs_on_menu=4)
    store.close()
    raced = invoked(tmp_path, "race", "c")
    assert (raced.exit_code, raced.stderr.splitlines()[-1]) == (
        1,
        "overnight: there is no held-out turn to look back at",
    )


def test_a_person_switches_a_campaign_that_does_not_run(tmp_path: Path) -> None:
    played(tmp_path, budget={"iterations": 1})
    commands = (
        ("promote", "c", "nobody"), ("rollback", "c"), ("promote", "c", "random", "--reason", "it talks"),
        ("promote", "c", "random"), ("rollback", "c", "--reason", "too much"),
    )  # fmt: skip
    done = [invoked(tmp_path, *each) for each in commands]
    assert [type(each.exception) for each in done] == [InputError, InputError, type(None), InputError, type(None)]
    assert "has no proposer `nobody`; it has `random`, `mute`" in str(done[0].exception)
    assert asked(tmp_path, "SELECT kind, to_proposer, decided_by, reason FROM promotion_log") == [
        ("promotion", "random", "person", "it talks"), ("rollback", "mute", "person", "too much"),
    ]  # fmt: skip


def test_a_person_switches_a_campaign_that_runs(tmp_path: Path) -> None:
    mute_against_random(
        tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.05}, router={"alpha": 0.001}
    )
    process = started("run", "mine", cwd=tmp_path)
    try:
        wait_until(lambda: bool(asked(tmp_path, "SELECT 1 FROM attempts WHERE iteration = 2")))
        promoted = invoked(tmp_path, "promote", "c", "random", "--reason", "now")
        assert (promoted.exit_code, "done after its current turn" in promoted.stderr) == (0, True)
        wait_until(lambda: bool(asked(tmp_path, "SELECT 1 FROM promotions")))
    finally:
        process.terminate()
        process.communicate(timeout=DEADLINE_S)
    assert asked(tmp_path, "SELECT decided_by, reason FROM promotion_log") == [("person", "now")]


def test_the_first_trajectory_can_be_looked_back_at(tmp_path: Path) -> None:
    if not SEED_FILE.exists():
        pytest.skip("the first trajectory (../shared/seed) is not here")
    spec = load_campaign("seed_replay").spec() | {
        "proposers": {"nim": {"kind": "scripted", "replies": ["gone"]}, "random": {"kind": "random"}},
        "router": {"champion": "nim", "controls": ["random"]},
        "distill": {"holdout": 8},
    }
    spec["campaign"] = {**dict(spec["campaign"]), "name": "replay", "brief": None}  # type: ignore[call-overload]
    (tmp_path / "replay").mkdir()
    (tmp_path / "replay" / "campaign.toml").write_text(tomlkit.dumps(without_nulls(spec)))
    folder = str(tmp_path / "replay")
    invoked(tmp_path, "import", str(SEED_FILE), "--campaign", folder, "--name", "replay")
    raced = invoked(tmp_path, "race", folder, "--items", "--format", "json")
    assert raced.exit_code == 0, raced.output
    mine = [row for row in json.loads(raced.stdout) if row["proposer"] == "nim"]
    assert [row["tried"] for row in mine] == [
        "d_ff = 6144", "d_model = 1536", "d_model = 768", "d_ff = 8192", "n_head = 32", "d_ff = 4096",
        "d_model = 2048", "n_head = 8",
    ]  # fmt: skip
    others = [row for row in json.loads(raced.stdout) if row["proposer"] == "random"]
    assert {row["match"] for row in others} <= {"exact", "knob only", "miss"}  # legal under the rails of then
    recorded = asked(tmp_path, "SELECT source, knob, valid, latency_s FROM race_items WHERE source = 'recorded'")
    assert [(knob, valid, latency > 1) for _, knob, valid, latency in recorded] == [
        (row["tried"].partition(" ")[0], 1, True) for row in mine
    ]


def without_nulls(table: Any) -> Any:
    """Return tables as TOML can hold them."""
    if isinstance(table, dict):
        return {key: without_nulls(value) for key, value in table.items() if value is not None}
    return [without_nulls(value) for value in table] if isinstance(table, list) else table
