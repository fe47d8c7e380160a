"""The GPT as plain arithmetic on flat buffers: layout, initial weights, the reference forward pass, and AdamW.

GPT-2's shape (Radford et al. 2019): pre-LayerNorm blocks, learned positions, GELU (tanh form), tied embeddings,
residual projections scaled by 1/sqrt(2 n_layer) at the start; no bias in a matrix product and no dropout. All
parameters live in one flat buffer, so that clipping and AdamW are a few whole-buffer operations on any device. This
is the path of the CPU and the reference for the faster one (`gpt_fused`); it promises bitwise repeats on a CPU with a
fixed number of threads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

EPS_ADAM = 1e-8
EPS_NORM = 1e-5
INIT_STD = 0.02


@dataclass(frozen=True, slots=True)
class Shape:
    """What fixes the parameters."""

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    seq_len: int
    vocab: int
    padded_vocab: int
    """Rows of the embedding; those past `vocab` are zero, never read, and no part of the loss."""

    @property
    def parameters(self) -> int:
        """Trainable numbers, padding left out."""
        padding = (self.padded_vocab - self.vocab) * self.d_model
        return sum(slot.size for slot in self.slots()) - padding

    def slots(self) -> Iterator[Slot]:
        """Yield every parameter in the buffer's order: those that weight decay acts on first."""
        width = self.d_model
        residual = INIT_STD / math.sqrt(2 * self.n_layer)
        yield Slot("tok", (self.padded_vocab, width), INIT_STD, True)
        yield Slot("pos", (self.seq_len, width), INIT_STD, True)
        for i in range(self.n_layer):
            yield Slot(f"{i}.qkv", (3 * width, width), INIT_STD, True)
            yield Slot(f"{i}.out", (width, width), residual, True)
            yield Slot(f"{i}.up", (self.d_ff, width), INIT_STD, True)
            yield Slot(f"{i}.down", (width, self.d_ff), residual, True)
        for name in (*(f"{i}.{norm}" for i in range(self.n_layer) for norm in ("norm1", "norm2")), "norm"):
            yield Slot(f"{name}.gain", (width,), None, False)
            yield Slot(f"{name}.bias", (width,), 0.0, False)


@dataclass(frozen=True, slots=True)
class Slot:
    """One parameter: its shape, the deviation of its initial values (None: ones), and whether weight decay acts."""

    name: str
    shape: tuple[int, ...]
    std: float | None
    decay: bool

    @property
    def size(self) -> int:
        """Numbers in it."""
        return math.prod(self.shape)


def views(shape: Shape, flat: Tensor) -> dict[str, Tensor]:
    """Return every parameter of `shape` as a view of the flat buffer, by name."""
    result = {}
    offset = 0
    for slot in shape.slots():
        result[slot.name] = flat[offset : offset + slot.size].view(slot.shape)
        offset += slot.size
    return result


def buffer_size(shape: Shape) -> tuple[int, int]:
    """Return (numbers in the flat buffer, how many of them at its front decay)."""
    slots = list(shape.slots())
    return sum(slot.size for slot in slots), sum(slot.size for slot in slots if slot.decay)


def initialise(shape: Shape, flat: Tensor, seed: int) -> None:
    """Fill `flat` with the initial weights of `seed`; padding stays zero and does not move the other draws."""
    generator = torch.Generator(device=flat.device).manual_seed(seed)
    flat.zero_()
    for slot, view in zip(shape.slots(), views(shape, flat).values(), strict=True):
        rows = view[: shape.vocab] if slot.name == "tok" else view
        if slot.std is None:
            rows.fill_(1.0)
        elif slot.std:
            rows.normal_(0.0, slot.std, generator=generator)


def hidden(shape: Shape, weights: dict[str, Tensor], tokens: Tensor) -> Tensor:
    """Return the last LayerNorm's output, (batch, time, d_model), for ids `tokens`, (batch, time)."""
    batch, time = tokens.shape
    width, heads = shape.d_model, shape.n_head

    def norm(x: Tensor, name: str) -> Tensor:
        return F.layer_norm(x, (width,), weights[f"{name}.gain"], weights[f"{name}.bias"], EPS_NORM)

    x = F.embedding(tokens, weights["tok"]) + weights["pos"][:time]
    for i in range(shape.n_layer):
        qkv = F.linear(norm(x, f"{i}.norm1"), weights[f"{i}.qkv"]).view(batch, time, 3, heads, width // heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        x = x + F.linear(mixed.transpose(1, 2).reshape(batch, time, width), weights[f"{i}.out"])
        inner = F.gelu(F.linear(norm(x, f"{i}.norm2"), weights[f"{i}.up"]), approximate="tanh")
        x = x + F.linear(inner, weights[f"{i}.down"])
    return norm(x, "norm")


def token_losses(shape: Shape, weights: dict[str, Tensor], tokens: Tensor, targets: Tensor) -> Tensor:
    """Return each target's loss in nats, (batch * time,), 0 where the target is -1."""
    states = hidden(shape, weights, tokens)
    logits = F.linear(states, weights["tok"][: shape.vocab])
    if logits.dtype != torch.float64:
        logits = logits.float()
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="none")


@dataclass(frozen=True, slots=True)
class AdamW:
    """Decoupled weight decay (Loshchilov & Hutter 2019) with the gradient's norm clipped, on flat buffers."""

    beta1: float
    beta2: float
    weight_decay: float
    clip: float
    decayed: int
    """How many numbers at the buffer's front decay."""

    def step(self, weights: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, *, lr: float, count: int) -> None:
        """Take update number `count` (from 1) in place; the gradient is clipped in place."""
        norm = torch.linalg.vector_norm(gradient)
        gradient.mul_(torch.clamp(self.clip / (norm + 1e-6), max=1.0))
        mean.lerp_(gradient, 1 - self.beta1)
        square.mul_(self.beta2).addcmul_(gradient, gradient, value=1 - self.beta2)
        weights[: self.decayed].mul_(1 - lr * self.weight_decay)
        scale = (square / (1 - self.beta2**count)).sqrt_().add_(EPS_ADAM)
        weights.addcdiv_(mean, scale, value=-lr / (1 - self.beta1**count))


def learning_rate(peak: float, *, step: int, warmup: int, done: float) -> float:
    """Return the rate of step `step` (from 0): linear warm-up, then a cosine from the peak to a tenth of it.

    `done` is the share of the trial after warm-up that is over, 0 to 1.
    """
    if step < warmup:
        return peak * (step + 1) / (warmup + 1)
    return peak * (0.55 + 0.45 * math.cos(math.pi * min(done, 1.0)))
