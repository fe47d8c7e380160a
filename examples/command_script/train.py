"""Train a small network to tell three spirals apart, and print its validation loss.

    python train.py --lr 0.01 --hidden 32 --seed 0

A training script as people have them: it takes its settings as arguments and prints a line an epoch.
"""

# ruff: noqa: T201

import argparse
import itertools

import numpy as np

CLASSES = 3


def spirals(rng: np.random.Generator, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw points of three interleaved spirals, and the spiral of each."""
    labels = rng.integers(CLASSES, size=count)
    radius = rng.uniform(0.1, 1.0, size=count)
    angle = 4.0 * radius + labels * 2 * np.pi / CLASSES + rng.normal(0, 0.6, size=count)
    return np.stack([radius * np.cos(angle), radius * np.sin(angle)], axis=1), labels


def make_network(rng: np.random.Generator, hidden: int, gain: float) -> list[np.ndarray]:
    """Return the weights and biases of two hidden layers and an output layer."""
    widths = [2, hidden, hidden, CLASSES]
    network: list[np.ndarray] = []
    for before, after in itertools.pairwise(widths):
        network += [rng.normal(0, gain / np.sqrt(before), size=(before, after)), np.zeros(after)]
    return network


def forward(network: list[np.ndarray], points: np.ndarray) -> tuple[list[np.ndarray], np.ndarray]:
    """Return what each layer saw, and the log-probabilities of the classes."""
    seen, values = [], points
    for layer in range(3):
        seen.append(values)
        values = values @ network[2 * layer] + network[2 * layer + 1]
        if layer < 2:
            values = np.maximum(values, 0.0)
    shifted = values - values.max(axis=1, keepdims=True)
    return seen, shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))


def loss_of(network: list[np.ndarray], points: np.ndarray, labels: np.ndarray) -> float:
    """Return the mean cross-entropy."""
    _, log_probabilities = forward(network, points)
    return float(-log_probabilities[np.arange(len(labels)), labels].mean())


def gradients(network: list[np.ndarray], points: np.ndarray, labels: np.ndarray) -> list[np.ndarray]:
    """Return the gradient of the mean cross-entropy, in the order of the network."""
    seen, log_probabilities = forward(network, points)
    error = np.exp(log_probabilities)
    error[np.arange(len(labels)), labels] -= 1.0
    error /= len(labels)
    found: list[np.ndarray] = []
    for layer in reversed(range(3)):
        found = [seen[layer].T @ error, error.sum(axis=0), *found]
        if layer > 0:
            error = (error @ network[2 * layer].T) * (seen[layer] > 0)
    return found


def main() -> None:
    """Train once."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--lr", type=float, default=0.01)
    parser.add_argument("--momentum", type=float, default=0.0)
    parser.add_argument("--hidden", type=int, default=16)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--init-gain", type=float, default=1.0)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    data = np.random.default_rng(2024)  # the data stay the same
    points, labels = spirals(data, 1000)
    val_points, val_labels = spirals(data, 500)

    rng = np.random.default_rng(args.seed)
    network = make_network(rng, args.hidden, args.init_gain)
    speed = [np.zeros_like(weights) for weights in network]
    for epoch in range(1, args.epochs + 1):
        order = rng.permutation(len(points))
        for start in range(0, len(order), args.batch_size):
            batch = order[start : start + args.batch_size]
            for index, gradient in enumerate(gradients(network, points[batch], labels[batch])):
                speed[index] = args.momentum * speed[index] - args.lr * gradient
                network[index] = network[index] + speed[index]
        train_loss, val_loss = loss_of(network, points, labels), loss_of(network, val_points, val_labels)
        print(f"epoch {epoch:2d}/{args.epochs}  train_loss {train_loss:.4f}  val_loss {val_loss:.4f}")


if __name__ == "__main__":
    main()
