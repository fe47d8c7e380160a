"""Looking back: held-out turns answered again, judged as they would have been then, whatever goes wrong."""

from __future__ import annotations

import json
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import contest_events as events
from overnight.agent.proposers.protocol import Ask, change_key, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.race import find_leak, look_back, plan_race
from overnight.agent.race_measure import measure_picks
from overnight.agent.run import prepared
from overnight.agent.runtime import Runtime
from overnight.agent.switching import by_hand
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.report.races import items_of
from overnight.store.clock import running_on
from overnight.store.errors import ProposerError
from overnight.store.learning import NewDistillation
from overnight.store.lease import REMOTE_SILENCE
from overnight.store.sql_store import SqlStore
from overnight.store.tables import utc_now
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import Recorder, first_move, run, runtime
from .clocks import FakeClock
from .contests import contested, rows, said, sides, toward

ALONE = {"challenger": None, "controls": ["two"]}
PICKS = [("k0", 3.16), ("k1", 0.1), ("k2", 3.16), ("k3", 0.1), ("k0", 0.1), ("k1", 3.16)]


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def played(folder: Path, store: SqlStore, **sections: Any) -> Any:
    """Return a campaign whose champion tried `PICKS`, the last three of them held out."""
    tables: dict[str, Any] = {"budget": {"iterations": 6}, "router": ALONE, "distill": {"holdout": 3}, **sections}
    of = contested(folder, **tables)
    run(of, store, proposers=sides([reply_text(*pick, "then") for pick in PICKS], [""]))
    return of


def looked_back(of: Any, store: SqlStore, proposers: Any, **options: Any) -> int:
    running: Runtime = runtime(of, store, proposers=proposers)
    try:
        return look_back(running, running.state(), **options)
    finally:
        running.close()


def draws(store: SqlStore, name: str, columns: str) -> list[Any]:
    return rows(store, f"SELECT {columns} FROM race_items i JOIN proposers p ON p.id = i.proposer_id "
                       f"WHERE p.name = '{name}' ORDER BY i.attempt_id, i.draw")  # fmt: skip


def test_a_pick_is_matched_against_what_was_tried(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    again = {3: ("k3", 0.1), 4: ("k0", 0.147), 5: ("k2", 0.1)}
    answers = ScriptedProposer("two", lambda ask: reply_text(*again[ask.iteration - 1], "now"))
    looked_back(of, store, {**sides(first_move, []), "two": answers}, draws=1)
    found = draws(store, "two", "knob, new_value, knob_match, exact_match, modal_match, valid, expected_gain IS NULL")
    assert found == [("k3", "0.1", 1, 1, 1, 1, 0), ("k0", "0.147", 1, 0, 0, 1, 1), ("k2", "0.1", 0, 0, 0, 1, 1)]


def test_ones_own_choice_of_then_is_its_first_answer_and_is_not_matched(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    looked_back(of, store, sides(first_move, first_move), draws=2)
    found = draws(store, "one", "i.draw, i.source, knob, exact_match")
    assert found[:2] == [(0, "recorded", "k3", None), (1, "asked", "k0", 0)]
    assert [item.picks["one"].draws for item in items_of(store, 1).items] == [1, 1, 1]


def test_several_draws_tell_how_far_a_proposer_agrees_with_itself(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    texts = [reply_text("k3", value, "x") for value in (0.1, 0.1, 0.147, 0.1, 3.16)]
    looked_back(of, store, sides(first_move, texts), draws=5)
    agreement, modal = draws(store, "two", "agreement, modal_match")[0]
    assert (agreement, modal) == (pytest.approx(3 / 10), 1)  # three of the ten pairs of draws


def test_a_proposer_that_knows_its_probabilities_is_asked_once(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    looked_back(of, store, {**sides(first_move, []), "two": RandomProposer("two")}, draws=5)
    found = draws(store, "two", "i.draw, i.source, latency_s IS NULL, agreement, tried_probability, probabilities")
    assert [row[:3] for row in found[:5]] == [(0, "asked", 0)] + [(n, "drawn", 1) for n in range(1, 5)]
    likely = json.loads(found[0][5])
    assert found[0][3:5] == (pytest.approx(1 / len(likely)), pytest.approx(1 / len(likely)))


def test_the_rails_are_those_of_that_moment(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    tried_before, tried_later = reply_text("k0", 3.16, "x"), reply_text("k1", 3.16, "x")
    looked_back(of, store, sides(first_move, [tried_before, tried_later, tried_later]), draws=1)
    assert draws(store, "two", "valid, rail") == [(0, "R6_novelty"), (1, None), (1, None)]


def test_a_contender_is_asked_as_it_would_have_been_then(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    asks: list[Ask] = []
    known: list[int] = []

    def reply(ask: Ask) -> str:
        asks.append(ask)
        known.append(len(list(ask.history.since(0))))
        return said(ask.moves[0])

    looked_back(of, store, sides(first_move, reply), draws=1)
    assert known == [3, 4, 5]
    prompts = dict(rows(store, "SELECT a.iteration, p.body FROM attempts a JOIN prompts p ON p.id = a.prompt_id"))
    assert [ask.prompt for ask in asks] == [prompts[turn] for turn in (4, 5, 6)]
    done = [{change_key(move) for move in ask.moves} for ask in asks]
    assert ["k0=3.16" in moves for moves in done] == [False] * 3
    assert ["k3=0.1" in moves for moves in done] == [True, False, False]


def test_an_endpoint_that_is_down_loses_no_one_elses_answers(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)

    def down(_ask: Ask) -> str:
        raise ProposerError("connection refused", failure="llm_error")

    two = ScriptedProposer("two", down)
    looked_back(of, store, {**sides(first_move, []), "two": two})
    assert draws(store, "two", "failure, valid, draw") == [("connection refused", None, 0)] * 3
    counts = rows(store, "SELECT proposer, items, missing FROM race_stats ORDER BY proposer")
    assert counts == [("one", 3, 0), ("two", 0, 3)]
    assert len(two.asks) == 3


def test_a_race_that_was_cut_off_goes_on_where_it_was(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)

    def reply(ask: Ask) -> str:
        if ask.iteration == 5 and not cut:
            cut.append(ask.iteration)
            raise KeyboardInterrupt
        return said(ask.moves[0])

    cut: list[int] = []
    two = ScriptedProposer("two", reply)
    with pytest.raises(KeyboardInterrupt):
        looked_back(of, store, {**sides(first_move, []), "two": two}, draws=1)
    looked_back(of, store, {**sides(first_move, []), "two": two}, draws=1)
    assert rows(store, "SELECT count(*), count(ended_at) FROM races") == [(1, 1)]
    assert len(draws(store, "two", "attempt_id")) == 3
    assert [ask.iteration for ask in two.asks] == [4, 5, 5, 6]


def test_unmeasured_picks_are_measured_in_pairs_when_asked(tmp_path: Path, store: SqlStore) -> None:
    of = played(tmp_path, store)
    running: Runtime = runtime(of, store, proposers=sides(first_move, [reply_text("k2", 4.64, "x")]))
    try:
        race_id = look_back(running, running.state(), draws=1)
        running.info = prepared(of, running.trainer)
        assert measure_picks(running, running.state(), race_id) == (1, 0)
        again = look_back(running, running.state(), draws=1)
        before = rows(store, "SELECT count(*) FROM trials")
        assert measure_picks(running, running.state(), again) == (1, 0)
        assert rows(store, "SELECT count(*) FROM trials") == before
    finally:
        running.close()
    trainer = ScriptedTrainer(ScriptedSettings.model_validate(of.file.trainer))
    base, pick = (trainer.true_value(config) for config in (of.menu.default, {**of.menu.default, "k2": 4.64}))
    gains = [gain for (gain,) in draws(store, "two", "expected_gain")]
    assert gains == [pytest.approx((base - pick) / base, abs=0.06)] * 6
    assert rows(store, "SELECT count(*) FROM trials WHERE purpose = 'race'") == [(2,)]


def test_a_campaign_without_a_held_out_turn_says_so_and_goes_on(tmp_path: Path, store: SqlStore) -> None:
    of = contested(tmp_path, budget={"iterations": 2}, distill={"holdout": 3}, router=ALONE)
    looked_back(of, store, sides(first_move, first_move))
    assert rows(store, "SELECT held_out, verdict FROM races") == [(0, "there is no held-out turn to look back at")]
    assert run(of, store, proposers=sides(first_move, first_move)).finished


def adapter(folder: Path, attempts: list[int], prompts: list[str]) -> Path:
    """Write an adapter that nobody can load, with a record of what it was trained on."""
    folder.mkdir(parents=True)
    record = {
        "files": {"adapter_model.safetensors": "0" * 64, "adapter_config.json": "0" * 64}, "base_model": "tiny",
        "base_sha256": "0" * 64, "licence": "x", "recipe": {}, "rows": 3, "too_long": [], "steps": 1, "losses": [1.0],
        "facts": {"corpus": {"attempts": attempts, "prompts": prompts}}, "held_out_before": None,
        "held_out_after": None, "wall_s": 1.0, "energy_j": None, "peak_memory_gib": None, "device": "cpu",
        "versions": {}, "created_at": "2026-01-01",
    }  # fmt: skip
    (folder / "overnight.json").write_text(json.dumps(record))
    for name in ("adapter_model.safetensors", "adapter_config.json"):
        (folder / name).write_text("{}")
    return folder


def distilled(store: SqlStore, folder: Path, *, cut: int | None, iteration: int, version: int = 1) -> None:
    state = store.campaign("c")
    assert state is not None
    lease = store.acquire(state.id)
    with store.writing(lease) as writer:
        writer.distillation(
            NewDistillation(
                iteration=iteration, proposer="two", version=version, objective="clone", corpus_hash=None,
                cut_attempt_id=cut, rows=3, adapter=str(folder), metrics={}, failure=None, wall_s=1.0,
                started_at=utc_now(),
            )
        )  # fmt: skip
    store.release(lease)


def student(of: Any, tiny_model: Path, cache: Path) -> StudentProposer:
    host = ModelHost(find_base(tiny_model.name, tiny_model.parent), cache, device="cpu")
    settings = StudentProposer.Settings.parse("two", {"base_model": "tiny"})
    return StudentProposer("two", settings, host, adapter=None)


@pytest.mark.parametrize("leaked", ["attempt", "prompt"])
def test_a_held_out_turn_that_was_trained_on_fails_the_race(
    tmp_path: Path, store: SqlStore, tiny_model: Path, leaked: str
) -> None:
    played(tmp_path, store)
    attempts = rows(store, "SELECT id, prompt_id FROM attempts ORDER BY iteration")
    trained = attempts[:3]
    (held_id, held_prompt) = attempts[4]
    ids = [each for each, _ in trained] + ([held_id] if leaked == "attempt" else [])
    prompts = [each for _, each in trained] + ([held_prompt] if leaked == "prompt" else [])
    distilled(store, adapter(tmp_path / "v1", ids, prompts), cut=attempts[2][0], iteration=6)
    of, recorder = contested(tmp_path, budget={"iterations": 8}), Recorder()
    proposers = {**sides(toward(of, 0.5), []), "two": student(of, tiny_model, tmp_path)}
    assert run(of, store, proposers=proposers, hooks=[recorder]).finished  # type: ignore[arg-type]
    ((failure, answered),) = rows(store, "SELECT failure, (SELECT count(*) FROM race_items) FROM races")
    assert (f"leak: the {leaked} of held-out turn 5 was in the training rows of `two@v1`" in failure, answered) == (
        1,
        0,
    )
    (weighed,) = recorder.of(events.Weighed)
    assert "leak" in weighed.words


@pytest.mark.parametrize(
    ("prompt", "words"), [("another", "no leak"), ("that turn's", "leak: the prompt of held-out turn 5 was in")]
)
def test_an_adapter_of_another_store_is_judged_by_its_prompts_alone(
    tmp_path: Path, store: SqlStore, tiny_model: Path, prompt: str, words: str
) -> None:
    """Attempts have small numbers in every store, so that equal ones say nothing."""
    of = played(tmp_path, store)
    ((held_id, held_prompt),) = rows(store, "SELECT id, prompt_id FROM attempts WHERE iteration = 5")
    folder = adapter(tmp_path / "elsewhere", [held_id], ["0" * 64] if prompt == "another" else [held_prompt])
    foreign = student(of, tiny_model, tmp_path).with_adapter("v1", folder)
    running: Runtime = runtime(of, store, proposers={**sides(first_move, []), "two": foreign})
    try:
        leak = find_leak(plan_race(running, running.state()))
    finally:
        running.close()
    assert (leak or "no leak").startswith(words)


def test_without_a_leak_the_race_is_run(tmp_path: Path, store: SqlStore, tiny_model: Path) -> None:
    played(tmp_path, store)
    attempts = rows(store, "SELECT id, prompt_id FROM attempts ORDER BY iteration")
    folder = adapter(tmp_path / "v1", [each for each, _ in attempts[:3]], [each for _, each in attempts[:3]])
    distilled(store, folder, cut=attempts[2][0], iteration=6)
    of = contested(tmp_path, budget={"iterations": 7})
    proposers = {**sides(toward(of, 0.5), []), "two": student(of, tiny_model, tmp_path)}
    assert run(of, store, proposers=proposers).finished  # type: ignore[arg-type]
    assert rows(store, "SELECT proposer, items, missing, held_out, failure FROM race_stats ORDER BY proposer") == [
        ("one", 3, 0, 3, None), ("two@v1", 0, 3, 3, None),  # its weights do not load: missing, not lost
    ]  # fmt: skip


def test_a_student_whose_adapter_is_gone_stops_nothing(tmp_path: Path, store: SqlStore, tiny_model: Path) -> None:
    played(tmp_path, store)
    attempts = rows(store, "SELECT id FROM attempts ORDER BY iteration")
    distilled(store, tmp_path / "nowhere", cut=attempts[2][0], iteration=6)
    of = contested(tmp_path, budget={"iterations": 10})
    proposers = {**sides(toward(of, 0.5), []), "two": student(of, tiny_model, tmp_path)}
    assert run(of, store, proposers=proposers).finished  # type: ignore[arg-type]
    ((verdict,),) = rows(store, "SELECT verdict FROM races")
    assert "not looked back at" in verdict
    assert rows(store, "SELECT count(*) FROM promotions") == [(0,)]


def test_the_lease_is_kept_while_contenders_think(tmp_path: Path, store: SqlStore) -> None:
    clock, silent = FakeClock(), []

    def thinks(ask: Ask) -> str:
        clock.now += 30.0
        ((seen_at,),) = rows(store, "SELECT lease_seen_at FROM campaigns")
        silent.append(clock.now - datetime.fromisoformat(seen_at).timestamp())
        return first_move(ask)

    of = played(tmp_path, store)
    with running_on(clock):
        looked_back(of, store, sides(thinks, thinks), draws=5)
    assert len(silent) == 3 * (4 + 5)
    assert max(silent) < REMOTE_SILENCE.total_seconds()


def down(_ask: Ask) -> str:
    raise ProposerError("connection refused", failure="llm_error")


class Challenged:
    """A campaign whose champion is challenged by a student that was distilled after six turns and never answers."""

    def __init__(
        self, folder: Path, store: SqlStore, tiny_model: Path, *, every: int, cut: int = 3, **cast: Any
    ) -> None:
        self.folder, self.store, self.every = folder, store, every
        of = played(folder, store)
        ((last,),) = rows(store, f"SELECT id FROM attempts WHERE iteration = {cut}")
        distilled(store, folder / "nowhere", cut=last, iteration=6)
        self.cast = {**sides(toward(of, 0.5), []), **cast, "two": student(of, tiny_model, folder)}

    def campaign(self, turns: int) -> Any:
        distill = {"holdout": 3, "every": self.every}
        proposers = {"random": {"kind": "random"}}
        return contested(self.folder, budget={"iterations": turns}, distill=distill, proposers=proposers)

    def play(self, turns: int) -> None:
        assert run(self.campaign(turns), self.store, proposers=self.cast).finished

    def promote(self, who: str) -> None:
        running: Runtime = runtime(self.campaign(20), self.store, proposers=self.cast)
        try:
            by_hand(running, running.state(), 7, "promote_requested", {"proposer": who})
        finally:
            running.close()

    def races(self) -> list[Any]:
        return rows(self.store, "SELECT iteration FROM races ORDER BY id")


@pytest.mark.parametrize(("cut", "races"), [(3, [(6,), (8,), (10,)]), (5, [(6,)]), (6, [(6,)])])
def test_a_student_is_looked_back_at_again_while_answers_are_wanting_that_could_be_there(
    tmp_path: Path, store: SqlStore, tiny_model: Path, cut: int, races: list[Any]
) -> None:
    """Not each turn, and never for a holdout that is too small for any gate."""
    night = Challenged(tmp_path, store, tiny_model, every=2, cut=cut)
    night.play(11)
    assert night.races() == races


@pytest.mark.parametrize("reply", [first_move, down])
def test_a_new_champion_has_the_challenger_looked_back_at_once_more(
    tmp_path: Path, store: SqlStore, tiny_model: Path, reply: Any
) -> None:
    night = Challenged(tmp_path, store, tiny_model, every=25, random=ScriptedProposer("random", reply))
    night.play(7)
    night.promote("random")
    assert night.races() == [(6,)]
    night.play(10)
    assert night.races() == [(6,), (7,)]
    asked = rows(store, "SELECT DISTINCT p.name FROM race_items i JOIN proposers p ON p.id = i.proposer_id "
                        "WHERE race_id = 2 ORDER BY 1")  # fmt: skip
    assert asked == [("random",), ("two",)]
