"""How large packs are on a CPU: the same whatever others leave free, and smaller where memory is short."""

import pytest
import torch

from overnight.distill import memory
from overnight.distill.memory import CPU_TOKENS, Allowance
from overnight.trainer.memory import GIB

TOKEN = 1 << 20
"""Bytes that a token keeps."""


@pytest.mark.parametrize(
    ("free_gib", "most"), [(64, CPU_TOKENS), (8, CPU_TOKENS), (5, CPU_TOKENS // 2), (4, CPU_TOKENS // 4), (0, 1)]
)
def test_packs_do_not_follow_every_change_of_free_memory(
    monkeypatch: pytest.MonkeyPatch, free_gib: int, most: int
) -> None:
    monkeypatch.setattr(memory, "free_memory", lambda _device: free_gib * GIB)
    assert Allowance(torch.device("cpu"), None).tokens(TOKEN) == most
