"""What the host wants to improve: a small network that learns a curve, in numpy. The loop calls `train` for each trial.

It runs in the loop's trial worker, a process of its own, so it may crash, hang or take all memory.
"""

from __future__ import annotations

from typing import Any

import numpy as np

STEPS = 1000


def train(config: dict[str, Any], seed: int, split: str) -> float:
    """Train one network; return its mean squared error on data that it has not seen.

    `split` is `val` while the loop searches; at the end the winner is measured once on `holdout`, never seen before.
    """
    rng = np.random.default_rng(seed)
    x, y = _samples(np.random.default_rng(1), 256)
    unseen = _samples(np.random.default_rng(2 if split == "val" else 3), 256)
    width = config["width"]
    parts = [rng.normal(0, 1, (1, width)), np.zeros(width), rng.normal(0, width**-0.5, (width, 1)), np.zeros(1)]
    speed = [np.zeros_like(part) for part in parts]
    for _ in range(STEPS):
        rows = rng.integers(0, len(x), config["batch"])
        slopes = _slopes(parts, x[rows], y[rows])
        speed = [config["momentum"] * rate - config["lr"] * slope for rate, slope in zip(speed, slopes, strict=True)]
        parts = [part + rate for part, rate in zip(parts, speed, strict=True)]
    return float(np.mean((_outputs(parts, unseen[0])[1] - unseen[1]) ** 2))


def _samples(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    x = rng.uniform(-3, 3, (count, 1))
    return x, np.sin(2 * x) + rng.normal(0, 0.1, (count, 1))


def _outputs(parts: list[np.ndarray], x: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    hidden = np.tanh(x @ parts[0] + parts[1])
    return hidden, hidden @ parts[2] + parts[3]


def _slopes(parts: list[np.ndarray], x: np.ndarray, y: np.ndarray) -> list[np.ndarray]:
    hidden, out = _outputs(parts, x)
    error = 2 * (out - y) / len(x)
    back = (error @ parts[2].T) * (1 - hidden**2)
    return [x.T @ back, back.sum(0), hidden.T @ error, error.sum(0)]
