"""Which budget of a running campaign runs out next, and when, at the pace of its last turns."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from overnight.store.hashing import JsonValue
from overnight.store.protocol import Spent


@dataclass(frozen=True, slots=True)
class End:
    """A budget's end, or a pause that this run was asked for."""

    budget: str
    left_s: float | None
    """Seconds until then; None while there is no pace to judge by."""


def next_end(
    budget: Mapping[str, JsonValue],
    spent: Spent,
    *,
    done: int,
    turn_s: float | None,
    now: float,
    deadline: float | None = None,
    pause_at: float | None = None,
    pause_after: int | None = None,
) -> End:
    """Return what ends the campaign, or pauses it, first.

    Args:
        budget: the campaign file's `[budget]`.
        spent: what is used of it.
        done: turns that are over.
        turn_s: what a turn takes in wall time; None: not known yet.
        now: seconds since the epoch, as `deadline` and `pause_at` are.
        deadline: when `budget.until` comes.
        pause_at: `--until` of this run.
        pause_after: `--iterations` of this run.
    """
    ends = [End(name, left_s=max(0.0, at - now)) for name, at in (("until", deadline), ("--until", pause_at)) if at]
    turns = [*_turns_left(budget, spent, done)]
    if pause_after is not None:
        turns.append(("--iterations", pause_after - done))
    ends += [End(name, None if turn_s is None else max(0.0, left) * turn_s) for name, left in turns]
    return min(ends, key=lambda end: math.inf if end.left_s is None else end.left_s)


def _turns_left(budget: Mapping[str, JsonValue], spent: Spent, done: int) -> Iterator[tuple[str, float]]:
    """Yield each budget that turns use up, with how many turns are left of it."""
    yield "iterations", _number(budget["iterations"]) - done
    if budget.get("patience") is not None:
        yield "patience", _number(budget["patience"]) - min(spent.since_keep, done)
    for name, used in (("gpu_hours", spent.trial_hours), ("energy_kwh", spent.energy_kwh)):
        if budget.get(name) is not None and used > 0 and done > 0:
            yield name, (_number(budget[name]) - used) / (used / done)


def _number(value: JsonValue) -> float:
    assert isinstance(value, int | float)
    return value


def in_words(seconds: float) -> str:
    """Return a time span as people say it: `45 s`, `12 min`, `3 h 05 min`."""
    minutes = round(seconds / 60)
    if seconds < 90:
        return f"{round(seconds)} s"
    return f"{minutes} min" if minutes < 120 else f"{minutes // 60} h {minutes % 60:02} min"
