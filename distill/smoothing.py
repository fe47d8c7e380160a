"""What measured values of a knob say about those between them: a smooth curve with as much error as it has.

A Gaussian process (Rasmussen and Williams 2006, section 2.2) over the knob's range, on the scale that the menu grids it
on: near a measured value it follows the measurement, far from any it returns to 0, the first baseline's. It promises no
more than the best measured value gave and threatens no worse than the worst: two values that lie close together would
otherwise speak for the whole range. Numbers only: words have no order.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from overnight.rails.menu import Knob
from overnight.store.records import KnobValue

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

LENGTH = 0.2
"""How far a value tells about others, as a share of the knob's range (benchmarks/distill.md)."""
JITTER = 1e-3
"""Least variance of a measured value, as a share of the curve's own: equal values must not break the solver."""


class Curve:
    """The gains along one knob, relative to one of its values.

    Args:
        knob: whose values they are.
        measured: mean and variance of the gain at each measured value.
    """

    def __init__(self, knob: Knob, measured: Mapping[KnobValue, tuple[float, float]]) -> None:
        self._knob = knob
        found = [(place(knob, value), *each) for value, each in measured.items()]
        self._points = [(at, mean, variance) for at, mean, variance in found if at is not None]
        self._weights: NDArray[np.float64] | None = None

    def at(self, value: KnobValue) -> float | None:
        """Return the gain at a value; None for a word, or where fewer than two values were measured."""
        at = place(self._knob, value)
        if at is None or len(self._points) < 2:
            return None
        import numpy as np

        places = np.array([point[0] for point in self._points])
        if self._weights is None:
            self._weights = self._solve(places)
        smooth = float(np.exp(-((at - places) ** 2) / (2 * LENGTH**2)) @ self._weights)
        means = [point[1] for point in self._points]
        return min(max(smooth, min(means)), max(means))

    def _solve(self, places: NDArray[np.float64]) -> NDArray[np.float64]:
        import numpy as np

        means = np.array([point[1] for point in self._points])
        noise = np.array([point[2] for point in self._points])
        size = float(np.mean(means**2))
        if size == 0:
            return np.zeros(len(means))
        alike = np.exp(-((places[:, None] - places[None, :]) ** 2) / (2 * LENGTH**2))
        solved: NDArray[np.float64] = np.linalg.solve(alike + np.diag(noise / size + JITTER), means)
        return solved


def place(knob: Knob, value: KnobValue) -> float | None:
    """Return where a number lies on its knob, from 0 to 1: by rank among choices, by the grid's scale in a range."""
    if isinstance(value, str):
        return None
    if knob.choices:
        numbers = sorted(float(choice) for choice in knob.choices if not isinstance(choice, str))
        return numbers.index(float(value)) / (len(numbers) - 1) if float(value) in numbers else None
    assert knob.low is not None
    assert knob.high is not None
    if knob.scale == "log":  # an imported value may lie outside the range
        return math.log(value / knob.low) / math.log(knob.high / knob.low) if value > 0 else None
    return (value - knob.low) / (knob.high - knob.low)
