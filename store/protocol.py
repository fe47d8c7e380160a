"""What the loop asks of a trajectory store, and the plain records that go in and out.

Every write of a stage happens inside one `writing(lease)` block: one transaction that first checks the lease's epoch.
A record written twice under its key is written once.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Literal, Protocol, runtime_checkable

from overnight.store.contests import ContestReader, ContestWriter
from overnight.store.hashing import JsonValue
from overnight.store.learning import LearningReads, LearningWrites
from overnight.store.records import (
    Config,
    FailureClass,
    KnobValue,
    Outcome,
    Purpose,
    Split,
    Stage,
    TrainerInfo,
    TrainerKind,
    TrialResult,
)

MAX_TRIES = 4
"""Tries of a turn: three answers, then a labelled fallback."""


@dataclass(frozen=True, slots=True)
class Lease:
    """The right to write one campaign; a higher epoch takes it away."""

    campaign_id: int
    epoch: int
    owner: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CampaignState:
    """Where a campaign stands, read in one query."""

    id: int
    name: str
    path: str | None
    seed: int
    spec: Mapping[str, JsonValue]
    frozen_hash: str
    status: str
    stop_reason: str | None
    baseline_config_id: str | None
    best_attempt_id: int | None
    refinement: int
    trainer_kind: TrainerKind | None
    trainer_hash: str | None
    environment_hash: str | None
    environment: str | None
    """JSON."""
    noise_sd: float | None
    started_at: str | None
    lease_owner: str | None
    lease_since: str | None
    lease_seen_at: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Attempt:
    """One try of one turn, as stored."""

    id: int
    iteration: int
    try_no: int
    stage: Stage
    role: str
    audit: bool
    proposer: str
    request_event_id: int | None
    prompt_id: str | None
    reply: str | None
    knob: str | None
    new_value: str | None
    reason: str | None
    baseline_config_id: str | None
    config_id: str | None
    rail: str | None
    rail_reason: str | None
    outcome: Outcome | None
    failure: FailureClass | None
    trace: str | None
    notes: str | None
    metric: float | None
    metric_se: float | None
    baseline_metric: float | None
    gain: float | None
    gain_se: float | None
    gain_lower: float | None
    trials: int
    decision: str | None
    is_best: bool | None
    proposal_latency_s: float | None
    wall_s: float | None
    energy_wh: float | None
    started_at: str
    prompt_kind: str = "rendered"
    """`reconstructed` for an imported attempt whose prompt was rendered afterwards."""


@dataclass(frozen=True, slots=True, kw_only=True)
class NewAttempt:
    """What the `propose` node commits. With `failure` set, the proposer did not answer and the try ends here."""

    iteration: int
    try_no: int
    role: str
    proposer_id: int
    baseline_config_id: str
    prompt: str
    audit: bool = False
    request_event_id: int | None = None
    reply: str | None = None
    settings: Mapping[str, JsonValue] = field(default_factory=dict)
    usage: Mapping[str, int] = field(default_factory=dict)
    probabilities: Mapping[str, float] = field(default_factory=dict)
    latency_s: float | None = None
    failure: FailureClass | None = None
    trace: str = ""
    started_at: str


@dataclass(frozen=True, slots=True, kw_only=True)
class NewVerdict:
    """What the `check_rails` node commits; with `rail` set the try is blocked and ends here."""

    attempt_id: int
    rail: str | None
    rail_reason: str
    knob: str | None
    new_value: KnobValue | None
    reason: str | None
    config: Config | None
    diff: Mapping[str, tuple[KnobValue, KnobValue]] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewTrial:
    """One finished run of (configuration, seed)."""

    attempt_id: int | None
    purpose: Purpose
    config_id: str
    trainer_hash: str
    environment_hash: str
    split: Split
    seed: int
    replicate: int
    result: TrialResult
    ended_at: str | None = None
    """When it ended, where that is not now: a full disk may have kept it waiting."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Measurement:
    """What the `validate` node commits: an attempt's trials as one result, or why there is none."""

    attempt_id: int
    metric: float | None
    metric_se: float | None
    baseline_metric: float | None
    gain: float | None
    gain_se: float | None
    gain_lower: float | None
    trials: int
    failure: FailureClass | None
    trace: str
    notes: str
    wall_s: float
    energy_wh: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class NewDecision:
    """What the `decide` node commits, and what it does to the campaign."""

    attempt_id: int
    outcome: Outcome
    explanation: str
    is_best: bool
    new_baseline_config_id: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Trial:
    """One run, as stored."""

    id: int
    attempt_id: int | None
    purpose: Purpose
    config_id: str
    trainer_hash: str
    environment_hash: str
    split: Split
    seed: int | None
    replicate: int
    mode: str | None
    metric: float | None
    failure: FailureClass | None
    trace: str | None
    notes: str | None
    wall_s: float | None
    energy_wh: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class PairTotal:
    """Running totals of one (knob, value) over all history."""

    knob: str
    new_value: str
    proposed: int
    kept: int
    reverted: int
    blocked: int
    failed: int
    trials: int
    mean_gain: float | None
    failures: Mapping[FailureClass, int] = field(default_factory=dict)
    """How often each class of failure came."""


@dataclass(frozen=True, slots=True, kw_only=True)
class KnobTotal:
    """Running totals of one knob over all history, with its most informative values."""

    knob: str
    proposed: int
    """With `blocked`."""
    kept: int
    blocked: int = 0
    distinct_values: int
    """Values of the menu that were proposed."""
    failures: Mapping[FailureClass, int] = field(default_factory=dict)
    """How often each class of failure came, whatever the value."""
    values: Sequence[PairTotal]
    """The most informative first; the rest of `distinct_values` is left out."""

    @property
    def tried(self) -> int:
        """Proposals that no rail blocked."""
        return self.proposed - self.blocked


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """A decided attempt as an optimizer may learn from it."""

    attempt_id: int
    config: Config
    metric: float | None
    failure: FailureClass | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Spent:
    """What a campaign has used of its budget."""

    iterations: int
    """Turns that are over."""
    since_keep: int
    """Turns since the last keep."""
    trial_hours: float
    energy_kwh: float


@dataclass(frozen=True, slots=True)
class SumOfSquares:
    """A pooled within-group sum of squares and its degrees of freedom, computed by SQL."""

    ss: float
    df: int


@dataclass(frozen=True, slots=True)
class Position:
    """Where a campaign goes on: the next stage, of which turn and try."""

    stage: Literal["propose", "check_rails", "train", "validate", "decide"]
    iteration: int
    try_no: int
    attempt_id: int | None
    """The attempt that the stage works on; None when it is still to be proposed."""


class StoreWriter(LearningWrites, ContestWriter, Protocol):
    """The writes of one transaction."""

    def config(self, config: Config) -> str:
        """Store a configuration once; return its id."""
        ...

    def proposer(self, name: str, kind: str, description: Mapping[str, JsonValue]) -> int:
        """Store a proposer as it is configured; return its id."""
        ...

    def attempt(self, new: NewAttempt) -> int:
        """Store a try at stage `proposed` (or `decided` when it failed); return its id."""
        ...

    def verdict(self, new: NewVerdict) -> None:
        """Take a try from `proposed` to `checked`, or to `decided` when it is blocked."""
        ...

    def trial(self, new: NewTrial) -> None:
        """Store a finished run."""
        ...

    def trained(self, attempt_id: int) -> None:
        """Take an attempt from `checked` to `trained`: no more trials are needed."""
        ...

    def measured_anew(self, attempt_id: int) -> None:
        """Take an attempt that is not decided back to `checked`: its trials belong to another environment."""
        ...

    def measurement(self, new: Measurement) -> None:
        """Take an attempt from `trained` to `validated`."""
        ...

    def decision(self, new: NewDecision) -> None:
        """Take an attempt from `validated` to `decided`."""
        ...

    def trainer(self, info: TrainerInfo, kind: TrainerKind | None, noise_sd: float | None) -> None:
        """Record which trainer, data and environment the campaign measures in."""
        ...

    def baseline(self, config_id: str) -> None:
        """Set what candidates are measured against."""
        ...

    def refined(self, refinement: int) -> None:
        """Record that float grids were refined."""
        ...

    def status(self, status: str, stop_reason: str | None = None) -> None:
        """Record that the campaign runs, paused or finished."""
        ...

    def event(
        self,
        kind: str,
        payload: Mapping[str, JsonValue],
        *,
        iteration: int | None = None,
        attempt_id: int | None = None,
        at: str | None = None,
    ) -> None:
        """Record something that happened, now or at a time that has passed."""
        ...


@runtime_checkable
class TrajectoryStore(LearningReads, ContestReader, Protocol):
    """The memory of campaigns."""

    def open_campaign(
        self, *, name: str, path: str, spec: Mapping[str, JsonValue], frozen_hash: str, knobs_on_menu: int
    ) -> CampaignState:
        """Return the campaign `name`, made if it is new, with the file's present content recorded."""
        ...

    def campaign(self, name: str) -> CampaignState | None:
        """Return a campaign by name."""
        ...

    def acquire(self, campaign_id: int) -> Lease:
        """Become the campaign's one writer.

        Raises:
            LeaseHeldError: another live process is.
        """
        ...

    def renew(self, lease: Lease) -> None:
        """Show that the writer is alive."""
        ...

    def release(self, lease: Lease) -> None:
        """Stop being the writer."""
        ...

    def writing(self, lease: Lease) -> AbstractContextManager[StoreWriter]:
        """One transaction under the lease.

        Raises:
            LeaseLostError: another process took the lease; nothing is written.
        """
        ...

    def next_stage(self, campaign_id: int) -> Position:
        """Return where the campaign goes on, from its last committed stage."""
        ...

    def last_attempt(self, campaign_id: int) -> Attempt | None:
        """Return the newest try of the newest turn."""
        ...

    def attempt(self, attempt_id: int) -> Attempt:
        """Return an attempt by its id."""
        ...

    def last_event(self, campaign_id: int, kind: str) -> tuple[str, Mapping[str, JsonValue]] | None:
        """Return when an event of this kind happened last, and what it said."""
        ...

    def attempts_of_turn(self, campaign_id: int, iteration: int) -> Sequence[Attempt]:
        """Return a turn's tries, first to last."""
        ...

    def recent(self, campaign_id: int, count: int) -> Sequence[Attempt]:
        """Return the last tries of the last decided turns, newest first."""
        ...

    def config_of(self, config_id: str) -> dict[str, KnobValue]:
        """Return a stored configuration."""
        ...

    def earlier(
        self, campaign_id: int, config_ids: Iterable[str], *, before: int | None = None
    ) -> Mapping[str, Attempt]:
        """Return, for each configuration that the decision rule is done with, the attempt that did it.

        `before` looks at the turns before that one only.
        """
        ...

    def trials_of(
        self,
        campaign_id: int,
        config_id: str,
        *,
        trainer_hash: str,
        environment_hash: str,
        split: Split = "val",
        seeds: range | None = None,
    ) -> Sequence[Trial]:
        """Return a configuration's trials in one environment, oldest first; on these consecutive seeds, or on all."""
        ...

    def recent_trials(
        self, campaign_id: int, *, trainer_hash: str, environment_hash: str, count: int
    ) -> Sequence[Trial]:
        """Return the last trials that measured something in one environment, newest first: what trials cost here."""
        ...

    def trials_of_attempt(self, attempt_id: int) -> Sequence[Trial]:
        """Return the trials that an attempt paid for, oldest first."""
        ...

    def knob_totals(self, campaign_id: int) -> Sequence[KnobTotal]:
        """Return the running totals of every knob tried, with its most informative values."""
        ...

    def measured_since(self, campaign_id: int, attempt_id: int) -> Iterator[Measured]:
        """Yield decided attempts with a candidate after `attempt_id`, oldest first."""
        ...

    def seed_spread(self, campaign_id: int, *, trainer_hash: str, environment_hash: str) -> SumOfSquares:
        """Return the trial noise over seeds from calibration runs in one environment."""
        ...

    def audit_spreads(
        self, campaign_id: int, *, trainer_hash: str, environment_hash: str, since: int = 0
    ) -> Mapping[int, SumOfSquares]:
        """Return the noise of paired differences in each decided audit in one environment, by attempt, oldest first.

        `since` leaves out the attempts up to that one.
        """
        ...

    def spent(self, campaign_id: int) -> Spent:
        """Return what the campaign has used of its budget."""
        ...

    def pending_requests(self, campaign_id: int) -> Sequence[tuple[int, Mapping[str, JsonValue]]]:
        """Return people's queued proposals that no attempt has answered, oldest first: (event id, payload)."""
        ...

    def pause_requested(self, campaign_id: int) -> bool:
        """Say whether somebody asked to pause since the run started."""
        ...

    def request(self, campaign_id: int, kind: str, payload: Mapping[str, JsonValue]) -> int:
        """Record what a person asks of a running campaign; needs no lease. Returns the event's id."""
        ...
