"""How noisy a measurement is, and what a measured gain is worth once its noise is taken into account.

Everything is estimated from sufficient statistics (counts, sums, sums of squares) that one SQL query gives, never from
a history in memory, and never from the residuals of candidates that stopped because of what they measured: those are
selected. What reaches a function here is finite, or it raises; filtering missing metrics is the caller's business.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Literal, Self

from overnight.store.records import TrainerKind

CANDIDATE_EXCESS = 2.0
"""Candidates may be this many times as noisy (in standard deviation of a trial) as the baseline; issue 4."""
AUDITED_EXCESS = 1.25
"""How far a candidate's paired noise may exceed what audits found on average over random candidates.

Audits include the noisy candidates, so the excess is over a mixture: with a share q of candidates twice as noisy it is
sqrt(5 / (2 + 3 q)); the error per proposal stays below alpha for the shares tried (benchmarks/decisions.md), that of
a rare noisy candidate among quiet ones reaches 2 alpha.
"""
UNSEEDED_RATIO = 0.25
"""A trainer is unseeded when repeats have at least this share of the variance between seeds (half of its sd)."""
MIN_PRIOR_COUNT = 5
"""Candidates that must be measured before their gains say anything about the campaign's prior."""


def _finite(name: str, *values: float) -> None:
    for value in values:
        if not math.isfinite(value):
            raise ValueError(f"`{name}` holds {value!r}; leave out missing and non-finite metrics before estimating")


@dataclass(frozen=True, slots=True)
class Spread:
    """A pooled within-group sum of squares with its degrees of freedom; spreads add."""

    ss: float
    df: float

    def __post_init__(self) -> None:
        _finite("Spread", self.ss, self.df)
        if self.ss < 0 or self.df < 0:
            raise ValueError(f"a sum of squares and its degrees of freedom are not negative, got {self}")

    @classmethod
    def from_sums(cls, groups: Iterable[tuple[int, float, float]]) -> Self:
        """Pool groups given as (n, sum, sum of squares), as `GROUP BY` returns them; groups of one add nothing.

        Sums of squares of raw metrics cancel badly when the spread is tiny beside the mean; SQL that subtracts a
        constant near the mean (or the group's mean) first keeps all digits.
        """
        ss = df = 0.0
        for n, total, squares in groups:
            _finite("sums", total, squares)
            if n >= 1:
                ss += max(0.0, squares - total * total / n)
                df += n - 1
        return cls(ss, df)

    @classmethod
    def from_values(cls, values: Sequence[float]) -> Self:
        """The spread of one group of values around its mean."""
        _finite("values", *values)
        if not values:
            return cls(0.0, 0.0)
        mean = math.fsum(values) / len(values)
        return cls(math.fsum((value - mean) ** 2 for value in values), len(values) - 1)

    def __add__(self, other: Spread) -> Spread:
        return Spread(self.ss + other.ss, self.df + other.df)

    @property
    def variance(self) -> float:
        """The unbiased estimate of the variance.

        Raises:
            ValueError: there are no degrees of freedom.
        """
        if self.df <= 0:
            raise ValueError("no degrees of freedom: a spread needs at least two trials of one configuration")
        return self.ss / self.df

    @property
    def sd(self) -> float:
        """The pooled standard deviation, the root of `variance`."""
        return math.sqrt(self.variance)

    @property
    def sd_unbiased(self) -> float:
        """`sd` corrected for the root's bias under normal noise (the c4 of quality control; Holtzman 1950)."""
        c4 = math.sqrt(2 / self.df) * math.exp(math.lgamma((self.df + 1) / 2) - math.lgamma(self.df / 2))
        return self.sd / c4


@dataclass(frozen=True, slots=True)
class Noise:
    """The standard deviation that a decision works with, in units of the metric, and how well it is known."""

    sd: float
    df: float
    source: Literal["calibration", "audit"]
    excess: float
    """A candidate's noise is taken to be at most this many times `sd`."""

    def __post_init__(self) -> None:
        _finite("Noise", self.sd, self.df, self.excess)
        if self.sd < 0 or self.df < 1 or self.excess < 1:
            raise ValueError(f"noise needs sd >= 0, df >= 1 and excess >= 1, got {self}")


def paired_noise(calibration: Spread, audit: Spread | None = None) -> Noise:
    """The noise of a paired difference, candidate minus baseline on one seed.

    Before audits know it at least as well as calibration does, it is sqrt(2) x the trial sd of calibration: what a
    pair has when the seed explains nothing, hence too large when pairing helps. A candidate twice as noisy as the
    baseline then exceeds it by sqrt((1 + 2^2) / 2).

    Args:
        calibration: trial values of calibrated baselines around each baseline's mean.
        audit: paired differences of audited candidates around each candidate's own mean, every audit on fresh trials
            of both sides.
    """
    if audit is not None and audit.df >= max(calibration.df, 1):
        return Noise(audit.sd, audit.df, "audit", AUDITED_EXCESS)
    return Noise(math.sqrt(2) * calibration.sd, calibration.df, "calibration", math.sqrt((1 + CANDIDATE_EXCESS**2) / 2))


def trial_noise(calibration: Spread) -> Noise:
    """The noise of one trial, which the unpaired rule works with."""
    return Noise(calibration.sd, calibration.df, "calibration", CANDIDATE_EXCESS)


def classify(repeats: Sequence[tuple[float, float]], seeds: Sequence[float]) -> TrainerKind:
    """How a trainer answers to its seed, from calibration.

    `exact` when every repeat is equal bit for bit; `unseeded` when repeats differ as much as different seeds do (a
    variance of at least `UNSEEDED_RATIO` of theirs), `noisy` in between. One repeat gives one degree of freedom, so
    the two are often confused; either way the decision's error holds and only its cost in trials changes.

    Args:
        repeats: pairs of metrics from the same configuration and seed, at least one.
        seeds: metrics of that configuration on different seeds, at least two.
    """
    for first, second in repeats:
        _finite("repeats", first, second)
    if not repeats:
        raise ValueError("a trainer is classified by running at least one seed twice")
    if all(first == second for first, second in repeats):
        return "exact"
    within = math.fsum((first - second) ** 2 for first, second in repeats) / (2 * len(repeats))
    between = Spread.from_values(seeds).variance
    return "unseeded" if within >= UNSEEDED_RATIO * between else "noisy"


@dataclass(frozen=True, slots=True)
class Prior:
    """What the campaign's candidates gain on the whole: a normal prior for the gain of one of them."""

    mean: float
    variance: float
    """Between candidates; infinite while too few were measured to say."""
    mean_variance: float
    """How uncertain `mean` itself is."""

    @classmethod
    def from_screening(cls, count: int, total: float, squares: float, noise_variance: float) -> Self:
        """Method of moments over SCREENING gains, one a candidate: the total variance less the noise's.

        The estimator of DerSimonian and Laird (1986, section 2) where all studies are equally precise. Screening gains
        exist for every measured candidate, so they are not selected; the means of adaptively stopped candidates are.

        Args:
            count: candidates measured.
            total: the sum of their screening gains.
            squares: the sum of the squares.
            noise_variance: of one screening gain, in the same units.
        """
        _finite("screening gains", total, squares, noise_variance)
        if count < MIN_PRIOR_COUNT:
            return cls(0.0, math.inf, 0.0)
        spread = Spread.from_sums([(count, total, squares)]).variance
        return cls(total / count, max(0.0, spread - noise_variance), max(spread, noise_variance) / count)


@dataclass(frozen=True, slots=True)
class Posterior:
    """What a configuration's gain is believed to be after shrinkage."""

    mean: float
    se: float


def shrink(gain: float, se: float, prior: Prior) -> Posterior:
    """Posterior mean and standard error of one configuration's gain (normal-normal).

    The mean is drawn to the prior's by the share of noise in the total variance (Efron and Morris 1975); the standard
    error includes the prior mean's own uncertainty (Morris 1983, section 4). An optional stopping rule changes
    neither, given the prior.
    """
    _finite("gain", gain, se)
    if math.isinf(prior.variance):
        return Posterior(gain, se)
    if se == 0:
        return Posterior(gain, 0.0)
    pull = se * se / (prior.variance + se * se)
    variance = (1 - pull) * se * se + pull * pull * prior.mean_variance
    return Posterior(gain + pull * (prior.mean - gain), math.sqrt(variance))
