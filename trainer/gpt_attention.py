"""Causal attention for the fused engine: the fastest forward and backward passes that repeat to the last bit.

On Hopper cuDNN's forward pass is the fastest, but its backward pass sums in no fixed order; FlashAttention's does when
it is asked to. For the head sizes where both exist the two are joined: both keep the natural logarithm of the
softmax's sum. Elsewhere PyTorch chooses the kernel, still with a fixed order. `find_attention` tries the joint on a
small example, so that a PyTorch that has changed these operators falls back instead of failing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

AttentionName = Literal["cudnn+flash", "sdpa"]
deterministic: Any = torch.utils.deterministic  # its one setting is a property that its type does not show
JOINED_HEADS = frozenset({64, 128})
"""Head sizes of the joint; cuDNN takes a second to make a kernel for each new one."""
BACKENDS = [SDPBackend.FLASH_ATTENTION, SDPBackend.EFFICIENT_ATTENTION, SDPBackend.MATH]
AGREEMENT = 0.02
"""Largest relative difference of the gradients, both in bf16, at which the joint is trusted."""


class Attended:
    """What a forward pass keeps for its backward pass."""

    __slots__ = ("_qkv", "_statistics", "out")

    def __init__(self, qkv: Tensor, out: Tensor, statistics: Tensor | None) -> None:
        self._qkv, self._statistics = qkv, statistics
        self.out = out
        """(batch, time, heads, head size); attached to autograd's graph unless the joint made it."""

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of the queries, keys and values, (batch, time, 3, heads, head size)."""
        if self._statistics is None:
            with _fixed_order():
                (result,) = torch.autograd.grad(self.out, self._qkv, grad)
            return result
        batch, time, _, heads, size = self._qkv.shape
        query, key, value = _heads_first(self._qkv)
        unused = torch.empty(0, dtype=torch.uint64, device=grad.device)  # the state of dropout
        with _fixed_order():
            parts = torch.ops.aten._scaled_dot_product_flash_attention_backward(
                grad.view(batch, time, heads, size).transpose(1, 2),
                query,
                key,
                value,
                self.out.transpose(1, 2),
                self._statistics,
                None,
                None,
                time,
                time,
                0.0,
                True,
                unused,
                unused,
            )
        return torch.stack([part.transpose(1, 2) for part in parts], dim=2)


def attend(qkv: Tensor, name: AttentionName, *, training: bool) -> Attended:
    """Return causal attention of (batch, time, 3, heads, head size)."""
    if name == "cudnn+flash" and qkv.shape[-1] in JOINED_HEADS:
        query, key, value = _heads_first(qkv)
        out, statistics, *_ = torch.ops.aten._scaled_dot_product_cudnn_attention(
            query, key, value, None, True, 0.0, True, False
        )
        return Attended(qkv, out.transpose(1, 2), statistics.squeeze(-1))
    with torch.set_grad_enabled(training), sdpa_kernel(BACKENDS, set_priority=True):
        query, key, value = _heads_first(qkv.requires_grad_(training))
        out = F.scaled_dot_product_attention(query, key, value, is_causal=True)
        return Attended(qkv, out.transpose(1, 2), None)


def find_attention(device: torch.device) -> AttentionName:
    """Return the best attention that works here, found by trying."""
    if torch.cuda.get_device_capability(device) != (9, 0):
        return "sdpa"
    generator = torch.Generator(device).manual_seed(0)
    qkv = torch.randn(2, 128, 3, 2, 64, device=device, generator=generator).bfloat16()
    grad = torch.randn(2, 128, 2, 64, device=device, generator=generator).bfloat16()
    wanted = attend(qkv.clone(), "sdpa", training=True).backward(grad).float()
    try:
        found = attend(qkv, "cudnn+flash", training=True).backward(grad).float()
    except (RuntimeError, TypeError, ValueError):  # another signature, or no such kernel
        return "sdpa"
    return "cudnn+flash" if (found - wanted).norm() <= AGREEMENT * wanted.norm() else "sdpa"


def _heads_first(qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = qkv.permute(2, 0, 3, 1, 4)
    return query, key, value


@contextmanager
def _fixed_order() -> Iterator[None]:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filling = deterministic.fill_uninitialized_memory
    deterministic.fill_uninitialized_memory = False  # a pass over memory that nobody reads
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])
        deterministic.fill_uninitialized_memory = filling
