"""The keep decision: its looks, its error under the null, its power, and what it refuses."""

from __future__ import annotations

import importlib.util
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.agent.decide import (
    DecisionSettings,
    Verdict,
    check_resolvable,
    judge,
    plan,
    seed_order,
)
from overnight.agent.seeds import AUDIT_TRIALS, audit_seeds, duel_seed
from overnight.trainer.noise import Noise, Spread, paired_noise, trial_noise

ABSOLUTE = DecisionSettings(min_gain=0.0, gain="absolute", direction="max")
KNOWN = Noise(1.0, 20, "calibration", math.sqrt(2.5))
FLAT = dict.fromkeys(range(5), 0.0)
ORDER = (0, 1, 2, 3, 4)


def _simulation() -> ModuleType:
    """`benchmarks/decisions.py`, which is no package."""
    path = Path(__file__).parents[2] / "benchmarks" / "decisions.py"
    spec = importlib.util.spec_from_file_location("benchmarks_decisions", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


simulation = _simulation()


def _decide(candidate: Mapping[int, float], settings: DecisionSettings = ABSOLUTE, noise: Noise = KNOWN) -> Verdict:
    return judge(candidate, FLAT, ORDER, noise=noise, settings=settings, kind="exact")


def _play(gains: list[float], settings: DecisionSettings = ABSOLUTE, noise: Noise = KNOWN) -> tuple[Verdict, int]:
    """Measure what the verdict asks for until it decides: the verdict and the trials it took."""
    measured: dict[int, float] = {}
    while (verdict := _decide(measured, settings, noise)).action == "measure":
        assert verdict.seed is not None
        measured[verdict.seed] = gains[verdict.seed]
    return verdict, len(measured)


def test_an_unmeasured_candidate_is_screened_on_the_first_seed_of_its_order() -> None:
    verdict = judge({}, FLAT, (3, 4, 0, 1, 2), noise=KNOWN, settings=ABSOLUTE, kind="exact")
    assert (verdict.action, verdict.seed, verdict.gain) == ("measure", 3, None)


def test_a_bad_screening_reverts_after_one_trial() -> None:
    assert _play([-0.5, 9, 9, 9, 9])[0].action == "revert"
    assert _play([-0.5, 9, 9, 9, 9])[1] == 1


def test_a_clear_gain_is_kept_after_all_trials_and_never_before() -> None:
    verdict, trials = _play([50.0, 50.5, 49.5, 50.2, 49.8])
    assert (verdict.action, trials) == ("keep", 5)


def test_a_keep_has_its_bound_above_zero_and_below_its_mean() -> None:
    verdict, _ = _play([2.0, 2.5, 1.5, 2.2, 1.8])
    assert verdict.lower_bound is not None
    assert verdict.gain is not None
    assert 0 < verdict.lower_bound < verdict.gain


def test_a_mean_below_min_gain_is_reverted_however_sure() -> None:
    assert _play([2.0, 2.5, 1.5, 2.2, 1.8], replace(ABSOLUTE, min_gain=2.2))[0].action == "revert"


def test_one_wild_trial_does_not_keep() -> None:
    assert _play([1.2, 60.0, 1.3, 1.2, 1.3])[0].action == "revert"


def test_when_the_metric_is_minimised_a_lower_one_gains() -> None:
    settings = replace(ABSOLUTE, direction="min", gain="relative", min_gain=0.01)
    baseline = {seed: 10.0 + seed / 100 for seed in range(5)}
    candidate = {seed: value * 0.9 for seed, value in baseline.items()}
    noise = Noise(0.05, 20, "audit", 1.25)
    verdict = judge(candidate, baseline, ORDER, noise=noise, settings=settings, kind="exact")
    assert verdict.action == "keep"
    assert verdict.gain == pytest.approx(0.1, rel=1e-3)


@given(st.sampled_from(["min", "max"]), st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_turning_the_metrics_sign_with_its_direction_changes_nothing(direction: str, gains: list[float]) -> None:
    sign = 1 if direction == "max" else -1
    candidate = {seed: 7.0 + gain for seed, gain in enumerate(gains)}
    baseline = dict.fromkeys(range(5), 7.0)
    one = judge(candidate, baseline, ORDER, noise=KNOWN, settings=ABSOLUTE, kind="exact")
    other = judge(
        {seed: sign * value for seed, value in candidate.items()},
        {seed: sign * value for seed, value in baseline.items()},
        ORDER,
        noise=KNOWN,
        settings=replace(ABSOLUTE, direction="min" if direction == "min" else "max"),
        kind="exact",
    )
    assert (one.action, one.gain) == (other.action, other.gain)


@given(st.floats(1e-6, 1e6), st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_the_unit_of_the_metric_changes_no_decision(unit: float, gains: list[float]) -> None:
    scaled = replace(KNOWN, sd=unit)
    assert _play([unit * gain for gain in gains], noise=scaled)[1] == _play(gains)[1]


@given(st.lists(st.floats(-3, 3), min_size=5, max_size=5))
def test_trials_beyond_the_looks_change_no_decision(gains: list[float]) -> None:
    audited = dict(enumerate(gains)) | dict.fromkeys(audit_seeds(3), 99.0)
    assert _decide(audited).action == _play(gains)[0].action


def test_a_seed_that_the_baseline_lacks_is_asked_for() -> None:
    candidate = dict.fromkeys(range(4), 2.0)
    verdict = judge(candidate, dict.fromkeys(range(3), 0.0), ORDER, noise=KNOWN, settings=ABSOLUTE, kind="exact")
    assert (verdict.action, verdict.seed) == ("measure", 3)


def test_the_unpaired_rule_needs_no_common_seeds() -> None:
    candidate = dict.fromkeys(range(100, 105), 50.0)
    noise = replace(KNOWN, excess=2.0)
    verdict = judge(candidate, FLAT, tuple(candidate), noise=noise, settings=ABSOLUTE, kind="unseeded")
    assert verdict.action == "keep"


def test_without_any_noise_a_gain_is_kept_and_none_is_not() -> None:
    silent = replace(KNOWN, sd=0.0)
    assert _play([0.1] * 5, noise=silent)[0].action == "keep"
    assert _play([0.0] * 5, noise=silent)[0].action == "revert"


def test_single_shot_keeps_on_one_run_at_min_gain() -> None:
    settings = replace(ABSOLUTE, rule="single_shot", min_gain=0.5)
    verdict = judge({0: 0.5}, FLAT, ORDER, noise=None, settings=settings, kind="exact")
    assert (verdict.action, verdict.n) == ("keep", 1)


def test_single_shot_reverts_below_min_gain() -> None:
    settings = replace(ABSOLUTE, rule="single_shot", min_gain=0.5)
    assert judge({0: 0.49}, FLAT, ORDER, noise=None, settings=settings, kind="exact").action == "revert"


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_metric_that_is_not_finite_never_reaches_a_decision(bad: float) -> None:
    with pytest.raises(ValueError, match="not finite"):
        _decide({0: bad})


def test_a_gain_relative_to_zero_names_the_remedy() -> None:
    with pytest.raises(ValueError, match="absolute"):
        judge({0: 1.0}, FLAT, ORDER, noise=KNOWN, settings=replace(ABSOLUTE, gain="relative"), kind="exact")


def test_confirming_without_a_noise_estimate_is_refused() -> None:
    with pytest.raises(ValueError, match="calibrate"):
        judge({0: 1.0}, FLAT, ORDER, noise=None, settings=ABSOLUTE, kind="exact")


def test_seeds_rotate_over_the_baselines() -> None:
    assert [seed_order([7, 8, 9], turn, 2) for turn in range(4)] == [(7, 8), (8, 9), (9, 7), (7, 8)]


def test_fresh_seeds_follow_when_the_baseline_has_too_few() -> None:
    assert seed_order([7, 8, 9], 1, 5) == (8, 9, 7, 10, 11)


def test_no_two_audits_share_a_seed_with_each_other_or_with_a_duel() -> None:
    seeds = [seed for iteration in range(1, 2001) for seed in audit_seeds(iteration)]
    assert len(set(seeds)) == len(seeds) == 2000 * AUDIT_TRIALS
    assert not {duel_seed(iteration) for iteration in range(1, 10_001)} & set(seeds)
    assert {seed % 1000 // 100 for seed in seeds} == {7}, "calibration and holdout use the first hundreds of thousands"


def test_a_min_gain_below_the_noise_is_refused_with_a_remedy() -> None:
    text = check_resolvable(KNOWN, replace(ABSOLUTE, min_gain=1.2), FLAT, "exact")
    assert text is not None
    assert "max_trials` to 8 or more" in text


def test_the_remedy_works() -> None:
    settings = replace(ABSOLUTE, min_gain=1.2, max_trials=8)
    assert check_resolvable(KNOWN, settings, FLAT, "exact") is None


def test_min_gain_zero_is_always_resolvable() -> None:
    assert check_resolvable(KNOWN, ABSOLUTE, FLAT, "exact") is None


@pytest.mark.parametrize("kind", ["exact", "unseeded"])
def test_the_simulated_rule_is_judge_itself(kind: str) -> None:
    rng = np.random.default_rng(7)
    unseeded = kind == "unseeded"
    for min_gain, n, df in [(0.0, 5, 4), (0.6, 5, 20), (0.0, 2, 2), (0.3, 8, 12), (0.0, 1, 4)]:
        settings = replace(ABSOLUTE, min_gain=min_gain, max_trials=n)
        calibration = Spread(float(df), df)
        noise = trial_noise(calibration) if unseeded else paired_noise(calibration)
        baseline = {seed: float(value) for seed, value in enumerate(rng.standard_normal(n))}
        candidates = rng.normal(1.5, 1.5, (300, n))
        reference = np.full(n, math.fsum(baseline.values()) / n) if unseeded else np.array(list(baseline.values()))
        design = plan(settings, noise, unpaired_baseline=n if unseeded else None)
        kept, trials = simulation.decide_all(candidates - reference, np.full(300, noise.sd), design, min_gain)
        for row, keep, took in zip(candidates, kept, trials, strict=True):
            measured: dict[int, float] = {}
            verdict = Verdict("measure", 0, 0, None, None, None, "")
            while verdict.action == "measure":
                verdict = judge(
                    measured,
                    baseline,
                    tuple(range(n)),
                    noise=noise,
                    settings=settings,
                    kind="unseeded" if unseeded else "exact",
                )
                if verdict.seed is not None:
                    measured[verdict.seed] = float(row[verdict.seed])
            assert (verdict.action == "keep", len(measured)) == (bool(keep), int(took))


@pytest.mark.parametrize("baseline", ["rolling", "fixed"])
@pytest.mark.parametrize("excess", [1.0, 2.0])
@pytest.mark.parametrize("shape", ["normal", "t3"])
def test_changes_that_do_nothing_are_rarely_kept(baseline: str, excess: float, shape: str) -> None:
    world = simulation.World(baseline=baseline, excess=excess, shape=shape, audit_share=0.0)
    assert simulation.simulate(world, simulation.confirmed, 2_000, 50, 1).upper <= 0.012


def test_changes_that_do_nothing_are_rarely_kept_with_audits_and_three_calibration_trials() -> None:
    world = simulation.World(excess=2.0, calibration=3)
    assert simulation.simulate(world, simulation.confirmed, 2_000, 50, 1).upper <= 0.012


def test_the_unpaired_rule_rarely_keeps_changes_that_do_nothing() -> None:
    world = simulation.World(excess=2.0, unseeded=True)
    assert simulation.simulate(world, simulation.confirmed, 2_000, 50, 1).upper <= 0.012


@pytest.mark.parametrize("source", ["calibration", "audit"])
def test_a_gain_of_two_paired_sd_is_kept_four_times_in_five(source: str) -> None:
    world = simulation.World(known=source, gain=2.0)
    assert simulation.simulate(world, simulation.confirmed, 20_000, 5, 2).power >= 0.8


@pytest.mark.parametrize("source", ["calibration", "audit"])
def test_a_change_that_does_nothing_costs_at_most_1_4_trials(source: str) -> None:
    world = simulation.World(known=source)
    assert simulation.simulate(world, simulation.confirmed, 40_000, 5, 2).trials <= 1.4


@pytest.mark.parametrize(("gain", "share"), [(0.0, 1.0), (2.0, 0.3)])
def test_the_audited_variance_is_unbiased_while_baselines_roll_on(gain: float, share: float) -> None:
    """Its scatter over 10,000 campaigns is 0.45%; benchmarks/decisions.md pools more."""
    world = simulation.World(baseline="rolling", gain=gain, gain_share=share)
    bias = simulation.simulate(world, simulation.confirmed, 10_000, 50, 1).variance_bias
    assert abs(bias) <= 0.015


def test_deciding_takes_under_five_milliseconds_once_warm() -> None:
    candidate = dict.fromkeys(range(5), 2.0)
    _decide(candidate)
    started = time.perf_counter()
    for _ in range(100):
        _decide(candidate)
    assert (time.perf_counter() - started) / 100 < 0.005


def test_importing_the_rule_loads_neither_numpy_nor_scipy() -> None:
    code = "import sys, overnight.agent.decide; sys.exit(bool({'numpy', 'scipy'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False, cwd=Path(__file__).parent).returncode == 0
