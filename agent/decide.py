"""Whether a measured change is kept: the `confirmed` rule, a small sequential design, and the old `single_shot`.

A candidate is screened on one seed and dropped as soon as a keep has become improbable; what survives `max_trials`
seeds is kept when its mean gain reaches `min_gain` and its lower bound is above zero. There is no early keep, so
looking early can only lower the error. Pure functions over plain numbers: nothing here measures, stores or draws at
random, and nothing here promises the error rate for candidates noisier than `overnight.trainer.noise` says.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise, takewhile
from typing import TYPE_CHECKING, Literal, TypeVar

from overnight.store.records import Direction, GainKind, TrainerKind
from overnight.trainer.noise import CANDIDATE_EXCESS, Noise

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

T = TypeVar("T", float, "NDArray[np.float64]")
Rule = Literal["confirmed", "single_shot"]
Action = Literal["measure", "keep", "revert"]

AUDIT_SHARE = 0.05
"""Share of turns, drawn before screening, whose candidate is also measured on `audit_seeds`, whatever it shows."""
IMPROBABLE = 0.2
"""A candidate is dropped when the predictive probability of a keep falls below this: the largest power for which a
null candidate costs at most 1.4 trials on average (benchmarks/decisions.md)."""
PRIOR_DF = 4.0
"""Most degrees of freedom that the pooled noise counts for beside a candidate's own; more would gain power against
equally noisy candidates and lose the bound against noisier ones (benchmarks/LOG.md)."""
PRIOR_DF_AUDITED = 8.0
"""The same where audits say how noisy candidates are."""
DF_RUNGS = (1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 12, 14, 16, 20, 24, 30, 40, 60, 120, 1000)
"""Critical values are computed once for each of these; degrees of freedom in between are rounded down."""
POINTS = 4096
"""Quasi-random points behind a critical value: its error probability is within 1% of itself."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DecisionSettings:
    """The campaign's `[decision]` table with the metric's direction."""

    rule: Rule = "confirmed"
    min_gain: float = 0.005
    alpha: float = 0.01
    calibration_trials: int = 5
    max_trials: int = 5
    direction: Direction = "min"
    gain: GainKind = "relative"

    def __post_init__(self) -> None:
        if not (math.isfinite(self.min_gain) and self.min_gain >= 0):
            raise ValueError(f"`min_gain` must be finite and not negative, got {self.min_gain!r}")
        if not 0 < self.alpha < 0.5:
            raise ValueError(f"`alpha` must lie between 0 and 0.5, got {self.alpha!r}")
        if self.calibration_trials < 2 and self.rule == "confirmed":
            raise ValueError(f"`calibration_trials` must be at least 2, got {self.calibration_trials!r}")
        if self.max_trials < 1:
            raise ValueError(f"`max_trials` must be at least 1, got {self.max_trials!r}")

    @property
    def sign(self) -> int:
        """1 where more of the metric is better, -1 where less is."""
        return 1 if self.direction == "max" else -1


@dataclass(frozen=True, slots=True)
class Verdict:
    """What to do next with a candidate, and what is known about it so far (gains as `[metric] gain` says)."""

    action: Action
    seed: int | None
    """With `measure`: the seed to measure next, on the candidate and, where it lacks it, on the baseline."""
    n: int
    """Candidate trials that `gain` rests on."""
    gain: float | None
    """Mean gain over those trials, positive is better; None before the first."""
    gain_se: float | None
    """Its standard error; None before the first trial and where no noise is known."""
    lower_bound: float | None
    """One-sided bound at `alpha` for the true gain; None unless all `max_trials` looks were taken."""
    explanation: str


@dataclass(frozen=True, slots=True)
class Plan:
    """One sequential design: how far pooled and own noise count, when to drop, and the final critical value.

    Its methods use arithmetic only, so that they take floats and numpy arrays alike (the simulation relies on it).
    """

    n: int
    base: float
    """1 / (baseline trials) in the unpaired rule, 0 in the paired."""
    prior_df: float
    critical: float
    resolution: float
    """The critical value with the noise known exactly: final mean / standard error that a keep needs at least."""

    def drop_below(self, k: int, sd: T) -> T:
        """The mean gain under which a candidate is dropped after `k` < `n` trials, when `min_gain` is not higher."""
        return (self.resolution * math.sqrt(self.base + 1 / self.n) - self.slack(k)) * sd

    def slack(self, k: int) -> float:
        """How far below its final threshold a mean may still lie after `k` trials, in units of the pooled sd.

        The predictive probability, under a flat prior, that the mean of n exceeds t when the mean of k is m is
        Phi((m - t) / (sd sqrt((n - k) / (k n)))) (Spiegelhalter, Freedman and Blackburn 1986).
        """
        return -_normal_quantile(IMPROBABLE) * math.sqrt((self.n - k) / (k * self.n))

    def squared_error(self, k: int, sd: T, own_ss: T) -> T:
        """Squared standard error of the mean gain of `k` trials: the moderated variance of Smyth (2004), section 4.

        The pooled variance counts as `prior_df` earlier observations beside the candidate's own sum of squares.
        """
        return sd * sd * self.base + (self.prior_df * sd * sd + own_ss) / ((self.prior_df + k - 1) * k)


def _normal_quantile(p: float) -> float:
    from statistics import NormalDist

    return NormalDist().inv_cdf(p)


def plan(settings: DecisionSettings, noise: Noise, *, unpaired_baseline: int | None = None) -> Plan:
    """The design for these settings and this noise; computed once for each rung of degrees of freedom."""
    df = next((high for high, above in pairwise((*DF_RUNGS, 10**9)) if noise.df < above), DF_RUNGS[-1])
    prior_df = PRIOR_DF_AUDITED if noise.source == "audit" else PRIOR_DF
    base = 1 / unpaired_baseline if unpaired_baseline else 0.0
    # The drop boundary is the calibrated design's whatever the source, so that a null candidate's cost stays the same.
    cautious = CANDIDATE_EXCESS if unpaired_baseline else math.sqrt((1 + CANDIDATE_EXCESS**2) / 2)
    return _plan(
        n=settings.max_trials,
        alpha=settings.alpha,
        df=df,
        excess=noise.excess,
        prior_df=min(prior_df, float(df)),
        base=base,
        cautious=cautious,
        shared=noise.source == "calibration" and not unpaired_baseline,
    )


@lru_cache(maxsize=256)
def _plan(
    *, n: int, alpha: float, df: int, excess: float, prior_df: float, base: float, cautious: float, shared: bool
) -> Plan:
    known = DF_RUNGS[-1]
    resolution = _critical(
        n=n, alpha=alpha, df=known, excess=cautious, prior_df=PRIOR_DF, base=base, shared=shared, resolution=None
    )
    critical = _critical(
        n=n, alpha=alpha, df=df, excess=excess, prior_df=prior_df, base=base, shared=shared, resolution=resolution
    )
    return Plan(n, base, prior_df, critical, resolution)


@lru_cache(maxsize=256)
def _critical(
    *,
    n: int,
    alpha: float,
    df: int,
    excess: float,
    prior_df: float,
    base: float,
    shared: bool,
    resolution: float | None,
) -> float:
    """The final critical value at which a null candidate `excess` times as noisy as the pool is kept with `alpha`.

    With z the candidate's standard normal trials, u the pooled sd's error and everything else fixed, each look asks
    the final mean to exceed some number; so the probability of a keep is the mean, over quasi-random residuals
    and u, of one normal tail: smooth, and monotone in the critical value. It grows with the candidate's noise, so
    the largest noise is the worst case. Dropping is binding in `judge`, which is why its share of alpha may be used
    (non-binding boundaries could not; Jennison and Turnbull 2000, section 5.2).

    Args:
        shared: the pool was estimated from baseline trials that are in the candidate's own pairs too.
        resolution: the constant of the drop boundary; None: the critical value itself.
    """
    import numpy as np
    from scipy.special import ndtr

    residuals, u = _points(n, df, 1 / (math.sqrt(2) * excess) if shared else 0.0)
    scale = math.sqrt(base + excess**2 / n)
    own_ss = excess**2 * np.square(residuals).sum(axis=1)
    partial = excess * np.cumsum(residuals, axis=1) / np.arange(1, n + 1)
    shape = Plan(n, base, prior_df, 0.0, 0.0)
    final = np.sqrt(shape.squared_error(n, u, own_ss))
    slack = [shape.slack(k) for k in range(1, n)]

    def looks(constant: float) -> NDArray[np.float64]:
        needed = np.full(len(u), -np.inf)
        for k in range(1, n):
            bound = (constant * math.sqrt(base + 1 / n) - slack[k - 1]) * u
            needed = np.maximum(needed, bound - partial[:, k - 1])
        return needed

    fixed = None if resolution is None else looks(resolution)

    def error(critical: float) -> float:
        needed = np.maximum(looks(critical) if fixed is None else fixed, critical * final)
        return float(ndtr(-needed / scale).mean())

    low, high = 0.0, 8.0
    while error(high) > alpha:
        low, high = high, 4 * high
    while high - low > 1e-4 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if error(middle) > alpha else (low, middle)
    return high


@lru_cache(maxsize=32)
def _points(n: int, df: int, correlation: float) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Residuals of `n` standard normals around their mean, and estimated / true sd with `df`, at quasi-random points.

    The calibrated trials are also the baseline's half of the pairs, so a pool that is too small by chance tends to
    come with own residuals that are. In each direction of their common places the calibrated trials have
    `correlation` with the pairs: along the pairs' own residuals that makes a shifted square, across them chi-squares.

    The points are the additive recurrence of Roberts (2018), on the generalised golden ratio: the same everywhere.
    """
    import numpy as np
    from scipy.special import gammaincinv, ndtri

    dimensions = n + 3
    golden = 1.5
    for _ in range(40):
        golden = (1 + golden) ** (1 / (dimensions + 1))
    steps = golden ** -np.arange(1.0, dimensions + 1)
    uniform = (0.5 + np.arange(1, POINTS + 1)[:, None] * steps) % 1

    def chi_square(freedom: int, column: int) -> NDArray[np.float64]:
        if freedom <= 0:
            return np.zeros(POINTS)
        quantiles: NDArray[np.float64] = 2 * gammaincinv(freedom / 2, uniform[:, column])
        return quantiles

    normal = ndtri(uniform[:, :n])
    residuals = normal - normal.mean(axis=1, keepdims=True)
    common = min(n, df + 1)
    if correlation == 0 or common < 2:
        return residuals, np.sqrt(chi_square(df, n) / df)
    overlap = residuals[:, :common] - residuals[:, :common].mean(axis=1, keepdims=True)
    along = correlation * np.sqrt(np.square(overlap).sum(axis=1)) + math.sqrt(1 - correlation**2) * ndtri(uniform[:, n])
    across = (1 - correlation**2) * chi_square(common - 2, n + 1)
    return residuals, np.sqrt((np.square(along) + across + chi_square(df + 1 - common, n + 2)) / df)


def seed_order(baseline_seeds: Sequence[int], rotation: int, max_trials: int) -> tuple[int, ...]:
    """The seeds that a candidate is measured on, in order: the baseline's, rotated, then fresh ones.

    Rotating (by the iteration) keeps one lucky baseline trial from screening every candidate. Fresh seeds, which
    the baseline has yet to be measured on, come only when it has fewer than `max_trials`.
    """
    if not baseline_seeds:
        raise ValueError("a baseline without trials cannot be compared with; calibrate it first")
    start = rotation % len(baseline_seeds)
    rotated = (*baseline_seeds[start:], *baseline_seeds[:start])
    first = max(baseline_seeds) + 1
    return (*rotated[:max_trials], *range(first, first + max_trials - len(rotated)))


def judge(
    candidate: Mapping[int, float],
    baseline: Mapping[int, float],
    order: Sequence[int],
    *,
    noise: Noise | None,
    settings: DecisionSettings,
    kind: TrainerKind,
) -> Verdict:
    """Decide on a candidate from its trials so far, or say which seed to measure next.

    Looks are taken in the order of `order`, so that asking again after a crash gives the same answer. Trials of audits
    and duels change no decision: the caller leaves them out.

    Args:
        candidate: metric by seed, finite.
        baseline: metric by seed, finite; every trial that the current baseline has.
        order: what `seed_order` gave for this candidate, at least `max_trials` seeds.
        noise: `paired_noise`, or `trial_noise` for an unseeded trainer; may be None with `single_shot` only.
        settings: the campaign's.
        kind: what calibration found the trainer to be.

    Raises:
        ValueError: a metric is not finite, the baseline's mean is zero and gains are relative, or noise is missing.
    """
    if not all(map(math.isfinite, (*candidate.values(), *baseline.values()))):
        raise ValueError("a metric is not finite; a trial without a metric is a failure and never reaches a decision")
    if not baseline:
        raise ValueError("a baseline without trials cannot be compared with; calibrate it first")
    if settings.rule == "confirmed" and noise is None:
        raise ValueError("the `confirmed` rule needs an estimate of the noise; calibrate first")
    unseeded = kind == "unseeded"
    scale = gain_scale(baseline, settings.gain)
    reference = dict.fromkeys(order, math.fsum(baseline.values()) / len(baseline)) if unseeded else baseline
    sign = settings.sign / scale
    measured = takewhile(lambda seed: seed in candidate and seed in reference, order)
    gains = [sign * (candidate[seed] - reference[seed]) for seed in measured]
    if settings.rule == "single_shot" or noise is None:
        return _single_shot(gains, settings, order[0], None if noise is None else noise.sd / scale)
    design = plan(settings, noise, unpaired_baseline=len(baseline) if unseeded else None)
    return _confirmed(gains, settings, order, design, noise.sd / scale)


def gain_scale(baseline: Mapping[int, float], gain: GainKind) -> float:
    """What a difference of metrics is divided by to become a gain: 1, or the size of the baseline's mean.

    Raises:
        ValueError: gains are relative to a baseline whose mean is zero.
    """
    if gain == "absolute":
        return 1.0
    scale = abs(math.fsum(baseline.values()) / len(baseline))
    if scale == 0:
        raise ValueError('a gain relative to a baseline of zero means nothing; set `[metric] gain = "absolute"`')
    return scale


def _single_shot(gains: list[float], settings: DecisionSettings, seed: int, sd: float | None) -> Verdict:
    if not gains:
        return Verdict("measure", seed, 0, None, None, None, "one run decides")
    kept = gains[0] >= settings.min_gain
    text = f"gain {gains[0]:+.4g} in one run {'reaches' if kept else 'does not reach'} min_gain {settings.min_gain:g}"
    return Verdict("keep" if kept else "revert", None, 1, gains[0], sd, None, text)


def _confirmed(
    gains: list[float], settings: DecisionSettings, order: Sequence[int], design: Plan, sd: float
) -> Verdict:
    n = design.n
    total = 0.0
    for k, gain in enumerate(gains[: n - 1], 1):
        total += gain
        threshold = max(settings.min_gain - design.slack(k) * sd, design.drop_below(k, sd))
        if total / k < threshold:
            mean, se = _estimate(gains, sd, design)
            text = f"dropped after {k} of {n} trials: gain {total / k:+.4g} leaves a keep improbable"
            return Verdict("revert", None, len(gains), mean, se, None, text)
    if len(gains) < n:
        if not gains:
            return Verdict("measure", order[0], 0, None, None, None, "screening")
        mean, se = _estimate(gains, sd, design)
        text = f"gain {mean:+.4g} after {len(gains)} of {n} trials is promising"
        return Verdict("measure", order[len(gains)], len(gains), mean, se, None, text)
    mean, se = _estimate(gains[:n], sd, design)
    bound = mean - design.critical * se
    kept = mean >= settings.min_gain and bound > 0
    how = "unpaired" if design.base else "paired"
    text = f"mean gain {mean:+.4g} over {n} {how} trials (standard error {se:.2g}), lower bound {bound:+.4g}: " + (
        "kept" if kept else f"below min_gain {settings.min_gain:g}" if bound > 0 else "may be noise"
    )
    return Verdict("keep" if kept else "revert", None, n, mean, se, bound, text)


def _estimate(gains: Sequence[float], sd: float, design: Plan) -> tuple[float, float]:
    """Mean gain and its standard error."""
    k = len(gains)
    mean = sum(gains) / k
    own_ss = sum((gain - mean) ** 2 for gain in gains)
    return mean, math.sqrt(design.squared_error(k, sd, own_ss))


def check_resolvable(
    noise: Noise, settings: DecisionSettings, baseline: Mapping[int, float], kind: TrainerKind
) -> str | None:
    """Why `min_gain` cannot be resolved within `max_trials`, with the remedy, or None when it can.

    It can when a mean gain of `min_gain` would have a lower bound above zero were the noise known exactly, the
    best that audits can reach. `min_gain = 0` asks for any real gain, so it always can.
    """
    if settings.rule == "single_shot" or settings.min_gain == 0:
        return None

    sd = noise.sd / gain_scale(baseline, settings.gain)

    def smallest(trials: int) -> float:
        design = plan(
            DecisionSettings(alpha=settings.alpha, max_trials=trials),
            Noise(noise.sd, DF_RUNGS[-1], noise.source, noise.excess),
            unpaired_baseline=len(baseline) if kind == "unseeded" else None,
        )
        return design.critical * math.sqrt(design.base + 1 / trials) * sd

    within = smallest(settings.max_trials)
    if within <= settings.min_gain:
        return None
    enough = next(
        (t for t in (6, 8, 10, 12, 16, 20) if t > settings.max_trials and smallest(t) <= settings.min_gain), 0
    )
    remedy = f"set `max_trials` to {enough} or more, or" if enough else "set"
    return (
        f"`min_gain` = {settings.min_gain:g} cannot be told from noise within `max_trials` = {settings.max_trials}: "
        f"with a noise of {sd:.2g} the smallest mean gain that could be kept is {within:.2g}; "
        f"{remedy} `min_gain` to {within * 1.1:.2g} or more, or make trials less noisy "
        "(more validation tokens, more steps)"
    )
