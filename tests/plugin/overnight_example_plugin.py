"""A stranger's plugin: a proposer, a trainer and a rail, written against the published protocols alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Self

from overnight.agent.proposers.protocol import Answer, Ask, ProposerContext, ProposerSettings, reply_text
from overnight.rails.gate import Candidate
from overnight.rails.registry import RailContext
from overnight.store.hashing import JsonValue
from overnight.store.records import Config, TrainerInfo, TrialProgress, TrialRequest, TrialResult
from overnight.trainer.protocol import Report, TrainerContext


class HalvingProposer:
    """Halves the first knob for which that is an open move, and takes the first open move otherwise."""

    class Settings(ProposerSettings):
        """It has no keys."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:
        """See `ProposerPlugin`."""
        del context
        cls.Settings.parse(name, settings)
        return cls(name)

    def propose(self, ask: Ask) -> Answer:
        """See `Proposer`."""
        halves = (move for move in ask.moves if 2 * float(move.value) == float(ask.baseline[move.knob]))
        move = next(halves, ask.moves[0])
        return Answer(reply=reply_text(move.knob, move.value, "half of it"), latency_s=0.0)

    def describe(self) -> Mapping[str, JsonValue]:
        """See `Proposer`."""
        return {"kind": "halving"}

    def close(self) -> None:
        """See `Proposer`."""


class ParaboloidTrainer:
    """The metric is the sum of squares of the knobs, plus a little of the seed."""

    def __init__(self, metric: str) -> None:
        self._metric = metric

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """See `Trainer`."""
        del settings
        return cls(context.metric)

    def prepare(self) -> TrainerInfo:
        """See `Trainer`."""
        return TrainerInfo("paraboloid", self._metric, "v1", {"device": "none"}, has_holdout=True)

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        """See `Trainer`."""
        report(TrialProgress(1, 1))
        value = sum(float(x) ** 2 for x in request.config.values()) + 1e-6 * (request.seed % 7)
        return TrialResult(value, wall_s=1e-6)

    def estimate_memory(self, config: Config) -> int | None:
        """See `Trainer`."""
        del config

    def unsupported(self, config: Config) -> str | None:
        """See `Trainer`."""
        del config

    def release(self) -> None:
        """See `Trainer`."""

    def close(self) -> None:
        """See `Trainer`."""


class SmallStepsRail:
    """Blocks a change that makes a number more than four times smaller or larger."""

    id = "P1_small_steps"

    @classmethod
    def from_context(cls, context: RailContext) -> Self:
        """See `RailPlugin`."""
        del context
        return cls()

    def check(self, candidate: Candidate) -> str | None:
        """See `Rail`."""
        knob = candidate.proposal.knob
        before, after = float(candidate.baseline[knob]), float(candidate.config[knob])
        if before / 4 <= after <= before * 4:
            return None
        return f"`{knob}` from {before:g} to {after:g} is too large a step; stay within a factor of four"
