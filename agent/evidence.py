"""Whether a challenger proposes better experiments than the champion: duel items and the test on them.

A duel measures both proposals with the baseline on one fresh seed; its item is the difference of the two banked gains
as a share of the most that one may bank. The test is an e-process: read it after every duel, stop whenever you like.
Pure functions over plain numbers; nothing here measures, stores or routes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import TYPE_CHECKING, Self

from overnight.trainer.noise import Prior, Spread, shrink

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

RECENT = 100
"""Newest measured candidates, whoever proposed them, that say what a gain is worth in a duel."""
WINSOR = 3.0
"""A gain worse than this many standard errors below zero counts as that: disasters bank nothing however large they are,
and a normal prior that they stretch would stop shrinking the gains near zero (benchmarks/promotion.md)."""
CAP_QUANTILE = 0.9
"""Of the recent gains: what a larger gain counts for. A higher cap makes each item a smaller share of it, and the test
slower; a lower one hides the rare large gain."""
CAP_LEAST = 2.0
"""Standard errors that the gain behind the cap has at least."""
BETS = 64
"""Bets in the mixture, evenly spaced in (0, 1)."""
BET_SCALE = 1.0
"""Standard deviation of the half-normal that weighs the bets."""
FORECAST_LIMIT = 10_000
"""Duels beyond which the forecast says that the threshold is out of reach."""
BOOTSTRAPS = 2000


@dataclass(frozen=True, slots=True)
class Bank:
    """How the gains of one duel are banked, fixed by what was measured BEFORE it; in the unit of the gain."""

    se: float
    """The standard error of a gain measured on one seed."""
    prior: Prior
    cap: float
    """The most that a banked gain counts for."""

    @classmethod
    def from_recent(cls, gains: Sequence[float], se: float) -> Self:
        """Learn from the campaign's screening gains.

        The prior's variance is taken to be at least its own standard error (that of a sample variance; normal gains),
        so that a chance estimate of zero does not make every later gain worthless.

        Args:
            gains: the first paired gain of each of the newest `RECENT` measured candidates, in any order (more are
                welcome to be left out: the caller chooses the newest).
            se: the noise of one pair, in the unit of the gain.
        """
        floored = [max(gain, -WINSOR * se) for gain in gains]
        count, total, squares = len(floored), math.fsum(floored), math.fsum(gain * gain for gain in floored)
        prior = Prior.from_screening(count, total, squares, se * se)
        if not math.isinf(prior.variance):
            seen = max(Spread.from_sums([(count, total, squares)]).variance, se * se)
            prior = replace(prior, variance=max(prior.variance, seen * math.sqrt(2 / (count - 1))))
        ranked = sorted(floored)
        top = ranked[math.ceil(CAP_QUANTILE * len(ranked)) - 1] if ranked else 0.0
        spread = 1.0 if math.isinf(prior.variance) else _pull(se, prior)
        cap = max(shrink(max(top, CAP_LEAST * se), se, prior).mean, spread * se)
        return cls(se, prior, cap)

    def banked(self, gain: float | None) -> float:
        """What one side banks: its posterior gain when that is positive, up to the cap.

        Args:
            gain: the paired gain on the duel's fresh seed; None for a blocked or failed answer, which banks nothing.
        """
        return 0.0 if gain is None else min(max(shrink(gain, self.se, self.prior).mean, 0.0), self.cap)

    def item(self, challenger: float | None, champion: float | None) -> float:
        """The duel's item, in [-1, 1]: the difference of the two banked gains over the cap.

        Two equal changes, measured as one trial, give 0. For the reversed test of a promoted student, pass the
        predecessor's gain as `challenger` and the student's as `champion` (or change the item's sign).
        """
        return (self.banked(challenger) - self.banked(champion)) / self.cap if self.cap else 0.0


def _pull(se: float, prior: Prior) -> float:
    """The share of a measured gain that its posterior keeps."""
    total = prior.variance + se * se
    return prior.variance / total if total else 0.0


def share(alpha: float, number: int) -> float:
    """What the `number`-th challenger of a campaign (from 1) may spend of `alpha`: alpha x 6 / (pi^2 number^2).

    The shares of all challengers that ever come sum to `alpha` (Euler's sum; the union bound).
    """
    if number < 1:
        raise ValueError(f"challengers are counted from 1, got {number}")
    return alpha * 6 / (math.pi * number) ** 2


@lru_cache(maxsize=1)
def bets() -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """The bets of the mixture and their weights."""
    import numpy as np

    stakes = (np.arange(BETS) + 0.5) / BETS
    weights = np.exp(-0.5 * np.square(stakes / BET_SCALE))
    return stakes, weights / weights.sum()


def _log_wealths(items: Sequence[float]) -> NDArray[np.float64]:
    """The logarithm of every bet's wealth after all items."""
    import numpy as np

    values = np.asarray(items, dtype=np.float64)
    if values.size and not (np.isfinite(values).all() and np.abs(values).max() <= 1):
        raise ValueError("duel items are finite and lie in [-1, 1]; `Bank.item` makes them")
    wealths: NDArray[np.float64] = np.log1p(np.multiply.outer(values, bets()[0])).sum(axis=0)
    return wealths


def _mixed(log_wealths: NDArray[np.float64]) -> float:
    import numpy as np

    peak = float(log_wealths.max())
    return math.exp(min(peak + math.log(float((bets()[1] * np.exp(log_wealths - peak)).sum())), 700.0))


def e_value(items: Sequence[float]) -> float:
    """The evidence that the items' mean is above zero, after all of them; 1 before the first.

    A one-sided normal mixture over bets: a gambler who stakes the share b of his wealth on each item has multiplied it
    by the product of (1 + b x item), which is a supermartingale whenever no item's mean, given the past, is above zero,
    for items of any shape in [-1, 1] (betting: Waudby-Smith and Ramdas 2024, section 4; its normal-mixture ancestors:
    Robbins 1970, Howard, Ramdas, McAuliffe and Sekhon 2021). The mixture weighs b by a half-normal cut off at 1.
    By Ville's inequality it ever exceeds 1/share with a probability of at most share.

    It does not depend on the items' order, rises with each item, and is unmoved by an item of 0.
    """
    return _mixed(_log_wealths(items))


def duels_needed(items: Sequence[float], threshold: float) -> int | None:
    """Further duels until `e_value` reaches `threshold` if they go on as so far: 0 when it has, None when never.

    "As so far" means that every bet's log-wealth keeps growing at its mean rate.
    """
    if e_value(items) >= threshold:
        return 0
    if not items:
        return None
    wealths = _log_wealths(items)

    def enough(more: int) -> bool:
        return _mixed(wealths * (1 + more / len(items))) >= threshold

    if not enough(FORECAST_LIMIT):
        return None
    low, high = 0, FORECAST_LIMIT
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if enough(middle) else (middle, high)
    return high


def sign_test(items: Sequence[float]) -> float:
    """The one-sided exact sign test (for readers; it decides nothing): the chance of as many wins, zeros left out."""
    wins, losses = sum(item > 0 for item in items), sum(item < 0 for item in items)
    n = wins + losses
    return sum(math.comb(n, k) for k in range(wins, n + 1)) / (1 << n)


def bootstrap_interval(items: Sequence[float], level: float = 0.95) -> tuple[float, float]:
    """The percentile interval of the items' mean (for readers; Efron and Tibshirani 1993, chapter 13).

    Raises:
        ValueError: there are no items.
    """
    import numpy as np

    if not items:
        raise ValueError("an interval needs at least one duel")
    values = np.asarray(items, dtype=np.float64)
    drawn = np.random.default_rng(len(values)).choice(values, size=(BOOTSTRAPS, len(values)))
    low, high = np.quantile(drawn.mean(axis=1), [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


@dataclass(frozen=True, slots=True)
class Evidence:
    """What the duels of one challenger say so far."""

    e_value: float
    threshold: float
    """1 / share: what `e_value` has to reach."""
    duels: int
    wins: int
    losses: int
    """The other duels were ties."""
    mean: float | None
    """Of the items, as a share of the cap; None before the first duel."""
    sign_p: float
    interval: tuple[float, float] | None
    """A bootstrap interval of the mean, for readers."""
    needed: int | None
    """Further duels at the present rate; None when the threshold would never be reached."""

    @property
    def reached(self) -> bool:
        """Whether the evidence suffices."""
        return self.e_value >= self.threshold


def weigh(items: Sequence[float], spend: float) -> Evidence:
    """Weigh the duels of one challenger.

    Args:
        items: `Bank.item` of each duel of this challenger, oldest first.
        spend: `share(alpha, number)` for a challenger; `alpha` itself for the reversed test of a promoted student.
    """
    if not 0 < spend < 1:
        raise ValueError(f"a share of alpha lies between 0 and 1, got {spend!r}")
    threshold = 1 / spend
    return Evidence(
        e_value=e_value(items),
        threshold=threshold,
        duels=len(items),
        wins=sum(item > 0 for item in items),
        losses=sum(item < 0 for item in items),
        mean=math.fsum(items) / len(items) if items else None,
        sign_p=sign_test(items),
        interval=bootstrap_interval(items) if items else None,
        needed=duels_needed(items, threshold),
    )
