"""LoRA layers of peft, computed for training by one function each: fewer passes over memory, nothing kept twice.

A layer keeps its input and nothing else; dropout is drawn again in the backward pass from the same seed. Products run
in the precision that is fastest here (`fastest_products`), the adapter's own weights stay in float32. Modules of peft
keep their parameters, so that an adapter is saved, loaded and switched as any other. Torch is imported here: for the
model host only.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

Tensor = torch.Tensor
_BYTE = 256


@dataclass(slots=True)
class _Layer:
    """One adapted linear layer."""

    module: Any
    """Of peft."""
    weight: Tensor
    """The base's, (out, in), in the precision of products."""
    bias: Tensor | None
    down: torch.nn.Parameter
    """peft's `lora_A`, (r, in), float32."""
    up: torch.nn.Parameter
    """peft's `lora_B`, (out, r), float32."""
    small_down: Tensor
    """Copies in the precision of products,"""
    small_up: Tensor
    """this one with the adapter's scale in it."""
    scale: float


class FusedLora:
    """The adapted layers of one adapter, as training computes them.

    Args:
        model: holds peft's layers.
        adapter: which adapter.
        dropout: of the input of each update.
        dtype: of the products.
    """

    def __init__(self, model: Any, adapter: str, *, dropout: float, dtype: torch.dtype) -> None:
        from peft.tuners.lora import Linear

        # On a CPU a byte is drawn for each element: numpy does so many times faster than torch draws numbers.
        self.dropout = round(dropout * _BYTE) / _BYTE
        self.dtype = dtype
        self.seed = 0
        """Of the dropout of the next pass; the backward pass must find the same."""
        self._layers = [
            _layer(module, adapter, dtype)
            for module in model.modules()
            if isinstance(module, Linear) and adapter in module.lora_A
        ]

    @property
    def parameters(self) -> list[torch.nn.Parameter]:
        """The adapter's weights."""
        return [parameter for layer in self._layers for parameter in (layer.down, layer.up)]

    def refresh(self) -> None:
        """Copy the weights into the precision of products: before the first pass, and after each step."""
        with torch.no_grad():
            torch._foreach_copy_([layer.small_down for layer in self._layers], [layer.down for layer in self._layers])
            torch._foreach_copy_([layer.small_up for layer in self._layers], [layer.up for layer in self._layers])
            for scale in {layer.scale for layer in self._layers}:
                torch._foreach_mul_([layer.small_up for layer in self._layers if layer.scale == scale], scale)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the model compute its adapted layers here, inside the block."""
        for number, layer in enumerate(self._layers):
            layer.module.forward = self._forward(number, layer)
        try:
            yield
        finally:
            for layer in self._layers:
                del layer.module.forward

    def _forward(self, number: int, layer: _Layer) -> Any:
        def forward(x: Tensor) -> Tensor:
            seed = self.seed * len(self._layers) + number
            rate = self.dropout if torch.is_grad_enabled() else 0.0
            flat = x.reshape(-1, x.shape[-1])
            out: Tensor = _LoraLinear.apply(flat, layer.down, layer.up, layer, rate, seed)  # type: ignore[no-untyped-call]
            return out.view(*x.shape[:-1], -1)

        return forward


def _layer(module: Any, adapter: str, dtype: torch.dtype) -> _Layer:
    base, down, up = module.base_layer, module.lora_A[adapter].weight, module.lora_B[adapter].weight
    return _Layer(
        module=module,
        weight=base.weight.detach().to(dtype),
        bias=None if base.bias is None else base.bias.detach().to(dtype),
        down=down,
        up=up,
        small_down=torch.empty_like(down, dtype=dtype),
        small_up=torch.empty_like(up, dtype=dtype),
        scale=module.scaling[adapter],
    )


class _LoraLinear(torch.autograd.Function):
    """x W' + bias + scale * dropout(x) A' B' over (tokens, in)."""

    @staticmethod
    def forward(  # noqa: PLR0917 the signature of autograd
        ctx: Any,
        x: Tensor,
        down: Tensor,  # noqa: ARG004 here and next, so that autograd asks for their gradients
        up: Tensor,  # noqa: ARG004
        layer: _Layer,
        rate: float,
        seed: int,
    ) -> Tensor:
        ctx.dtype = x.dtype
        x = x.to(layer.weight.dtype)
        small = _dropped(x, rate, seed)[0] @ layer.small_down.T
        out = F.linear(x, layer.weight, layer.bias).addmm_(small, layer.small_up.T)
        ctx.save_for_backward(x, small)
        ctx.layer, ctx.rate, ctx.seed = layer, rate, seed
        return out.to(ctx.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, small = ctx.saved_tensors
        layer: _Layer = ctx.layer
        grad = grad.to(x.dtype)
        of_small = grad @ layer.small_up
        dropped, kept = _dropped(x, ctx.rate, ctx.seed)
        of_down = (of_small.T @ dropped).float()
        of_up = (grad.T @ small).float().mul_(layer.scale)
        if not ctx.needs_input_grad[0]:
            return None, of_down, of_up, None, None, None
        of_x = grad @ layer.weight
        if kept is None:
            of_x.addmm_(of_small, layer.small_down)
        else:
            of_x.addcmul_(of_small @ layer.small_down, kept, value=1 / (1 - ctx.rate))
        return of_x.to(ctx.dtype), of_down, of_up, None, None, None


def _dropped(x: Tensor, rate: float, seed: int) -> tuple[Tensor, Tensor | None]:
    """Return `x` after dropout, and where it was kept; the same for the same seed."""
    if rate == 0.0:
        return x, None
    if x.is_cuda:
        torch.cuda.manual_seed(seed)
        dropped, kept = torch.native_dropout(x, rate, True)
        return dropped, kept
    drawn = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(x.numel()), dtype=np.uint8)
    kept = torch.from_numpy(drawn >= round(rate * _BYTE)).view(x.shape)
    return x * kept * (1 / (1 - rate)), kept


def fastest_products(device: torch.device, base: torch.dtype) -> torch.dtype:
    """Return the fastest precision of products here: the base's on a GPU; on a CPU bf16 where it computes that."""
    if device.type != "cpu" or base != torch.float32:
        return base
    a, b = torch.randn(512, 512), torch.randn(512, 1024)
    return torch.bfloat16 if _seconds(a.bfloat16(), b.bfloat16()) < _seconds(a, b) / 1.3 else base


def _seconds(a: Tensor, b: Tensor) -> float:
    times = []
    for _ in range(5):
        started = time.perf_counter()
        a @ b
        times.append(time.perf_counter() - started)
    return min(times)
