"""Duels, races, switches and aliases are kept once, and read back as written, on both engines."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import text

from overnight.store.contests import NewDuel, NewPromotion, NewRace, NewRaceItem, Settlement, label
from overnight.store.sql_store import SqlStore

from .suite import Campaigner


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
def campaign(store: SqlStore) -> Campaigner:
    return Campaigner(store)


def known(campaign: Campaigner, name: str, version: str | None = None) -> int:
    description: dict[str, Any] = {"kind": "student", "adapter": version and {"version": version, "sha256": "0"}}
    with campaign.store.writing(campaign.lease) as writer:
        return writer.proposer(name, "student", description)


def duel(campaign: Campaigner, iteration: int, sides: tuple[int, int], kind: Any = "challenge") -> int:
    attempt_id = campaign.propose(iteration)
    with campaign.store.writing(campaign.lease) as writer:
        return writer.begin_duel(
            NewDuel(
                iteration=iteration, kind=kind, seed=90 + iteration, champion_id=sides[0], challenger_id=sides[1],
                first="challenger", attempt_id=attempt_id,
            )
        )  # fmt: skip


def settle(campaign: Campaigner, duel_id: int, item: float | None, note: str | None = None) -> bool:
    with campaign.store.writing(campaign.lease) as writer:
        return writer.settle_duel(Settlement(duel_id=duel_id, item=item, note=note))


def test_a_contestant_is_written_with_its_adapters_version(store: SqlStore, campaign: Campaigner) -> None:
    plain, third = known(campaign, "student"), known(campaign, "student", "v3")
    assert [store.contestant(each).label for each in (plain, third)] == ["student", "student@v3"]
    assert label("student", {"adapter": "a folder of the campaign file"}) == "student"


def test_a_duel_waits_for_its_second_side_and_is_settled_once(store: SqlStore, campaign: Campaigner) -> None:
    sides = known(campaign, "one"), known(campaign, "two")
    duel_id = duel(campaign, 4, sides)
    waiting = store.last_duel(campaign.state.id)
    assert waiting is not None
    assert (waiting.waits_for, waiting.first, waiting.settled_at) == ("champion", "challenger", None)
    second = campaign.propose(5)
    with store.writing(campaign.lease) as writer:
        writer.answer_duel(duel_id, "champion", second)
    assert [settle(campaign, duel_id, item) for item in (0.5, -1.0)] == [True, False]
    settled = store.last_duel(campaign.state.id)
    assert settled is not None
    assert (settled.item, settled.waits_for, settled.first) == (0.5, None, "challenger")


def test_one_duel_begins_in_a_turn(store: SqlStore, campaign: Campaigner) -> None:
    sides = known(campaign, "one"), known(campaign, "two")
    assert duel(campaign, 4, sides) == duel(campaign, 4, sides)


def test_items_are_those_of_two_contestants_in_their_order(store: SqlStore, campaign: Campaigner) -> None:
    one, two, three = (known(campaign, name) for name in ("one", "two", "three"))
    for iteration, sides, kind, item in (
        (1, (one, two), "challenge", 0.1), (3, (one, two), "challenge", None), (5, (one, two), "challenge", 0.3),
        (7, (one, three), "challenge", 0.4), (9, (two, one), "return", 0.5),
    ):  # fmt: skip
        settle(campaign, duel(campaign, iteration, sides, kind), item)
    ask = {"champion_id": one, "challenger_id": two, "kind": "challenge"}
    assert list(store.items_between(campaign.state.id, **ask)) == [0.1, 0.3]  # type: ignore[arg-type]
    assert list(store.items_between(campaign.state.id, **ask, after=1)) == [0.3]  # type: ignore[arg-type]
    assert list(store.challenges(campaign.state.id)) == [(one, two), (one, three)]


def promote(campaign: Campaigner, sides: tuple[int, int], kind: Any = "promotion") -> None:
    with campaign.store.writing(campaign.lease) as writer:
        writer.promotion(
            NewPromotion(
                iteration=7, kind=kind, from_proposer_id=sides[0], to_proposer_id=sides[1], evidence={"e_value": 21.0},
                decided_by="router", reason="why",
            )
        )  # fmt: skip


def test_a_switch_moves_the_aliases_with_it(store: SqlStore, campaign: Campaigner) -> None:
    one, two = known(campaign, "one"), known(campaign, "two")
    with store.writing(campaign.lease) as writer:
        writer.alias("champion", one, 0)
        writer.alias("challenger", two, 0)
    promote(campaign, (one, two))
    assert {alias: who.name for alias, who in store.aliases(campaign.state.id).items()} == {
        "champion": "two", "previous": "one",
    }  # fmt: skip


def test_the_promotion_log_says_who_gave_way_to_whom(store: SqlStore, campaign: Campaigner) -> None:
    promote(campaign, (known(campaign, "nim"), known(campaign, "student", "v2")))
    with store.engine.connect() as connection:
        (row,) = connection.execute(text("SELECT kind, from_proposer, to_proposer, evidence FROM promotion_log"))
    assert tuple(row) == ("promotion", "nim", "student@v2", '{"e_value":21.0}')


def raced(campaign: Campaigner, proposer_id: int, answers: list[dict[str, Any]]) -> int:
    with campaign.store.writing(campaign.lease) as writer:
        new = NewRace(iteration=9, distillation_id=None, challenger_id=proposer_id, held_out=len(answers))
        race_id = writer.begin_race(new)
    for number, answer in enumerate(answers):
        attempt_id = campaign.turn(number + 1, 0.2 + number / 100, "reverted", -0.1)
        with campaign.store.writing(campaign.lease) as writer:
            item = NewRaceItem(attempt_id=attempt_id, proposer_id=proposer_id, draw=0, source="asked", **answer)
            writer.race_item(race_id, item)
    with campaign.store.writing(campaign.lease) as writer:
        writer.end_race(race_id, verdict="the gate holds")
    return race_id


def test_race_stats_leave_missing_answers_out(store: SqlStore, campaign: Campaigner) -> None:
    good = {"valid": True, "knob_match": True, "exact_match": False, "knob": "lr", "new_value": "0.3"}
    answers: list[dict[str, Any]] = [{**good, "latency_s": float(n)} for n in range(1, 20)]
    answers.append({"valid": False, "rail": "R3_range", "latency_s": 20.0})
    answers.append({"failure": "the endpoint is down"})
    raced(campaign, known(campaign, "student", "v1"), answers)
    names = "proposer, items, missing, valid_rate, knob_match_rate, exact_match_rate, distinct_pairs, unmeasured_rate"
    with store.engine.connect() as connection:
        (row,) = connection.execute(text(f"SELECT {names} FROM race_stats"))
        (times,) = connection.execute(text("SELECT median_latency_s, p95_latency_s FROM race_stats"))
    assert tuple(row) == ("student@v1", 20, 1, 0.95, 1.0, 0.0, 1, 1.0)
    assert tuple(times) == (10.5, 19.0)


def test_the_last_race_of_a_challenger_is_one_that_ended(store: SqlStore, campaign: Campaigner) -> None:
    challenger = known(campaign, "student", "v1")
    done = raced(campaign, challenger, [{"valid": True}])
    with store.writing(campaign.lease) as writer:
        writer.begin_race(NewRace(iteration=11, distillation_id=None, challenger_id=challenger, held_out=3))
    last = store.last_race(campaign.state.id, challenger)
    assert last is not None
    assert (last.id, last.verdict) == (done, "the gate holds")


def test_held_out_turns_are_those_after_the_cut_that_proposed_something(store: SqlStore, campaign: Campaigner) -> None:
    for turn in range(1, 5):
        campaign.turn(turn, 0.2 + turn / 10, "reverted", -0.1)
    campaign.check(campaign.propose(5), 0.9, rail="R3_range")
    found = store.held_out(campaign.state.id, after=2, until=4)
    assert [turn.iteration for turn in found] == [3, 4]
    assert store.turn_before(campaign.state.id, 4, 3) == 1


def test_gains_are_of_the_same_baseline(store: SqlStore, campaign: Campaigner) -> None:
    attempt = store.attempt(campaign.turn(1, 0.2, "reverted", -0.1))
    assert attempt.config_id is not None
    assert store.gains_on(campaign.state.id, campaign.base_id, [attempt.config_id]) == {attempt.config_id: -0.1}
    assert store.gains_on(campaign.state.id, attempt.config_id, [attempt.config_id]) == {}
