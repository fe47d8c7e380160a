"""Variants keep their meaning: what they show is true, and what they do not show is open again."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace

import pytest

from overnight.distill.augment import Augmenter, Variant, Variation
from overnight.distill.corpus import CorpusSettings, build_corpus
from overnight.distill.lessons import Lesson, baseline_key, read_lessons
from overnight.store.prompt import render_constant, shuffle_history
from overnight.store.sql_store import SqlStore

from ..agent_tests.campaigns import run
from .histories import Chronicle, small_campaign


@pytest.fixture(scope="module")
def lived(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chronicle]:
    """A campaign of 20 turns that really ran, with several baselines; nobody writes to it."""
    folder = tmp_path_factory.mktemp("lived")
    store = SqlStore.open(folder / "store.db", create=True)
    of = small_campaign(folder, budget={"iterations": 20}, decision={"min_gain": 0.02})
    run(of, store)
    yield Chronicle(store, of)
    store.close()


def variants(lived: Chronicle, kind: Variation) -> Iterator[tuple[Lesson, list[Lesson], str, Variant]]:
    """Yield each turn, what came before it, its stored prompt, and a variant of it."""
    lessons, _ = read_lessons(lived.store, lived.id, lived.of.menu)
    prompts = lived.store.prompts_of([each.attempt.prompt_id or "" for each in lessons])
    augmenter = Augmenter(lived.frame, lessons)
    for number, lesson in enumerate(lessons):
        prompt = prompts[lesson.attempt.prompt_id or ""]
        for draw in range(3):
            variant = augmenter.variant(kind, number, number, prompt, random.Random(f"{number}/{draw}"))
            if variant is not None:
                yield lesson, lessons[:number], prompt, variant


def tried(lessons: list[Lesson] | tuple[Lesson, ...]) -> Counter[object]:
    return Counter((baseline_key(lesson.baseline), lesson.change) for lesson in lessons)


def test_permuted_lines_are_the_same_lines(lived: Chronicle) -> None:
    found = list(variants(lived, "permute"))
    assert found
    for _, _, prompt, variant in found:
        assert variant.prompt != prompt
        assert sorted(variant.prompt.split("\n")) == sorted(prompt.split("\n"))
        assert variant.prompt.startswith(render_constant(lived.frame.facts))


def test_only_the_knobs_of_the_history_change_places() -> None:
    history = "# History\n3 turns\n- a 1x: 1\n- b 2x: 2\n- never tried: c"
    prompt = f"# Task\nx\n\n# Brief\n> # History\n\n{history}\n\n# Last\n- t\n"
    orders = {shuffle_history(prompt, random.Random(seed)) for seed in range(20)}
    assert orders == {prompt, prompt.replace("- a 1x: 1\n- b 2x: 2", "- b 2x: 2\n- a 1x: 1")}


def test_a_prompt_without_history_stays_as_it_is() -> None:
    assert shuffle_history("# Task\n\n# Current\n{}\n", random.Random(0)) == "# Task\n\n# Current\n{}\n"


def test_an_earlier_cut_is_a_beginning_on_the_same_configuration(lived: Chronicle) -> None:
    found = list(variants(lived, "earlier"))
    assert found
    for lesson, before, _, variant in found:
        shown = list(variant.shown)
        assert shown == before[: len(shown)]
        assert len(shown) < len(before)
        assert {baseline_key(each.baseline) for each in before[len(shown) :]} == {baseline_key(lesson.baseline)}
        assert f"turn {before[len(shown)].attempt.iteration}:" not in variant.prompt


def test_a_subsample_shows_part_of_what_was_and_every_keep(lived: Chronicle) -> None:
    found = list(variants(lived, "subsample"))
    assert found
    for lesson, before, _, variant in found:
        assert variant.lesson is lesson
        assert tried(list(variant.shown)) < tried(before)
        kept = [each.change for each in before if each.kept]
        assert [each.change for each in variant.shown if each.kept] == kept


def test_a_synthetic_history_tells_of_one_configuration_and_what_led_to_it(lived: Chronicle) -> None:
    lessons, _ = read_lessons(lived.store, lived.id, lived.of.menu)
    seen = set()
    for _, _, _, variant in variants(lived, "synthetic"):
        here = baseline_key(variant.lesson.baseline)
        seen.add(here)
        assert tried(list(variant.shown)) <= tried(lessons)
        assert variant.lesson.change not in [each.change for each in variant.shown if not each.kept]
        for each in variant.shown:
            assert each.kept != (baseline_key(each.baseline) == here)  # a keep there would have made another one
        assert f"{len(variant.shown)} turns, " in variant.prompt or not variant.shown
    assert len(seen) > 1


def test_what_a_variant_does_not_show_is_open_again(lived: Chronicle) -> None:
    easy = {"min_rows": 1, "min_pairs": 1, "min_knobs": 1, "max_share": 1.0, "holdout": 2}
    corpus = build_corpus(
        lived.store, lived.state, lived.frame, CorpusSettings(**easy, augment=("subsample",), epochs=2)
    )
    stored = {row.id: row for row in corpus.rows if row.epoch == 0}
    varied = [row for row in corpus.rows if row.id.endswith("/subsample")]
    assert varied
    opened = [set(row.candidates) - set(stored[row.id.removesuffix("/subsample")].candidates) for row in varied]
    closed = [set(stored[row.id.removesuffix("/subsample")].candidates) - set(row.candidates) for row in varied]
    assert any(opened)
    assert not any(closed)


def test_a_variant_does_not_tell_what_became_of_its_change(lived: Chronicle) -> None:
    lessons, _ = read_lessons(lived.store, lived.id, lived.of.menu)
    unmeasured = {"outcome": "failed", "baseline_metric": None, "gain": None, "gain_se": None}
    for number in range(1, len(lessons), 3):
        failed = replace(lessons[number].attempt, **unmeasured)  # type: ignore[arg-type]
        lessons[number] = replace(lessons[number], attempt=failed)
    augmenter, told = Augmenter(lived.frame, lessons), dict[object, set[str]]()
    for number in range(1, len(lessons)):
        variant = augmenter.variant("synthetic", number, number, "", random.Random(number))
        assert variant is not None
        (line,) = [line for line in variant.prompt.splitlines() if line.startswith("Its loss is")]
        told.setdefault(baseline_key(variant.lesson.baseline), set()).add(line)
    assert [len(lines) for lines in told.values()] == [1] * len(told)


def test_the_same_draw_gives_the_same_variant(lived: Chronicle) -> None:
    once, again = ([v.prompt for *_, v in variants(lived, "synthetic")] for _ in range(2))
    assert once == again
