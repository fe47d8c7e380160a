"""The one place that times and waits come from: the system's clock, or one that a benchmark puts in its place.

Everything that the store writes, every deadline and every wait of the loop asks here, so that a whole night can be run
in a minute. Durations of single calls (a proposal's latency, a trial's wall time) are measured by whoever makes them.
"""

from __future__ import annotations

import time as system_time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import Protocol


class Clock(Protocol):
    """Tells the time, and lets it pass."""

    def time(self) -> float:
        """Seconds since the epoch."""
        ...

    def sleep(self, seconds: float) -> None:
        """Return when `seconds` have passed."""
        ...


class SystemClock:
    """The computer's own clock."""

    def time(self) -> float:
        """Seconds since the epoch."""
        return system_time.time()

    def sleep(self, seconds: float) -> None:
        """Return when `seconds` have passed."""
        system_time.sleep(seconds)


class _Current:
    clock: Clock = SystemClock()


def time() -> float:
    """Return the seconds since the epoch."""
    return _Current.clock.time()


def sleep(seconds: float) -> None:
    """Return when `seconds` have passed."""
    _Current.clock.sleep(seconds)


def now() -> datetime:
    """Return the time in UTC."""
    return datetime.fromtimestamp(time(), UTC)


def utc_text(at: float) -> str:
    """Return seconds since the epoch as the store writes times: UTC in ISO 8601 with milliseconds."""
    return datetime.fromtimestamp(at, UTC).isoformat(timespec="milliseconds")


@contextmanager
def running_on(clock: Clock) -> Iterator[None]:
    """Let this process live on another clock inside the block."""
    before, _Current.clock = _Current.clock, clock
    try:
        yield
    finally:
        _Current.clock = before
