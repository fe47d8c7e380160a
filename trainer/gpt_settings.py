"""The GPT trainer's `[trainer]` table: what may be written there, and how it completes a configuration.

The thirteen knobs can be on the menu or be plain settings here; whichever the menu leaves out keeps the value of this
table, or the default of the 354M campaign. Importing this loads pydantic and nothing heavier.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal, Self, cast

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from overnight.store.errors import CampaignError
from overnight.store.records import Config

Precision = Literal["auto", "float32", "bf16", "fp8"]
EngineName = Literal["auto", "eager", "fused"]
Positive = Annotated[int, Field(gt=0)]
KNOBS: Mapping[str, str] = {
    "n_layer": "int",
    "n_head": "int",
    "d_model": "int",
    "d_ff": "int",
    "lr": "float",
    "lr_warmup": "int",
    "grad_clip": "float",
    "weight_decay": "float",
    "beta1": "float",
    "beta2": "float",
    "batch_size": "int",
    "seq_len": "int",
    "precision": "str",
}
"""Every knob that this trainer has, with its type."""


class GptSettings(BaseModel):
    """The `[trainer]` table of a campaign whose trainer is `gpt`."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)

    steps: Positive | None = Field(default=None, description="optimizer steps in a trial")
    tokens: Positive | None = Field(default=None, description="training tokens in a trial, rounded up to whole steps")
    seconds: Annotated[float, Field(gt=0)] | None = Field(default=None, description="seconds of training in a trial")
    data: str = Field(default="stdlib", min_length=1, description="`stdlib`, a glob of text files, or `hf:<dataset>`")
    tokenizer: str = Field(default="byte", description="`byte`, `bpe:<size>` or `gpt2`")
    val_tokens: Positive = Field(default=262144, description="tokens of the validation shard, whatever the knobs are")
    micro_batch: Positive | Literal["auto"] = Field(
        default="auto", description="sequences in memory at once; gradients accumulate up to `batch_size`"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(default="auto", description="where trials run")
    engine: EngineName = Field(default="auto", description="how a GPU computes a step; auto: the fastest that it can")
    threads: Positive | None = Field(default=None, description="CPU threads; default: one for each core")
    n_layer: Positive = 24
    """Transformer blocks."""
    n_head: Positive = 16
    """Attention heads; they divide `d_model`."""
    d_model: Positive = 1024
    """Width of the model."""
    d_ff: Positive = 4096
    """Width of the feed-forward layer."""
    lr: Annotated[float, Field(gt=0)] = 3e-4
    """AdamW peak learning rate."""
    lr_warmup: Annotated[int, Field(ge=0)] = 5
    """Steps of linear warm-up before the cosine."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """AdamW's decoupled weight decay, on matrices."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """AdamW's decay of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.95
    """AdamW's decay of squared gradients."""
    batch_size: Positive = 16
    """Sequences in a step."""
    seq_len: Positive = 1024
    """Tokens in a sequence."""
    precision: Precision = "auto"
    """What the blocks' matrix products multiply; `auto`: bf16 on a GPU, float32 on a CPU."""

    @field_validator("tokenizer")
    @classmethod
    def _known_tokenizer(cls, value: str) -> str:
        if value in ("byte", "gpt2"):
            return value
        size = value.removeprefix("bpe:")
        if size == value or not size.isdecimal() or not 300 <= int(size) <= 1_000_000:
            raise ValueError("is not `byte`, `gpt2` or `bpe:<size>` with a size of 300 to 1000000")
        return value

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        given = [name for name in ("steps", "tokens", "seconds") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(f"give exactly one of `steps`, `tokens` and `seconds` (here: {len(given)})")
        return self

    @classmethod
    def parse(cls, settings: Mapping[str, object], knobs: Mapping[str, str]) -> Self:
        """Validate the table against the menu's `knobs` (name to type).

        Raises:
            CampaignError: a key, a value or a knob that this trainer does not have; the message names it.
        """
        for name, kind in knobs.items():
            if name not in KNOBS:
                known = ", ".join(KNOBS)
                raise CampaignError(f"`knobs.{name}`: the `gpt` trainer has no such knob; it has {known}")
            if kind != KNOBS[name] and (kind, KNOBS[name]) != ("int", "float"):
                raise CampaignError(f'`knobs.{name}`: its type is `{KNOBS[name]}`; set `type = "{KNOBS[name]}"`')
            if name in settings:
                raise CampaignError(f"`trainer.{name}` is also a knob of the menu; remove one of the two")
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            raise CampaignError(_first_problem(error)) from None

    def complete(self, config: Config) -> GptConfig:
        """Return all thirteen knobs: those of `config`, and this table's for the rest."""
        values = {name: config.get(name, getattr(self, name)) for name in KNOBS}
        return GptConfig(
            n_layer=int(values["n_layer"]),
            n_head=int(values["n_head"]),
            d_model=int(values["d_model"]),
            d_ff=int(values["d_ff"]),
            lr=float(values["lr"]),
            lr_warmup=int(values["lr_warmup"]),
            grad_clip=float(values["grad_clip"]),
            weight_decay=float(values["weight_decay"]),
            beta1=float(values["beta1"]),
            beta2=float(values["beta2"]),
            batch_size=int(values["batch_size"]),
            seq_len=int(values["seq_len"]),
            precision=cast(Precision, str(values["precision"])),
        )

    def total_steps(self, config: GptConfig) -> int | None:
        """Return the optimizer steps of a trial of `config`; None when it is bounded in seconds."""
        if self.tokens is not None:
            return -(-self.tokens // (config.batch_size * config.seq_len))
        return self.steps

    def numbers(self, knobs: Mapping[str, str]) -> dict[str, float]:
        """Return the numbers of the table, defaults included, that constraints may use beside the menu's `knobs`."""
        values = {name: getattr(self, name) for name in type(self).model_fields if name not in knobs}
        return {name: value for name, value in values.items() if isinstance(value, int | float)}


@dataclass(frozen=True, slots=True, kw_only=True)
class GptConfig:
    """One value for each of the thirteen knobs."""

    n_layer: int
    n_head: int
    d_model: int
    d_ff: int
    lr: float
    lr_warmup: int
    grad_clip: float
    weight_decay: float
    beta1: float
    beta2: float
    batch_size: int
    seq_len: int
    precision: Precision

    def problem(self) -> str | None:
        """Say why no machine can run this configuration, or None."""
        if min(self.n_layer, self.n_head, self.d_model, self.d_ff, self.batch_size, self.seq_len) < 1:
            return "sizes must be at least 1"
        if self.d_model % self.n_head:
            return f"`d_model` {self.d_model} is not a multiple of `n_head` {self.n_head}"
        if self.precision not in ("auto", "float32", "bf16", "fp8"):
            return f"`precision` {self.precision!r} is not one of auto, float32, bf16, fp8"
        return None


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(["trainer", *(str(part) for part in first["loc"][:1])])
    if first["type"] == "extra_forbidden":
        return f"`{key}`: the `gpt` trainer has no such setting; it has {', '.join(GptSettings.model_fields)}"
    return f"`{key}`: {first['msg'].removeprefix('Value error, ')}"
