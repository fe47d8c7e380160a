"""What the loop keeps of contests between proposers: duels, races, switches of the champion, and who stands where.

Plain records, and what a store must do with them. A contestant is a proposer as it was configured; a student's adapters
are contestants of their own, written `student@v3`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, Protocol

from overnight.store.hashing import JsonValue
from overnight.store.records import Config

Alias = Literal["champion", "challenger", "previous"]
DuelKind = Literal["challenge", "return"]
"""`return`: the challenger is the predecessor of a champion that was promoted."""
Side = Literal["champion", "challenger"]
Switch = Literal["promotion", "rollback"]
Source = Literal["asked", "recorded", "drawn"]


@dataclass(frozen=True, slots=True)
class Contestant:
    """A proposer as it was configured."""

    id: int
    name: str
    kind: str
    description: Mapping[str, JsonValue]

    @property
    def label(self) -> str:
        """Its name, with the version of its adapter where it has one: `student@v3`."""
        return label(self.name, self.description)


def label(name: str, description: Mapping[str, JsonValue]) -> str:
    """Return how a contestant is written: its name, with the version of its adapter where it has one."""
    version = adapter_version(description)
    return name if version is None else f"{name}@{version}"


def adapter_version(description: Mapping[str, JsonValue]) -> str | None:
    """Return the version of the adapter that a proposer answers with, where it was trained by a campaign."""
    adapter = description.get("adapter")
    version = adapter.get("version") if isinstance(adapter, Mapping) else None
    return version if isinstance(version, str) else None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDuel:
    """A duel as it begins, with the attempt of its first side."""

    iteration: int
    kind: DuelKind
    seed: int
    champion_id: int
    challenger_id: int
    first: Side
    attempt_id: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Settlement:
    """What a duel came to; without an item it counts for nothing, and the note says why."""

    duel_id: int
    champion_gain: float | None = None
    challenger_gain: float | None = None
    gain_se: float | None = None
    champion_banked: float | None = None
    challenger_banked: float | None = None
    cap: float | None = None
    item: float | None = None
    note: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Duel:
    """A duel, as stored."""

    id: int
    iteration: int
    kind: DuelKind
    seed: int
    champion_id: int
    challenger_id: int
    champion_attempt_id: int | None
    challenger_attempt_id: int | None
    champion_banked: float | None
    challenger_banked: float | None
    item: float | None
    note: str | None
    settled_at: str | None

    @property
    def waits_for(self) -> Side | None:
        """The side that has not answered yet."""
        if self.champion_attempt_id is None:
            return "champion"
        return "challenger" if self.challenger_attempt_id is None else None

    @property
    def first(self) -> Side:
        """The side that answered in its first turn."""
        if self.waits_for is not None:
            return "champion" if self.waits_for == "challenger" else "challenger"
        assert self.champion_attempt_id is not None
        assert self.challenger_attempt_id is not None
        return "champion" if self.champion_attempt_id < self.challenger_attempt_id else "challenger"


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRace:
    """A look back as it begins."""

    iteration: int
    distillation_id: int | None
    challenger_id: int | None
    held_out: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Race:
    """A look back, as stored."""

    id: int
    iteration: int
    distillation_id: int | None
    challenger_id: int | None
    held_out: int
    verdict: str | None
    failure: str | None
    started_at: str
    ended_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewRaceItem:
    """One draw of one proposer for one held-out turn."""

    attempt_id: int
    proposer_id: int
    draw: int
    source: Source
    reply: str | None = None
    knob: str | None = None
    new_value: str | None = None
    """As the store writes values: a word as it is, a number as JSON."""
    config: Config | None = None
    valid: bool | None = None
    rail: str | None = None
    failure: str | None = None
    knob_match: bool | None = None
    exact_match: bool | None = None
    modal_match: bool | None = None
    agreement: float | None = None
    tried_probability: float | None = None
    probabilities: Mapping[str, float] | None = None
    expected_gain: float | None = None
    latency_s: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class RaceItem:
    """One draw of one proposer for one held-out turn, as stored."""

    attempt_id: int
    proposer_id: int
    draw: int
    source: Source
    knob: str | None
    new_value: str | None
    config_id: str | None
    valid: bool | None
    rail: str | None
    failure: str | None
    knob_match: bool | None
    exact_match: bool | None
    modal_match: bool | None
    agreement: float | None
    tried_probability: float | None
    expected_gain: float | None
    latency_s: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewPromotion:
    """A switch of the champion."""

    iteration: int
    kind: Switch
    from_proposer_id: int | None
    to_proposer_id: int
    evidence: Mapping[str, JsonValue]
    decided_by: Literal["router", "person"]
    reason: str
    request_event_id: int | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Promotion:
    """A switch of the champion, as stored."""

    id: int
    iteration: int
    kind: Switch
    from_proposer_id: int | None
    to_proposer_id: int
    decided_by: str
    reason: str | None
    at: str


@dataclass(frozen=True, slots=True)
class HeldOutTurn:
    """A decided turn that had a prompt or a baseline: what was tried then, for others to answer again."""

    attempt_id: int
    iteration: int
    try_no: int
    asked_in: int
    """The turn that its prompt was made for: a duel's second side answers the prompt of the first."""
    asked_as: int
    """The first attempt that answered that prompt."""
    role: str
    proposer: str
    proposer_id: int
    prompt_id: str | None
    baseline_config_id: str
    baseline_metric: float | None
    reply: str | None
    knob: str | None
    new_value: str | None
    config_id: str | None
    rail: str | None
    outcome: str
    gain: float | None
    proposal_latency_s: float | None
    started_at: str


class ContestWriter(Protocol):
    """The writes of contests, part of one transaction."""

    def begin_duel(self, new: NewDuel) -> int:
        """Store a duel with its first side's attempt; return its id. One duel begins in a turn."""
        ...

    def answer_duel(self, duel_id: int, side: Side, attempt_id: int) -> None:
        """Note the second side's attempt, once."""
        ...

    def settle_duel(self, new: Settlement) -> bool:
        """Store what a duel came to; say whether it was still open, for only then anything was written."""
        ...

    def begin_race(self, new: NewRace) -> int:
        """Store a look back that begins; return its id."""
        ...

    def race_item(self, race_id: int, new: NewRaceItem) -> None:
        """Store one draw, once."""
        ...

    def pick_measured(self, race_id: int, baseline_config_id: str, config_id: str, gain: float) -> None:
        """Store the gain of a race's pick that was measured for the race."""
        ...

    def end_race(self, race_id: int, *, verdict: str, failure: str | None = None) -> None:
        """Store what a race showed, or why it counts for nothing."""
        ...

    def promotion(self, new: NewPromotion) -> None:
        """Store a switch, and move the aliases `champion` and `previous` with it."""
        ...

    def alias(self, alias: Alias, proposer_id: int, iteration: int) -> None:
        """Say who stands where."""
        ...


class ContestReader(Protocol):
    """The reads of contests."""

    def proposer_id(self, campaign_id: int, name: str, description: Mapping[str, JsonValue]) -> int | None:
        """Return the id of a proposer as it is configured, or None where the campaign does not know it."""
        ...

    def contestant(self, proposer_id: int) -> Contestant:
        """Return a stored proposer."""
        ...

    def aliases(self, campaign_id: int) -> Mapping[Alias, Contestant]:
        """Return who stands where."""
        ...

    def newest_adapter(self, campaign_id: int, proposer: str) -> tuple[int, str, str] | None:
        """Return distillation, version and folder of a student's newest adapter."""
        ...

    def adapter_folder(self, campaign_id: int, proposer: str, version: str) -> str | None:
        """Return the folder of an adapter: `v3` of this campaign's student, or `other/v3` of another campaign's."""
        ...

    def known_versions(self, campaign_id: int, proposer: str) -> Sequence[str]:
        """Return the adapter versions with which a proposer took part, the newest to do so first."""
        ...

    def last_duel(self, campaign_id: int) -> Duel | None:
        """Return the newest duel."""
        ...

    def items_between(
        self, campaign_id: int, *, champion_id: int, challenger_id: int, kind: DuelKind, after: int = 0
    ) -> Sequence[float]:
        """Return the items of two contestants' duels in turns after `after`, oldest first."""
        ...

    def challenges(self, campaign_id: int) -> Sequence[tuple[int, int]]:
        """Return each (champion, challenger) that ever met in a `challenge`, in the order they first did."""
        ...

    def races(self, campaign_id: int) -> Sequence[Race]:
        """Return the campaign's races, oldest first."""
        ...

    def last_race(self, campaign_id: int, challenger_id: int) -> Race | None:
        """Return the newest finished race that was run for a challenger."""
        ...

    def open_race(self, campaign_id: int, challenger_id: int | None) -> Race | None:
        """Return the newest race, if it was run for this challenger and is not over."""
        ...

    def race_items(self, race_id: int) -> Sequence[RaceItem]:
        """Return a race's draws, by turn, proposer and draw."""
        ...

    def promotions(self, campaign_id: int) -> Sequence[Promotion]:
        """Return every switch, oldest first."""
        ...

    def held_out(self, campaign_id: int, *, after: int, until: int) -> Sequence[HeldOutTurn]:
        """Return the turns in (`after`, `until`] that proposed a configuration, each with its last try."""
        ...

    def decided_turns(self, campaign_id: int) -> tuple[int, int]:
        """Return how many turns proposed a configuration and are decided, and the number of the newest."""
        ...

    def turn_before(self, campaign_id: int, newest: int, count: int) -> int:
        """Return the turn after which the last `count` turns up to `newest` with a configuration lie."""
        ...

    def gains_on(self, campaign_id: int, baseline_config_id: str, config_ids: Sequence[str]) -> Mapping[str, float]:
        """Return the mean measured gain of configurations against one baseline, over their attempts."""
        ...

    def recent_gains(self, campaign_id: int, *, before: int, most: int) -> Sequence[float]:
        """Return the first paired gains of the last `most` measured candidates of turns before `before`."""
        ...

    def last_of(self, campaign_id: int, kinds: Sequence[str]) -> tuple[int, str, Mapping[str, JsonValue]] | None:
        """Return the newest event of some kinds: its id, its kind and what it says."""
        ...

    def refinements(self, campaign_id: int) -> Sequence[str]:
        """Return when the grids were refined (UTC, ISO 8601), in order."""
        ...
