"""Duel items and the test on them: its level, whenever one stops, and what it may depend on."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.agent.evidence import (
    RECENT,
    Bank,
    bets,
    bootstrap_interval,
    duels_needed,
    e_value,
    share,
    sign_test,
    weigh,
)


def _simulation() -> ModuleType:
    """`benchmarks/promotion.py`, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "promotion.py"
    spec = importlib.util.spec_from_file_location("benchmarks_promotion", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


simulation = _simulation()
items = st.lists(st.floats(-1, 1), max_size=30)
gains = st.lists(st.floats(-20, 20), max_size=RECENT)


def test_no_duels_weigh_nothing() -> None:
    assert e_value([]) == 1


@given(items, st.randoms())
def test_the_order_of_duels_changes_nothing(values: list[float], rng: np.random.Generator) -> None:
    shuffled = list(values)
    rng.shuffle(shuffled)  # type: ignore[arg-type]
    assert e_value(shuffled) == pytest.approx(e_value(values))


@given(items, st.floats(-1, 1), st.floats(-1, 1))
def test_a_better_item_never_lowers_the_evidence(values: list[float], one: float, two: float) -> None:
    worse, better = sorted((one, two))
    assert e_value([*values, worse]) <= e_value([*values, better]) * (1 + 1e-12)


@given(items, st.integers(0, 20))
def test_ties_leave_the_evidence_as_it_is(values: list[float], ties: int) -> None:
    assert e_value(values + ties * [0.0]) == pytest.approx(e_value(values))


@given(st.floats(0, 1), st.floats(0, 1))
def test_no_item_of_mean_zero_is_expected_to_raise_the_evidence(win: float, loss: float) -> None:
    """The supermartingale itself: a two-point item with mean 0 multiplies every bet's wealth by 1 on average."""
    if win + loss == 0:
        return
    chance = loss / (win + loss)
    mean = chance * e_value([win]) + (1 - chance) * e_value([-loss])
    assert mean == pytest.approx(1)


def test_whoever_stops_at_the_best_moment_is_wrong_at_most_alpha_of_the_time() -> None:
    """Optional stopping: the maximum over 200 duels of skewed, mostly zero items with mean 0, looked at each time."""
    rng = np.random.default_rng(3)
    count, duels, alpha = 2000, 200, 0.05
    for loss in (1.0, 0.1, 0.5):  # rare losses with frequent small wins, and the reverse
        win = 0.3
        values = np.where(rng.random((duels, count)) < loss / (win + loss), win, -loss)
        values *= rng.random((duels, count)) < 0.5
        wealth, crossed = simulation.Wealth(count), np.zeros(count, dtype=bool)
        for turn in values:
            wealth.add(turn, np.ones(count, dtype=bool))
            crossed |= wealth.e() >= 1 / alpha
        assert crossed.mean() <= alpha + 2 * math.sqrt(alpha / count)


def test_items_outside_their_range_are_refused() -> None:
    for wrong in (1.1, -1.1, math.nan, math.inf):
        with pytest.raises(ValueError, match=r"lie in \[-1, 1\]"):
            e_value([0.5, wrong])


def test_shares_of_all_challengers_sum_to_alpha() -> None:
    spent = math.fsum(share(0.05, number) for number in range(1, 20_000))
    assert 0.05 * (1 - 1e-4) < spent < 0.05
    with pytest.raises(ValueError, match="counted from 1"):
        share(0.05, 0)


@given(st.lists(st.floats(-1, 1), min_size=1, max_size=20), st.floats(2, 1000))
def test_as_many_duels_as_forecast_suffice_when_they_go_on_alike(values: list[float], threshold: float) -> None:
    needed = duels_needed(values, threshold)
    if needed is None:
        return
    rounds = math.ceil(needed / len(values))
    assert e_value(values * (1 + rounds)) >= threshold * (1 - 1e-9)


def test_a_losing_challenger_is_out_of_reach() -> None:
    assert duels_needed([-0.2, 0.1, -0.1], 20) is None
    assert weigh([-0.2], 0.05).needed is None
    assert weigh([1.0] * 20, 0.05).needed == 0


def test_the_sign_test_is_the_binomial_tail_without_ties() -> None:
    assert sign_test([0.5, 0.1, 0.2, -0.3, 0.0, 0.0]) == pytest.approx(5 / 16)
    assert sign_test([]) == 1
    assert 0 < sign_test([0.1] * 900 + [-0.1] * 830) < 0.06


def test_the_bootstrap_interval_covers_the_mean_and_is_the_same_each_time() -> None:
    values = list(np.random.default_rng(0).uniform(-0.2, 0.6, 100))
    low, high = bootstrap_interval(values)
    assert low < float(np.mean(values)) < high
    assert high - low == pytest.approx(2 * 1.96 * np.std(values) / 10, rel=0.15)
    assert bootstrap_interval(values) == (low, high)


@given(gains, st.floats(1e-6, 10), st.floats(-30, 30), st.floats(-30, 30))
def test_items_lie_between_minus_one_and_one_and_turn_round_with_the_sides(
    history: list[float], se: float, one: float, two: float
) -> None:
    bank = Bank.from_recent(history, se)
    assert 0 <= bank.banked(one) <= bank.cap
    assert -1 <= bank.item(one, two) <= 1
    assert bank.item(one, two) == -bank.item(two, one)
    assert bank.item(one, one) == 0


@given(gains, st.floats(0.01, 10), st.floats(0.001, 1000))
def test_the_unit_of_the_gain_does_not_matter(history: list[float], se: float, unit: float) -> None:
    bank, scaled = Bank.from_recent(history, se), Bank.from_recent([unit * gain for gain in history], unit * se)
    assert scaled.item(unit * 2 * se, unit * se) == pytest.approx(bank.item(2 * se, se), abs=1e-6)


def test_what_is_blocked_or_failed_banks_nothing() -> None:
    bank = Bank.from_recent(list(np.random.default_rng(1).normal(0, 2, 50)), 1.0)
    assert bank.item(None, None) == 0
    assert bank.item(3.0, None) > 0 > bank.item(None, 3.0)


def test_disasters_do_not_make_noise_worth_banking() -> None:
    """Nine ordinary candidates and one that loses 1,000: a gain of half the noise is still shrunk to little."""
    ordinary = list(np.random.default_rng(2).normal(-0.5, 1.1, 90))
    quiet, stretched = Bank.from_recent(ordinary, 1.0), Bank.from_recent([*ordinary, *[-1000.0] * 10], 1.0)
    assert stretched.banked(0.5) < 0.25
    assert stretched.prior.variance < quiet.prior.variance + 2


def test_the_arrays_of_the_benchmark_are_the_product() -> None:
    rng = np.random.default_rng(0)
    for count in (0, 3, 5, 20, 100):
        history = rng.normal(-1, 2, (20, count))
        one, two = rng.normal(1, 2, (2, 20))
        ours = simulation.items_of(one, two, simulation.bank_all(history))
        product = [Bank.from_recent(list(h), 1.0).item(a, b) for h, a, b in zip(history, one, two, strict=True)]
        assert ours == pytest.approx(product)
    wealth = simulation.Wealth(4)
    values = rng.uniform(-1, 1, (12, 4))
    for turn in values:
        wealth.add(turn, np.ones(4, dtype=bool))
    assert wealth.e() == pytest.approx([e_value(list(column)) for column in values.T])
    assert bets()[1].sum() == pytest.approx(1)


@pytest.mark.parametrize("challenger", [1.0, 0.1, None])
def test_a_challenger_that_is_no_better_is_rarely_promoted(challenger: float | None) -> None:
    """Issue 7's null, 300 campaigns; all worlds and 1,000 campaigns are in benchmarks/promotion.md."""
    picks = simulation.same_policy if challenger is None else simulation.equal_bank(challenger)
    for rules in (simulation.Rules(), simulation.DENSE, simulation.Rules(keep_lead=True)):
        assert simulation.campaigns("even", 0.3, picks, rules, count=300, seed=7).promoted.mean() <= 0.05


def test_looking_back_alone_promotes_challengers_that_are_no_better() -> None:
    found = simulation.campaigns("even", 0.3, simulation.same_policy, simulation.Rules(), count=100, seed=7, held=True)
    assert found.heldout.mean() > 0.5


def test_a_difference_of_one_sd_is_promoted_within_60_duels() -> None:
    assert simulation.by_duels(1.0, 0.2, number=1, duels=60, count=300, seed=5).mean() >= 0.8


def test_a_student_worse_by_two_sd_is_rolled_back_in_probation() -> None:
    assert simulation.rolled_back(2.0, 0.3, 300, 5).mean() >= 0.95
    assert simulation.rolled_back(0.0, 0.3, 300, 5).mean() <= 0.05


def test_a_timid_student_is_not_promoted_over_a_champion_that_banks_gains() -> None:
    rules = simulation.Rules(keep_lead=True)
    for world in simulation.WORLDS:
        assert simulation.campaigns(world, 1.0, 0.0, rules, count=200, seed=9).promoted.mean() <= 0.05


@pytest.mark.slow
def test_the_quick_benchmark_runs_and_writes_nothing(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(sys, "argv", ["promotion.py", "--quick"])
    monkeypatch.setattr(simulation, "HERE", tmp_path)
    simulation.main()
    assert list(tmp_path.iterdir()) == []
