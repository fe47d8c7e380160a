"""The line to a warm worker process under a guard: one question at a time, an answer by a deadline or a clear end.

The one place that talks to worker processes: the trial worker and the model host both hang on it. What may be said is
the caller's: it brings the command and the function that checks an answer.
"""

from __future__ import annotations

import socket
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

from overnight.trainer.process import Ending, GuardedProcess
from overnight.trainer.wire import Inbox, WireError, pack

IDLE_S = 1.0
"""How often `idle` is called while waiting: a lease is renewed long before it lapses."""


class Numbered(Protocol):
    """An answer, whatever else it holds."""

    @property
    def call(self) -> int:
        """Which question it answers."""
        ...


AnswerT = TypeVar("AnswerT", bound=Numbered)


class Died(Exception):
    """The worker ended in the middle of a question."""

    def __init__(self, ending: Ending, trace: str, what: str) -> None:
        super().__init__(ending.words())
        self.ending = ending
        self.trace = f"{trace}\nthe {what} ended: {ending.words()}".strip()


class Overran(Exception):
    """The deadline of a question passed."""


class Link(Generic[AnswerT]):
    """The line to one worker process.

    Args:
        command: what to run; the number of its end of the socket is added as the last argument.
        unpack: checks the body of a frame and returns the answer in it, or raises `WireError`.
        what: what the process is called in messages.
        idle: called about every second while waiting; what it raises is passed on.
        pass_fds: further descriptors that the worker inherits under the same numbers.

    Raises:
        OSError: the process cannot be started.
    """

    def __init__(
        self,
        command: Sequence[str],
        unpack: Callable[[bytes], AnswerT],
        *,
        what: str,
        idle: Callable[[], None] = lambda: None,
        pass_fds: Sequence[int] = (),
    ) -> None:
        self._unpack = unpack
        self._what = what
        self._idle = idle
        self._calls = 0
        self._socket, theirs = socket.socketpair()
        with theirs:
            try:
                self.process = GuardedProcess([*command, str(theirs.fileno())], pass_fds=[theirs.fileno(), *pass_fds])
            except OSError:
                self._socket.close()
                raise
        self._inbox = Inbox(self._socket)
        self.process.watch(self._socket.fileno())

    def ask(
        self,
        operation: str,
        arguments: Mapping[str, object],
        *,
        deadline: float | None = None,
        progress: Callable[[AnswerT], bool] = lambda _answer: False,
    ) -> AnswerT:
        """Ask one question and wait for its answer, up to `deadline` on the monotonic clock.

        Args:
            operation: what is asked.
            arguments: plain data.
            deadline: on the monotonic clock; None: as long as it takes.
            progress: given every answer; True says that it was only news, and the answer is still to come.

        Raises:
            Died: the worker ended.
            Overran: the deadline passed.
            WireError: the answer is not in the protocol.
        """
        self._calls += 1
        self.process.tail.clear()
        try:
            self._socket.sendall(pack({"call": self._calls, "op": operation, **arguments}))
        except ConnectionError:
            raise self._death() from None
        idle_at = time.monotonic() + IDLE_S
        while True:
            answer = self._next_answer()
            if answer is not None and not progress(answer):
                return answer
            now = time.monotonic()
            if now >= idle_at:
                self._idle()
                idle_at = time.monotonic() + IDLE_S
            if deadline is not None and now >= deadline:
                raise Overran
            if answer is None:
                self._wait(min(idle_at, deadline or idle_at) - now)

    def _next_answer(self) -> AnswerT | None:
        body = self._inbox.frame()
        if body is None:
            return None
        answer = self._unpack(body)
        if answer.call != self._calls:
            raise WireError(f"the {self._what} answered question {answer.call}, not {self._calls}")
        return answer

    def _wait(self, timeout_s: float) -> None:
        ready, _ = self.process.feed(timeout_s)
        if self._socket.fileno() in ready and not self._inbox.fill():
            raise self._death()

    def _death(self) -> Died:
        self.process.forget(self._socket.fileno())
        ending = self.process.settle()
        return Died(ending, self.process.tail.text(), self._what)

    def close(self) -> None:
        """Kill the worker and everything below it."""
        self.process.kill()
        self._socket.close()
