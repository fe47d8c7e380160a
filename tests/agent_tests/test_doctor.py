"""`overnight doctor CAMPAIGN` tries what the night will need: it says yes only to what starts, and mends every no."""

from __future__ import annotations

import json
import os
import re
import shutil
import socket
import sqlite3
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from overnight.agent.campaign import load_campaign, renamed
from overnight.agent.cli import overnight as cli
from overnight.agent.doctor import machine, trials
from overnight.agent.doctor.checkup import campaign_findings
from overnight.agent.doctor.finding import Finding, amiss
from overnight.agent.doctor.planning import disk_needed
from overnight.agent.doctor.planning import time as time_finding
from overnight.agent.run import run_campaign
from overnight.agent.trust import allow, wants_of
from overnight.store.records import Config, TrainerInfo, TrialResult
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import campaign, run, runtime
from .servers import LoopbackServer, Wire
from .test_cli import overnight, started, wait_until, write
from .test_cli import trials as committed


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def looked(folder: Path, db: Path | None = None) -> dict[str, Finding]:
    """Look at the campaign in a folder, as the command does once the file was allowed what it wants."""
    loaded = load_campaign(folder)
    found = campaign_findings(loaded, str(db or folder.parent / "overnight.db"), lambda _what: None)
    return {finding.what: finding for finding in found}


def test_what_doctor_says_yes_to_starts_and_nothing_is_written_before(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 2}, trainer={"steps": 10})
    result = overnight("doctor", "mine", "--json", cwd=tmp_path)
    rows = {row["what"]: row for row in json.loads(result.stdout)}
    assert result.returncode == 0, result.stdout
    assert [path.name for path in tmp_path.iterdir()] == ["mine"]
    for what in ("python", "torch", "database", "disk", "trainers", "proposers", "rails", "port", "campaign",
                 "permission", "position", "data", "device", "baseline", "menu", "largest", "proposer random",
                 "time"):  # fmt: skip
        assert rows[what]["state"] in ("ok", "note"), rows[what]
    assert overnight("run", "mine", cwd=tmp_path).returncode == 0
    assert overnight("doctor", "mine", "--json", cwd=tmp_path).returncode == 1  # it is finished


def endpoint(**keys: Any) -> dict[str, Any]:
    return {"proposers": {"m": {"kind": "openai", "model": "m", **keys}}, "router": {"champion": "m"}}


STUDENT = {"proposers": {"s": {"kind": "student", "base_model": "gone"}}}
NOT_THERE = "http://127.0.0.1:9/v1"
AMISS: list[tuple[str, dict[str, Any], str, str]] = [
    ("proposer m", endpoint(base_url=NOT_THERE, deadline_s=3.0), "Connect", r"correct `\[proposers\.m\]`"),
    ("proposer m", endpoint(base_url=NOT_THERE, api_key_env="NO_SUCH_KEY"), "NO_SUCH_KEY", "export NO_SUCH_KEY="),
    ("proposer s", {**STUDENT, "router": {"champion": "random"}}, "gone", "name one of these"),
    ("parts", {"campaign": {"trainer": "gone"}}, "gone", "install the package"),
    ("parts", {"trainer": {"step": 3}}, "step", "."),
    ("parts", {"rails": {"extra": ["P1_gone"]}}, "P1_gone", "."),
    ("baseline", {"trainer": {"faults": {"b=1": "oom"}}}, r"failed \(oom\)", "smaller defaults"),
    ("baseline", {"trainer": {"faults": {"b=1": "unsupported"}}}, "cannot run here", "other defaults"),
    ("baseline", {"trainer": {"memory_gib": {"b=1": 1e6}}}, "GiB", "other defaults"),
    ("baseline", {"trainer": {"sleep_s": 30, "steps": 100}, "budget": {"trial_timeout_s": 5}}, "30 s", "raise"),
    ("time", {"budget": {"gpu_hours": 1e-9}}, "0 of 1 turns", "raise `budget.gpu_hours`"),
    ("notify", {"notify": {"command": ["no-such-program"]}}, "no-such-program", "notify.command"),
    ("notify", {"notify": {"command": ["true"], "env": ["NO_SUCH_HOOK"]}}, "NO_SUCH_HOOK", "export NO_SUCH_HOOK="),
]  # fmt: skip


@pytest.mark.parametrize(("what", "sections", "found", "remedy"), AMISS)
def test_every_no_says_what_is_amiss_and_what_to_do(
    tmp_path: Path, what: str, sections: dict[str, Any], found: str, remedy: str
) -> None:
    folder = write(tmp_path / "mine", **{**sections, "budget": {"iterations": 1, **sections.get("budget", {})}})
    loaded = load_campaign(folder)
    allow(loaded, wants_of(loaded))
    finding = looked(folder)[what]
    assert finding.state == "NO"
    assert re.search(found, finding.found)
    assert re.search(remedy, finding.remedy)
    assert not list(tmp_path.glob("*.db*"))


def test_one_proposer_that_is_amiss_does_not_hide_the_others(tmp_path: Path) -> None:
    folder = write(
        tmp_path / "mine",
        proposers={"bad": {"kind": "student", "base_model": "gone"}, "tpe": {"kind": "optuna"}},
        router={"champion": "tpe"},
    )
    found = looked(folder)
    assert [found[f"proposer {name}"].state for name in ("bad", "tpe", "random")] == ["NO", "ok", "ok"]


def test_what_cannot_be_inherited_is_told_from_the_store_that_is_there(
    tmp_path: Path, store: SqlStore, tiny_model: Path
) -> None:
    run(campaign(tmp_path, campaign={"name": "old"}, budget={"iterations": 1}), store)
    student = {"kind": "student", "base_model": str(tiny_model), "device": "cpu"}
    router = {"champion": "random", "challenger": "s", "inherit": "old"}
    folder = write(tmp_path / "new", proposers={"random": {"kind": "random"}, "s": student}, router=router)
    loaded = load_campaign(folder)
    allow(loaded, wants_of(loaded))
    finding = looked(folder, tmp_path / "store.db")["challenger"]
    assert (finding.state, finding.remedy) == ("NO", "drop the key")
    assert "the champion of `old` has no adapter" in finding.found
    assert list(store.campaigns()) == ["old"]


async def enforces_a_schema(wire: Wire) -> None:
    schema = wire.body.get("response_format", {}).get("json_schema", {}).get("schema", {})
    if "ready" in schema.get("properties", {}):
        await wire.say('{"ready": true}')
    elif schema:
        await wire.say('{"knob": "b", "new_value": 3, "reason": ""}')
    else:
        await wire.say("well, I would raise b")


async def writes_prose(wire: Wire) -> None:
    await wire.say("I would raise b.")


@pytest.mark.parametrize(
    ("handler", "state", "said"),
    [(enforces_a_schema, "ok", r"structured (json_schema): b 1 -> 3"), (writes_prose, "note", "blocked by R1_schema")],
)
def test_a_real_proposal_says_whether_output_is_structured(
    tmp_path: Path, handler: Callable[[Wire], Any], state: str, said: str
) -> None:
    with LoopbackServer(handler) as server:
        folder = write(tmp_path / "mine", **endpoint(base_url=server.url))
        finding = looked(folder)["proposer m"]
    assert (finding.state, said in finding.found) == (state, True), finding
    assert "answered in 0." in finding.found
    assert server.bodies[-1]["messages"][0]["content"].startswith("# Task")


def test_a_file_that_nobody_allowed_is_not_tried(tmp_path: Path) -> None:
    folder = write(tmp_path / "theirs", notify={"command": ["touch", str(tmp_path / "pwned")]})
    result = CliRunner().invoke(cli, ["doctor", str(folder), "--db", str(tmp_path / "o.db"), "--json"])
    row = next(row for row in json.loads(result.stdout) if row["what"] == "campaign")
    assert (result.exit_code, row["state"], "`--allow`" in row["remedy"]) == (1, "NO", True)


def test_a_running_campaign_cannot_be_started_again(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.05})
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: committed(tmp_path) > 0)
    finding = looked(tmp_path / "mine")["position"]
    process.kill()
    process.communicate()
    assert (finding.state, str(process.pid) in finding.found) == ("NO", True)
    assert "overnight pause c" in finding.remedy
    assert looked(tmp_path / "mine")["position"].state == "ok"


def test_after_a_fresh_start_the_newest_campaign_of_the_file_is_looked_at(tmp_path: Path, store: SqlStore) -> None:
    folder = write(tmp_path / "mine", budget={"iterations": 2})
    loaded = load_campaign(folder)
    run(loaded, store)
    fresh = runtime(renamed(loaded, "c-2"), store)
    fresh.iterations = 1
    run_campaign(fresh)
    fresh.close()
    found = looked(folder, tmp_path / "store.db")
    assert (found["position"].state, found["position"].found) == ("ok", "1 of 2 turns are over")
    assert found["campaign"].found.startswith("c-2: ")


def begun_with(folder: Path, store: SqlStore, **differs: Any) -> dict[str, Finding]:
    """Look at a campaign that has a turn to go, and ran so far with a trainer of which something differed."""

    class Before(ScriptedTrainer):
        def prepare(self) -> TrainerInfo:
            return replace(super().prepare(), **differs)

    loaded = load_campaign(write(folder / "mine", budget={"iterations": 1}))
    run(loaded, store, trainer=Before(ScriptedSettings.model_validate(loaded.file.trainer), metric="loss"))
    return looked(write(folder / "mine", budget={"iterations": 2}), folder / "store.db")


def test_data_that_changed_since_the_campaign_began_is_amiss(tmp_path: Path, store: SqlStore) -> None:
    finding = begun_with(tmp_path, store, data_hash="another")["trainer"]
    assert (finding.state, "data or settings changed since it began" in finding.found) == ("NO", True)
    assert finding.remedy.startswith("put them back, or start a new campaign")


def test_a_changed_environment_is_noted_with_what_it_costs(tmp_path: Path, store: SqlStore) -> None:
    found = begun_with(tmp_path, store, environment={"device": "another"})
    assert (found["environment"].state, found["environment"].found) == ("note", "changed since the last run: device")
    assert found["environment"].remedy == "the run measures the baseline anew first"
    assert "trainer" not in found


def test_a_trainer_that_is_the_same_is_not_spoken_of(tmp_path: Path, store: SqlStore) -> None:
    assert {"trainer", "environment"}.isdisjoint(begun_with(tmp_path, store))


def test_a_store_of_another_version_and_a_changed_file_are_told(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    write(tmp_path / "mine", budget={"iterations": 5}, decision={"min_gain": 0.5})
    changed = looked(tmp_path / "mine")["parts"]
    assert ("`decision` changed" in changed.found, "--fresh" in changed.remedy) == (True, True)
    with sqlite3.connect(tmp_path / "overnight.db") as connection:
        connection.execute("UPDATE alembic_version SET version_num = '9999'")
    connection.close()
    newer = machine.database(str(tmp_path / "overnight.db"))
    assert (newer.state, "9999" in newer.found, "newer overnight" in newer.remedy) == ("NO", True, True)


class Grows(ScriptedTrainer):
    """Needs a GiB for each unit of `b` and two for each unit of `c`, and cannot run some pairs."""

    def estimate_memory(self, config: Config) -> int:
        return (int(config["b"]) + 2 * int(config["c"])) << 30

    def unsupported(self, config: Config) -> str | None:
        return "this pair" if (config["b"], config["c"]) == (4, 8) else None


def sized(folder: Path, store: SqlStore, free_gib: float) -> Config | None:
    sections: dict[str, Any] = {
        "knobs": {
            "c": {"type": "int", "range": [1, 8], "levels": 8, "default": 2},
            "b": {"type": "int", "choices": [1, 2, 3, 4, 9], "default": 1},
        },
        "constraints": {},
        "trainer": {"optimum": None},
    }
    of = campaign(folder, **{key: value for key, value in sections.items() if value})
    made = runtime(of, store, trainer=Grows(ScriptedSettings()))
    made.free_memory = lambda: int(free_gib * 2**30)
    return trials.largest(made)


@pytest.mark.parametrize("free_gib", [1000, 24.5, 20, 12.5])
def test_the_largest_configuration_that_fits_is_tried(tmp_path: Path, store: SqlStore, free_gib: float) -> None:
    found = sized(tmp_path, store, free_gib)
    assert found is not None
    b, c = int(found["b"]), int(found["c"])
    assert b + 2 * c <= free_gib
    assert (b, c) != (4, 8)
    assert b + 2 * c >= min(free_gib, 25) - 2.5  # nothing one step larger was left out
    assert (b, c) == (9, 8) or free_gib < 1000


def test_where_nothing_larger_fits_there_is_no_largest(tmp_path: Path, store: SqlStore) -> None:
    assert sized(tmp_path, store, 3) is None


def test_a_whole_trial_is_told_from_two_steps(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, trainer={"steps": 100, "sleep_s": 10.0})
    begin = time.monotonic()
    tried = trials.try_config(runtime(of, store), of.menu.default)
    assert time.monotonic() - begin < 3
    assert tried.whole_s == pytest.approx(10.0, rel=0.2)


def planned(folder: Path, store: SqlStore, *, whole_s: float, left_s: float | None, **budget: Any) -> Finding:
    of = campaign(folder, budget={"iterations": 100, **budget})
    made = runtime(of, store)
    made.info = TrainerInfo("scripted", "loss", "x", {}, has_holdout=True)
    made.clock = lambda: 1000.0
    made.deadline = None if left_s is None else 1000.0 + left_s
    tried = trials.Tried(of.menu.default, TrialResult(1.0), whole_s)
    return time_finding(made, made.state(), tried, None, 2.0)


def test_turns_before_until_are_counted_after_calibration_and_holdout(tmp_path: Path, store: SqlStore) -> None:
    # 6 calibration and 10 holdout trials of 10 s leave 840 s: 16 turns of 5 trials, 70 of one.
    finding = planned(tmp_path, store, whole_s=10.0, left_s=1000.0)
    assert (finding.state, "room for 16 to 70 of 100 turns" in finding.found) == ("note", True), finding
    assert planned(tmp_path, store, whole_s=10.0, left_s=100.0).state == "NO"
    assert planned(tmp_path, store, whole_s=0.1, left_s=1000.0).state == "ok"
    short = planned(tmp_path, store, whole_s=10.0, left_s=1e6, gpu_hours=0.25)
    assert "gpu_hours: 15 min have room for 14 to 61" in short.found
    assert "turns take" in planned(tmp_path, store, whole_s=10.0, left_s=None).found


def test_a_calibration_in_a_new_environment_is_planned_with(tmp_path: Path, store: SqlStore) -> None:
    run(campaign(tmp_path, budget={"iterations": 1}), store)
    finding = planned(tmp_path, store, whole_s=10.0, left_s=1000.0)  # its environment has no `device`
    assert "room for 16 to 70 of 99 turns" in finding.found


def test_the_disk_for_the_whole_campaign_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small = campaign(tmp_path, budget={"iterations": 10})
    student = {"proposers": {"s": {"kind": "student"}}, "distill": {"every": 25}}

    def adapters(turns: int, done: int, **router: Any) -> float:
        budget, with_student = {"iterations": turns}, {"champion": "random", "challenger": "s", **router}
        big = disk_needed(campaign(tmp_path, budget=budget, router=with_student, **student), done)
        return (big - disk_needed(campaign(tmp_path, budget=budget), done)) / (128 * 2**20)

    assert (adapters(60, 0), adapters(60, 30), adapters(1000, 0)) == (2, 1, 40)
    assert (adapters(60, 0, duel_share=0), adapters(1000, 0, duel_share=0.0)) == (2, 13)
    assert adapters(1000, 0, evidence="heldout") == 13
    assert disk_needed(campaign(tmp_path, budget={"iterations": 1010}), 0) - disk_needed(small, 0) == 1000 * 2**14
    monkeypatch.setattr(shutil, "disk_usage", lambda _path: shutil._ntuple_diskusage(100, 99, 2**20))
    finding = machine.disk(str(tmp_path / "o.db"), disk_needed(small, 0), "it")
    assert (finding.state, "1 MiB free" in finding.found, finding.remedy) == ("NO", True, "free 255 MiB there")
    assert machine.disk(str(tmp_path / "no" / "o.db")).state == "NO"


def test_a_port_in_use_is_worth_knowing_and_stops_nobody() -> None:
    with socket.socket() as taken:
        taken.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            taken.bind(("127.0.0.1", machine.PORT))
            taken.listen()
        except OSError:
            pass  # somebody else has it, which serves as well
        assert machine.port().state == "note"


def test_what_the_gpt_trainer_works_with_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "mine"
    (folder / "data").mkdir(parents=True)
    (folder / "data" / "a.txt").write_text("some text to train on. " * 2000)
    knobs = {"a": None, "b": None, "n_layer": {"type": "int", "choices": [1, 2], "default": 1}}
    none = dict.fromkeys(("optimum", "noise_sd", "seed_sd"))
    small = {
        "steps": 30,
        "data": "data/*.txt",
        "val_tokens": 2000,
        "d_model": 16,
        "n_head": 2,
        "d_ff": 32,
        "seq_len": 32,
    }
    write(
        folder,
        campaign={"trainer": "gpt"},
        metric={"name": "val_bpb"},
        trainer={**none, **small, "batch_size": 2, "device": "cpu", "threads": 1},
        knobs=knobs,
    )
    found = looked(folder)
    assert "tokens to train on, 2,001 to validate" in found["data"].found
    assert "device cpu" in found["device"].found
    assert found["largest"].found.startswith("n_layer 2: a whole trial takes about")
    assert all(finding.state == "ok" for finding in found.values()), found


def test_an_error_is_split_into_what_and_remedy() -> None:
    assert amiss("x", "the disk is full; free some") == Finding("x", "NO", "the disk is full", "free some")
    assert amiss("x", "no idea").remedy == "see the message"
    assert os.sep not in amiss("x", "a", "b").remedy
