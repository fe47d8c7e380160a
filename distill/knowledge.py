"""What is known at the cut about the gain of a change, from everything that was measured before it.

A change measured on a configuration is known there by its own trials. Measured on another one, it still tells: with
effects of different knobs adding up (a first-order model), the gain of taking a knob from u to v is the same
everywhere, and a value reached through kept changes carries their gains along. So each knob has a ladder of values, 0
at the first baseline's, and a change that was never measured here is worth the difference of two rungs. What that model
leaves out (knobs that interact) is added to its variance. Everything is then shrunk by its noise
(`overnight.trainer.noise`). A value that nobody tried is guessed from its neighbours on the ladder, and stays untried.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from overnight.distill.lessons import ConfigKey, Lesson, baseline_key
from overnight.distill.smoothing import Curve
from overnight.rails.menu import Change, Menu
from overnight.store.learning import ScreeningSums
from overnight.store.records import Config, KnobValue
from overnight.trainer.noise import Posterior, Prior, shrink

INTERACTION = 0.25
"""Variance that moving a gain to another configuration adds, as a share of the gains' own (benchmarks/distill.md)."""


@dataclass(frozen=True, slots=True)
class Estimate:
    """A gain with its variance."""

    mean: float
    variance: float


@dataclass(frozen=True, slots=True)
class Spoilt:
    """A change whose trials gave no metric."""


@dataclass(frozen=True, slots=True)
class Guess:
    """A change that nobody tried, between or beside values that somebody did."""

    mean: float


Known = Posterior | Spoilt | Guess | None
"""What is known of a change; None: neither it nor a neighbour was tried."""


class Knowledge:
    """Gains as they are known after some lessons.

    Args:
        lessons: what was measured, in the order of turns.
        sums: the campaign's screening gains up to the same turn.
        menu: the campaign's.
        noise_sd: standard deviation of one gain where neither lessons nor sums know it.
    """

    def __init__(self, lessons: Sequence[Lesson], sums: ScreeningSums, menu: Menu, *, noise_sd: float = 0.0) -> None:
        noise = noise_sd**2 if sums.noise_variance is None else sums.noise_variance
        self.prior = Prior.from_screening(sums.count, sums.total, sums.squares, noise)
        self.spread = _spread([lesson.attempt.gain for lesson in lessons if lesson.attempt.gain is not None])
        self._noise, self._menu = noise, menu
        self._here: dict[tuple[ConfigKey, Change], list[Estimate]] = {}
        self._ladders: dict[str, dict[KnobValue, Estimate]] = {}
        self._spoilt: set[Change] = set()
        self._curves: dict[str, Curve] = {}
        for lesson in lessons:
            self._learn(lesson)

    def gain(self, baseline: Config, change: Change) -> Known:
        """Return what is known of `change` on `baseline`."""
        own = self._here.get((baseline_key(baseline), change))
        estimate = _pooled(own) if own else self._moved(baseline, change)
        if estimate is not None:
            return shrink(estimate.mean, math.sqrt(estimate.variance), self.prior)
        if change in self._spoilt:
            return Spoilt()
        guess = self._guessed(baseline, change)
        return None if guess is None else Guess(guess)

    def scale(self, temperature: float) -> float:
        """Return the difference in gain that a temperature tells apart by a factor of e.

        `temperature` counts in the spread of the campaign's gains, and no less than half the noise of one of them:
        what cannot be told apart is not.
        """
        return max(temperature * self.spread, math.sqrt(self._noise) / 2)

    def measured(self, baseline: Config, change: Change) -> float | None:
        """Return the mean gain of the trials of `change` on `baseline` itself, not shrunk; None where there is none."""
        own = self._here.get((baseline_key(baseline), change))
        return None if own is None else _pooled(own).mean

    def worth(self, lesson: Lesson) -> Known:
        """Return what is known of a lesson's own change, where it was tried."""
        return self.gain(lesson.baseline, lesson.change)

    def _learn(self, lesson: Lesson) -> None:
        attempt, change = lesson.attempt, lesson.change
        if attempt.gain is None:
            self._spoilt.add(change)
            return
        variance = self._noise if attempt.gain_se is None else attempt.gain_se**2
        measured = Estimate(attempt.gain, variance)
        self._here.setdefault((baseline_key(lesson.baseline), change), []).append(measured)
        start = lesson.baseline[change.knob]
        ladder = self._ladders.setdefault(change.knob, {start: Estimate(0.0, 0.0)})
        if start in ladder and change.value != start:
            reached = Estimate(ladder[start].mean + measured.mean, ladder[start].variance + measured.variance)
            known = ladder.get(change.value)
            ladder[change.value] = reached if known is None else _pooled([known, reached])

    def _moved(self, baseline: Config, change: Change) -> Estimate | None:
        """Return a change's gain from other configurations, where both of its values are on the knob's ladder."""
        ladder = self._ladders.get(change.knob, {})
        here, there = ladder.get(baseline[change.knob]), ladder.get(change.value)
        if here is None or there is None:
            return None
        between = self.prior.variance if math.isfinite(self.prior.variance) else self.spread**2
        return Estimate(there.mean - here.mean, there.variance + here.variance + INTERACTION * between)

    def _guessed(self, baseline: Config, change: Change) -> float | None:
        """Return a change's gain by the curve through its knob's ladder."""
        if change.knob not in self._curves:
            ladder = self._ladders.get(change.knob, {})
            rungs = {value: (rung.mean, rung.variance) for value, rung in ladder.items()}
            self._curves[change.knob] = Curve(self._menu.by_name[change.knob], rungs)
        curve = self._curves[change.knob]
        here, there = curve.at(baseline[change.knob]), curve.at(change.value)
        return None if here is None or there is None else there - here


def _pooled(estimates: Iterable[Estimate]) -> Estimate:
    """Average independent estimates of one gain, each by its precision; without any variance, plainly."""
    found = list(estimates)
    if min(each.variance for each in found) <= 0:
        return Estimate(math.fsum(each.mean for each in found) / len(found), 0.0)
    precision = math.fsum(1 / each.variance for each in found)
    return Estimate(math.fsum(each.mean / each.variance for each in found) / precision, 1 / precision)


def _spread(gains: Sequence[float]) -> float:
    """Return the standard deviation of gains as their middle shows it; 0 where there are fewer than two.

    The median absolute deviation, times 1.4826 for normal gains (Hampel 1974): a few changes that ruin everything say
    nothing about how far apart the others are.
    """
    if len(gains) < 2:
        return 0.0
    middle = statistics.median(gains)
    return 1.4826 * statistics.median(abs(gain - middle) for gain in gains)
