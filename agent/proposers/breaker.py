"""A failure counter for one endpoint: after failures in a row the endpoint is left alone for a growing interval.

So a campaign does not spend its night waiting for a server that is down. After the interval the next call goes through
by itself; one more failure doubles the interval, one success closes the breaker. It does not retry and does not sleep.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime, timedelta

from overnight.store.errors import ProposerError

FAILURES_TO_OPEN = 3
FIRST_SKIP_S = 30.0
LONGEST_SKIP_S = 30 * 60.0


class Breaker:
    """Counts failures in a row of one endpoint; safe to share between proposers and threads."""

    def __init__(
        self,
        endpoint: str,
        *,
        failures_to_open: int = FAILURES_TO_OPEN,
        first_skip_s: float = FIRST_SKIP_S,
        longest_skip_s: float = LONGEST_SKIP_S,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.endpoint = endpoint
        self._failures_to_open = failures_to_open
        self._first_skip_s = first_skip_s
        self._longest_skip_s = longest_skip_s
        self._clock = clock
        self._lock = threading.Lock()
        self._failures = 0
        self._skip_until = 0.0
        self._last_error = ""

    @property
    def failures(self) -> int:
        """Failures since the last success."""
        return self._failures

    @property
    def skip_s(self) -> float:
        """Seconds for which calls are still refused; 0 when the endpoint may be called."""
        if self._failures < self._failures_to_open:
            return 0.0
        return max(0.0, self._skip_until - self._clock())

    def check(self) -> None:
        """Let a call through, or refuse it at once.

        Raises:
            ProposerError: the endpoint is being skipped (`llm_error`); the message says until when, and why.
        """
        with self._lock:
            left = self.skip_s
            if not left:
                return
            until = datetime.now(UTC) + timedelta(seconds=left)
            raise ProposerError(
                f"endpoint `{self.endpoint}` failed {self._failures} times in a row and is skipped for another "
                f"{left:.0f} s, until {until:%H:%M:%S} UTC; the last failure: {self._last_error}",
                failure="llm_error",
            )

    def record_success(self) -> None:
        """Close the breaker and forget the failures."""
        with self._lock:
            self._failures = 0
            self._last_error = ""

    def record_failure(self, error: str) -> None:
        """Count a failure; from the third in a row on, skip for 30 s, doubling up to 30 minutes."""
        with self._lock:
            self._failures += 1
            self._last_error = error
            beyond = self._failures - self._failures_to_open
            if beyond >= 0:
                skip = min(self._first_skip_s * 2.0 ** min(beyond, 32), self._longest_skip_s)
                self._skip_until = self._clock() + skip
