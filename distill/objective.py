"""What a row teaches: targets from what is known at the cut. Pure functions; the losses are `overnight.distill.losses`.

`outcome` puts a probability on every open change of a moment, listwise (Cao et al. 2007, ListNet): in proportion to
exp(gain / scale). A change that lost goes below one that nothing is known of, which counts as a gain of zero; one whose
trial gave no metric gets nothing; and the untried keep at least the share `floor` together, by what their neighbours
say, so that what is known never closes what is not. The others imitate: `clone` what was tried, `filtered` what was
tried and gained, `weighted` what was tried, times exp of the same ratio.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from overnight.distill.knowledge import Guess, Known, Spoilt
from overnight.trainer.noise import Posterior

ObjectiveName = Literal["outcome", "clone", "filtered", "weighted"]
MAX_RATIO = 30.0
"""Gains of more than this many scales count as this many: exp stays far from overflow."""
MAX_WEIGHT_RATIO = 3.0
"""The same for the weight of one imitated row: the best weighs 400 times the worst, not 10 to the 26th."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """An objective with its settings.

    Args:
        name: which.
        scale: the difference in gain that is a factor of e (`Knowledge.scale`); 0 makes targets uniform.
        floor: least share of the untried.
    """

    name: ObjectiveName
    scale: float
    floor: float

    def choice(self, known: Sequence[Known]) -> list[float]:
        """Return the probability that each open change should have, in the order given; `outcome`."""
        weights = [self._weight(each) for each in known]
        untried = [each is None or isinstance(each, Guess) for each in known]
        tried_mass = math.fsum(w for w, new in zip(weights, untried, strict=True) if not new)
        new_mass = math.fsum(w for w, new in zip(weights, untried, strict=True) if new)
        if tried_mass + new_mass <= 0:  # all of them failed: nothing to prefer
            return [1 / len(known)] * len(known)
        if new_mass and tried_mass and new_mass / (new_mass + tried_mass) < self.floor:
            scale = self.floor * tried_mass / ((1 - self.floor) * new_mass)
            weights = [w * scale if new else w for w, new in zip(weights, untried, strict=True)]
        total = math.fsum(weights)
        return [weight / total for weight in weights]

    def weight(self, worth: Known) -> float:
        """Return how much a tried change counts when it is imitated; 0 leaves the row out."""
        if self.name == "filtered":
            return 1.0 if gained(worth) else 0.0
        if self.name == "weighted":
            return math.exp(self._ratio(worth, MAX_WEIGHT_RATIO))
        return 1.0

    def _weight(self, known: Known) -> float:
        return 0.0 if isinstance(known, Spoilt) else math.exp(self._ratio(known, MAX_RATIO))

    def _ratio(self, known: Known, limit: float) -> float:
        if known is None:
            return 0.0
        if isinstance(known, Spoilt):
            return -limit
        return max(-limit, min(limit, known.mean / self.scale)) if self.scale > 0 else 0.0


def gained(worth: Known) -> bool:
    """Whether a change gained by more than its standard error, after shrinking."""
    return isinstance(worth, Posterior) and worth.mean > worth.se


def effective_size(weights: Sequence[float]) -> float:
    """Return how many equally weighted rows carry as much (Kish 1965): the squared sum over the sum of squares."""
    squares = math.fsum(weight * weight for weight in weights)
    return math.fsum(weights) ** 2 / squares if squares else 0.0
