"""The typed events of a campaign, and the one stream that carries them.

Progress display, log, notifications and the store's `events` table all consume this stream. A consumer that raises is
logged and left alone: watching a campaign never stops it.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, Protocol, runtime_checkable

from overnight.store.clock import time, utc_text
from overnight.store.hashing import JsonValue
from overnight.store.records import FailureClass, KnobValue, Outcome, Purpose, TrainerKind

LOG = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Event:
    """Base of every event."""

    kind: ClassVar[str]
    recorded: ClassVar[bool] = False
    """Whether it gets a row in `events`; what attempts and trials already tell does not."""
    campaign: str

    def payload(self) -> dict[str, JsonValue]:
        """The event's own fields as plain data."""
        # Not `asdict`: it copies deeply, and costs more than everything else that watches a turn.
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self) if field.name != "campaign"}


@dataclass(frozen=True, slots=True, kw_only=True)
class RunStarted(Event):
    """A process began to run the campaign, or went on with it."""

    kind: ClassVar[str] = "run_started"
    recorded: ClassVar[bool] = True
    iteration: int
    """The turn that comes next."""
    budget: int
    pid: int
    until: str | None = None
    """`budget.until` as the file says it."""
    deadline: str | None = None
    """When that is, in UTC."""
    prepared_s: float = 0.0
    """What preparing the trainer took, just before."""
    last_seen: str | None = None
    """The last sign of life of a run that was cut off before this one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Calibrated(Event):
    """The baseline was measured on several seeds."""

    kind: ClassVar[str] = "calibrated"
    recorded: ClassVar[bool] = True
    trainer_kind: TrainerKind
    baseline_metric: float
    noise_sd: float | None
    trials: int


@dataclass(frozen=True, slots=True, kw_only=True)
class EnvironmentChanged(Event):
    """Trials run in another environment than before; the baseline is measured again."""

    kind: ClassVar[str] = "environment_changed"
    recorded: ClassVar[bool] = True
    changed: Sequence[str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TurnStarted(Event):
    """A proposer is being asked."""

    kind: ClassVar[str] = "turn_started"
    iteration: int
    try_no: int
    proposer: str
    role: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Proposed(Event):
    """A proposer answered; the reply is stored, and no rail has seen it."""

    kind: ClassVar[str] = "proposed"
    iteration: int
    try_no: int
    proposer: str
    latency_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class ProposalFailed(Event):
    """A proposer did not answer."""

    kind: ClassVar[str] = "proposal_failed"
    iteration: int
    try_no: int
    proposer: str
    failure: FailureClass
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Blocked(Event):
    """The rails blocked a proposal."""

    kind: ClassVar[str] = "blocked"
    iteration: int
    try_no: int
    rail: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Accepted(Event):
    """The rails let a proposal through; it will be measured."""

    kind: ClassVar[str] = "accepted"
    iteration: int
    proposer: str
    knob: str
    old_value: KnobValue
    new_value: KnobValue


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStarted(Event):
    """A trial begins."""

    kind: ClassVar[str] = "trial_started"
    iteration: int | None
    purpose: Purpose
    number: int
    of: int
    """At most this many in this series."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialStepped(Event):
    """A running trial took a step."""

    kind: ClassVar[str] = "trial_stepped"
    step: int
    steps: int | None
    loss: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialFinished(Event):
    """A trial ended."""

    kind: ClassVar[str] = "trial_finished"
    iteration: int | None
    purpose: Purpose
    metric: float | None
    failure: FailureClass | None
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Trained(Event):
    """A candidate needs no more trials."""

    kind: ClassVar[str] = "trained"
    iteration: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Validated(Event):
    """A candidate's trials became one result, or the failure that ended them."""

    kind: ClassVar[str] = "validated"
    iteration: int
    metric: float | None
    gain: float | None
    failure: FailureClass | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialDropped(Event):
    """A trial under way was given up, through no fault of its own; it is run again when the campaign goes on."""

    kind: ClassVar[str] = "trial_dropped"
    recorded: ClassVar[bool] = True
    iteration: int | None
    purpose: Purpose
    reason: str
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Fault(Event):
    """Something outside went wrong; the campaign goes on, or waits and tries again."""

    kind: ClassVar[str] = "fault"
    recorded: ClassVar[bool] = True
    what: str
    """`storage`, `trainer`, `worker`, `out_of_memory`, `terminal`, or `proposer:<name>`."""
    detail: str
    iteration: int | None
    waits: bool
    """Whether the campaign stands still until it is over."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FaultOver(Event):
    """What went wrong works again."""

    kind: ClassVar[str] = "fault_over"
    recorded: ClassVar[bool] = True
    what: str
    since: str
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Decided(Event):
    """A turn is over."""

    kind: ClassVar[str] = "decided"
    iteration: int
    proposer: str
    knob: str | None
    new_value: str | None
    outcome: Outcome
    metric: float | None
    gain: float | None
    failure: FailureClass | None
    rail: str | None
    trials: int
    explanation: str
    is_best: bool


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillWaiting(Event):
    """Distilling waits for more rows; told once."""

    kind: ClassVar[str] = "distill_waiting"
    recorded: ClassVar[bool] = True
    iteration: int
    rows: int
    min_rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillStarted(Event):
    """A student begins to learn from the history."""

    kind: ClassVar[str] = "distill_started"
    recorded: ClassVar[bool] = True
    iteration: int
    contestant: str
    """The version that is being made: `student@v3`."""
    rows: int


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillStepped(Event):
    """A distillation took a step."""

    kind: ClassVar[str] = "distill_stepped"
    epoch: int
    epochs: int
    step: int
    steps: int
    loss: float
    seconds_left: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Distilled(Event):
    """A student learned from the history; its new version may challenge."""

    kind: ClassVar[str] = "distilled"
    recorded: ClassVar[bool] = True
    iteration: int
    contestant: str
    rows: int
    too_long: int
    losses: Sequence[float]
    held_out_before: float | None
    held_out_after: float | None
    wall_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class DistillFailed(Event):
    """A distillation came to nothing; the campaign goes on with the champion that it has."""

    kind: ClassVar[str] = "distill_failed"
    recorded: ClassVar[bool] = True
    iteration: int
    proposer: str
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class GridRefined(Event):
    """Every legal change was tried; ranges are gridded finer."""

    kind: ClassVar[str] = "grid_refined"
    recorded: ClassVar[bool] = True
    refinement: int


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldoutMeasured(Event):
    """The first baseline and the winner were measured on the locked holdout, once."""

    kind: ClassVar[str] = "holdout_measured"
    recorded: ClassVar[bool] = True
    winner_attempt_id: int
    baseline_metric: float
    metric: float
    gain: float
    gain_low: float
    gain_high: float
    seeds: int
    fresh_data: bool = True
    """Whether it was data that no decision had seen; False: only the seeds were fresh."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HoldoutSkipped(Event):
    """The holdout was not measured, and why."""

    kind: ClassVar[str] = "holdout_skipped"
    recorded: ClassVar[bool] = True
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Paused(Event):
    """The campaign stopped on request; `overnight run` goes on with it."""

    kind: ClassVar[str] = "paused"
    recorded: ClassVar[bool] = True
    iteration: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Stopped(Event):
    """The campaign was stopped by a fault that it could not wait out; `overnight run` goes on with it."""

    kind: ClassVar[str] = "stopped"
    recorded: ClassVar[bool] = True
    iteration: int
    reason: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Finished(Event):
    """The campaign is over."""

    kind: ClassVar[str] = "finished"
    recorded: ClassVar[bool] = True
    iterations: int
    stop_reason: str
    why: str = ""
    """The same in words, with the numbers that it rests on."""


@runtime_checkable
class Hooks(Protocol):
    """A consumer of the stream."""

    def on_event(self, event: Event) -> None:
        """Take one event; must return soon."""
        ...


class EventStream:
    """Hands each event to every consumer, in order, and to LangGraph's stream where a graph is running.

    Args:
        buffer: keeps what gets a row, at once.
        hooks: whoever else listens; inside a transaction they hear of an event once it is committed, or never.
    """

    def __init__(self, buffer: EventBuffer, hooks: Sequence[Hooks]) -> None:
        self._buffer = buffer
        self._hooks = list(hooks)
        self._held: list[Event] | None = None

    def emit(self, event: Event) -> None:
        """Send an event."""
        self._buffer.on_event(event)
        if self._held is None:
            self._tell(event)
        else:
            self._held.append(event)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Around the transaction that takes what waits: what is emitted inside is told after it, in order."""
        held: list[Event] = []
        self._held = held
        try:
            with self._buffer.transaction():
                yield
        finally:
            self._held = None
        for event in held:
            self._tell(event)

    def _tell(self, event: Event) -> None:
        _write_to_graph(event)
        for hook in self._hooks:
            try:
                hook.on_event(event)
            except Exception:  # a consumer is somebody else's code: logged, never fatal
                LOG.exception("a hook failed on `%s`", event.kind)


def _write_to_graph(event: Event) -> None:
    from langgraph.config import get_stream_writer

    try:
        writer = get_stream_writer()
    except RuntimeError:  # not inside a graph: calibration from `doctor`, say
        return
    writer({"event": event.kind, "campaign": event.campaign, **event.payload()})


@dataclass(frozen=True, slots=True)
class PendingEvent:
    """An event on its way into the store."""

    kind: str
    payload: Mapping[str, JsonValue]
    iteration: int | None
    at: str


class EventBuffer:
    """The consumer behind the `events` table: keeps what is to be recorded until a transaction has taken it."""

    def __init__(self) -> None:
        self._pending: list[PendingEvent] = []

    def on_event(self, event: Event) -> None:
        """Keep an event that gets a row, with the time at which it happened."""
        if event.recorded:
            payload = event.payload()
            iteration = payload.get("iteration")
            at = utc_text(time())
            self._pending.append(
                PendingEvent(event.kind, payload, iteration if isinstance(iteration, int) else None, at)
            )

    def waiting(self) -> Sequence[PendingEvent]:
        """Return what waits, oldest first."""
        return tuple(self._pending)

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """Around the transaction that takes what waits; one that fails takes nothing, and undoes what was added."""
        before = tuple(self._pending)
        try:
            yield
        except BaseException:  # raised on: what was added is undone, Ctrl-C included
            self._pending = list(before)
            raise
        self._pending = []
