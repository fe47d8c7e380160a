"""Champion and challenger answer one prompt in two turns, and both are measured on one seed of the duel's own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.agent.contest import Challenge, Standing
from overnight.agent.duels import chance, drawn
from overnight.agent.evidence import Bank, weigh
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.router import Gate, Route
from overnight.agent.run import run_campaign
from overnight.agent.seeds import ASIDE, decision_seeds, duel_seed
from overnight.store.contests import Race
from overnight.store.errors import ProposerError
from overnight.store.protocol import Attempt, Position
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import first_move, run, runtime
from .contests import contested, rows, said, sides, toward
from .test_race import student


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def turn(store: SqlStore, iteration: int) -> list[Attempt]:
    state = store.campaign("c")
    assert state is not None
    return list(store.attempts_of_turn(state.id, iteration))


def fixed(knob: str, value: float) -> list[str]:
    return [reply_text(knob, value, "because")]


def last_move(ask: Ask) -> str:
    return said(ask.moves[-1])


def test_both_answer_the_same_stored_prompt_against_the_same_baseline(tmp_path: Path, store: SqlStore) -> None:
    proposers = sides(first_move, last_move)
    run(contested(tmp_path, budget={"iterations": 2}), store, proposers=proposers)
    (first,), (second,) = turn(store, 1), turn(store, 2)
    assert {first.role, second.role} == {"duel_champion", "duel_challenger"}
    assert (first.prompt_id, first.baseline_config_id) == (second.prompt_id, second.baseline_config_id)
    asks = [proposer.asks[0] for proposer in proposers.values()]
    assert (asks[0].prompt, asks[0].moves, asks[0].baseline) == (asks[1].prompt, asks[1].moves, asks[1].baseline)


def test_the_second_side_learns_nothing_of_the_firsts_result(tmp_path: Path, store: SqlStore) -> None:
    known: list[int] = []

    def reply(ask: Ask) -> str:
        known.append(len(list(ask.history.since(0))))
        return said(ask.moves[len(known)])

    run(contested(tmp_path, budget={"iterations": 4}), store, proposers=sides(reply, reply))
    assert known == [0, 0, 2, 2]


def test_both_are_measured_with_the_baseline_on_one_seed_of_the_duels_own(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 6})
    run(of, store, proposers=sides(toward(of, 0.9), toward(of, 0.1)))
    trials = rows(store, "SELECT seed, purpose, config_id FROM trials WHERE split = 'val'")
    duels = rows(store, "SELECT seed, champion_attempt_id, challenger_attempt_id FROM duels")
    assert [seed for seed, *_ in duels] == [duel_seed(iteration) for iteration in (1, 3, 5)]
    for seed, *attempts in duels:
        pair = {store.attempt(attempt_id).config_id for attempt_id in attempts}
        baseline = store.attempt(attempts[0]).baseline_config_id
        assert Counter(trials)[seed, "duel", baseline] == 1
        assert {config for own, _, config in trials if own == seed} == pair | {baseline}
        assert {purpose for own, purpose, _ in trials if own == seed} == {"duel"}


def test_a_duel_is_banked_by_the_noise_that_was_known_before_it(tmp_path: Path, store: SqlStore) -> None:
    known = []
    for name, share in (("audited", 1.0), ("plain", 0.0)):
        of = contested(
            tmp_path, campaign={"name": name, "baseline": "fixed"}, decision={"audit": share}, budget={"iterations": 2}
        )
        run(of, store, proposers=sides(toward(of, 0.9), toward(of, 0.1)))
        known += rows(
            store, f"SELECT gain_se FROM duels JOIN campaigns AS c ON c.id = campaign_id WHERE name = '{name}'"
        )
    assert known[0] == known[1]


def test_no_campaign_seed_meets_a_duels_seed() -> None:
    campaigns = [decision_seeds(seed) for seed in (0, 7, 999_999, 1_000_000, 2**31 - 1)]
    taken = {seed for of in campaigns for seed in (*of[:504], of[-1])}
    assert max(taken) < ASIDE
    seeds = [duel_seed(iteration) for iteration in range(1, 20_001)]
    assert len({*seeds}) == 20_000
    assert not taken & {*seeds}
    assert max(duel_seed(10_000_000), *seeds) < 2**31 - 6


def test_a_duel_changes_no_decision_and_no_estimate_of_noise(tmp_path: Path, store: SqlStore) -> None:
    picks = [("k0", 3.16), ("k1", 0.1), ("k2", 3.16), ("k3", 0.147)]
    replies = [reply_text(*pick, "because") for pick in picks]
    with_duels = contested(tmp_path, budget={"iterations": 4})
    run(
        with_duels,
        store,
        proposers=sides(lambda ask: replies[ask.iteration - 1], lambda ask: replies[ask.iteration - 1]),
    )
    other = SqlStore.open(tmp_path / "other.db", create=True)
    alone = contested(tmp_path, budget={"iterations": 4}, router={"challenger": None})
    run(alone, other, proposers=sides(replies, replies))
    query = (
        "SELECT iteration, knob, outcome, metric, gain, gain_se, gain_lower, trials FROM attempts ORDER BY iteration"
    )
    assert rows(store, query) == rows(other, query)
    assert rows(store, "SELECT count(*) FROM trials WHERE purpose = 'duel'") == [(6,)]
    other.close()


def test_the_item_is_the_difference_of_the_banked_gains(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 12})
    run(of, store, proposers=sides(toward(of, 0.4), toward(of, 0.95)))
    state = store.campaign("c")
    assert state is not None
    found = rows(store, "SELECT iteration, champion_gain, challenger_gain, gain_se, item FROM duels ORDER BY iteration")
    assert len(found) == 6
    for iteration, champion, challenger, se, item in found:
        bank = Bank.from_recent(store.recent_gains(state.id, before=iteration, most=100), se)
        assert item == pytest.approx(bank.item(challenger, champion))
    trainer = ScriptedTrainer(ScriptedSettings.model_validate(of.file.trainer))
    base = trainer.true_value(of.menu.default)
    for attempt_id, gain in rows(store, "SELECT challenger_attempt_id, challenger_gain FROM duels"):
        config_id = store.attempt(attempt_id).config_id
        assert config_id is not None
        assert gain == pytest.approx((base - trainer.true_value(store.config_of(config_id))) / base, abs=0.06)


def test_a_blocked_answer_banks_nothing_and_the_turn_goes_on(tmp_path: Path, store: SqlStore) -> None:
    def refused_at_first(ask: Ask) -> str:
        return said(ask.moves[3]) if ask.rejections else reply_text("k0", 99.0, "too far")

    of = contested(tmp_path, budget={"iterations": 2})
    run(of, store, proposers=sides(toward(of, 1.0), refused_at_first))
    ((champion, challenger, banked, item),) = rows(
        store, "SELECT champion_gain, challenger_gain, challenger_banked, item FROM duels"
    )
    assert (champion > 0, challenger, banked, item < 0) == (True, None, 0.0, True)
    tries = next(tries for tries in (turn(store, 1), turn(store, 2)) if tries[0].role == "duel_challenger")
    assert [attempt.rail for attempt in tries] == ["R3_range", None]
    assert tries[1].outcome in ("kept", "reverted")


def test_a_side_that_does_not_answer_banks_nothing(tmp_path: Path, store: SqlStore) -> None:
    def down(_ask: Ask) -> str:
        raise ProposerError("the endpoint is down", failure="llm_error")

    of = contested(tmp_path, budget={"iterations": 2})
    run(of, store, proposers=sides(down, toward(of, 1.0)))
    ((champion, item),) = rows(store, "SELECT champion_gain, item FROM duels")
    assert (champion, item > 0) == (None, True)
    assert Counter(rows(store, "SELECT role FROM attempts"))[("fallback",)] == 1


def test_a_candidate_that_fails_banks_nothing(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 2}, trainer={"faults": {"k0=0.1": "oom"}})
    run(of, store, proposers=sides(fixed("k0", 0.1), fixed("k1", 3.16)))
    ((champion, banked, item),) = rows(store, "SELECT champion_gain, champion_banked, item FROM duels")
    assert (champion, banked, item > 0) == (None, 0.0, True)


def test_a_harness_failure_makes_a_duel_count_for_nothing(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 2}, trainer={"faults": {"k0=0.1": "harness"}})
    run(of, store, proposers=sides(fixed("k0", 0.1), fixed("k1", 3.16)))
    assert rows(store, "SELECT item, note FROM duels") == [(None, "the harness failed")]


def test_the_same_answer_is_measured_once_and_is_a_tie(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 2})
    both = lambda ask: said(ask.moves[0]) if ask.rejections else reply_text("k1", 3.16, "because")  # noqa: E731
    run(of, store, proposers=sides(both, both))
    assert rows(store, "SELECT item, note FROM duels") == [(0.0, "both gave the same answer")]
    assert [attempt.rail for attempt in turn(store, 2)] == ["R6_novelty", None]


def test_two_keeps_of_one_duel_leave_the_better_one(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, campaign={"baseline": "rolling"}, budget={"iterations": 2})
    better, good = fixed("k0", 3.16), fixed("k1", 1.47)
    for number, (one, two) in enumerate(((better, good), (good, better))):
        memory = SqlStore.open(tmp_path / f"{number}.db", create=True)
        run(of, memory, proposers=sides(one, two))
        state = memory.campaign("c")
        assert state is not None
        assert state.baseline_config_id is not None
        assert memory.config_of(state.baseline_config_id)["k0"] == 3.16
        (second,) = turn(memory, 2)
        assert "against the other side's change, which was kept" in (second.decision or "")
        assert second.outcome == ("kept" if second.knob == "k0" else "reverted")
        memory.close()


def test_whether_and_in_which_order_they_duel_is_drawn_beforehand(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 10}, router={"duel_share": 0.25})
    run(of, store, proposers=sides(toward(of, 0.5), toward(of, 0.5)))
    other = SqlStore.open(tmp_path / "other.db", create=True)
    run(of, other, proposers=sides(toward(of, 0.2), toward(of, 0.8)))
    query = "SELECT iteration, role FROM attempts ORDER BY iteration"
    assert rows(store, query) == rows(other, query)
    assert 1 <= rows(store, "SELECT count(*) FROM duels")[0][0] <= 5
    other.close()


def test_so_many_turns_begin_a_duel_as_are_asked_for(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(contested(tmp_path), store, proposers=sides([""], [""]))
    for share in (0.1, 0.25, 0.4, 0.5, 1.0):
        begun, iteration = 0, 1
        while iteration <= 20_000:
            duel = running.draw_unit("duel", iteration) < chance(share)
            begun, iteration = begun + duel, iteration + 1 + duel
        assert begun / 20_000 == pytest.approx(min(share, 0.5), abs=0.01)
    first = [running.draw_unit("duel side", iteration) < 0.5 for iteration in range(20_000)]
    assert sum(first) / 20_000 == pytest.approx(0.5, abs=0.02)
    running.close()


def test_no_duel_begins_on_the_last_turn(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 3})
    run(of, store, proposers=sides(toward(of, 0.5), toward(of, 0.5)))
    assert [attempt.role for attempt in turn(store, 3)] == ["champion"]
    assert rows(store, "SELECT count(*), count(item) FROM duels") == [(1, 1)]


def test_a_campaign_without_a_challenger_never_asks_for_duels(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[str] = []
    for name in ("last_duel", "aliases", "last_of", "newest_adapter", "last_race", "challenges"):
        monkeypatch.setattr(store, name, lambda *_args, **_more: asked.append("a query"))
    of = contested(tmp_path, budget={"iterations": 3}, router={"challenger": None})
    run(of, store, proposers=sides(toward(of, 0.5), toward(of, 0.5)))
    assert asked == []


class Stops(ScriptedTrainer):
    """Ends the process, as far as the campaign can tell, before one of its trials."""

    def __init__(self, settings: ScriptedSettings, before: int) -> None:
        super().__init__(settings, metric="loss")
        self.left = before

    def run(self, request: Any, report: Any) -> Any:
        self.left -= 1
        if self.left < 0:
            raise KeyboardInterrupt
        return super().run(request, report)


@pytest.mark.parametrize("trials", [8, 9, 10, 11])
def test_killed_anywhere_in_a_duel_it_comes_to_one_item(tmp_path: Path, store: SqlStore, trials: int) -> None:
    of = contested(tmp_path, budget={"iterations": 2})
    settings = ScriptedSettings.model_validate(of.file.trainer)
    proposers = {"one": toward(of, 0.2), "two": toward(of, 1.0)}
    calm = SqlStore.open(tmp_path / "calm.db", create=True)
    run(of, calm, proposers=sides(**proposers))
    running = runtime(of, store, trainer=Stops(settings, trials), proposers=sides(**proposers))
    with pytest.raises(KeyboardInterrupt):
        run_campaign(running)
    running.close()
    run(of, store, proposers=sides(**proposers))
    query = "SELECT iteration, seed, champion_gain, challenger_gain, item FROM duels"
    assert rows(store, query) == rows(calm, query)
    assert len(rows(store, query)) == 1
    calm.close()


@pytest.mark.parametrize(("wants", "duels"), [("champion", True), ("challenger", False), (None, False)])
def test_a_student_goes_on_duelling_while_only_the_champions_answers_are_wanting(
    tmp_path: Path, store: SqlStore, tiny_model: Path, wants: Any, duels: bool
) -> None:
    of = contested(tmp_path)
    two, gate = student(of, tiny_model, tmp_path), Gate(("too few",), wants)
    race = Race(
        id=1, iteration=1, distillation_id=1, challenger_id=2, held_out=5, verdict=None, failure=None, started_at="",
        ended_at="",
    )  # fmt: skip
    challenge = Challenge(two, 2, 1, 1, weigh([], 0.05), gate, race, Route("stay", ""))
    proposers = {**sides(first_move, []), "two": two}
    running = runtime(of, store, proposers=proposers)
    try:
        begun = drawn(running, Position("propose", 2, 1, None), Standing(proposers["one"], challenge=challenge))
    finally:
        running.close()
    assert (begun is not None) == duels
