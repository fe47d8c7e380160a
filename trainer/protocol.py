"""What a trainer is, for the loop that calls it and for the author who writes one.

A trainer turns (configuration, seed, split) into one number. The built-in ones are reached through a worker process
(`overnight.trainer.worker`) that speaks this same protocol, so that the caller never knows where a trial runs.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol, Self, runtime_checkable

from overnight.store.records import Config, TrainerInfo, TrialProgress, TrialRequest, TrialResult

Report = Callable[[TrialProgress], None]
"""Called by a running trial after a step; cheap, and never raises into the trial."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerContext:
    """What a campaign tells a trainer besides its own settings."""

    campaign_dir: Path
    """Relative paths in the settings are relative to this folder."""
    cache_dir: Path
    """Where token files and compiled code may be kept between campaigns."""
    knobs: Mapping[str, str]
    """Each knob of the menu with its type (`int`, `float`, `str`)."""
    metric: str
    """The name of the metric that the campaign optimises."""
    memory_gib: float | None = None
    """How much memory trials may take; None: what is free."""


@runtime_checkable
class Trainer(Protocol):
    """Runs trials. (configuration, seed) fixes the result in one environment, or calibration says that it does not."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """Validate the campaign's `[trainer]` table and its knobs; opens no data, loads no torch.

        Raises:
            CampaignError: a setting or a knob that this trainer does not have; the message names the key.
        """
        ...

    def prepare(self) -> TrainerInfo:
        """Get ready to run trials (build or map the data, find the device); calling it twice costs nothing.

        Raises:
            CampaignError: the settings cannot be met (a glob that matches nothing).
            TrainerError: the device or the disk cannot do it.
        """
        ...

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        """Run one trial. A failure of the candidate is a result, never an exception."""
        ...

    def estimate_memory(self, config: Config) -> int | None:
        """Bytes that a trial of `config` needs at its peak, or None where the trainer cannot tell."""
        ...

    def unsupported(self, config: Config) -> str | None:
        """Why this machine cannot run `config` whatever the memory, in words, or None when it can."""
        ...

    def release(self) -> None:
        """Give back device memory that is kept between trials; the next trial takes it again."""
        ...

    def close(self) -> None:
        """Release processes, files and memory. The trainer is not used afterwards."""
        ...
