"""A stand-in for your own training script: fits a noisy curve with a small polynomial by momentum SGD.

Overnight starts it once for each trial. All it has to do is to take the knobs and a seed, and to print its metric as a
line of JSON at the end:

    python train.py --config config.json --seed 0 --split val

It needs nothing but Python.
"""

# ruff: noqa: T201  standard output is where overnight reads the metric

import argparse
import json
import math
import random

STEPS = 200
BATCH = 16
NOISE = 0.1


def points(rng: random.Random, count: int) -> list[tuple[float, float]]:
    """Draw (x, y) pairs of the curve to learn."""
    xs = [rng.uniform(-1, 1) for _ in range(count)]
    return [(x, math.sin(3 * x) + rng.gauss(0, NOISE)) for x in xs]


def predict(weights: list[float], x: float) -> float:
    """Evaluate the polynomial at x."""
    return sum(weight * x**power for power, weight in enumerate(weights))


def loss(weights: list[float], data: list[tuple[float, float]]) -> float:
    """Return the mean squared error."""
    return sum((predict(weights, x) - y) ** 2 for x, y in data) / len(data)


def train(config: dict[str, float], rng: random.Random, data: list[tuple[float, float]]) -> list[float]:
    """Fit the weights; the seed behind `rng` decides where they start and which points they see."""
    weights = [rng.gauss(0, 0.01) for _ in range(int(config["degree"]) + 1)]
    speed = [0.0] * len(weights)
    for step in range(1, STEPS + 1):
        batch = [(x, predict(weights, x) - y) for x, y in rng.sample(data, BATCH)]
        for power in range(len(weights)):
            gradient = sum(2 * error * x**power for x, error in batch) / BATCH
            gradient += config["weight_decay"] * weights[power]
            speed[power] = config["momentum"] * speed[power] - config["lr"] * gradient
            weights[power] += speed[power]
        if step % 100 == 0:
            loss_now = sum(error**2 for _, error in batch) / BATCH
            print(json.dumps({"step": step, "steps": STEPS, "loss": loss_now}))
    return weights


def main() -> None:
    """Train once and print the metric."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--config", required=True, help="JSON file with every knob")
    parser.add_argument("--seed", type=int, required=True)
    parser.add_argument("--split", choices=["val", "holdout"], required=True)
    arguments = parser.parse_args()
    with open(arguments.config) as file:
        config = json.load(file)
    training = points(random.Random("training"), 200)  # the data are the same in every trial
    measured = points(random.Random(arguments.split), 200)
    try:
        weights = train(config, random.Random(arguments.seed), training)
        result = {
            "val_mse": loss(weights, measured),
            "train_mse": loss(weights, training),
            "notes": f"largest weight {max(map(abs, weights)):.2f}",
        }
    except OverflowError:  # the weights ran away: Python's powers raise where tensors become infinite
        result = {"val_mse": math.inf}
    print(json.dumps(result))


if __name__ == "__main__":
    main()
