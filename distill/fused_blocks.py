"""Fuses the gated activation and the rotation of positions of a model while it is trained.

Each is one kernel instead of five to ten on a CUDA device, and keeps for the backward pass only what it was given. A
model's own is replaced only where ours gives the same on a small example: other activations and other rotations are
left alone. Torch is imported here: for the model host only.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F

Tensor = torch.Tensor
TOLERANCE = 0.02
"""Two roundings to bf16 at values of about 1."""
_ROTATION = "apply_rotary_pos_emb"
_PARTS = ("gate_proj", "up_proj", "down_proj", "act_fn")


@contextmanager
def fused_blocks(model: Any) -> Iterator[None]:
    """Have `model` use the fused blocks inside the block, where they are equal to its own."""
    cuda = next(model.parameters()).is_cuda and find_spec("triton") is not None
    with ExitStack() as stack:
        for module in _gated_blocks(model):
            stack.callback(delattr, module, "forward")
            module.forward = _gated(module, cuda)
        if cuda:
            for place in {type(module).__module__ for module in model.modules()}:
                own = getattr(sys.modules[place], _ROTATION, None)
                if own is not None and _rotates_alike(own, model):
                    stack.callback(setattr, sys.modules[place], _ROTATION, own)
                    setattr(sys.modules[place], _ROTATION, rotated)
        yield


def _gated_blocks(model: Any) -> list[Any]:
    """Return the feed-forward networks that compute down(silu(gate(x)) * up(x))."""
    found = [module for module in model.modules() if all(hasattr(module, part) for part in _PARTS)]
    alike: dict[type, bool] = {}
    for module in found:
        if type(module) not in alike:
            alike[type(module)] = _gates_alike(module, model)
    return [module for module in found if alike[type(module)]]


def _gated(module: Any, kernels: bool) -> Callable[[Tensor], Tensor]:
    def forward(x: Tensor) -> Tensor:
        gated = _Gate.apply(module.gate_proj(x), module.up_proj(x), kernels)  # type: ignore[no-untyped-call]
        out: Tensor = module.down_proj(gated)
        return out

    return forward


@torch.no_grad()
def _gates_alike(module: Any, model: Any) -> bool:
    weight = next(model.parameters())
    x = torch.randn(2, model.config.get_text_config().hidden_size, device=weight.device, dtype=model.dtype)
    wanted = module(x)
    found = module.down_proj(F.silu(module.gate_proj(x)) * module.up_proj(x))
    return torch.allclose(found, wanted, rtol=TOLERANCE, atol=TOLERANCE * float(wanted.abs().max()))


class _Gate(torch.autograd.Function):
    """silu(gated) * up."""

    @staticmethod
    def forward(ctx: Any, gated: Tensor, up: Tensor, kernels: bool) -> Tensor:
        ctx.save_for_backward(gated, up)
        ctx.kernels = kernels
        if kernels:
            from overnight.distill.kernels import gate

            return gate(gated, up)
        return F.silu(gated).mul_(up)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        gated, up = ctx.saved_tensors
        if ctx.kernels:
            from overnight.distill.kernels import gate_backward

            return *gate_backward(grad.contiguous(), gated, up), None
        of_gated: Tensor = torch.ops.aten.silu_backward(grad * up, gated)
        return of_gated, F.silu(gated).mul_(grad), None


def rotated(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *_: object, **__: object) -> tuple[Tensor, Tensor]:
    """Return queries and keys (1, heads, tokens, width) rotated by the angles of their positions (1, tokens, width)."""
    one, two = (_Rotation.apply(x, cos[0], sin[0]) for x in (query, key))  # type: ignore[no-untyped-call]
    return one, two


class _Rotation(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _turned(x, cos, sin, 1.0)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        cos, sin = ctx.saved_tensors
        return _turned(grad, cos, sin, -1.0), None, None


def _turned(x: Tensor, cos: Tensor, sin: Tensor, sign: float) -> Tensor:
    from overnight.distill.kernels import rotate

    return rotate(x[0].transpose(0, 1).contiguous(), cos, sin, sign).transpose(0, 1)[None]


@torch.no_grad()
def _rotates_alike(own: Callable[..., Any], model: Any) -> bool:
    """Compare on two heads of three tokens, with the angles that the model itself makes."""
    rotary = getattr(model.get_decoder(), "rotary_emb", None)
    if rotary is None:
        return False
    device, dtype = next(model.parameters()).device, model.dtype
    cos, sin = rotary(torch.zeros(1, device=device, dtype=dtype), torch.tensor([[0, 7, 900]], device=device))
    x = torch.randn(1, 2, 3, cos.shape[-1], device=device, dtype=dtype)
    wanted, found = own(x, x, cos, sin), rotated(x, x, cos, sin)
    return all(torch.allclose(a, b, rtol=TOLERANCE, atol=TOLERANCE) for a, b in zip(found, wanted, strict=True))
