"""The words every layer shares: what a configuration, a trial and an attempt are, as plain frozen data.

Everything here can be pickled, compared and stored; nothing here opens a file or computes a statistic.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal

KnobValue = int | float | str
Config = Mapping[str, KnobValue]
"""A complete configuration: one value for every knob of the menu."""

Direction = Literal["min", "max"]
GainKind = Literal["relative", "absolute"]
Split = Literal["val", "holdout"]
Outcome = Literal["kept", "reverted", "blocked", "failed"]
Stage = Literal["proposed", "checked", "trained", "validated", "decided"]
"""The last stage of an attempt that is committed."""
FailureClass = Literal["oom", "nan", "timeout", "crash", "unsupported", "llm_timeout", "llm_error", "harness"]
Purpose = Literal["calibration", "screening", "confirmation", "audit", "baseline", "duel", "race", "holdout"]
TrainerKind = Literal["exact", "noisy", "unseeded"]
"""How a trainer answers to its seed: repeats bit for bit, repeats roughly, or not at all."""


def gain_text(gain: float | None, kind: GainKind) -> str:
    """Return a gain as people read it: in percent where it is relative, nothing where there is none."""
    if gain is None:
        return ""
    return f"{gain:+.2%}" if kind == "relative" else f"{gain:+.3g}"


@dataclass(frozen=True, slots=True)
class TrialRequest:
    """One run of (configuration, seed) on one split, as plain data that any executor can ship."""

    config: Config
    seed: int
    split: Split = "val"
    timeout_s: float | None = None
    """Wall-clock limit in seconds; the executor kills the trial and its children when it is over."""
    max_steps: int | None = None
    """Stop after this many optimizer steps whatever the trainer's own bound (`doctor` tries two)."""


@dataclass(frozen=True, slots=True)
class TrialProgress:
    """Where a running trial stands."""

    step: int
    steps: int | None
    """Steps in the whole trial; None when the bound is in seconds."""
    loss: float | None = None


@dataclass(frozen=True, slots=True)
class TrialResult:
    """What a trial measured. A failure has no metric: `metric` is None exactly when `failure` is set."""

    metric: float | None
    failure: FailureClass | None = None
    trace: str = ""
    """The last lines of what went wrong, untrusted text."""
    mode: str = "eager"
    """Execution mode (`eager`, `compiled`, ...): both halves of a pair must share it."""
    wall_s: float = 0.0
    train_s: float | None = None
    val_s: float | None = None
    steps: int | None = None
    peak_memory_gib: float | None = None
    energy_j: float | None = None
    energy_source: str | None = None
    metrics: Mapping[str, float] = field(default_factory=dict)
    """Everything else that was measured (`params_m`, `train_loss_last`, `mean_step_ms`, `tokens_per_s`, ...)."""
    notes: str = ""
    """What the trainer wants the proposer to read, untrusted text."""


@dataclass(frozen=True, slots=True)
class TrainerInfo:
    """What a prepared trainer is: everything besides (configuration, seed) that a result depends on."""

    trainer: str
    metric: str
    data_hash: str
    """Content address of the trainer's settings and the data it trains and validates on."""
    environment: Mapping[str, str]
    """Device, library versions, whatever else changes a result; its hash keeps environments from mixing."""
    has_holdout: bool
    numbers: Mapping[str, float] = field(default_factory=dict)
    """The trainer's own numbers that constraints may use (`steps`, `val_tokens`, ...)."""
    holdout_data: bool = True
    """Whether the holdout is data kept aside; False: a holdout trial differs by its fresh seed alone."""
    data: str = ""
    """What it trains and validates on, in words."""
