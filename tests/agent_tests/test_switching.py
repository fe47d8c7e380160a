"""Who proposes changes when duels, looking back and people say so, and in no other way."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import contest
from overnight.agent import contest_events as events
from overnight.agent.evidence import e_value, share
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import run_campaign
from overnight.agent.runtime import Runtime
from overnight.agent.switching import by_hand
from overnight.store.contests import NewPromotion
from overnight.store.errors import InputError
from overnight.store.sql_store import SqlStore
from overnight.store.writer import SqlWriter

from .campaigns import Recorder, run, runtime
from .contests import contested, rows, said, sides, toward
from .test_race import distilled, student


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def champions(store: SqlStore) -> list[tuple[str, str, str]]:
    return rows(store, "SELECT kind, from_proposer, to_proposer FROM promotion_log")


def aliases(store: SqlStore) -> dict[str, str]:
    state = store.campaign("c")
    assert state is not None
    return {alias: who.label for alias, who in store.aliases(state.id).items()}


def test_a_better_challenger_takes_over_with_its_evidence(tmp_path: Path, store: SqlStore) -> None:
    of, recorder = contested(tmp_path, budget={"iterations": 16}), Recorder()
    run(of, store, proposers=sides(toward(of, 0.1), toward(of, 0.95)), hooks=[recorder])
    assert champions(store) == [("promotion", "one", "two")]
    ((turn, evidence),) = rows(store, "SELECT iteration, evidence FROM promotions")
    numbers = json.loads(evidence)
    items = [item for (item,) in rows(store, f"SELECT item FROM duels WHERE iteration < {turn} ORDER BY iteration")]
    assert numbers["e_value"] == pytest.approx(e_value(items))
    assert numbers["threshold"] == pytest.approx(1 / share(0.3, 1))
    assert (numbers["e_value"] >= numbers["threshold"], numbers["gate"]) == (True, "holds")
    (promoted,) = recorder.of(events.Promoted)
    assert (promoted.iteration, promoted.to_proposer, promoted.decided_by) == (turn, "two", "router")
    assert aliases(store) == {"champion": "two", "previous": "one"}


def test_an_equal_challenger_does_not_take_over(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 16})
    run(of, store, proposers=sides(toward(of, 0.7), toward(of, 0.7)))
    assert champions(store) == []
    assert aliases(store) == {"champion": "one", "challenger": "two"}


def test_a_timid_challenger_does_not_take_over(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 20})
    still = {"still": {"type": "float", "range": [0.0, 1.0], "default": 0.5, "levels": 50}}
    of = contested(tmp_path, budget={"iterations": 20}, knobs=still)

    def nothing(ask: Ask) -> str:
        return said(next(move for move in ask.moves if move.knob == "still"))

    run(of, store, proposers=sides(toward(of, 0.95), nothing))
    assert champions(store) == []
    assert rows(store, "SELECT max(item) < 0.5, avg(item) < 0 FROM duels") == [(1, 1)]


def test_a_collapsed_challenger_does_not_take_over_and_the_reason_says_so(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 14}, distill={"holdout": 8})
    good = toward(of, 1.0)

    def reply(ask: Ask) -> str:
        """Wins its duels, and gives one answer when it is asked about the past."""
        fresh = ask.prompt not in seen
        seen.add(ask.prompt)
        return good(ask) if fresh else reply_text("k0", 0.1, "always")

    seen: set[str] = set()
    recorder = Recorder()
    run(of, store, proposers=sides(toward(of, 0.1), reply), hooks=[recorder])
    assert champions(store) == []
    last = recorder.of(events.Weighed)[-1]
    assert last.e_value >= last.threshold
    assert "collapse" in last.words
    ((verdict,),) = [rows(store, "SELECT verdict FROM races ORDER BY id DESC LIMIT 1")]
    assert "collapse" in verdict[0]


def test_a_promoted_champion_alternates_with_its_predecessor_on_probation(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("overnight.agent.router.PROBATION_TURNS", 6)
    router = {"explore": 0.0}
    proposers = {"one": toward(contested(tmp_path), 0.3), "two": toward(contested(tmp_path), 0.95)}
    run(contested(tmp_path, budget={"iterations": 1}, router=router), store, proposers=sides(**proposers))
    hand(contested(tmp_path, router=router), store, sides(**proposers), "promote_requested", proposer="two")
    run(contested(tmp_path, budget={"iterations": 10}, router=router), store, proposers=sides(**proposers))
    query = "SELECT p.name FROM attempts a JOIN proposers p ON p.id = a.proposer_id WHERE iteration > 1 ORDER BY a.id"
    names = [name for (name,) in rows(store, query)]
    assert [tuple(sorted(names[i : i + 2])) for i in (0, 2, 4)] == [("one", "two")] * 3
    assert names[6:] == ["two"] * 3
    assert rows(store, "SELECT iteration, kind FROM duels") == [(2, "return"), (4, "return"), (6, "return")]


def test_a_champion_that_proposes_worse_is_rolled_back(tmp_path: Path, store: SqlStore) -> None:
    proposers = {"one": toward(contested(tmp_path), 1.0), "two": toward(contested(tmp_path), 0.0)}
    run(contested(tmp_path, budget={"iterations": 1}), store, proposers=sides(**proposers))
    hand(contested(tmp_path), store, sides(**proposers), "promote_requested", proposer="two")
    recorder = Recorder()
    run(contested(tmp_path, budget={"iterations": 20}), store, proposers=sides(**proposers), hooks=[recorder])
    assert [kind for kind, *_ in champions(store)] == ["promotion", "rollback"]
    (down,) = recorder.of(events.RolledBack)
    assert (down.from_proposer, down.to_proposer, down.decided_by) == ("two", "one", "router")
    assert aliases(store)["champion"] == "one"
    after = rows(store, f"SELECT DISTINCT role FROM attempts WHERE iteration > {down.iteration}")
    assert after == [("champion",)]  # who was rolled back does not challenge again


def test_killed_around_a_promotion_it_has_one_champion(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = contested(tmp_path, budget={"iterations": 20})

    class Dies(Recorder):
        def on_event(self, event: Any) -> None:
            if isinstance(event, events.Promoted):
                raise KeyboardInterrupt

    proposers = {"one": toward(of, 0.1), "two": toward(of, 0.95)}

    def killed(*hooks: Any) -> None:
        running = runtime(of, store, proposers=sides(**proposers), hooks=hooks)
        with pytest.raises(KeyboardInterrupt):
            run_campaign(running)
        running.close()

    promotion = SqlWriter.promotion

    def dies(writer: SqlWriter, new: NewPromotion) -> None:
        promotion(writer, new)
        raise KeyboardInterrupt

    monkeypatch.setattr(SqlWriter, "promotion", dies)
    for _ in range(2):  # before the commit
        told = Recorder()
        killed(told)
        assert (champions(store), told.of(events.Promoted)) == ([], [])
    monkeypatch.undo()
    killed(Dies())  # after the commit, and before the next proposal
    assert len(champions(store)) == 1
    run(of, store, proposers=sides(**proposers))
    calm = SqlStore.open(tmp_path / "calm.db", create=True)
    run(of, calm, proposers=sides(**proposers))
    query = "SELECT iteration, kind, from_proposer_id, to_proposer_id FROM promotions"
    assert rows(store, query) == rows(calm, query)
    assert len(champions(store)) == 1
    items = "SELECT iteration, champion_id, challenger_id, item FROM duels"
    assert rows(store, items) == rows(calm, items)
    calm.close()


def hand(of: Any, store: SqlStore, proposers: Any, kind: str, **said: str) -> None:
    running: Runtime = runtime(of, store, proposers=proposers)
    try:
        state = running.state()
        by_hand(running, state, store.next_stage(state.id).iteration - 1, kind, said)
    finally:
        running.close()


def test_a_person_promotes_and_rolls_back_with_a_reason(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 2}, router={"duel_share": 0.0})
    proposers = sides(toward(of, 0.5), toward(of, 0.5))
    run(of, store, proposers=proposers)
    hand(of, store, proposers, "promote_requested", proposer="two", reason="it looks keen")
    hand(of, store, proposers, "rollback_requested", reason="it was not")
    query = "SELECT kind, to_proposer, decided_by, reason FROM promotion_log"
    assert rows(store, query) == [
        ("promotion", "two", "person", "it looks keen"), ("rollback", "one", "person", "it was not"),
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "who", "words"),
    [
        ("promote_requested", "nobody", "has no proposer `nobody`; it has `one`, `two`"),
        ("promote_requested", "one", "`one` is the champion already"),
        ("promote_requested", "two@v3", "`two` is no student"),
        ("rollback_requested", "", "nothing was promoted"),
    ],
)
def test_a_switch_that_makes_no_sense_is_refused(
    tmp_path: Path, store: SqlStore, kind: str, who: str, words: str
) -> None:
    of = contested(tmp_path, budget={"iterations": 1})
    proposers = sides(toward(of, 0.5), toward(of, 0.5))
    run(of, store, proposers=proposers)
    with pytest.raises(InputError, match=words):
        hand(of, store, proposers, kind, proposer=who)
    assert champions(store) == []


@pytest.mark.parametrize("who", ["two", "two@v1"])
def test_an_adapter_that_is_gone_is_not_promoted(tmp_path: Path, store: SqlStore, tiny_model: Path, who: str) -> None:
    of = contested(tmp_path, budget={"iterations": 1}, router={"duel_share": 0.0})
    run(of, store, proposers=sides(toward(of, 0.5), []))
    distilled(store, tmp_path / "nowhere", cut=None, iteration=1)
    proposers = {**sides(toward(of, 0.5), []), "two": student(of, tiny_model, tmp_path)}
    with pytest.raises(InputError, match=r"`two@v1` cannot be promoted: .*nowhere"):
        hand(of, store, proposers, "promote_requested", proposer=who)
    assert champions(store) == []


def test_after_a_rollback_all_duels_of_the_reign_that_goes_on_count(tmp_path: Path, store: SqlStore) -> None:
    router = {"explore": 0.0, "alpha": 0.01}
    proposers = sides(toward(contested(tmp_path), 0.5), toward(contested(tmp_path), 0.5))
    cast = {**proposers, "random": ScriptedProposer("random", toward(contested(tmp_path), 0.5))}
    tables: dict[str, Any] = {"router": router, "proposers": {"random": {"kind": "random"}}}
    run(contested(tmp_path, budget={"iterations": 1}, **tables), store, proposers=cast)
    of = contested(tmp_path, budget={"iterations": 7}, **tables)
    hand(of, store, cast, "promote_requested", proposer="two")
    run(of, store, proposers=cast)
    ((fought,),) = rows(store, "SELECT count(item) FROM duels WHERE kind = 'return'")
    hand(of, store, cast, "promote_requested", proposer="random")
    hand(of, store, cast, "rollback_requested")
    running: Runtime = runtime(of, store, proposers=cast)
    try:
        back = contest.standing(running, running.state()).returning
    finally:
        running.close()
    assert fought >= 3
    assert back is not None
    assert back.duels == fought


def test_a_running_campaign_does_what_a_person_asks_between_two_turns(tmp_path: Path, store: SqlStore) -> None:
    of, recorder = contested(tmp_path, budget={"iterations": 4}, router={"duel_share": 0.0}), Recorder()
    asked: list[int] = []

    def asking(ask: Ask) -> str:
        state = store.campaign("c")
        assert state is not None
        if ask.iteration in (2, 3):
            who = "two" if ask.iteration == 2 else "nobody"
            asked.append(store.request(state.id, "promote_requested", {"proposer": who, "reason": "please"}))
        return toward(of, 0.5)(ask)

    run(of, store, proposers=sides(asking, asking), hooks=[recorder])
    assert rows(store, "SELECT iteration, request_event_id FROM promotions") == [(2, asked[0])]
    assert ["has no proposer `nobody`" in event.reason for event in recorder.of(events.SwitchRefused)] == [True]


def test_who_asks_first_is_asked_once_and_the_campaign_goes_on(tmp_path: Path, store: SqlStore) -> None:
    of, recorder = contested(tmp_path, budget={"iterations": 16}, router={"ask": True}), Recorder()
    run(of, store, proposers=sides(toward(of, 0.1), toward(of, 0.95)), hooks=[recorder])
    assert champions(store) == []
    assert len(recorder.of(events.PromotionAsked)) == 1
    assert rows(store, "SELECT max(iteration) FROM attempts") == [(16,)]


@pytest.mark.parametrize(("answer", "switched"), [("yes", [("promotion", "one", "two")]), ("no", [])])
def test_a_person_answers_before_a_promotion(tmp_path: Path, store: SqlStore, answer: str, switched: list[Any]) -> None:
    of = contested(tmp_path, budget={"iterations": 16}, router={"ask": True})
    running = runtime(of, store, proposers=sides(toward(of, 0.1), toward(of, 0.95)))
    questions: list[Any] = []

    def person(question: Any) -> str:
        questions.append(question)
        return answer

    running.ask_person = person
    try:
        run_campaign(running)
    finally:
        running.close()
    assert champions(store) == switched
    assert [question["challenger"] for question in questions] == ["two"]


def test_looking_back_alone_promotes_where_the_file_says_so(tmp_path: Path, store: SqlStore) -> None:
    of = contested(
        tmp_path, budget={"iterations": 20}, router={"evidence": "heldout"}, distill={"every": 16, "holdout": 8},
        rails={"skip": ["R6_novelty"]},
    )  # fmt: skip
    picks = [
        reply_text(f"k{i % 4}", value, "x") for i, value in enumerate((0.1, 3.16, 0.147, 2.61, 0.1, 3.16, 0.1, 3.16))
    ]
    tried = lambda ask: picks[ask.iteration % 8]  # noqa: E731
    better = lambda ask: picks[(ask.iteration % 8) | 1]  # noqa: E731
    run(of, store, proposers=sides(tried, better))
    assert rows(store, "SELECT count(*) FROM duels WHERE kind = 'challenge'") == [(0,)]
    assert champions(store) == [("promotion", "one", "two")]
