"""The fp8 products of a block: forward in e4m3, the gradients of activations in e5m2 x e4m3; the rest stays in bf16.

Weights are scaled by their largest value, once a step. Activations and gradients have fixed scales, since the kernel
that makes them also rounds them: norms and GELUs stay far below 28, which 16 maps to e4m3's largest number, and
gradients of a mean loss are multiplied by 16 x its tokens, which puts them in the middle of e5m2's thirty binades.
What lies outside saturates. Weight gradients, attention, its two products and the head stay in bf16: each would need
another pass over memory that costs more than its product gains (`benchmarks/LOG.md`).
"""

from __future__ import annotations

import torch
from torch import Tensor

from overnight.trainer import gpt_kernels as kernels

ACTIVATION_SCALE = 16.0
GRADIENT_SCALE = 16.0
"""Times the tokens that the loss is a mean of."""
FORWARD = ("qkv", "up", "down")
BACKWARD = ("out", "up", "down")


class Fp8Products:
    """Holds the weights in fp8 and multiplies with them."""

    def __init__(self, weights: dict[str, Tensor], n_layer: int, tokens: int) -> None:
        self._names = [f"{i}.{name}" for i in range(n_layer) for name in ("qkv", "out", "up", "down")]
        self._weights = [weights[name] for name in self._names]
        self._small = {name: torch.empty_like(weights[name], dtype=torch.float8_e4m3fn) for name in self._names}
        self._turned = {
            name: torch.empty_like(weights[name].t(), dtype=torch.float8_e4m3fn, memory_format=torch.contiguous_format)
            for name in self._names
        }
        device = self._weights[0].device
        self.activation = ACTIVATION_SCALE
        self.gradient = GRADIENT_SCALE * tokens
        self._of_activation = torch.tensor(1 / self.activation, device=device)
        self._of_gradient = torch.tensor(1 / self.gradient, device=device)
        self._scales = torch.zeros(len(self._names), 4, device=device)  # cuBLASLt wants each at 16 bytes
        self._of_weight = dict(zip(self._names, self._scales[:, 0].unbind(), strict=True))
        self.refresh()

    def refresh(self) -> None:
        """Take the weights as they are now."""
        highest = torch.stack(torch._foreach_norm(self._weights, float("inf"))).float()
        self._scales[:, 0] = highest / 448.0
        for name, weight, top in zip(self._names, self._weights, highest.unbind(), strict=True):
            kernels.quantise(weight, self._small[name], self._turned[name], top)

    def forward(self, name: str, x: Tensor) -> Tensor:
        """Return x @ weight^T in bf16 for an activation in fp8."""
        return torch._scaled_mm(
            x,
            self._small[name].t(),
            scale_a=self._of_activation,
            scale_b=self._of_weight[name],
            out_dtype=torch.bfloat16,
            use_fast_accum=True,
        )

    def backward(self, name: str, grad: Tensor) -> Tensor:
        """Return grad @ weight in bf16 for a gradient in fp8."""
        return torch._scaled_mm(
            grad,
            self._turned[name].t(),
            scale_a=self._of_gradient,
            scale_b=self._of_weight[name],
            out_dtype=torch.bfloat16,
            use_fast_accum=False,
        )
