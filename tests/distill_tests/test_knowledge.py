"""What is known of a change: its own trials where it was tried, the knob's ladder elsewhere, both shrunk."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from overnight.distill.knowledge import INTERACTION, Guess, Knowledge, Spoilt
from overnight.distill.lessons import read_lessons
from overnight.rails.menu import Change
from overnight.store.learning import ScreeningSums
from overnight.store.sql_store import SqlStore
from overnight.trainer.noise import Posterior, Prior, shrink

from ..agent_tests.campaigns import run, scripted
from .histories import Chronicle, small_campaign

FEW = ScreeningSums(0, 0.0, 0.0, 1e-4)
"""Too few to say what candidates gain as a rule: nothing is shrunk."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture
def chronicle(tmp_path: Path, store: SqlStore) -> Chronicle:
    return Chronicle(store, small_campaign(tmp_path))


def knowledge(chronicle: Chronicle, sums: ScreeningSums = FEW, noise_sd: float = 0.0) -> Knowledge:
    lessons, _ = read_lessons(chronicle.store, chronicle.id, chronicle.of.menu)
    return Knowledge(lessons, sums, chronicle.of.menu, noise_sd=noise_sd)


def test_a_change_is_known_where_it_was_tried(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.03, gain_se=0.01)
    assert knowledge(chronicle).gain(chronicle.baseline, Change("a", 0.25)) == Posterior(0.03, pytest.approx(0.01))


def test_repeats_are_averaged_by_their_precision(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.03, gain_se=0.01)
    chronicle.turn("a", 0.25, 0.00, gain_se=0.02)
    found = knowledge(chronicle).gain(chronicle.baseline, Change("a", 0.25))
    assert found == Posterior(pytest.approx(0.024), pytest.approx(math.sqrt(1 / 12500)))


def test_a_knob_that_nobody_tried_is_unknown(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.03)
    chronicle.turn("c", "y", 0.03)
    known = knowledge(chronicle)
    assert known.gain(chronicle.baseline, Change("b", 2)) is None
    assert known.gain(chronicle.baseline, Change("c", "z")) is None


def test_a_value_between_two_that_lost_is_guessed_to_lose(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.0, -0.2)
    chronicle.turn("a", 0.25, -0.1)
    between = knowledge(chronicle).gain(chronicle.baseline, Change("a", 0.125))
    assert isinstance(between, Guess)
    assert -0.25 < between.mean < -0.08


def test_a_guess_counts_from_the_configuration_at_hand(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.1, outcome="kept")
    chronicle.turn("a", 0.0, -0.1)
    back = knowledge(chronicle).gain(chronicle.baseline, Change("a", 0.375))
    assert isinstance(back, Guess)
    assert -0.1 < back.mean < 0.0


def test_a_few_ruined_trials_do_not_widen_the_scale(chronicle: Chronicle) -> None:
    for number, gain in enumerate((0.01, -0.01, 0.02, -0.02, 0.0, -0.9)):
        chronicle.turn("a", number / 8, gain)
    known = knowledge(chronicle)
    assert known.spread == pytest.approx(1.4826 * 0.015)
    assert known.scale(1.0) == known.spread
    assert known.scale(0.001) == pytest.approx(0.005)


def test_a_change_tried_on_an_older_baseline_still_tells(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.03)
    chronicle.turn("b", 2, 0.10, outcome="kept")
    found = knowledge(chronicle).gain(chronicle.baseline, Change("a", 0.25))
    assert isinstance(found, Posterior)
    assert found.mean == pytest.approx(0.03)


def test_gains_of_kept_steps_are_carried_along_a_knob(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.10, outcome="kept")
    chronicle.turn("a", 0.125, 0.02, outcome="reverted")
    chronicle.turn("a", 0.0, 0.05, outcome="kept")
    known = knowledge(chronicle)
    back, half = (known.gain(chronicle.baseline, Change("a", value)) for value in (0.5, 0.125))
    assert isinstance(back, Posterior)
    assert isinstance(half, Posterior)
    assert back.mean == pytest.approx(-0.15)
    assert half.mean == pytest.approx(0.12 - 0.15)


def test_a_moved_gain_is_less_certain_than_one_measured_here(chronicle: Chronicle) -> None:
    sums = ScreeningSums(10, 0.0, 0.9, 1e-4)
    chronicle.turn("a", 0.25, 0.03, gain_se=0.01)
    here = knowledge(chronicle, sums).gain(chronicle.baseline, Change("a", 0.25))
    chronicle.turn("b", 2, 0.10, outcome="kept")
    moved = knowledge(chronicle, sums).gain(chronicle.baseline, Change("a", 0.25))
    prior = Prior.from_screening(sums.count, sums.total, sums.squares, 1e-4)
    assert here == shrink(0.03, 0.01, prior)
    assert moved == shrink(0.03, math.sqrt(1e-4 + INTERACTION * prior.variance), prior)


def test_a_change_whose_trials_failed_is_spoilt_until_one_measures(chronicle: Chronicle) -> None:
    chronicle.turn("b", 9, None, failure="nan")
    assert isinstance(knowledge(chronicle).gain(chronicle.baseline, Change("b", 9)), Spoilt)
    chronicle.turn("b", 9, -0.2)
    assert isinstance(knowledge(chronicle).gain(chronicle.baseline, Change("b", 9)), Posterior)


def test_gains_are_shrunk_to_what_candidates_gain_as_a_rule(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.05, gain_se=0.02)
    sums = ScreeningSums(20, -0.2, 0.02, 4e-4)
    found = knowledge(chronicle, sums).gain(chronicle.baseline, Change("a", 0.25))
    assert isinstance(found, Posterior)
    assert -0.01 < found.mean < 0.05


def test_without_a_stored_error_the_campaigns_noise_counts(chronicle: Chronicle) -> None:
    chronicle.turn("a", 0.25, 0.05, gain_se=None)
    sums = ScreeningSums(20, 0.0, 0.02, None)
    found = knowledge(chronicle, sums, noise_sd=0.03).gain(chronicle.baseline, Change("a", 0.25))
    assert found == shrink(0.05, 0.03, Prior.from_screening(20, 0.0, 0.02, 9e-4))


def test_screening_gains_are_the_first_trials_of_every_candidate(tmp_path: Path, store: SqlStore) -> None:
    of = small_campaign(tmp_path, budget={"iterations": 5}, decision={"min_gain": 0.0, "audit": 0.0})
    run(of, store, proposers=scripted(("b", 3), ("b", 9), ("a", 0.25), ("c", "y"), ("b", 2)))
    state = store.campaign("c")
    assert state is not None
    with store.engine.connect() as connection:
        first = """SELECT a.iteration, (b.metric - t.metric) / a.scale AS gain FROM (
            SELECT *, (baseline_metric - metric) / gain AS scale FROM attempts) AS a
            JOIN trials AS t ON t.attempt_id = a.id AND t.purpose = 'screening' AND t.config_id = a.config_id
            JOIN trials AS b ON b.config_id = a.baseline_config_id AND b.seed = t.seed AND b.replicate = 0"""
        gains = [row.gain for row in connection.execute(text(first))]
    sums = store.screening_sums(state.id)
    assert sums.count == len(gains) == 5
    assert sums.total == pytest.approx(math.fsum(gains))
    assert sums.squares == pytest.approx(math.fsum(gain * gain for gain in gains))
    assert store.screening_sums(state.id, through=2).count == 2
    assert sums.noise_variance is not None
