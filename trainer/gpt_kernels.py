"""Triton kernels for what lies between the GPT's matrix products: norms, GELU, cross-entropy and AdamW.

Each reads and writes device memory once. They are compiled for a width's power of two and a dtype, never for a batch
or a sequence length, so that a shape never seen before costs no compilation once its width class is cached on disk.
Arithmetic inside is float32. Importing this needs Triton.
"""

# mypy: disable-error-code="import-not-found,import-untyped,untyped-decorator,no-untyped-def,no-untyped-call"
# ruff: noqa: PLR0917  a kernel's arguments are positional
from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

ROWS_IN_FLIGHT = 8
"""Programs on each multiprocessor in the norm's backward pass; each keeps partial sums for the gain and the bias."""


@triton.jit
def _norm_kernel(
    x_ptr, delta_ptr, sum_ptr, out_ptr, small_ptr, mean_ptr, rstd_ptr, gain_ptr, bias_ptr, width, eps, small_scale,
    ADD: tl.constexpr, SMALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    at = row * width + cols
    x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
    if ADD:
        x += tl.load(delta_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rounded = x.to(sum_ptr.dtype.element_ty)
        tl.store(sum_ptr + at, rounded, mask=inside)
        x = rounded.to(tl.float32)
    mean = tl.sum(x, axis=0) / width
    centred = tl.where(inside, x - mean, 0.0)
    rstd = 1.0 / tl.sqrt(tl.sum(centred * centred, axis=0) / width + eps)
    gain = tl.load(gain_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    bias = tl.load(bias_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    out = centred * rstd * gain + bias
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    if SMALL:
        small = tl.clamp(out * small_scale, -448.0, 448.0)
        tl.store(small_ptr + at, small.to(small_ptr.dtype.element_ty), mask=inside)
    tl.store(mean_ptr + row, mean)
    tl.store(rstd_ptr + row, rstd)


@triton.jit(do_not_specialize=["rows", "rows_each"])
def _norm_backward_kernel(
    grad_ptr, x_ptr, mean_ptr, rstd_ptr, gain_ptr, residual_ptr, small_ptr, partial_ptr, rows, width, rows_each,
    small_scale, ADD: tl.constexpr, SMALL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    program = tl.program_id(0).to(tl.int64)
    cols = tl.arange(0, BLOCK)
    inside = cols < width
    gain = tl.load(gain_ptr + cols, mask=inside, other=0.0).to(tl.float32)
    gain_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    bias_sum = tl.zeros((BLOCK,), dtype=tl.float32)
    first = program * rows_each
    for row in range(first, tl.minimum(first + rows_each, rows)):
        at = row * width + cols
        grad = tl.load(grad_ptr + at, mask=inside, other=0.0).to(tl.float32)
        x = tl.load(x_ptr + at, mask=inside, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row)
        unit = tl.where(inside, (x - tl.load(mean_ptr + row)) * rstd, 0.0)
        gain_sum += grad * unit
        bias_sum += grad
        scaled = grad * gain
        along = tl.sum(scaled * unit, axis=0) / width
        level = tl.sum(scaled, axis=0) / width
        result = rstd * (scaled - unit * along - level)
        if ADD:
            result += tl.load(residual_ptr + at, mask=inside, other=0.0).to(tl.float32)
        tl.store(residual_ptr + at, result.to(residual_ptr.dtype.element_ty), mask=inside)
        if SMALL:
            small = tl.clamp(result * small_scale, -57344.0, 57344.0)
            tl.store(small_ptr + at, small.to(small_ptr.dtype.element_ty), mask=inside)
    tl.store(partial_ptr + program * width + cols, gain_sum, mask=inside)
    tl.store(partial_ptr + (tl.num_programs(0) + program) * width + cols, bias_sum, mask=inside)


@triton.jit
def _gelu_kernel(x_ptr, out_ptr, small_ptr, size, small_scale, SMALL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))  # 0.5 (1 + tanh z) = sigmoid(2 z)
    out = x * gate
    tl.store(out_ptr + at, out.to(out_ptr.dtype.element_ty), mask=inside)
    if SMALL:
        small = tl.clamp(out * small_scale, -448.0, 448.0)
        tl.store(small_ptr + at, small.to(small_ptr.dtype.element_ty), mask=inside)


@triton.jit
def _gelu_backward_kernel(x_ptr, grad_ptr, small_ptr, size, small_scale, SMALL: tl.constexpr, BLOCK: tl.constexpr):
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    x = tl.load(x_ptr + at, mask=inside).to(tl.float32)
    grad = tl.load(grad_ptr + at, mask=inside).to(tl.float32)
    gate = tl.sigmoid(1.5957691216057308 * (x + 0.044715 * x * x * x))
    slope = 1.5957691216057308 * (1.0 + 0.134145 * x * x)
    result = grad * (gate + x * gate * (1.0 - gate) * slope)
    tl.store(grad_ptr + at, result.to(grad_ptr.dtype.element_ty), mask=inside)
    if SMALL:
        small = tl.clamp(result * small_scale, -57344.0, 57344.0)
        tl.store(small_ptr + at, small.to(small_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["vocab"])
def _cross_entropy_kernel(
    logits_ptr, target_ptr, loss_ptr, vocab, padded, scale, GRADIENT: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * padded
    target = tl.load(target_ptr + row)
    highest = -float("inf")
    total = 0.0
    for start in range(0, vocab, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        logits = tl.load(base + cols, mask=cols < vocab, other=-float("inf")).to(tl.float32)
        higher = tl.maximum(highest, tl.max(logits, axis=0))
        total = total * tl.exp(highest - higher) + tl.sum(tl.exp(logits - higher), axis=0)
        highest = higher
    normaliser = highest + tl.log(total)
    wanted = tl.load(base + tl.maximum(target, 0)).to(tl.float32)
    tl.store(loss_ptr + row, tl.where(target >= 0, normaliser - wanted, 0.0))
    if GRADIENT:
        tl.debug_barrier()  # every thread has read the target's logit before any writes over it
        for start in range(0, padded, BLOCK):
            cols = start + tl.arange(0, BLOCK)
            logits = tl.load(base + cols, mask=cols < vocab, other=-float("inf")).to(tl.float32)
            grad = tl.exp(logits - normaliser)
            grad = tl.where(cols == target, grad - 1.0, grad) * scale
            tl.store(base + cols, grad.to(logits_ptr.dtype.element_ty), mask=cols < padded)


@triton.jit(do_not_specialize=["decayed"])
def _adamw_kernel(
    master_ptr, copy_ptr, grad_ptr, mean_ptr, square_ptr, norm_ptr, size, decayed, shrink, rate, beta1, beta2,
    correction2, eps, clip, BLOCK: tl.constexpr,
):  # fmt: skip
    at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = at < size
    factor = tl.minimum(clip / (tl.load(norm_ptr) + 1e-6), 1.0)
    grad = tl.load(grad_ptr + at, mask=inside).to(tl.float32) * factor
    mean = tl.load(mean_ptr + at, mask=inside)
    square = tl.load(square_ptr + at, mask=inside)
    value = tl.load(master_ptr + at, mask=inside)
    mean += (1.0 - beta1) * (grad - mean)
    square = beta2 * square + (1.0 - beta2) * grad * grad
    value = value * tl.where(at < decayed, shrink, 1.0) - rate * mean / (tl.sqrt(square / correction2) + eps)
    tl.store(mean_ptr + at, mean, mask=inside)
    tl.store(square_ptr + at, square, mask=inside)
    tl.store(master_ptr + at, value, mask=inside)
    tl.store(copy_ptr + at, value.to(copy_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["rows", "cols"])
def _quantise_kernel(x_ptr, out_ptr, turned_ptr, highest_ptr, rows, cols, TILE: tl.constexpr):
    row = tl.program_id(0) * TILE + tl.arange(0, TILE)[:, None]
    col = tl.program_id(1) * TILE + tl.arange(0, TILE)[None, :]
    inside = (row < rows) & (col < cols)
    scale = 448.0 / tl.maximum(tl.load(highest_ptr), 1e-12)
    x = tl.load(x_ptr + row * cols + col, mask=inside, other=0.0).to(tl.float32) * scale
    small = tl.clamp(x, -448.0, 448.0).to(out_ptr.dtype.element_ty)
    tl.store(out_ptr + row * cols + col, small, mask=inside)
    tl.store(turned_ptr + col * rows + row, small, mask=inside)


def _warps(block: int) -> int:
    return min(max(block // 256, 1), 16)


class Norm:
    """LayerNorm over the last dimension of (rows, width), with what its backward pass needs."""

    def __init__(self, gain: Tensor, bias: Tensor, eps: float) -> None:
        self._gain, self._bias, self._eps = gain, bias, eps
        self._block = triton.next_power_of_2(gain.numel())

    def forward(
        self, x: Tensor, delta: Tensor | None, *, small: float | None = None
    ) -> tuple[Tensor, Tensor, Tensor | None, tuple[Tensor, Tensor]]:
        """Return (x + delta, its norm, the norm x `small` in fp8 if that is given, its statistics)."""
        rows, width = x.shape
        out = torch.empty_like(x)
        added = x if delta is None else torch.empty_like(x)
        mean = torch.empty(rows, device=x.device, dtype=torch.float32)
        rstd = torch.empty_like(mean)
        out8 = None if small is None else torch.empty_like(x, dtype=torch.float8_e4m3fn)
        _norm_kernel[(rows,)](
            x, x if delta is None else delta, added, out, out if out8 is None else out8, mean, rstd, self._gain,
            self._bias, width, self._eps, small or 0.0, ADD=delta is not None, SMALL=out8 is not None,
            BLOCK=self._block, num_warps=_warps(self._block),
        )  # fmt: skip
        return added, out, out8, (mean, rstd)

    def backward(
        self, grad: Tensor, x: Tensor, statistics: tuple[Tensor, Tensor], residual: Tensor | None, out: Tensor,
        *, small: float | None = None,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        """Return the gradient of x, added in place to `residual`, and that x `small` in fp8 if that is given.

        The gradients of (gain, bias) go to `out`, (2, width).
        """
        rows, width = x.shape
        result = torch.empty_like(x) if residual is None else residual
        programs = min(rows, torch.cuda.get_device_properties(x.device).multi_processor_count * ROWS_IN_FLIGHT)
        partial = torch.empty(2, programs, width, device=x.device, dtype=torch.float32)
        result8 = None if small is None else torch.empty_like(x, dtype=torch.float8_e5m2)
        _norm_backward_kernel[(programs,)](
            grad, x, *statistics, self._gain, result, result if result8 is None else result8, partial, rows, width,
            triton.cdiv(rows, programs), small or 0.0, ADD=residual is not None, SMALL=result8 is not None,
            BLOCK=self._block, num_warps=_warps(self._block),
        )  # fmt: skip
        out.copy_(partial.sum(dim=1))
        return result, result8


def gelu(x: Tensor, *, small: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Return GELU in its tanh form, and that x `small` in fp8 if that is given."""
    out = torch.empty_like(x)
    out8 = None if small is None else torch.empty_like(x, dtype=torch.float8_e4m3fn)
    _gelu_kernel[(triton.cdiv(x.numel(), 2048),)](
        x, out, out if out8 is None else out8, x.numel(), small or 0.0, SMALL=out8 is not None, BLOCK=2048, num_warps=8
    )
    return out, out8


def gelu_backward(x: Tensor, grad: Tensor, *, small: float | None = None) -> tuple[Tensor, Tensor | None]:
    """Turn the gradient of GELU's output into that of its input, in place; also x `small` in fp8 if that is given."""
    grad8 = None if small is None else torch.empty_like(x, dtype=torch.float8_e5m2)
    _gelu_backward_kernel[(triton.cdiv(x.numel(), 2048),)](
        x, grad, grad if grad8 is None else grad8, x.numel(), small or 0.0, SMALL=grad8 is not None,
        BLOCK=2048, num_warps=8,
    )  # fmt: skip
    return grad, grad8


def quantise(x: Tensor, out: Tensor, turned: Tensor, highest: Tensor) -> None:
    """Write x, (rows, cols), scaled so that `highest` becomes fp8's largest number, to `out` and transposed."""
    rows, cols = x.shape
    _quantise_kernel[(triton.cdiv(rows, 64), triton.cdiv(cols, 64))](
        x, out, turned, highest, rows, cols, TILE=64, num_warps=4
    )


def cross_entropy(logits: Tensor, targets: Tensor, *, vocab: int, scale: float | None) -> Tensor:
    """Return each row's loss in nats, 0 where the target is -1, over the first `vocab` columns only.

    With a `scale`, `logits` becomes the gradient of scale x (sum of losses); no target may be -1 then. Padded columns
    get none.
    """
    rows, padded = logits.shape
    losses = torch.empty(rows, device=logits.device, dtype=torch.float32)
    _cross_entropy_kernel[(rows,)](
        logits, targets, losses, vocab, padded, scale or 0.0, GRADIENT=scale is not None, BLOCK=4096, num_warps=8
    )
    return losses


def adamw(
    master: Tensor, copy: Tensor, gradient: Tensor, mean: Tensor, square: Tensor, *,
    lr: float, beta1: float, beta2: float, weight_decay: float, clip: float, decayed: int, count: int, eps: float,
) -> None:  # fmt: skip
    """Take update number `count` in place and refresh the low-precision `copy`: `gpt_model.AdamW` in one pass."""
    norm = torch.linalg.vector_norm(gradient, dtype=torch.float32)
    size = master.numel()
    _adamw_kernel[(triton.cdiv(size, 1024),)](
        master, copy, gradient, mean, square, norm, size, decayed, 1 - lr * weight_decay, lr / (1 - beta1**count),
        beta1, beta2, 1 - beta2**count, eps, clip, BLOCK=1024, num_warps=4,
    )  # fmt: skip
