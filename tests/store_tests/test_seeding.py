"""A new campaign that begins with another's history."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.store.errors import InputError
from overnight.store.seeding import seed_campaign
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from .suite import Campaigner
from .trajectories import as_bytes, attempt, every_stage, header

SPEC: dict[str, Any] = {
    "campaign": {"seed": 3},
    "metric": {"name": "val_bpb", "direction": "min", "gain": "relative"},
    "budget": {"iterations": 9},
    "knobs": {"lr": {}, "d_model": {}},
}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def seed(store: SqlStore, records: list[dict[str, Any]], name: str = "new", spec: dict[str, Any] = SPEC) -> int:
    lines = as_bytes(records)
    return seed_campaign(store, lines, name=name, path="/c", spec=spec, frozen_hash="f", origin="old.jsonl")[0]


def test_the_totals_of_knobs_on_the_menu_are_taken_over(store: SqlStore) -> None:
    history = [header(), attempt(1, "lr", 0.0002, 10.8), attempt(2, "lr", 0.0002, 10.7), attempt(3, "n_head", 8)]
    assert seed(store, history) == 2
    state = store.campaign("new")
    assert state is not None
    (total,) = store.knob_totals(state.id)
    assert (total.knob, total.proposed, total.kept, total.distinct_values) == ("lr", 2, 2, 1)
    assert (total.values[0].trials, total.values[0].mean_gain) == (2, pytest.approx(0.15 / 10.9))


def test_failures_are_taken_over(store: SqlStore) -> None:
    seed(store, every_stage())
    state = store.campaign("new")
    assert state is not None
    failed = {total.knob: (total.values[0].failures, total.failures) for total in store.knob_totals(state.id)}
    assert failed["d_model"] == ({"oom": 1}, {"oom": 1})


def test_a_seeded_campaign_has_the_totals_of_an_imported_one(store: SqlStore) -> None:
    lines = [*every_stage(), attempt(7, "lr", 0.0004), *({**every_stage()[2], "iter": turn} for turn in (8, 9))]
    seed(store, lines)
    import_trajectory(store, as_bytes(lines), name="imported", origin="x")
    seeded, imported = (store.campaign(name) for name in ("new", "imported"))
    assert seeded is not None
    assert imported is not None
    on_menu = [total for total in store.knob_totals(imported.id) if total.knob in SPEC["knobs"]]
    assert sorted(store.knob_totals(seeded.id), key=str) == sorted(on_menu, key=str) != []


def test_a_seeded_campaign_has_no_attempt_and_starts_at_its_first_turn(store: SqlStore) -> None:
    seed(store, every_stage())
    state = store.campaign("new")
    assert state is not None
    assert (store.last_attempt(state.id), store.next_stage(state.id).iteration) == (None, 1)
    assert store.last_event(state.id, "seeded") is not None


def test_a_campaign_that_has_begun_is_not_seeded(store: SqlStore) -> None:
    campaign = Campaigner(store, "begun")
    campaign.turn(1, 0.2, "kept", 0.1)
    with pytest.raises(InputError, match="has a history already"):
        seed(store, every_stage(), "begun")


def test_gains_that_do_not_compare_are_refused(store: SqlStore) -> None:
    other = {**SPEC, "metric": {**SPEC["metric"], "direction": "max"}}
    with pytest.raises(InputError, match="do not compare"):
        seed(store, every_stage(), spec=other)
    assert store.campaigns() == []
