"""How much memory a training may take, and how many tokens of a pack that is.

The limit is enforced by the allocator on a CUDA device: what goes past it fails, and the trainer answers with smaller
packs. On a CPU nothing can enforce it, so that the estimate alone keeps to it. Torch is imported here: for the model
host only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from overnight.distill.fused_lora import SIBLINGS
from overnight.store.errors import ProposerError
from overnight.trainer.memory import GIB, free_memory

CONTEXT = int(0.75 * GIB)
"""What CUDA itself and its libraries hold beside the allocator: 0.5 to 0.7 GiB on an H100."""
WORKING = 2 * GIB
"""Logits piece by piece, gradients and moments of the adapter, and what one layer's backward pass needs at once."""
MARGIN = 1.05
MOST_TOKENS = 1 << 16
"""Of a pack, whatever memory there is: places in a pack's activations are counted in 32 bits."""
CPU_TOKENS = 1 << 12
"""Of a pack on a CPU, halved until it fits: how rows are packed rounds their sums, and what other processes leave free
this minute should not change what is learned."""


class Allowance:
    """The memory of one training.

    Args:
        device: where the model is.
        limit_gib: most memory of the process on the device, or of the system on a CPU; None: what is free.
    """

    def __init__(self, device: torch.device, limit_gib: float | None) -> None:
        index = torch.cuda.current_device() if device.type == "cuda" and device.index is None else device.index
        self._device = torch.device(device.type, index)  # the allocator wants a number
        self._limit = None if limit_gib is None else int(limit_gib * GIB)
        self._cuda = device.type == "cuda"
        if self._cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats(self._device)

    def tokens(self, bytes_each: int) -> int:
        """Return how many tokens a pack may have, at least 1, given what each one keeps for the backward pass.

        Raises:
            ProposerError: the limit is below what the model holds already.
        """
        held = torch.cuda.memory_reserved(self._device) + CONTEXT if self._cuda else 0
        room = free_memory(None)
        if self._limit is not None:
            room = min(room, self._limit - held)
            if room <= 0:
                raise ProposerError(
                    f"`memory_gib = {self._limit / GIB:g}` is below the {held / GIB:.1f} GiB that the model takes: "
                    "raise it, or choose a smaller base model",
                    failure="llm_error",
                )
        fits = max(1, int((room - min(WORKING, room // 2)) / (bytes_each * MARGIN)))
        if self._cuda:
            return min(MOST_TOKENS, fits)
        most = CPU_TOKENS
        while most > fits:
            most //= 2
        return max(most, 1)

    @contextmanager
    def enforced(self) -> Iterator[None]:
        """Keep the allocator to the limit inside the block."""
        if not self._cuda or self._limit is None:
            yield
            return
        total = torch.cuda.get_device_properties(self._device).total_memory
        torch.cuda.set_per_process_memory_fraction(min(1.0, max(0, self._limit - CONTEXT) / total), self._device)
        try:
            yield
        finally:
            torch.cuda.set_per_process_memory_fraction(1.0, self._device)

    def peak_gib(self) -> float | None:
        """Return the most memory that the allocator held, weights included; None on a CPU."""
        return torch.cuda.max_memory_reserved(self._device) / GIB if self._cuda else None


def bytes_a_token(model: Any) -> int:
    """Return about what one token keeps for the backward pass: what every linear layer makes, and what it is given.

    Layers that share an input keep it once. Measured in Qwen2.5-3B's shape: 2.9 MB, where this says 3.3.
    """
    features = 0
    for parent in model.get_decoder().modules():
        if hasattr(parent, "lora_A") or isinstance(parent, torch.nn.ModuleDict):
            continue  # the parts of an adapted layer, which its parent counts
        layers = {name: child for name, child in parent.named_children() if hasattr(child, "out_features")}
        features += sum(layer.out_features for layer in layers.values())
        shared = [name for names in SIBLINGS for name in names[1:] if names[0] in layers]
        features += sum(layer.in_features for name, layer in layers.items() if name not in shared)
    return int(features * model.dtype.itemsize)
