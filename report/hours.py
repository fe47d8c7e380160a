"""Where the time of a campaign went: every second from its first start to its end, each spent on one thing.

Built from what the store holds: trials, proposals, trainings and races say how long they took, events say when a
process ran, waited or was gone. Where two things overlap (a trial while an endpoint was away) the one that did
something counts. What is left of a running process' time is the loop itself. A process that was cut off lost what it
had not committed: that time, up to its last sign of life, is named too.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, text

GONE_PAUSED = "not running: paused"
GONE_CUT_OFF = "not running: cut off"
LOOP = "the loop itself"
LOST = "work lost when it was cut off"
DROPPED = "trials dropped"
TRIALS = {
    "screening": "trials of candidates",
    "confirmation": "trials of candidates",
    "baseline": "trials of the baseline",
    "audit": "audits",
    "calibration": "calibration",
    "duel": "duels",
    "holdout": "the locked holdout",
    "race": "races",
}
WAITS = {"storage": "waiting for the disk", "trainer": "waiting for the trainer or its device"}
ORDER = (
    *dict.fromkeys(TRIALS.values()), "proposals", "distilling", DROPPED, *WAITS.values(), "waiting for something else",
    "preparing the trainer", LOST, LOOP, GONE_PAUSED, GONE_CUT_OFF,
)  # fmt: skip
"""What a moment is spent on is the first of these that covers it."""


@dataclass(frozen=True, slots=True)
class Span:
    """From one moment to another, in seconds since the epoch, something was done."""

    start: float
    end: float
    what: str


@dataclass(frozen=True, slots=True)
class FaultSpan:
    """A fault, from when it began until it was over; a moment where it was only seen."""

    what: str
    began: str
    seconds: float | None
    """None: a single moment, or not over."""
    detail: str


@dataclass(frozen=True, slots=True)
class Hours:
    """The account of a campaign's time."""

    seconds: Mapping[str, float]
    """By what it was spent on, in the order of `ORDER`; they add up to `total`."""
    total: float
    faults: Sequence[FaultSpan]
    stopped: str | None
    """Why the campaign last stopped, in words."""


def read_hours(connection: Connection, campaign_id: int) -> Hours | None:
    """Return where a campaign's time went; None where no run of it was recorded (an imported trajectory)."""
    query = "SELECT kind, at, payload FROM events WHERE campaign_id = :id ORDER BY id"
    rows = _rows(connection, query, campaign_id)
    events = [(row["kind"], _seconds(row["at"]), json.loads(row["payload"])) for row in rows]
    work = list(_work(connection, campaign_id, events))
    sessions = list(_sessions(events, work))
    if not sessions:
        return None
    spans = [*work, *_gaps(sessions), *_lost(sessions, work), *(Span(each.start, each.end, LOOP) for each in sessions)]
    seconds = spent(spans, sessions)
    return Hours(seconds, sum(seconds.values()), list(_faults(events)), _why(events))


def spent(spans: Sequence[Span], sessions: Sequence[Span]) -> dict[str, float]:
    """Return the seconds of each kind from the first session's start to the last one's end; nothing counts twice."""
    start, end = min(each.start for each in sessions), max(each.end for each in sessions)
    moves: list[tuple[float, int, str]] = []
    for span in spans:
        first, last = max(span.start, start), min(span.end, end)
        if first < last:
            moves += [(first, 1, span.what), (last, -1, span.what)]
    moves.sort(key=lambda move: move[0])
    covering: Counter[str] = Counter()
    found = dict.fromkeys(ORDER, 0.0)
    for (at, step, what), (until, _, _) in pairwise([*moves, (end, 0, "")]):
        covering[what] += step
        if until > at:
            found[_first(covering)] += until - at
    return {what: total for what, total in found.items() if total > 0}


def _first(covering: Mapping[str, int]) -> str:
    gone = [what for what in (GONE_PAUSED, GONE_CUT_OFF) if covering.get(what)]
    return gone[0] if gone else next(what for what in ORDER if covering.get(what))


Events = Sequence[tuple[str, float, Mapping[str, Any]]]


def _work(connection: Connection, campaign_id: int, events: Events) -> Iterator[Span]:
    query = "SELECT purpose, ended_at, wall_s FROM trials WHERE campaign_id = :id AND wall_s IS NOT NULL"
    for row in _rows(connection, query, campaign_id):
        end = _seconds(row["ended_at"])
        yield Span(end - row["wall_s"], end, TRIALS.get(row["purpose"], "trials of candidates"))
    query = """SELECT started_at, decided_at, failure, proposal_latency_s FROM attempts
        WHERE campaign_id = :id AND role <> 'imported'"""
    for row in _rows(connection, query, campaign_id):
        start = _seconds(row["started_at"])
        if row["proposal_latency_s"] is not None:
            yield Span(start, start + row["proposal_latency_s"], "proposals")
        elif row["failure"] in ("llm_timeout", "llm_error") and row["decided_at"] is not None:
            yield Span(start, _seconds(row["decided_at"]), "proposals")
    for table, what in (("distillations", "distilling"), ("races", "races")):
        query = f"SELECT started_at, ended_at FROM {table} WHERE campaign_id = :id AND ended_at IS NOT NULL"
        for row in _rows(connection, query, campaign_id):
            yield Span(_seconds(row["started_at"]), _seconds(row["ended_at"]), what)
    for kind, at, said in events:
        if kind == "trial_dropped":
            yield Span(at - said["wall_s"], at, DROPPED)
        elif kind == "run_started":
            yield Span(at - said.get("prepared_s", 0.0), at, "preparing the trainer")
    yield from _waits(events)


def _waits(events: Events) -> Iterator[Span]:
    """Yield the times that a fault made the campaign stand still; one that a cut-off ended ends with its session."""
    open_since: dict[str, float] = {}
    for kind, at, said in events:
        if kind == "fault" and said.get("waits"):
            open_since[said["what"]] = at
        elif kind == "fault_over" and said["what"] in open_since:
            yield Span(open_since.pop(said["what"]), at, WAITS.get(said["what"], "waiting for something else"))
        elif kind in ("run_started", "paused", "stopped", "finished"):
            for what, since in open_since.items():
                yield Span(since, at, WAITS.get(what, "waiting for something else"))
            open_since = {}


def _sessions(events: Events, work: Sequence[Span]) -> Iterator[Span]:
    """Yield when a process ran the campaign; `what` says how it ended: a time of not running follows."""
    starts = [(at, said) for kind, at, said in events if kind == "run_started"]
    ends = [(at, kind) for kind, at, _ in events if kind in ("paused", "stopped", "finished")]
    signs = sorted([*(span.end for span in work), *(at for _, at, _ in events)])
    for number, (at, said) in enumerate(starts):
        begin = at - said.get("prepared_s", 0.0)
        after = starts[number + 1] if number + 1 < len(starts) else None
        until = float("inf") if after is None else after[0] - after[1].get("prepared_s", 0.0)
        closed = next((end for end, _ in ends if at <= end <= until), None)
        if closed is not None:
            yield Span(begin, closed, GONE_PAUSED)
            continue
        # What a cut-off process committed ends where the next one's preparations begin.
        last = max((sign for sign in signs if at <= sign < until), default=at)
        seen = None if after is None else after[1].get("last_seen")
        alive = max(last, _seconds(seen)) if seen else last
        yield Span(begin, min(max(alive, begin), until), GONE_CUT_OFF)


def _gaps(sessions: Sequence[Span]) -> Iterator[Span]:
    for before, after in pairwise(sessions):
        if after.start > before.end:
            yield Span(before.end, after.start, before.what)


def _lost(sessions: Sequence[Span], work: Sequence[Span]) -> Iterator[Span]:
    """Yield what a process that was cut off did after its last committed work, as long as it showed signs of life."""
    for each in sessions:
        if each.what == GONE_CUT_OFF:
            done = max((span.end for span in work if each.start <= span.end <= each.end), default=each.start)
            yield Span(done, each.end, LOST)


def _faults(events: Events) -> Iterator[FaultSpan]:
    over = [(said["what"], said["since"], said["wall_s"]) for kind, _, said in events if kind == "fault_over"]
    for kind, at, said in events:
        if kind == "fault":
            began = datetime.fromtimestamp(at).astimezone().isoformat(sep=" ", timespec="seconds")
            lasted = (s for what, since, s in over if what == said["what"] and abs(_seconds(since) - at) < 1.0)
            yield FaultSpan(said["what"], began, next(lasted, None), said["detail"])


def _why(events: Events) -> str | None:
    last = next((each for each in reversed(events) if each[0] in ("paused", "stopped", "finished")), None)
    if last is None:
        return None
    kind, _, said = last
    if kind == "finished":
        return f"finished: {said.get('why') or said['stop_reason']}"
    return f"{'stopped by a fault' if kind == 'stopped' else 'paused'}: {said['reason']}"


def _rows(connection: Connection, query: str, campaign_id: int) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(text(query), {"id": campaign_id}).mappings()]


def _seconds(at: str) -> float:
    return datetime.fromisoformat(at).timestamp()
