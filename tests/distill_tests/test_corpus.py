"""The corpus is the history, byte for byte, split by time; no target of a training row knows what came after."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sqlalchemy import text, update

from overnight.agent.campaign import load_campaign, parse_campaign
from overnight.agent.distilling import corpus_settings
from overnight.distill.corpus import Corpus, CorpusSettings, build_corpus, reconstruct_prompts
from overnight.distill.histories import totals
from overnight.distill.lessons import read_lessons
from overnight.rails.menu import Menu
from overnight.store.errors import CorpusRefusedError
from overnight.store.hashing import text_digest
from overnight.store.prompt import render_constant
from overnight.store.sql_store import SqlStore
from overnight.store.tables import AttemptRow, utc_now
from overnight.store.trajectory import import_trajectory

from ..agent_tests.campaigns import run
from ..store_tests.trajectories import SEED_FILE, as_bytes, attempt, header
from .histories import Chronicle, small_campaign

ALL = ("permute", "earlier", "subsample", "synthetic")
EASY = {"min_rows": 1, "min_pairs": 1, "min_knobs": 1, "max_share": 1.0}


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture
def chronicle(tmp_path: Path, store: SqlStore) -> Chronicle:
    return Chronicle(store, small_campaign(tmp_path))


@pytest.fixture(scope="module")
def shared_store(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SqlStore]:
    """One database for all examples of a property, each in a campaign of its own."""
    store = SqlStore.open(tmp_path_factory.mktemp("examples") / "store.db", create=True)
    yield store
    store.close()


def another(store: SqlStore) -> Chronicle:
    name = f"c{len(store.campaigns())}"
    return Chronicle(store, small_campaign(Path("nowhere"), campaign={"name": name}))


def corpus_of(chronicle: Chronicle, **changed: object) -> Corpus:
    easy = CorpusSettings(**{**EASY, **changed})  # type: ignore[arg-type]
    return build_corpus(chronicle.store, chronicle.state, chronicle.frame, easy)


def test_every_row_has_the_prompt_that_its_proposer_saw(tmp_path: Path, store: SqlStore) -> None:
    of = small_campaign(tmp_path, budget={"iterations": 12}, router={"explore": 0.5})
    run(of, store)
    chronicle = Chronicle(store, of)
    corpus = corpus_of(chronicle, objective="clone")
    stored = {item.id: item.lesson.attempt.prompt_id for item in (*corpus.trained, *corpus.held_out)}
    assert {row.id: text_digest(row.prompt) for row in (*corpus.rows, *corpus.held_out_rows)} == stored
    assert len(stored) == 12


def test_turns_of_every_proposer_teach(chronicle: Chronicle) -> None:
    for value, proposer in enumerate(("random", "optuna", "openai", "student"), 1):
        chronicle.turn("a", value / 8, proposer=proposer)
    taught = corpus_of(chronicle, holdout=1)
    assert [item.lesson.attempt.proposer for item in taught.trained] == ["random", "optuna", "openai"]


@given(turns=st.integers(2, 12), holdout=st.integers(1, 14), share=st.floats(0.01, 0.99))
@settings(max_examples=25, deadline=None)
def test_the_newest_turns_are_held_out(shared_store: SqlStore, turns: int, holdout: int, share: float) -> None:
    chronicle = another(shared_store)
    with chronicle.together():
        for turn in range(turns):
            chronicle.turn("a", turn / 16)
    for asked in ({"holdout": holdout}, {"holdout_fraction": share}):
        wanted = asked.get("holdout", -(-turns * share // 1))
        if wanted >= turns:
            with pytest.raises(CorpusRefusedError, match="held out, none is left"):
                corpus_of(chronicle, **asked)
            continue
        corpus = corpus_of(chronicle, **asked)
        numbers = [item.lesson.attempt.iteration for item in (*corpus.trained, *corpus.held_out)]
        assert numbers == list(range(1, turns + 1))
        assert len(corpus.held_out) == wanted
        assert corpus.report.cut_turn == turns - wanted


@pytest.mark.parametrize("objective", ["outcome", "clone", "filtered", "weighted"])
@given(seed=st.integers(0, 10**6), cut=st.integers(8, 20))
@settings(max_examples=8, deadline=None)
def test_nothing_measured_after_the_cut_reaches_a_training_row(
    shared_store: SqlStore, objective: str, seed: int, cut: int
) -> None:
    after, known = 6, []
    for future in range(2):
        chronicle = another(shared_store)
        with chronicle.together():
            chronicle.wander(cut, seed)
            chronicle.turn("a", 0.125, 0.02)
            chronicle.wander(after, seed + 1 + future)
        try:
            corpus = corpus_of(chronicle, objective=objective, holdout=after, augment=ALL)
            known.append(corpus.sha256)
            assert max(item.lesson.attempt.iteration for item in corpus.trained) <= cut + 1
        except CorpusRefusedError:
            assert objective == "filtered"
            known.append("nothing gained")
    assert known[0] == known[1]


def test_a_held_out_target_knows_what_came_later(chronicle: Chronicle) -> None:
    for value, gain in ((2, 0.01), (3, -0.01), (4, 0.02), (9, 0.0)):
        chronicle.turn("b", value, gain)
    chronicle.turn("c", "y")
    chronicle.turn("a", 0.125, -0.4)
    held, _ = corpus_of(chronicle, holdout=2).held_out_rows
    chance = dict(zip(held.candidates, held.choice, strict=True))
    assert chance['{"knob": "a", "new_value": 0.125,'] < 0.1 / len(chance)


@pytest.mark.parametrize("skip", [[], ["R6_novelty"]])
def test_what_was_measured_is_open_again_only_where_repeats_are_allowed(
    tmp_path: Path, store: SqlStore, skip: list[str]
) -> None:
    chronicle = Chronicle(store, small_campaign(tmp_path, rails={"skip": skip}))
    chronicle.turn("b", 2)
    chronicle.turn("b", 3, None, failure="nan")
    chronicle.turn("c", "y", 0.1, outcome="kept")
    chronicle.turn("b", 2)
    chronicle.turn("a", 0.0)
    first, second, third, fourth = (set(row.candidates) for row in corpus_of(chronicle, holdout=1).rows)
    two, three, x = (
        '{"knob": "b", "new_value": 2,',
        '{"knob": "b", "new_value": 3,',
        '{"knob": "c", "new_value": "x",',
    )
    assert {two, three} <= first
    assert (two in second, two in third, three in third) == ((bool(skip),) * 3)
    assert {two, three} <= fourth  # the configuration is another one
    assert (x in fourth) == bool(skip)  # this would be the first one again


def test_where_repeats_are_allowed_a_gain_is_taught_to_those_who_were_asked_before_it(
    tmp_path: Path, store: SqlStore
) -> None:
    chronicle = Chronicle(store, small_campaign(tmp_path, rails={"skip": ["R6_novelty"]}))
    chronicle.turn("b", 2, 0.4)
    for value in (0.0, 0.125, 0.25):
        chronicle.turn("a", value, -0.1)
    before, after, *_ = corpus_of(chronicle, holdout=1).rows
    two = '{"knob": "b", "new_value": 2,'
    chances = [dict(zip(row.candidates, row.choice, strict=True)) for row in (before, after)]
    assert chances[0][two] == max(chances[0].values()) > 3 / len(before.candidates)
    assert chances[1][two] < max(chances[1].values())  # it was gained already: nothing new would come of it


def test_after_a_refinement_the_finer_grid_is_open_to_whoever_was_asked_then(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.125)
    with chronicle.together() as writer:
        writer.event("grid_refined", {}, iteration=1, at=utc_now())
    chronicle.turn("a", 0.25)
    chronicle.turn("a", 0.375)
    before, after = (set(row.candidates) for row in corpus_of(chronicle, holdout=1).rows)
    finer = '{"knob": "a", "new_value": 0.0625,'
    assert finer not in before
    assert finer in after


def test_a_student_that_scores_neighbours_learns_about_them(chronicle: Chronicle) -> None:
    for value in (0.125, 0.25, 0.375):
        chronicle.turn("a", value)
    beside = {'{"knob": "a", "new_value": 0.438,', '{"knob": "a", "new_value": 0.562,'}
    for neighbours in (False, True):
        chronicle.frame = replace(chronicle.frame, neighbours=neighbours)
        for row in corpus_of(chronicle, holdout=1).rows:
            assert beside & set(row.candidates) == (beside if neighbours else set())


def test_what_a_duels_first_side_tried_was_open_to_the_second(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.125, prompt="the same")
    chronicle.turn("a", 0.25, prompt="the same")
    chronicle.turn("a", 0.375)
    chronicle.turn("b", 2)
    first, second, third = (set(row.candidates) for row in corpus_of(chronicle, holdout=1).rows)
    assert first == second
    assert first - third == {'{"knob": "a", "new_value": 0.125,', '{"knob": "a", "new_value": 0.25,'}


def test_reasons_are_taught_where_they_are_words_of_their_own(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.125, 0.2, proposer="openai")
    chronicle.turn("b", 2, 0.3, proposer="random")
    chronicle.turn("c", "y", 0.0, proposer="random")
    rows = corpus_of(chronicle, holdout=1, objective="clone").rows
    assert [json.loads(row.replies[0].text)["reason"] for row in rows] == ["why a 0.125", ""]


def test_harness_failures_and_strange_changes_are_counted_and_left_out(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.125)
    chronicle.turn("a", 0.25, None, failure="harness")
    chronicle.turn("b", 7)  # a value that the menu does not have
    chronicle.turn("b", 2, None, failure="oom")
    chronicle.turn("c", "y")
    lost = chronicle.turn("b", 3)
    with chronicle.store.transaction() as connection:
        connection.execute(update(AttemptRow).where(AttemptRow.id == lost).values(prompt_id=None))
    report = corpus_of(chronicle, holdout=1).report
    assert (report.trained, report.held_out) == (2, 1)
    assert report.excluded == {"change not on the menu": 1, "harness failure": 1, "no prompt stored": 1}


def test_a_change_that_the_menu_does_not_have_teaches_nothing(chronicle: Chronicle) -> None:
    for value in (1, 2, 3):
        chronicle.turn("a", value / 8)
    with chronicle.store.transaction() as connection:
        connection.execute(text("UPDATE attempts SET knob = 'depth' WHERE id = 1"))
    assert corpus_of(chronicle, holdout=1).report.excluded == {"change not on the menu": 1}


def test_a_duel_across_the_cut_leaks_no_prompt(chronicle: Chronicle) -> None:
    for value in (1, 2, 3):
        chronicle.turn("a", value / 8)
    chronicle.turn("b", 2, prompt="asked of both")
    chronicle.turn("b", 3, prompt="asked of both")
    corpus = corpus_of(chronicle, holdout=1)
    assert [item.lesson.attempt.iteration for item in corpus.trained] == [1, 2, 3]
    assert corpus.report.excluded == {"prompt shared with a held-out turn": 1}
    assert corpus.cut_attempt_id == 4


def test_a_changed_prompt_is_noticed(chronicle: Chronicle) -> None:
    chronicle.wander(5)
    with chronicle.store.transaction() as connection:
        connection.execute(text("UPDATE prompts SET body = body || '.' WHERE id = (SELECT min(id) FROM prompts)"))
    with pytest.raises(CorpusRefusedError, match="was changed after it was written"):
        corpus_of(chronicle)


@pytest.mark.parametrize(
    ("asked", "words"),
    [
        ({"min_rows": 30}, "8 rows teach, 30 are needed: run more turns, or lower `distill.min_rows`"),
        ({"min_knobs": 3}, "they try 2 knobs, `distill.min_knobs` is 3; run more turns with a larger `router.explore`"),
        ({"min_pairs": 9}, "they try 2 different changes, `distill.min_pairs` is 9; run more turns"),
        ({"max_share": 0.6}, "83% of them try `b = 2`, `distill.max_share` is 60%; run more turns"),
        ({"holdout": 8}, "with 8 of 8 rows held out, none is left to train on"),
    ],
)
def test_a_history_that_cannot_teach_is_refused_with_the_remedy(
    chronicle: Chronicle, asked: dict[str, float], words: str
) -> None:
    for _ in range(5):
        chronicle.turn("b", 2)
    chronicle.turn("c", "y")
    chronicle.turn("b", 3)
    chronicle.turn("b", 4)
    with pytest.raises(CorpusRefusedError) as refused:
        corpus_of(chronicle, **asked)
    assert words in str(refused.value)


def test_the_report_counts_what_is_there(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.125, 0.09, outcome="kept")
    chronicle.turn("b", 2)
    chronicle.turn("b", 2)
    chronicle.turn("c", "y", 0.09, outcome="kept")
    report = corpus_of(chronicle, holdout=1, objective="clone").report
    assert (report.rows, report.trained, report.held_out) == (4, 3, 1)
    assert (report.knobs, report.knobs_on_menu, report.pairs) == (2, 3, 2)
    assert (report.top_pair, report.top_share) == ("b = 2", pytest.approx(2 / 3))
    assert (report.kept_trained, report.kept_held_out, report.effective_rows) == (1, 1, pytest.approx(3))
    assert (report.first_turn, report.cut_turn, report.last_turn, report.reconstructed) == (1, 3, 4, 0)


@given(seed=st.integers(0, 10**6))
@settings(max_examples=8, deadline=None)
def test_totals_of_all_lessons_are_those_that_the_store_keeps(shared_store: SqlStore, seed: int) -> None:
    store, chronicle = shared_store, another(shared_store)
    chronicle.wander(25, seed)
    lessons, _ = read_lessons(store, chronicle.id, chronicle.of.menu)
    kept = {total.knob: total for total in store.knob_totals(chronicle.id)}
    for total in totals(lessons):
        known = kept.pop(total.knob)
        assert (total.proposed, total.kept, total.distinct_values) == (
            known.proposed, known.kept, known.distinct_values
        )  # fmt: skip
        for pair in total.values:
            (same,) = [each for each in known.values if each.new_value == pair.new_value]
            assert (pair.kept, pair.reverted, pair.failed, pair.trials) == (
                same.kept, same.reverted, same.failed, same.trials
            )  # fmt: skip
            assert pair.mean_gain == pytest.approx(same.mean_gain)
            assert pair.failures == same.failures
    assert kept == {}


def test_the_constant_part_is_the_same_in_every_row(tmp_path: Path, store: SqlStore) -> None:
    of = small_campaign(tmp_path, budget={"iterations": 16}, decision={"min_gain": 0.02})
    run(of, store)
    corpus = corpus_of(Chronicle(store, of), augment=ALL, epochs=8)
    constant = render_constant(Chronicle(store, of).frame.facts)
    assert set(corpus.report.variants) == set(ALL)
    assert all(row.prompt.startswith(constant) for row in (*corpus.rows, *corpus.held_out_rows))


def test_without_augmentation_every_epoch_sees_the_stored_prompts(chronicle: Chronicle) -> None:
    chronicle.wander(8)
    corpus = corpus_of(chronicle)
    assert {row.epoch for row in corpus.rows} == {None}
    assert corpus.report.variants == {}


@pytest.mark.parametrize("kind", ALL)
def test_each_kind_of_augmentation_can_be_the_only_one(tmp_path: Path, store: SqlStore, kind: str) -> None:
    of = small_campaign(tmp_path, budget={"iterations": 16}, decision={"min_gain": 0.02})
    run(of, store)
    corpus = corpus_of(Chronicle(store, of), augment=(kind,), epochs=4)
    assert set(corpus.report.variants) == {kind}
    assert {row.epoch for row in corpus.rows if "/" in row.id} <= {1, 3}
    assert {row.epoch for row in corpus.rows if "/" not in row.id} >= {0, 2}


def test_the_same_history_and_seed_give_the_same_corpus(chronicle: Chronicle) -> None:
    chronicle.wander(15)
    once, again, other = (corpus_of(chronicle, augment=ALL, seed=seed).sha256 for seed in (1, 1, 2))
    assert once == again != other


def test_imported_attempts_get_the_prompt_that_they_would_have_seen(tmp_path: Path, store: SqlStore) -> None:
    knobs = {
        "lr": {"type": "float", "choices": [0.0002, 0.0003, 0.0004], "default": 0.0003},
        "n_head": {"type": "int", "choices": [8, 16, 32], "default": 16},
        "d_model": {"type": "int", "choices": [768, 1024, 1536], "default": 1024},
        "precision": {"type": "str", "choices": ["bf16", "fp8"], "default": "fp8"},
    }
    of = small_campaign(tmp_path, metric={"name": "val_bpb"}, prompt={"recent": 5})
    of = replace(of, menu=small_menu(knobs))
    history = [header(), attempt(1), attempt(2, "n_head", 8, 10.7), attempt(3, "d_model", 768, 10.95)]
    import_trajectory(store, as_bytes(history), name="c", origin="t.jsonl")
    chronicle = Chronicle(store, of)
    with store.writing(chronicle.lease) as writer:
        assert reconstruct_prompts(store, chronicle.state, chronicle.frame, writer) == 3
    rows = {row.id: row.prompt for row in corpus_of(chronicle, holdout=1, objective="clone").rows}
    assert '"lr": 0.0003' in rows["turn-2-1"]
    assert "- turn 1: lr = 0.0002: kept +0.92%" in rows["turn-2-1"]
    assert "turn 2" not in rows["turn-2-1"]
    assert "Nothing was tried yet" in rows["turn-1-1"]
    kinds = [a.prompt_kind for a in store.teaching(chronicle.id)]
    assert kinds == ["reconstructed"] * 3
    assert corpus_of(chronicle, holdout=1).report.reconstructed == 3


def small_menu(knobs: dict[str, dict[str, object]]) -> Menu:
    data = {
        "campaign": {"name": "c", "trainer": "scripted"},
        "budget": {"iterations": 1},
        "knobs": knobs,
        "proposers": {"random": {"kind": "random"}},
    }
    return parse_campaign(data, Path("campaign.toml")).menu


@pytest.mark.skipif(not SEED_FILE.exists(), reason=f"the first trajectory is not at {SEED_FILE}")
def test_the_first_trajectory_is_42_rows_and_8_held_out(tmp_path: Path, store: SqlStore) -> None:
    of = load_campaign("seed_replay")
    import_trajectory(store, SEED_FILE.read_bytes().splitlines(keepends=True), name=of.name, origin="seed")
    chronicle = Chronicle(store, of)
    with store.writing(chronicle.lease) as writer:
        reconstruct_prompts(store, chronicle.state, chronicle.frame, writer)
    corpus = build_corpus(store, chronicle.state, chronicle.frame, corpus_settings(of))
    report = corpus.report
    assert (report.trained, report.held_out, report.reconstructed) == (42, 8, 50)
    assert (report.knobs, report.knobs_on_menu, report.top_pair) == (6, 13, "d_model = 1536")
    assert (report.kept_trained, report.kept_held_out) == (5, 3)
