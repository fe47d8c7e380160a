"""Triton kernels for what lies between the products of a LoRA training: fewer launches, each reading memory once.

Dropout is never stored: whether an element is kept is a hash of the pass' seed and its place (the finalizer of
MurmurHash3), found again in the backward pass. A kernel is compiled once for a model, not for each of its widths, and
never for a number of tokens. Arithmetic inside is float32. Importing this needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0917  a kernel's arguments are positional
from __future__ import annotations

import torch
import triton
import triton.language as tl

Tensor = torch.Tensor
_WORD = 1 << 32
_SEEDS = 1 << 31
"""So that a seed is always passed as 32 bits."""


@triton.jit
def _kept(place, seed, threshold):
    """Return whether the elements at `place` survive dropout."""
    word = (place.to(tl.uint32) * 0x9E3779B1) ^ seed.to(tl.uint32)
    word = (word ^ (word >> 16)) * 0x85EBCA6B
    word = (word ^ (word >> 13)) * 0xC2B2AE35
    return (word ^ (word >> 16)) >= threshold.to(tl.uint32)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _down_kernel(
    x_ptr, down_ptr, out_ptr, rows, width, rank, seed, threshold, factor, DROP: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    number = tl.arange(0, RANKS)
    total = tl.zeros((ROWS, RANKS), dtype=tl.float32)
    for start in range(0, width, COLS):
        col = start + tl.arange(0, COLS)
        place = row[:, None] * width + col[None, :]
        x = tl.load(x_ptr + place, mask=(row < rows)[:, None] & (col < width)[None, :], other=0.0)
        if DROP:
            x = tl.where(_kept(place, seed, threshold), x, 0.0)
        at = number[:, None] * width + col[None, :]
        down = tl.load(down_ptr + at, mask=(number < rank)[:, None] & (col < width)[None, :], other=0.0)
        total += tl.dot(x, tl.trans(down), input_precision="ieee")
    inside = (row < rows)[:, None] & (number < rank)[None, :]
    out = (total * factor).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row[:, None] * rank + number[None, :], out, mask=inside)


@triton.jit(do_not_specialize=["rows", "seed", "threshold"])
def _down_backward_kernel(
    x_ptr, small_ptr, down_ptr, x_grad_ptr, down_grad_ptr, rows, width, rank, seed, threshold, factor,
    DROP: tl.constexpr, WANT_X: tl.constexpr,
    ROWS: tl.constexpr, COLS: tl.constexpr, RANKS: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    col = tl.program_id(1) * COLS + tl.arange(0, COLS)
    number = tl.arange(0, RANKS)
    place = row[:, None] * width + col[None, :]
    inside = (row < rows)[:, None] & (col < width)[None, :]
    x = tl.load(x_ptr + place, mask=inside, other=0.0)
    small = tl.load(
        small_ptr + row[:, None] * rank + number[None, :],
        mask=(row < rows)[:, None] & (number < rank)[None, :],
        other=0.0,
    )
    at = number[:, None] * width + col[None, :]
    known = (number < rank)[:, None] & (col < width)[None, :]
    if DROP:
        kept = _kept(place, seed, threshold)
        x = tl.where(kept, x, 0.0)
    down_grad = tl.dot(tl.trans(small), x, input_precision="ieee") * factor
    tl.atomic_add(down_grad_ptr + at, down_grad, mask=known, sem="relaxed")
    if WANT_X:
        down = tl.load(down_ptr + at, mask=known, other=0.0)
        change = tl.dot(small, down, input_precision="ieee") * factor
        if DROP:
            change = tl.where(kept, change, 0.0)
        grad = tl.load(x_grad_ptr + place, mask=inside, other=0.0).to(tl.float32) + change
        tl.store(x_grad_ptr + place, grad.to(x_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_kernel(gate_ptr, up_ptr, out_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + at, (gate * tl.sigmoid(gate) * up).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gate_backward_kernel(grad_ptr, gate_ptr, up_ptr, gate_grad_ptr, up_grad_ptr, size, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
    gate = tl.load(gate_ptr + at, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(up_ptr + at, mask=inside, other=0.0).to(tl.float32)
    share = tl.sigmoid(gate)
    slope = share * (1.0 + gate * (1.0 - share))
    tl.store(gate_grad_ptr + at, (grad * up * slope).to(gate_grad_ptr.dtype.element_ty), mask=inside)
    tl.store(up_grad_ptr + at, (grad * gate * share).to(up_grad_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _rotate_kernel(
    x_ptr, cos_ptr, sin_ptr, out_ptr, sign, HEADS: tl.constexpr, WIDTH: tl.constexpr, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    place = tl.arange(0, BLOCK)
    half: tl.constexpr = WIDTH // 2
    inside = place < HEADS * half
    col = place % half
    first = token * HEADS * WIDTH + (place // half) * WIDTH + col
    cos = tl.load(cos_ptr + token * WIDTH + col, mask=inside, other=0.0).to(tl.float32)
    sin = tl.load(sin_ptr + token * WIDTH + col, mask=inside, other=0.0).to(tl.float32) * sign
    one = tl.load(x_ptr + first, mask=inside, other=0.0).to(tl.float32)
    two = tl.load(x_ptr + first + half, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + first, (one * cos - two * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + first + half, (two * cos + one * sin).to(out_ptr.dtype.element_ty), mask=inside)


def lora_down(x: Tensor, down: Tensor, rate: float, seed: int, scale: float, ranks: int) -> Tensor:
    """Return scale * dropout(x) @ down' for `x` (tokens, in) and `down` (at most `ranks`, in)."""
    (rows, width), rank = x.shape, down.shape[0]
    out = x.new_empty(rows, rank)
    size = 32
    _down_kernel[(triton.cdiv(rows, size),)](
        x, down, out, rows, width, rank, seed % _SEEDS, int(rate * _WORD), scale / (1 - rate), DROP=rate > 0,
        ROWS=size, COLS=128, RANKS=_padded(ranks), num_stages=4,
    )  # fmt: skip
    return out


def lora_down_backward(
    x: Tensor,
    small: Tensor,
    down: Tensor,
    x_grad: Tensor | None,
    down_grad: Tensor,
    rate: float,
    seed: int,
    scale: float,
    ranks: int,
) -> None:
    """Add the gradients of its inputs through `lora_down`; `small` (tokens, ranks) is that of its output."""
    (rows, width), rank = x.shape, down.shape[0]
    size, cols = 128, 64
    _down_backward_kernel[(triton.cdiv(rows, size), triton.cdiv(width, cols))](
        x, small, down, x if x_grad is None else x_grad, down_grad, rows, width, rank, seed % _SEEDS,
        int(rate * _WORD), scale / (1 - rate), DROP=rate > 0, WANT_X=x_grad is not None,
        ROWS=size, COLS=cols, RANKS=_padded(ranks),
    )  # fmt: skip


def gate(gated: Tensor, up: Tensor) -> Tensor:
    """Return silu(gated) * up."""
    out = torch.empty_like(gated)
    _gate_kernel[(triton.cdiv(out.numel(), 2048),)](gated, up, out, out.numel(), BLOCK=2048)
    return out


def gate_backward(grad: Tensor, gated: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradients of `gated` and `up`."""
    of_gated, of_up = torch.empty_like(gated), torch.empty_like(up)
    blocks = triton.cdiv(grad.numel(), 2048)
    _gate_backward_kernel[(blocks,)](grad, gated, up, of_gated, of_up, grad.numel(), BLOCK=2048)
    return of_gated, of_up


def rotate(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    """Return `x` (tokens, heads, width) with each head's halves rotated by the angles of its token (tokens, width)."""
    out = torch.empty_like(x)
    tokens, heads, width = x.shape
    block = triton.next_power_of_2(heads * width // 2)
    _rotate_kernel[(tokens,)](x, cos, sin, out, sign, HEADS=heads, WIDTH=width, BLOCK=block)
    return out


def _padded(ranks: int) -> int:
    return max(16, int(triton.next_power_of_2(ranks)))
