"""Importing and exporting trajectories."""

from __future__ import annotations

import json
import statistics
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import Connection, event, text

from overnight.store.errors import InputError, StoreError
from overnight.store.reading import query
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import Imported, import_trajectory
from overnight.store.trajectory_export import export_trajectory
from overnight.store.trajectory_lines import parse

from .suite import Campaigner
from .trajectories import SEED_FILE, as_bytes, attempt, every_stage, header, random_history

KEYS = {"campaign", "attempt_id", "trial_id", "event_id"}


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    if request.param == "sqlite":
        where = str(tmp_path / "store.db")
    else:
        new_postgresql: Callable[[], str] = request.getfixturevalue("new_postgresql")
        where = new_postgresql()
    store = SqlStore.open(where, create=True)
    yield store
    store.close()


@pytest.fixture
def local(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "local.db", create=True)
    yield store
    store.close()


def take(store: SqlStore, records: list[dict[str, Any]], name: str = "old", **more: Any) -> Imported:
    return import_trajectory(store, as_bytes(records), name=name, origin="old.jsonl", **more)


def rows(store: SqlStore, view: str, campaign: str = "old", drop: set[str] = KEYS) -> list[dict[str, object]]:
    with store.engine.connect() as connection:
        found = connection.execute(text(f"SELECT * FROM {view} WHERE campaign = :name"), {"name": campaign}).mappings()
        plain = [{key: value for key, value in row.items() if key not in drop} for row in found]
    return sorted(plain, key=lambda row: json.dumps(row, sort_keys=True, default=str))


TOTALS = {"pair_totals": "knob, new_value", "failure_totals": "knob, new_value, failure", "knob_totals": "knob"}


def totals(store: SqlStore, campaign_id: int, table: str = "pair_totals") -> list[dict[str, Any]]:
    with store.engine.connect() as connection:
        query = text(f"SELECT * FROM {table} WHERE campaign_id = :id ORDER BY {TOTALS[table]}")
        found = connection.execute(query, {"id": campaign_id}).mappings()
        return [{key: value for key, value in row.items() if key != "campaign_id"} for row in found]


def everything(store: SqlStore, campaign: str = "old", drop: set[str] = KEYS) -> list[object]:
    names = "iterations", "trial_log", "event_log", "knob_stats", "pair_stats", "proposer_stats", "campaign_stats"
    return [rows(store, name, campaign, drop) for name in names]


def test_every_stage_of_the_first_format_has_its_outcome(store: SqlStore) -> None:
    take(store, every_stage())
    found = {row["iteration"]: (row["outcome"], row["failure"], row["rail"]) for row in rows(store, "iterations")}
    assert found == {
        1: ("kept", None, None),
        2: ("blocked", None, "R3_range"),
        3: ("failed", "oom", None),
        4: ("failed", "llm_timeout", None),
        5: ("reverted", None, None),
        6: ("reverted", None, None),
    }
    assert {row["kind"] for row in rows(store, "event_log")} == {"paused", "finished"}


def test_importing_twice_changes_nothing(store: SqlStore) -> None:
    take(store, every_stage())
    before = everything(store, drop=set())
    again = take(store, every_stage())
    assert (again.added, again.known, everything(store, drop=set())) == (0, 6, before)


def test_a_file_that_grew_adds_what_is_new(store: SqlStore) -> None:
    history = random_history(30)
    take(store, history[:20])
    take(store, history)
    take(store, history, name="whole")
    assert everything(store) == everything(store, "whole")


def test_export_and_import_give_the_same_rows(store: SqlStore) -> None:
    take(store, every_stage())
    lines = [line.encode() for line in export_trajectory(store, "old")]
    import_trajectory(store, lines, name="again", origin="x")
    assert everything(store) == everything(store, "again")


def test_a_campaign_that_was_run_comes_back_but_for_its_seeds(store: SqlStore) -> None:
    campaign = Campaigner(store, "old")
    campaign.trial(None, 0.1, 0, 1.0, purpose="calibration")
    campaign.turn(1, 0.2, "kept", 0.1)
    campaign.check(campaign.propose(2), 5.0, rail="R3_range")
    campaign.turn(3, 0.3, "failed", None)
    campaign.propose(4, failure="llm_timeout")
    store.request(campaign.state.id, "note", {"text": "ü"})
    lines = [line.encode() for line in export_trajectory(store, "old")]
    import_trajectory(store, lines, name="again", origin="x")
    drop = KEYS | {"seed", "status", "stop_reason", "knobs_on_menu", "noise_sd"}
    assert everything(store, drop=drop) == everything(store, "again", drop)
    assert {row["seed"] for row in rows(store, "trial_log", "again")} == {None}
    again = store.campaign("again")
    assert again is not None
    for table in TOTALS:
        assert totals(store, again.id, table) == totals(store, campaign.state.id, table) != []
    assert store.prompt_of(store.attempts_of_turn(again.id, 1)[0].prompt_id or "") == "prompt 1"


def test_bad_lines_are_reported_by_number_and_skipped(local: SqlStore) -> None:
    good = as_bytes([header(), attempt(1), attempt(2)])
    bad = {
        b'{"iter": 3, "stage": "eval': "cut",
        b"\xff\xfe\n": "not UTF-8",
        b"[1, 2]\n": "not a JSON object",
        b'{"stage": "dreaming", "iter": 4}\n': '"dreaming"',
        b'{"stage": "evaluated", "iter": "five"}\n': "`iter` is not a whole number",
        as_bytes([attempt(6, metric=float("nan"))])[0]: "NaN",
        as_bytes([{**attempt(7), "val_bpb": None}])[0]: "without its",
        as_bytes([{**attempt(8), "ts": "yesterday"}])[0]: "`ts` is not a time",
        as_bytes([{**attempt(9), "candidate_cfg": {"lr": [1]}}])[0]: "`candidate_cfg.lr`",
        b'{"iter": 1e999, "stage": "blocked", "ts": "2026-01-01"}\n': "`iter`",
        b"[" * 100_000 + b"\n": "not JSON",
    }
    cut, *others = bad
    done = import_trajectory(local, [*good[:2], *others, good[2], cut], name="old", origin="x")
    assert [skipped.line for skipped in done.skipped] == [*range(3, 3 + len(others)), 4 + len(others)]
    assert [
        words in skipped.why for words, skipped in zip([*[*bad.values()][1:], "cut"], done.skipped, strict=True)
    ] == [True] * len(bad)
    assert (done.added, len(rows(local, "iterations"))) == (2, 2)


@settings(max_examples=60, deadline=None)
@given(st.lists(st.binary(max_size=60) | st.sampled_from(as_bytes(every_stage())), max_size=12))
def test_no_file_breaks_the_reader(lines: list[bytes]) -> None:
    found = parse(lines)
    assert len(found.skipped) <= len(lines)


def test_a_file_without_an_attempt_writes_nothing(local: SqlStore) -> None:
    with pytest.raises(InputError, match="no attempt in it can be read; line 1: not JSON"):
        import_trajectory(local, [b"nonsense\n"], name="old", origin="x")
    assert local.campaigns() == []


def test_a_campaign_that_was_run_is_not_imported_over(local: SqlStore) -> None:
    Campaigner(local, "old")
    with pytest.raises(InputError, match="--name"):
        take(local, every_stage())


def test_a_full_disk_leaves_nothing_of_an_import(local: SqlStore) -> None:
    @event.listens_for(local.engine, "begin")
    def shrink(connection: Connection) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")

    with pytest.raises(StoreError, match="full"):
        take(local, random_history(2000))
    assert local.campaigns() == []


def test_coverage_needs_a_menu(local: SqlStore) -> None:
    take(local, every_stage())
    without = rows(local, "campaign_stats")[0]["knobs_on_menu"]
    take(local, every_stage(), menu={"lr": {}, "n_head": {}, "d_model": {}, "precision": {}})
    assert (without, rows(local, "campaign_stats")[0]["knobs_on_menu"]) == (None, 4)


def test_totals_and_noise_are_those_of_the_file(local: SqlStore) -> None:
    history = random_history(60)
    take(local, history)
    state = local.campaign("old")
    assert state is not None
    lr = [record for record in history[1:] if record["proposal"]["knob"] == "lr"]
    assert sum(total["proposed"] for total in totals(local, state.id) if total["knob"] == "lr") == len(lr)
    groups: dict[tuple[str, object], list[float]] = {}  # no value here is the baseline's own
    for record in history[1:]:
        proposal = record["proposal"]
        groups.setdefault((proposal["knob"], proposal["new_value"]), []).append(record["val_bpb"])
    ss = sum((len(group) - 1) * statistics.variance(group) for group in groups.values() if len(group) > 1)
    df = sum(len(group) - 1 for group in groups.values())
    assert state.noise_sd == pytest.approx((ss / df) ** 0.5)


@pytest.mark.skipif(not SEED_FILE.exists(), reason="the first trajectory (../shared/seed) is not here")
def test_the_first_trajectory_counts_as_its_file_does(store: SqlStore) -> None:
    with SEED_FILE.open("rb") as file:
        import_trajectory(store, file, name="trajectory", origin=str(SEED_FILE))
    lines = [json.loads(line) for line in SEED_FILE.read_text().splitlines()]
    attempts, summary = [line for line in lines if "iter" in line], lines[-1]
    pairs = Counter((line["proposal"]["knob"], str(line["proposal"]["new_value"])) for line in attempts)
    kept = [line["iter"] for line in attempts if line["decision"] == "keep"]
    expected = {
        "metric_name": "val_bpb",
        "iterations": len(attempts),
        "kept": summary["accept_count"],
        "reverted": summary["revert_count"],
        "blocked": 0,
        "failed": 0,
        "accept_rate": summary["accept_count"] / len(attempts),
        "knobs_on_menu": None,
        "knobs_touched": len({knob for knob, _ in pairs}),
        "distinct_pairs": len(pairs),
        "repeats": len(attempts) - len(pairs),
        "repeat_rate": 1 - len(pairs) / len(attempts),
        "first_keep": kept[0],
        "best_iteration": max(line["iter"] for line in attempts if line["is_new_best"]),
        "best_metric": summary["best_val_bpb"],
        "best_gain": 1 - summary["best_val_bpb"] / summary["baseline_val_bpb"],
        "wall_s": sum(line["iter_wall_s"] for line in attempts),
    }
    stats = rows(store, "campaign_stats", "trajectory")[0]
    assert {key: stats[key] for key in expected} == {
        key: pytest.approx(value) if isinstance(value, float) else value for key, value in expected.items()
    }
    flags = {row["iteration"] for row in rows(store, "iterations", "trajectory") if row["is_best"]}
    assert flags == {line["iter"] for line in attempts if line["is_new_best"]}


def test_the_command_names_the_campaign_after_its_file(tmp_path: Path) -> None:
    from click.testing import CliRunner

    from overnight.agent.cli.trajectory import export_command, import_command

    file, database = tmp_path / "night.jsonl", str(tmp_path / "new.db")
    file.write_bytes(b"".join(as_bytes(every_stage())) + b'{"iter"')
    run = CliRunner().invoke(import_command, [str(file), "--db", database], catch_exceptions=False)
    assert "line 10 skipped" in run.stderr
    assert query(database, "SELECT campaign, iterations FROM campaign_stats").rows == [("night", 6)]
    out = tmp_path / "out.jsonl"
    CliRunner().invoke(export_command, ["night", "-o", str(out), "--db", database], catch_exceptions=False)
    assert len(out.read_text().splitlines()) == 1 + 6 + 1 + 2  # header, attempts, the baseline's trial, events
