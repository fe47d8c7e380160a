"""What a row asks for: better changes up, losses down, failures out, and a floor under what nobody has tried."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.distill.knowledge import Guess, Known, Spoilt
from overnight.distill.objective import Objective, ObjectiveName, effective_size, gained
from overnight.trainer.noise import Posterior

gains = st.floats(-1.0, 1.0)
measured = st.builds(Posterior, gains, st.floats(0.0, 0.1))
known = st.one_of(st.none(), measured, st.just(Spoilt()), st.builds(Guess, gains))


def objective(name: ObjectiveName = "outcome", *, scale: float = 0.0075, floor: float = 0.2) -> Objective:
    return Objective(name=name, scale=scale, floor=floor)


def gain(mean: float, se: float = 0.001) -> Posterior:
    return Posterior(mean, se)


@given(st.lists(known, min_size=1, max_size=12), st.floats(0.0, 10.0), st.floats(0.0, 0.99))
def test_a_choice_is_a_probability_distribution(each: list[Known], scale: float, floor: float) -> None:
    choice = objective(scale=scale, floor=floor).choice(each)
    assert len(choice) == len(each)
    assert min(choice) >= 0
    assert math.fsum(choice) == pytest.approx(1)


@given(st.lists(known, min_size=2, max_size=12), st.floats(0.0, 0.99))
def test_the_untried_keep_their_floor(each: list[Known], floor: float) -> None:
    choice = objective(floor=floor).choice(each)
    untried = [chance for chance, of in zip(choice, each, strict=True) if of is None or isinstance(of, Guess)]
    if untried:
        assert math.fsum(untried) >= floor - 1e-9


def test_among_the_untried_the_neighbours_decide() -> None:
    up, unknown, down, tried = objective(floor=0.5).choice([Guess(0.01), None, Guess(-0.01), gain(0.1)])
    assert up > unknown > down > 0
    assert tried == pytest.approx(0.5)


@given(gains, gains)
def test_what_gained_more_is_more_probable(one: float, other: float) -> None:
    first, second, _ = objective().choice([gain(one), gain(other), None])
    assert (first > second) == (one > other) or math.isclose(first, second)


def test_a_gain_goes_above_the_untried_and_a_loss_below() -> None:
    up, untried, down = objective(floor=0.0).choice([gain(0.01), None, gain(-0.01)])
    assert up > untried > down
    assert untried / down == pytest.approx(up / untried) == pytest.approx(math.exp(0.01 / 0.0075))


def test_a_change_whose_trial_failed_gets_nothing() -> None:
    assert objective().choice([Spoilt(), None, gain(-0.5)])[0] == 0


def test_where_everything_failed_nothing_is_preferred() -> None:
    assert objective().choice([Spoilt(), Spoilt()]) == [0.5, 0.5]


def test_without_a_scale_nothing_is_preferred() -> None:
    assert objective(scale=0.0).choice([gain(0.3), gain(-0.3)]) == [0.5, 0.5]


def test_a_smaller_scale_is_sharper() -> None:
    each: list[Known] = [gain(0.02), gain(0.0)]
    sharp, soft = (objective(scale=scale).choice(each)[0] for scale in (0.005, 0.05))
    assert sharp > soft > 0.5


def test_huge_gains_do_not_overflow() -> None:
    assert objective(scale=1e-11).choice([gain(1.0), gain(-1.0), None])[0] == pytest.approx(0.8)


def test_clone_weighs_every_row_alike() -> None:
    assert {objective("clone").weight(worth) for worth in (gain(1.0), gain(-1.0), Spoilt(), None)} == {1.0}


def test_filtered_takes_what_gained_beyond_its_noise() -> None:
    worths: list[Known] = [gain(0.02, 0.01), gain(0.005, 0.01), gain(-0.02, 0.01), Spoilt(), None]
    assert [objective("filtered").weight(worth) for worth in worths] == [1, 0, 0, 0, 0]
    assert [gained(worth) for worth in worths] == [True, False, False, False, False]


def test_weighted_rises_with_the_gain_within_bounds() -> None:
    weights = [objective("weighted").weight(each) for each in (Spoilt(), gain(-0.01), gain(0.0), gain(0.01), gain(9.0))]
    assert weights == sorted(weights)
    assert weights[2] == 1
    assert weights[-1] / weights[0] == pytest.approx(math.exp(6))


@given(st.lists(st.floats(0.001, 100.0), min_size=1, max_size=30))
def test_the_effective_size_lies_between_one_and_all(weights: list[float]) -> None:
    assert 1 - 1e-9 <= effective_size(weights) <= len(weights) + 1e-9


def test_equal_weights_count_in_full_and_none_counts_as_nothing() -> None:
    assert effective_size([0.3] * 7) == pytest.approx(7)
    assert effective_size([]) == 0
