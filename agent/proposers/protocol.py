"""What a proposer is: it is shown a prompt and the legal changes, and answers with text that the rails judge.

Everyone answers in the same form, one JSON object with `knob`, `new_value` and `reason`, random draws and optimizers
too, so that one gate judges them all and their turns teach a student alike.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, Protocol, Self, runtime_checkable

from pydantic import BaseModel, ConfigDict, ValidationError

from overnight.rails.menu import Change, Menu
from overnight.rails.reply import change_key, reply_text
from overnight.store.errors import CampaignError
from overnight.store.hashing import JsonValue
from overnight.store.records import Config, Direction, FailureClass

if TYPE_CHECKING:
    from overnight.agent.proposers.breaker import Breaker
    from overnight.distill.host import ModelHost

__all__ = [
    "Answer", "Ask", "History", "Observation", "Proposer", "ProposerContext", "ProposerPlugin", "ProposerSettings",
    "Rejection", "change_key", "reply_text",
]  # fmt: skip


@dataclass(frozen=True, slots=True)
class Observation:
    """One decided attempt, as a proposer may learn from it."""

    attempt_id: int
    config: Config
    metric: float | None
    """Mean over the attempt's trials, in the metric's own unit; None for a failure."""
    failure: FailureClass | None


class History(Protocol):
    """The campaign's measured past, read from the store as far as a proposer asks for it."""

    def since(self, attempt_id: int) -> Iterator[Observation]:
        """Yield the attempts decided after `attempt_id` (0: all), oldest first."""
        ...


@dataclass(frozen=True, slots=True)
class Rejection:
    """A reply of this same turn that the rails blocked."""

    reply: str
    rail: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Ask:
    """One question to a proposer."""

    iteration: int
    prompt: str
    """The stored prompt, byte for byte."""
    menu: Menu
    direction: Direction
    baseline: Config
    baseline_metric: float | None
    moves: tuple[Change, ...]
    """The legal one-knob changes that the rails would let through now, in the menu's order; never empty."""
    neighbours: tuple[Change, ...] = ()
    """The values next to the present ones of the knobs that may be moved, between the grid's, let through likewise."""
    rejections: tuple[Rejection, ...] = ()
    history: History
    seed: int
    """Derived from (campaign seed, iteration, try, purpose): every draw comes from a generator seeded by it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What came back, before any rail has seen it."""

    reply: str
    latency_s: float
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    """How it was asked: temperature, seed, max_tokens, structured-output mode, sampler."""
    usage: Mapping[str, int] = field(default_factory=dict)
    """Tokens in and out, where the endpoint tells."""
    probabilities: Mapping[str, float] = field(default_factory=dict)
    """Propensities: the probability of each change, keyed by `change_key`, where the proposer knows them."""


@runtime_checkable
class Proposer(Protocol):
    """Answers a prompt with one change."""

    name: str
    """The key of the campaign file's `[proposers.<name>]` table."""

    def propose(self, ask: Ask) -> Answer:
        """Answer within the proposer's own deadline.

        Raises:
            ProposerError: no answer; its `failure` says `llm_timeout` or `llm_error`.
        """
        ...

    def describe(self) -> Mapping[str, JsonValue]:
        """What identifies this proposer in the store (kind, model, settings); never a key or a password."""
        ...

    def close(self) -> None:
        """Release connections and memory."""
        ...


@runtime_checkable
class Rewindable(Protocol):
    """A proposer that remembers history in memory, and can begin anew: a race asks about the past."""

    def rewound(self) -> Proposer:
        """Return the same proposer without memory; what it holds open is shared."""
        ...


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposerContext:
    """What a campaign hands to each proposer that it builds."""

    campaign_dir: Path
    """Folder of the campaign file: relative paths in a proposer's table start here."""
    cache_dir: Path
    """Where a proposer may keep what can be made again (converted models)."""
    menu: Menu
    breakers: dict[str, Breaker] = field(default_factory=dict)
    """One failure counter for each endpoint, shared by the proposers that use it."""
    served: dict[str, dict[str, str]] = field(default_factory=dict)
    """For each endpoint, the adapter that each proposer answers with there."""
    hosts: dict[str, ModelHost] = field(default_factory=dict)
    """One model host for each base model and device, shared by the proposers that use it."""
    idle: Callable[[], None] = lambda: None
    """Called about every second while a model loads or answers: renews the campaign's lease."""


class ProposerSettings(BaseModel):
    """Base of every `[proposers.<name>]` table: strict, so that a misspelt key is an error and not a default."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    @classmethod
    def parse(cls, name: str, settings: Mapping[str, object]) -> Self:
        """Return the validated table.

        Raises:
            CampaignError: the first problem, with the table and key it is in.
        """
        try:
            return cls.model_validate(dict(settings))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(str(part) for part in first["loc"])
            where = f"`[proposers.{name}]`" + (f" key `{key}`" if key else "")
            known = ", ".join(cls.model_fields)
            remedy = f"; the keys are: kind, {known}" if first["type"] == "extra_forbidden" else ""
            raise CampaignError(f"{where}: {first['msg']}{remedy}") from error


class ProposerPlugin(Protocol):
    """What an entry point of the group `overnight.proposers` names: a proposer class that builds itself."""

    Settings: ClassVar[type[ProposerSettings]]
    """The table's keys, besides `kind`."""

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Proposer:
        """Build the proposer `[proposers.<name>]`; `settings` is its table without `kind`.

        Raises:
            CampaignError: a key is missing, unknown or impossible; nothing was opened.
        """
        ...
