"""The noise estimates: pooled, from sufficient statistics, and shrunk towards what the campaign shows."""

from __future__ import annotations

import json
import math
import sqlite3
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.trainer.noise import MIN_PRIOR_COUNT, Noise, Prior, Spread, classify, paired_noise, shrink, trial_noise

SEED = Path(__file__).parents[3] / "shared" / "seed" / "trajectory.jsonl"
# The query that docs/decisions.md shows.
POOLED_SD = """
SELECT sqrt(sum(ss) / sum(n - 1))
FROM (SELECT count(*) AS n, sum(metric * metric) - sum(metric) * sum(metric) / count(*) AS ss
      FROM iterations WHERE metric IS NOT NULL GROUP BY knob, new_value)
"""
values = st.lists(st.floats(-1e3, 1e3), min_size=2, max_size=20)


@given(st.lists(values, min_size=1, max_size=5))
def test_pooling_groups_one_by_one_or_from_their_sums_agrees(groups: list[list[float]]) -> None:
    pooled = Spread.from_values(groups[0])
    for group in groups[1:]:
        pooled += Spread.from_values(group)
    sums = Spread.from_sums((len(g), math.fsum(g), math.fsum(x * x for x in g)) for g in groups)
    assert sums.df == pooled.df
    assert sums.ss == pytest.approx(pooled.ss, rel=1e-6, abs=1e-6)


def test_a_group_of_one_adds_nothing() -> None:
    assert Spread.from_sums([(1, 3.0, 9.0), (2, 3.0, 5.0)]) == Spread(0.5, 1)


def test_the_corrected_sd_is_unbiased_at_two_degrees_of_freedom() -> None:
    draws = np.random.default_rng(0).chisquare(2, 40_000)
    assert np.mean([Spread(ss, 2).sd_unbiased for ss in draws]) == pytest.approx(1, abs=0.01)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_a_metric_that_is_not_finite_never_reaches_an_estimate(bad: float) -> None:
    for estimate in (
        lambda: Spread.from_values([1.0, bad]),
        lambda: Spread.from_sums([(2, bad, 1.0)]),
        lambda: Spread(bad, 1),
        lambda: classify([(1.0, bad)], [1.0, 2.0]),
        lambda: Prior.from_screening(9, bad, 1.0, 1.0),
        lambda: shrink(bad, 1.0, Prior(0, 1, 0)),
    ):
        with pytest.raises(ValueError, match="finite"):
            estimate()


def test_a_spread_without_degrees_of_freedom_has_no_variance() -> None:
    with pytest.raises(ValueError, match="two trials"):
        _ = Spread(0.0, 0.0).variance


def test_before_audits_the_paired_noise_is_that_of_unrelated_trials() -> None:
    noise = paired_noise(Spread(4.0, 4))
    assert noise.sd == pytest.approx(math.sqrt(2))
    assert (noise.df, noise.source) == (4, "calibration")


def test_audits_take_over_once_they_know_as_much_as_calibration() -> None:
    calibration = Spread(9.0, 9)
    assert paired_noise(calibration, Spread(8.0, 8)).source == "calibration"
    assert paired_noise(calibration, Spread(12.0, 12)) == Noise(1.0, 12, "audit", 1.25)


def test_one_audit_is_believed_before_calibration_that_knows_less() -> None:
    assert paired_noise(Spread(2.0, 2), Spread(4.0, 4)) == Noise(1.0, 4, "audit", 1.25)
    assert paired_noise(Spread(2.0, 2), Spread(0.0, 0)).source == "calibration"


def test_audited_candidates_that_beat_the_baseline_do_not_move_the_paired_noise() -> None:
    gains = np.random.default_rng(2).normal(scale=0.5, size=(5_000, 5)) + np.linspace(-3, 3, 5_000)[:, None]
    pooled = Spread.from_sums((5, float(g.sum()), float((g * g).sum())) for g in gains)
    assert pooled.sd == pytest.approx(0.5, rel=0.02)


def test_trial_noise_allows_candidates_twice_as_noisy() -> None:
    assert trial_noise(Spread(4.0, 4)) == Noise(1.0, 4, "calibration", 2.0)


def test_a_trainer_that_repeats_bit_for_bit_is_exact() -> None:
    assert classify([(1.5, 1.5)], [1.5, 1.6, 1.4]) == "exact"


def test_one_ulp_is_not_exact() -> None:
    assert classify([(1.5, math.nextafter(1.5, 2))], [1.5, 1.6, 1.4]) == "noisy"


def test_repeats_that_differ_as_seeds_do_are_unseeded() -> None:
    assert classify([(1.5, 1.65)], [1.5, 1.6, 1.4]) == "unseeded"


def test_a_trainer_cannot_be_classified_without_a_repeat() -> None:
    with pytest.raises(ValueError, match="twice"):
        classify([], [1.0, 2.0])


def test_shrinkage_recovers_gains_better_than_the_raw_means_do() -> None:
    rng = np.random.default_rng(3)
    true = rng.normal(-0.5, 0.3, 2_000)
    measured = true + rng.normal(0, 0.6, 2_000)
    prior = Prior.from_screening(2_000, float(measured.sum()), float((measured**2).sum()), 0.36)
    shrunk = np.array([shrink(float(x), 0.6, prior).mean for x in measured])
    assert np.mean((shrunk - true) ** 2) < 0.3 * np.mean((measured - true) ** 2)


def test_posterior_standard_errors_cover_the_true_gains() -> None:
    rng = np.random.default_rng(4)
    true = rng.normal(0.2, 0.5, 4_000)
    measured = true + rng.normal(0, 0.5, 4_000)
    prior = Prior.from_screening(4_000, float(measured.sum()), float((measured**2).sum()), 0.25)
    beliefs = [shrink(float(x), 0.5, prior) for x in measured]
    covered = [abs(b.mean - t) < 1.96 * b.se for b, t in zip(beliefs, true, strict=True)]
    assert np.mean(covered) == pytest.approx(0.95, abs=0.015)


def test_with_few_candidates_nothing_is_shrunk() -> None:
    prior = Prior.from_screening(MIN_PRIOR_COUNT - 1, 4.0, 9.0, 0.1)
    assert shrink(2.0, 0.5, prior).mean == 2.0


def test_when_noise_explains_everything_all_gains_shrink_to_the_mean() -> None:
    prior = Prior.from_screening(10, 5.0, 2.6, 1.0)
    assert shrink(4.0, 0.4, prior).mean == pytest.approx(0.5)


def test_a_gain_without_noise_is_not_shrunk() -> None:
    assert shrink(0.3, 0.0, Prior(0.0, 0.0, 0.1)).mean == 0.3


@pytest.mark.skipif(not SEED.exists(), reason="the first trajectory, ../shared/seed/trajectory.jsonl, is not here")
def test_the_estimate_on_the_first_trajectory_is_what_one_query_gives() -> None:
    records = [json.loads(line) for line in SEED.read_text().splitlines()]
    attempts = [r for r in records if r.get("stage") == "evaluated"]
    rows = [(r["proposal"]["knob"], str(r["proposal"]["new_value"]), r["val_bpb"]) for r in attempts]
    with sqlite3.connect(":memory:") as db:
        db.execute("CREATE TABLE iterations (knob, new_value, metric)")
        db.executemany("INSERT INTO iterations VALUES (?, ?, ?)", rows)
        (queried,) = db.execute(POOLED_SD).fetchone()
    groups: dict[tuple[str, str], list[float]] = {}
    for knob, value, metric in rows:
        groups.setdefault((knob, value), []).append(metric)
    pooled = Spread(0.0, 0.0)
    for group in groups.values():
        pooled += Spread.from_values(group)
    assert pooled.sd == pytest.approx(queried, rel=1e-6)
    assert pooled.sd == pytest.approx(0.020, abs=0.001)
