"""What the store keeps of learning: measured changes that teach, and the distillations that learned from them.

`TrajectoryStore` and `StoreWriter` have these methods too; they stand apart so that a file stays one idea. A change
teaches when it passed the rails and was measured, whoever proposed it; a harness failure says nothing about it.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from overnight.store.hashing import JsonValue

if TYPE_CHECKING:
    from overnight.store.protocol import Attempt


@dataclass(frozen=True, slots=True, kw_only=True)
class Distillation:
    """One training of a student, as stored."""

    id: int
    iteration: int
    """The turn after which it was run."""
    proposer: str
    version: int | None
    """Of the adapter, `v<version>`; None for a failure."""
    objective: str
    corpus_hash: str | None
    cut_attempt_id: int | None
    """The last attempt that was trained on or known to a target; what came later until `iteration` is held out."""
    rows: int | None
    adapter: str | None
    """The version's folder; it may have been pruned since."""
    metrics: Mapping[str, JsonValue]
    failure: str | None
    wall_s: float | None
    started_at: str
    ended_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDistillation:
    """What the `distill` node commits once a training is over, well or badly."""

    iteration: int
    proposer: str
    version: int | None
    objective: str
    corpus_hash: str | None
    cut_attempt_id: int | None
    rows: int | None
    adapter: str | None
    metrics: Mapping[str, JsonValue]
    failure: str | None
    wall_s: float
    started_at: str


@dataclass(frozen=True, slots=True)
class ScreeningSums:
    """First gains, one for each measured candidate, as sums: what a campaign's prior is estimated from."""

    count: int
    total: float
    squares: float
    noise_variance: float | None
    """Mean squared standard error of one such gain; None where no noise is known."""


class LearningReads(Protocol):
    """What corpus and node read."""

    def teaching(self, campaign_id: int, *, through: int | None = None) -> Iterator[Attempt]:
        """Yield the attempts whose change was measured, harness failures apart, in the order of turns.

        Args:
            campaign_id: whose.
            through: the last turn to read; None: all.
        """
        ...

    def teaching_count(self, campaign_id: int) -> int:
        """Return how many attempts `teaching` yields."""
        ...

    def harness_failures(self, campaign_id: int) -> int:
        """Return how many measured attempts are left out of `teaching`."""
        ...

    def screening_sums(self, campaign_id: int, *, through: int | None = None) -> ScreeningSums:
        """Return sums over the screening gains of the turns up to `through`."""
        ...

    def writers(self, campaign_id: int) -> frozenset[str]:
        """Return the names of the proposers whose replies are words of their own: they stored no probabilities."""
        ...

    def unprompted(self, campaign_id: int) -> bool:
        """Say whether a teaching attempt has no prompt: an imported one whose prompt was not rendered yet."""
        ...

    def prompts_of(self, prompt_ids: Sequence[str]) -> Mapping[str, str]:
        """Return stored prompts, byte for byte, by their hash."""
        ...

    def distillations(self, campaign_id: int) -> Sequence[Distillation]:
        """Return all distillations, newest first."""
        ...

    def last_distillation(self, campaign_id: int) -> Distillation | None:
        """Return the newest distillation that made an adapter."""
        ...

    def distilled_after(self, campaign_id: int, iteration: int) -> bool:
        """Say whether a distillation was run after this turn, well or badly."""
        ...

    def contested_versions(self, campaign_id: int) -> Collection[str]:
        """Return the versions (`v3`) that proposed, duelled, were promoted, have an alias, or ran the newest race."""
        ...

    def home(self) -> Path:
        """Return the folder where files of the store lie: beside the database file, or the current one."""
        ...


class LearningWrites(Protocol):
    """What corpus and node write."""

    def distillation(self, new: NewDistillation) -> int:
        """Store a distillation that is over; return its id."""
        ...

    def reconstructed(self, attempt_id: int, prompt: str) -> None:
        """Give an imported attempt, which has no prompt, the one that its proposer would have been shown."""
        ...
