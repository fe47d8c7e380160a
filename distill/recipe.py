"""How an adapter is trained: the recipe, typed and checked when it is made. Nothing here loads torch."""

from __future__ import annotations

from dataclasses import dataclass

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""All of attention and of the gated feed-forward network, by their names in Llama, Qwen, Mistral and their kin."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LoraRecipe:
    """The settings of one training (Hu et al. 2021, LoRA).

    Raises:
        ValueError: one of them is outside its range; the message names it.
    """

    r: int = 16
    """Rank of each update."""
    alpha: float = 32.0
    """An update is scaled by alpha / r."""
    dropout: float = 0.05
    """Of the input of each update, while training."""
    targets: tuple[str, ...] = PROJECTIONS
    """Names of the linear layers that are adapted."""
    epochs: int = 20
    """What a history of sixty turns needs (benchmarks/distill.md)."""
    learning_rate: float = 5e-4
    """The peak, reached after the warm-up; a cosine takes it to zero."""
    warmup: float = 0.1
    """Share of all steps."""
    weight_decay: float = 0.01
    batch: int = 8
    """Rows in a step of the optimizer; how many of them go through the model at once, memory decides."""
    max_grad_norm: float = 1.0
    max_length: int = 2048
    """Tokens of prompt and longest reply; rows above it are left out and named, never cut."""
    seed: int = 0
    """Of the order of rows, the first weights and dropout."""

    def __post_init__(self) -> None:
        """Check the ranges."""
        for name, low in (("r", 1), ("epochs", 1), ("batch", 1), ("max_length", 1), ("seed", 0)):
            if getattr(self, name) < low:
                raise ValueError(f"`{name} = {getattr(self, name)}`: at least {low}")
        for name in ("alpha", "learning_rate", "max_grad_norm"):
            if not getattr(self, name) > 0:
                raise ValueError(f"`{name} = {getattr(self, name)}`: above 0")
        for name in ("dropout", "warmup"):
            if not 0 <= getattr(self, name) < 1:
                raise ValueError(f"`{name} = {getattr(self, name)}`: from 0 to below 1")
        if not self.weight_decay >= 0:
            raise ValueError(f"`weight_decay = {self.weight_decay}`: at least 0")
        if not self.targets:
            raise ValueError("`targets`: name at least one linear layer")
