"""The events of contests: duels, races, how far a challenger is, and switches of the champion."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from overnight.agent.events import Event


@dataclass(frozen=True, slots=True, kw_only=True)
class DuelSettled(Event):
    """Champion and challenger answered one prompt, and both were measured; what it came to is in `duels`."""

    kind: ClassVar[str] = "duel_settled"
    iteration: int
    champion: str
    challenger: str
    item: float | None
    """Above 0 the challenger won; None where the duel counts for nothing."""
    note: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Weighed(Event):
    """How far a challenger is after a duel or a race: why it was, or was not yet, promoted."""

    kind: ClassVar[str] = "weighed"
    recorded: ClassVar[bool] = True
    iteration: int
    """The turn after which this holds."""
    champion: str
    challenger: str
    e_value: float
    threshold: float
    duels: int
    wins: int
    losses: int
    needed: int | None
    """Further duels at the present rate; None when the threshold is out of reach."""
    mean: float | None
    low: float | None
    high: float | None
    sign_p: float
    gate: Sequence[str]
    """What stands against a promotion; empty when the gate holds."""
    words: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PredecessorWeighed(Weighed):
    """How far the predecessor of a promoted champion is: the reversed test, on duels since the promotion."""

    kind: ClassVar[str] = "predecessor_weighed"


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceStarted(Event):
    """Several proposers begin to answer the held-out turns."""

    kind: ClassVar[str] = "race_started"
    iteration: int
    proposers: Sequence[str]
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceStepped(Event):
    """A held-out turn was answered by everybody."""

    kind: ClassVar[str] = "race_stepped"
    done: int
    items: int


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceFinished(Event):
    """Looking back is over."""

    kind: ClassVar[str] = "race_finished"
    recorded: ClassVar[bool] = True
    iteration: int
    race_id: int
    challenger: str | None
    items: int
    verdict: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Promoted(Event):
    """A challenger took over."""

    kind: ClassVar[str] = "promoted"
    recorded: ClassVar[bool] = True
    iteration: int
    from_proposer: str
    to_proposer: str
    decided_by: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class RolledBack(Event):
    """A promoted champion gave way to its predecessor."""

    kind: ClassVar[str] = "rolled_back"
    recorded: ClassVar[bool] = True
    iteration: int
    from_proposer: str
    to_proposer: str
    decided_by: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionAsked(Event):
    """A promotion waits for a person: `overnight promote` answers."""

    kind: ClassVar[str] = "promotion_asked"
    recorded: ClassVar[bool] = True
    iteration: int
    challenger: str
    proposer_id: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class PromotionDeclined(Event):
    """A person said no to a promotion; this challenger is not proposed again."""

    kind: ClassVar[str] = "promotion_declined"
    recorded: ClassVar[bool] = True
    iteration: int
    challenger: str
    proposer_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class SwitchRefused(Event):
    """What a person asked for could not be done."""

    kind: ClassVar[str] = "switch_refused"
    recorded: ClassVar[bool] = True
    iteration: int
    reason: str
