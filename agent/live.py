"""Where a running campaign is at this second, for `overnight status` in another terminal.

A consumer of the event stream keeps it in memory; a thread writes it beside the store, whole, once a second at most and
only when something changed, so that the loop pays nothing for it. It is about the present: the store alone says what
was measured. It is the lease holder's: nothing is written before the run's first event, which comes under the lease,
and the file goes when the run ends, if it is still this run's. After a crash it names a process that is gone, and
counts for nothing.
"""

from __future__ import annotations

import json
import threading
from collections import deque
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Self

from pydantic import TypeAdapter, ValidationError

from overnight.agent import events
from overnight.store import clock
from overnight.store.database import database_url
from overnight.store.lease import this_process

EVERY_S = 1.0
RECENT_TURNS = 20
"""How many turns the pace is taken over."""


@dataclass(frozen=True, slots=True)
class Limits:
    """What ends or pauses this run; times are seconds since the epoch."""

    deadline: float | None = None
    """When `budget.until` comes."""
    pause_at: float | None = None
    """`--until` of this run."""
    pause_after: int | None = None
    """`--iterations` of this run."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Live:
    """What is going on."""

    owner: str
    """The process, as its lease names it."""
    started: float
    """When the run began; all times are seconds since the epoch."""
    at: float
    """When this was true."""
    doing: str = "starting"
    """In words."""
    doing_since: float
    step: int | None = None
    steps: int | None = None
    loss: float | None = None
    turn_s: float | None = None
    """What a turn took in this run, the mean of the last ones; before the first is over, what a trial took."""
    limits: Limits = Limits()


@dataclass(slots=True)
class _Pace:
    """What turns took."""

    since: float | None = None
    turns: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_TURNS))
    trials: deque[float] = field(default_factory=lambda: deque(maxlen=RECENT_TURNS))

    def turn_over(self, now: float) -> None:
        """Count a turn that ended now."""
        if self.since is not None:
            self.turns.append(now - self.since)
        self.since = now

    @property
    def turn_s(self) -> float | None:
        """The mean of the last turns; before there is one, of the trials, which is the least that a turn takes."""
        known = self.turns or self.trials
        return sum(known) / len(known) if known else None


class LiveFile:
    """A consumer of the event stream; open while the campaign runs."""

    def __init__(self, path: Path, limits: Callable[[], Limits] = Limits) -> None:
        self._path = path
        self._draft = _draft(path)
        self._limits = limits
        self._pace = _Pace()
        self._owner, self._started = this_process(), clock.time()
        self._doing, self._since = "starting", self._started
        self._step: events.TrialStepped | None = None
        self._is_ours = False
        self._changed = threading.Event()
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._keep_writing, name="overnight-live", daemon=True)

    def __enter__(self) -> Self:
        """Begin to listen."""
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        """Write no more, and remove what this run wrote."""
        self._ended.set()
        self._changed.set()
        self._thread.join()
        if read_live(self._path, self._owner) is not None:
            for path in (self._draft, self._path):
                with suppress(OSError):
                    path.unlink(missing_ok=True)

    def on_event(self, event: events.Event) -> None:
        """Take an event in; the file follows within a second."""
        if isinstance(event, events.TrialStepped):  # there are thousands of them: keep it, and no more
            self._step = event
        else:
            self._take(event, clock.time())
        if not self._is_ours:
            self._is_ours = True
            self._write()  # at once: what a killed run left is this run's from here on
        self._changed.set()

    def _take(self, event: events.Event, now: float) -> None:
        words = _words(event)
        if words is not None:
            self._doing, self._since, self._step = words, now, None
        match event:
            case events.TurnStarted() if self._pace.since is None:
                self._pace.since = now
            case events.TrialFinished():
                self._pace.trials.append(event.wall_s)
            case events.Decided():
                self._pace.turn_over(now)

    def _live(self) -> Live:
        step = self._step
        return Live(
            owner=self._owner,
            started=self._started,
            at=clock.time(),
            doing=self._doing,
            doing_since=self._since,
            step=step.step if step else None,
            steps=step.steps if step else None,
            loss=step.loss if step else None,
            turn_s=self._pace.turn_s,
            limits=self._limits(),
        )

    def _keep_writing(self) -> None:
        while not self._ended.is_set():
            self._changed.wait()
            self._changed.clear()
            if not self._ended.is_set():
                self._write()
            self._ended.wait(EVERY_S)

    def _write(self) -> None:
        with suppress(OSError):  # a full disk is told about elsewhere
            self._draft.write_text(json.dumps(asdict(self._live())))
            self._draft.replace(self._path)


def beside(db: str, campaign: str, ending: str) -> Path:
    """Return a campaign's file beside the store; for a database on a server, in the current folder."""
    url = database_url(db)
    place = url.database if url.get_backend_name() == "sqlite" and url.database else "overnight"
    return Path(f"{place}.{campaign}.{ending}")


def live_file(db: str, campaign: str) -> Path:
    """Return where a running campaign says what it is doing."""
    return beside(db, campaign, "live.json")


def forget_live(db: str, campaign: str) -> None:
    """Remove what a killed run said of itself."""
    path = live_file(db, campaign)
    for each in (path, _draft(path)):
        with suppress(OSError):
            each.unlink(missing_ok=True)


def _draft(path: Path) -> Path:
    return path.with_name(f"{path.name}.part")


def read_live(path: Path, owner: str) -> Live | None:
    """Return what the process `owner` says that it is doing; None where nothing of it is there."""
    try:
        live = _READER.validate_json(path.read_bytes())
    except (OSError, ValidationError):
        return None
    return live if live.owner == owner else None


_READER = TypeAdapter(Live)


def _words(event: events.Event) -> str | None:
    """Return what a run does after an event, or None for one that changes nothing."""
    match event:
        case events.TurnStarted():
            return f"asking `{event.proposer}` ({event.role})"
        case events.Accepted():
            return f"{event.knob} = {event.new_value}"
        case events.TrialStarted():
            return f"trial {event.number} of {event.of} at most ({event.purpose})"
        case events.Fault() if event.waits:
            return f"waiting: {event.what} is at fault"
        case events.FaultOver():
            return "going on after a fault"
        case events.Decided():
            return "between turns"
    return None
