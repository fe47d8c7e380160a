"""LoRA layers of peft, computed for training by one function for each group that shares an input.

A group (queries, keys and values; gate and up) keeps its input and the small product, nothing else; dropout is found
again in the backward pass from the same seed. Products run in the precision that is fastest here (`fastest_products`).
The adapter's weights stay in float32, in one vector of which peft's parameters are views, as their gradients are of
another: what the optimizer does is one pass. Torch is imported here: for the model host only.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from overnight.store.errors import CampaignError

Tensor = torch.Tensor
SIBLINGS = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))
"""Layers of one module that are given the same input."""
BF16_PRODUCTS = ("avx512_bf16", "amx_bf16")
"""What a CPU that multiplies bf16 faster than float32 is able to, by torch's names (benchmarks/lora.md)."""
_BYTE = 256
_SEEDS = 1 << 31


@dataclass(slots=True)
class _Layer:
    """One adapted linear layer, in the precision of products."""

    module: Any
    """Of peft."""
    weight: Tensor
    """The base's, (out, in)."""
    bias: Tensor | None
    up: Tensor
    """peft's `lora_B`, (out, r): a view."""
    up_grad: Tensor
    """Its gradient in float32: a view."""


@dataclass(slots=True)
class _Group:
    """Adapted layers with one input."""

    number: int
    layers: list[_Layer]
    down: Tensor
    """peft's `lora_A` of all of them, (layers * r, in), in the precision of products: a view."""
    down_grad: Tensor
    """Its gradient in float32: a view."""
    scale: float
    widest: int
    """The most ranks that any group of the adapter has: kernels are compiled for it once."""


class FusedLora:
    """The adapted layers of one adapter, as training computes them.

    Args:
        model: holds peft's layers.
        adapter: which adapter.
        dropout: of the input of each update.
        dtype: of the products.

    Raises:
        CampaignError: one of its layers is not a plain linear one.
    """

    def __init__(self, model: Any, adapter: str, *, dropout: float, dtype: torch.dtype) -> None:
        # On a CPU a byte is drawn for each element: numpy does so many times faster than torch draws numbers.
        self.dropout = round(dropout * _BYTE) / _BYTE
        self.seed = 0
        """Of the dropout of the next pass; the backward pass must find the same."""
        modules = list(_grouped(model, adapter))
        self._parameters = [
            *(module.lora_A[adapter].weight for group in modules for module in group),
            *(module.lora_B[adapter].weight for group in modules for module in group),
        ]
        device = self._parameters[0].device
        sizes = [parameter.numel() for parameter in self._parameters]
        self.vector = torch.nn.Parameter(torch.empty(sum(sizes), device=device))
        """All weights of the adapter."""
        self.vector.grad = torch.zeros_like(self.vector)
        self._small = torch.empty_like(self.vector, dtype=dtype, requires_grad=False)
        self._anchor = torch.zeros((), device=device, requires_grad=True)
        """Makes autograd go through a layer whose input needs no gradient."""
        places = [torch.split(one, sizes) for one in (self.vector.data, self.vector.grad, self._small)]
        for parameter, value, grad in zip(self._parameters, places[0], places[1], strict=True):
            shape = parameter.shape
            parameter.data = value.view(shape).copy_(parameter.data)
            parameter.grad = grad.view(shape)
        self._groups = _groups(modules, adapter, self._small, self.vector.grad, dtype)
        self.refresh()

    def refresh(self) -> None:
        """Copy the weights into the precision of products: after each step."""
        self._small.copy_(self.vector.data)

    @contextmanager
    def installed(self) -> Iterator[None]:
        """Have the model compute its adapted layers here, inside the block."""
        for group in self._groups:
            _Siblings(self, group).install()
        try:
            yield
        finally:
            for group in self._groups:
                for layer in group.layers:
                    del layer.module.forward

    def outputs(self, group: _Group, x: Tensor) -> tuple[Tensor, ...]:
        """Return what the layers of a group make of their input (..., in)."""
        rate = self.dropout if torch.is_grad_enabled() else 0.0
        seed = hash((self.seed, group.number)) % _SEEDS  # of whole numbers: the same in every process
        flat = x.reshape(-1, x.shape[-1])
        outs = _LoraGroup.apply(self._anchor, flat, group, rate, seed)  # type: ignore[no-untyped-call]
        return tuple(out.view(*x.shape[:-1], -1) for out in outs)


class _Siblings:
    """Computes a group when its first layer is called, and hands the others their parts."""

    def __init__(self, fused: FusedLora, group: _Group) -> None:
        self._fused, self._group = fused, group
        self._input: Tensor | None = None
        self._outputs: dict[int, Tensor] = {}

    def install(self) -> None:
        for place, layer in enumerate(self._group.layers):
            layer.module.forward = lambda x, place=place: self._output(place, x)

    def _output(self, place: int, x: Tensor) -> Tensor:
        if self._input is not x or place not in self._outputs:
            self._input, self._outputs = x, dict(enumerate(self._fused.outputs(self._group, x)))
        found = self._outputs.pop(place)
        if not self._outputs:
            self._input = None
        return found


def _grouped(model: Any, adapter: str) -> Iterator[list[Any]]:
    """Yield peft's layers, siblings together."""
    from peft.tuners.lora import Linear

    for parent in model.modules():
        layers = {name: child for name, child in parent.named_children() if adapter in getattr(child, "lora_A", ())}
        for name, layer in layers.items():
            if not (isinstance(layer, Linear) and isinstance(layer.base_layer, torch.nn.Linear)):
                raise CampaignError(f"`{name}` of the base model is no plain linear layer; leave it out of `targets`")
        for names in SIBLINGS:
            together = [layers.pop(name) for name in names if name in layers]
            if together:
                yield together
        yield from ([layer] for layer in layers.values())


def _groups(modules: list[list[Any]], adapter: str, small: Tensor, grads: Tensor, dtype: torch.dtype) -> list[_Group]:
    """Return the groups, their weights and gradients as views: first all of `lora_A`, then all of `lora_B`."""
    groups, at = [], 0
    widest = max(sum(module.r[adapter] for module in members) for members in modules)
    for number, members in enumerate(modules):
        ranks, width = sum(m.r[adapter] for m in members), members[0].in_features
        place = slice(at, at + ranks * width)
        scale = members[0].scaling[adapter]
        down, down_grad = (one[place].view(ranks, width) for one in (small, grads))
        groups.append(_Group(number, [], down, down_grad, scale, widest))
        at = place.stop
    for group, members in zip(groups, modules, strict=True):
        for module in members:
            base, shape = module.base_layer, module.lora_B[adapter].weight.shape
            place = slice(at, at + shape.numel())
            group.layers.append(
                _Layer(
                    module=module,
                    weight=base.weight.detach().to(dtype),
                    bias=None if base.bias is None else base.bias.detach().to(dtype),
                    up=small[place].view(shape),
                    up_grad=grads[place].view(shape),
                )
            )
            at = place.stop
    return groups


class _LoraGroup(torch.autograd.Function):
    """x W' + bias + scale * dropout(x) A' B' over (tokens, in), for each layer of a group."""

    @staticmethod
    def forward(  # noqa: PLR0917 the signature of autograd
        ctx: Any,
        anchor: Tensor,  # noqa: ARG004
        x: Tensor,
        group: _Group,
        rate: float,
        seed: int,
    ) -> tuple[Tensor, ...]:
        ctx.dtype = x.dtype
        x = x.to(group.down.dtype)
        small = _down(x, group, rate, seed)
        ctx.save_for_backward(x, small)
        ctx.group, ctx.rate, ctx.seed = group, rate, seed
        parts = torch.chunk(small, len(group.layers), dim=1)
        return tuple(
            F.linear(x, layer.weight, layer.bias).addmm_(part, layer.up.T)
            for layer, part in zip(group.layers, parts, strict=True)
        )

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, small = ctx.saved_tensors
        group: _Group = ctx.group
        of_small = torch.empty_like(small)
        of_x = None
        count = len(group.layers)
        for layer, grad, part, of_part in zip(
            group.layers, grads, torch.chunk(small, count, dim=1), torch.chunk(of_small, count, dim=1), strict=True
        ):
            torch.mm(grad, layer.up, out=of_part)
            layer.up_grad.add_(grad.T @ part)
            if ctx.needs_input_grad[1]:
                of_x = grad @ layer.weight if of_x is None else of_x.addmm_(grad, layer.weight)
        _down_backward(x, of_small, of_x, group, ctx.rate, ctx.seed)
        return None, None if of_x is None else of_x.to(ctx.dtype), None, None, None


def _down(x: Tensor, group: _Group, rate: float, seed: int) -> Tensor:
    """Return scale * dropout(x) A'."""
    if _kernels(x):
        from overnight.distill.kernels import lora_down

        return lora_down(x, group.down, rate, seed, group.scale, group.widest)
    dropped, _, factor = _dropped(x, rate, seed)
    return (dropped @ group.down.T).mul_(group.scale * factor)


def _down_backward(  # noqa: PLR0917
    x: Tensor, small: Tensor, of_x: Tensor | None, group: _Group, rate: float, seed: int
) -> None:
    """Add the gradients through `_down` to those of its input and of A."""
    if _kernels(x):
        from overnight.distill.kernels import lora_down_backward

        lora_down_backward(x, small, group.down, of_x, group.down_grad, rate, seed, group.scale, group.widest)
        return
    dropped, kept, factor = _dropped(x, rate, seed)
    small.mul_(group.scale * factor)
    group.down_grad.add_(small.T @ dropped)
    if of_x is None:
        return
    if kept is None:
        of_x.addmm_(small, group.down)
    else:
        of_x.addcmul_(small @ group.down, kept)


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def _kernels(x: Tensor) -> bool:
    return x.is_cuda and _has_triton()


def _dropped(x: Tensor, rate: float, seed: int) -> tuple[Tensor, Tensor | None, float]:
    """Return `x` after dropout, where it was kept, and what it is still to be multiplied with; repeats for a seed."""
    if rate == 0.0:
        return x, None, 1.0
    if x.is_cuda:
        torch.cuda.manual_seed(seed)
        dropped, kept = torch.native_dropout(x, rate, True)
        return dropped, kept / (1 - rate), 1.0
    drawn = np.frombuffer(np.random.Generator(np.random.SFC64(seed)).bytes(x.numel()), dtype=np.uint8)
    kept = torch.from_numpy(drawn >= round(rate * _BYTE)).view(x.shape)
    return x * kept, kept, 1 / (1 - rate)


def fastest_products(model: Any) -> torch.dtype:
    """Return the fastest precision to train `model` in: its own on a GPU; on a CPU bf16 where it computes that.

    The same on one machine every time, however busy it is: what is learned depends on it. Layers that are not adapted
    compute in the model's own precision, and need it of their inputs.
    """
    base: torch.dtype = model.dtype
    if base != torch.float32 or next(model.parameters()).device.type != "cpu" or not _all_adapted(model):
        return base
    known: Mapping[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()  # older ones of torch do not tell
    return torch.bfloat16 if any(known.get(name) for name in BF16_PRODUCTS) else base


def _all_adapted(model: Any) -> bool:
    adapted = [module for module in model.modules() if hasattr(module, "lora_A")]
    inside = {id(part) for module in adapted for part in module.modules()}
    linear = [module for module in model.get_decoder().modules() if isinstance(module, torch.nn.Linear)]
    return all(id(module) in inside for module in linear)
