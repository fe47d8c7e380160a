"""Variants of a moment that keep its meaning: what they show is true, and what they teach is worked out for what they
show.

`permute` reorders the lines of the stored history; `earlier` cuts it at an earlier time on the same configuration;
`subsample` leaves some of it out; `synthetic` draws a history from everything that was measured on one configuration,
its changes in any order. What a variant does not show is open again in it, so that its gain can be learned. The
constant part is the same in all of them. Everything comes from before the cut.
"""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from overnight.distill.histories import Frame, Moment, gain_sd, render
from overnight.distill.lessons import Lesson, baseline_key, distinct_baselines
from overnight.store.prompt import shuffle_history

Variation = Literal["permute", "earlier", "subsample", "synthetic"]
KEPT_SHARES = (0.3, 0.9)
"""`subsample` shows each reverted change with a chance drawn between these."""


@dataclass(frozen=True, slots=True)
class Variant:
    """Another prompt, and what it asks for."""

    prompt: str
    lesson: Lesson
    """The change that is imitated."""
    shown: Sequence[Lesson]
    """What its history tells; the rest is open."""


class Augmenter:
    """Makes variants of the moments of one campaign.

    Args:
        frame: the campaign's.
        lessons: everything before the cut, in the order of turns.
    """

    def __init__(self, frame: Frame, lessons: Sequence[Lesson]) -> None:
        self._frame = frame
        self._lessons = lessons
        by_baseline = distinct_baselines(lessons)
        self._by_baseline = list(by_baseline.values())
        # What a prompt says of its configuration is no matter of the change that answered it: nothing here may tell
        # one that failed, or that was measured often, from another.
        self._metrics = {
            key: _mean([each.attempt.baseline_metric for each in found]) for key, found in by_baseline.items()
        }
        self._gain_sd = _mean([gain_sd(lesson) for lesson in lessons])

    def variant(self, kind: Variation, number: int, asked: int, prompt: str, rng: random.Random) -> Variant | None:
        """Return a variant of the lesson at index `number`, or None where none would differ.

        Args:
            kind: of variant.
            number: the lesson's index.
            asked: the index of the first lesson that its prompt does not tell of.
            prompt: as it was stored.
            rng: for the draws.
        """
        lesson, before = self._lessons[number], self._lessons[:asked]
        if kind == "permute":
            shuffled = shuffle_history(prompt, rng)
            return None if shuffled == prompt else Variant(shuffled, lesson, before)
        if kind == "earlier":
            return self._earlier(lesson, asked, rng)
        if kind == "subsample":
            return self._subsampled(lesson, before, rng)
        return self._synthetic(rng)

    def _earlier(self, lesson: Lesson, number: int, rng: random.Random) -> Variant | None:
        """Cut the history where the same configuration was the baseline already."""
        here = baseline_key(lesson.baseline)
        first = number
        while first > 0 and baseline_key(self._lessons[first - 1].baseline) == here:
            first -= 1
        if first == number:
            return None
        cut = rng.randrange(first, number)
        turns = self._lessons[cut].attempt.iteration - 1
        return self._rendered(lesson, self._lessons[:cut], turns)

    def _subsampled(self, lesson: Lesson, before: Sequence[Lesson], rng: random.Random) -> Variant | None:
        """Leave reverted changes out; what was kept made the configuration, so it stays."""
        chance = rng.uniform(*KEPT_SHARES)
        shown = [each for each in before if each.kept or rng.random() < chance]
        return None if len(shown) == len(before) else self._rendered(lesson, _renumbered(shown), len(shown))

    def _synthetic(self, rng: random.Random) -> Variant | None:
        """Draw which changes of one configuration were tried already, in any order, after what led to it.

        A change that was kept there is not shown: it would have made another configuration.
        """
        pool = rng.choices(self._by_baseline, weights=[len(each) for each in self._by_baseline])[0]
        start = next(i for i, each in enumerate(self._lessons) if each is pool[0])
        path = [each for each in self._lessons[:start] if each.kept]
        drawn = rng.sample(pool, len(pool))
        count = rng.randrange(len(pool))
        shown = [*path, *(each for each in drawn[:count] if not each.kept)]
        return self._rendered(drawn[count], _renumbered(shown), len(shown))

    def _rendered(self, lesson: Lesson, shown: Sequence[Lesson], turns: int) -> Variant:
        moment = Moment(
            baseline=lesson.baseline,
            baseline_metric=self._metrics[baseline_key(lesson.baseline)],
            shown=shown,
            turns=turns,
            gain_sd=self._gain_sd,
        )
        return Variant(render(self._frame, moment), lesson, shown)


def _mean(values: Iterable[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.fsum(known) / len(known) if known else None


def _renumbered(lessons: Sequence[Lesson]) -> list[Lesson]:
    """Return lessons as if they had been the only turns, so that the prompt's numbers agree."""
    return [replace(lesson, attempt=replace(lesson.attempt, iteration=turn)) for turn, lesson in enumerate(lessons, 1)]
