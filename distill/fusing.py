"""Fuses the root-mean-square norms of a model: one kernel each instead of six (2 ms of 20, see benchmarks/LOG.md).

Runs in the model host only, so torch is imported here. A norm is replaced only where torch's fused one computes the
same: variants that scale otherwise (Gemma's 1 + weight) are found by comparing results, and left alone.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

TOLERANCE = 0.02
"""Two roundings to bf16 at values of about 1."""


class FusedRMSNorm(torch.nn.Module):
    """Root-mean-square norm (Zhang and Sennrich 2019) over the last dimension, with the weight of another module."""

    def __init__(self, weight: torch.nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight = weight
        self.eps = eps

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return `x` scaled to a root mean square of 1, times the weight."""
        return F.rms_norm(x, self.weight.shape, self.weight, self.eps)


def fuse_norms(model: Any) -> int:
    """Replace the norms of a `transformers` model in place; return how many were replaced."""
    replaced = 0
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            eps = getattr(child, "variance_epsilon", None)
            if type(child).__name__.endswith("RMSNorm") and isinstance(eps, float):
                fused = FusedRMSNorm(child.weight, eps)
                if _agree(child, fused):
                    setattr(parent, name, fused)
                    replaced += 1
    return replaced


@torch.inference_mode()
def _agree(one: Any, other: FusedRMSNorm) -> bool:
    weight = other.weight
    x = torch.randn((4, *weight.shape), device=weight.device, dtype=weight.dtype)
    return bool(torch.allclose(one(x).float(), other(x).float(), atol=TOLERANCE, rtol=TOLERANCE))
