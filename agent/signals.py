"""What signals do to a run: pause after the trial, pause now, or go on without a terminal.

SIGINT pauses after the trial under way. SIGTERM is the machine's word that it goes down, mostly with 10 s to live:
what is being waited for (a trial, an answer, a pause after a fault) is dropped at once and done again at the next run.
SIGHUP says that the terminal closed: the campaign goes on, and what it would print goes nowhere. Signals arrive in the
main thread; a campaign that runs in another one hears of them between trials.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from types import FrameType

ABORT_AFTER = 2
"""A second signal ends the process at once: what was committed is there."""
_HANDLED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


class PauseRequested(Exception):
    """Somebody asked to pause; raised where nothing is half done, handled by the node."""


class Interrupted(BaseException):
    """SIGTERM came while the campaign was waiting; no consumer of events may swallow it."""


@dataclass
class PauseSwitch:
    """Collects reasons to pause: signals, and requests from other processes."""

    reason: str | None = None
    signals: int = 0
    urgent: bool = False
    """SIGTERM came: nothing more is waited for."""
    hung_up: bool = False
    """The terminal closed."""
    on_signal: Callable[[str], None] = field(default=lambda _name: None)
    _waiting: bool = False
    _hangup_told: bool = False
    _terminals: tuple[int, ...] = ()

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle a signal; the second one that asks for a pause ends the process."""
        if number == signal.SIGHUP:
            self.hung_up = True
            _silence(self._terminals)
            return
        self.signals += 1
        name = signal.Signals(number).name
        if self.signals >= ABORT_AFTER:
            raise KeyboardInterrupt
        self.reason = name
        self.on_signal(name)
        if number == signal.SIGTERM:
            self.urgent = True
            if self._waiting:
                raise Interrupted

    def take_hangup(self) -> bool:
        """Say once that the terminal closed."""
        told, self._hangup_told = self._hangup_told, self.hung_up
        return self.hung_up and not told

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block, and put the old handlers back after it."""
        self._terminals = tuple(fd for fd in (0, 1, 2) if _is_terminal(fd))
        ignored = signal.getsignal(signal.SIGHUP) is signal.SIG_IGN  # `nohup` has seen to it
        numbers = [number for number in _HANDLED if number != signal.SIGHUP or not ignored]
        before = {number: signal.signal(number, self.receive) for number in numbers}
        try:
            yield
        finally:
            for number, handler in before.items():
                # After a closed terminal the summary still goes nowhere instead of ending the process.
                signal.signal(number, signal.SIG_IGN if number == signal.SIGHUP and self.hung_up else handler)

    @contextmanager
    def waiting(self) -> Iterator[None]:
        """Let SIGTERM end the block at once: it only waits, and what it waits for can be done again.

        Raises:
            PauseRequested: SIGTERM came, before the block or in it.
        """
        if self.urgent:
            raise PauseRequested
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        try:
            self._waiting = True
            yield
        except Interrupted:
            raise PauseRequested from None
        finally:
            self._waiting = False


def _is_terminal(fd: int) -> bool:
    try:
        return os.isatty(fd)
    except OSError:
        return False


def _silence(fds: tuple[int, ...]) -> None:
    """Let what is written to a terminal that closed go nowhere; every write to it would fail."""
    nowhere = os.open(os.devnull, os.O_RDWR)
    for fd in fds:
        os.dup2(nowhere, fd)
    os.close(nowhere)
