"""A process under a guard: started, watched without blocking, and gone with all its descendants when asked.

The one place that starts processes for trials: the worker and the command trainer both use it. It relies on
`overnight.trainer.guard` for the killing; where the guard itself does not answer, psutil kills what it last saw.
Output is read by whoever polls (`feed`), never by a thread, and only its tail is kept here.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import psutil

from overnight.store.records import FailureClass
from overnight.trainer.output import Tail

_GUARD = Path(__file__).with_name("guard.py")
_MARK = "OVERNIGHT_GUARD_"
"""Begins the name of a variable that every process of a command has in its environment."""
_KILL_S = 15.0
"""Longer than the guard goes on killing, so that its word is heard before psutil takes over."""
_SETTLE_S = 5.0
"""A crashed process is being dumped and reaped for this long at most."""
_CHUNK = 1 << 16
Stream = Literal["out", "err"]


@dataclass(frozen=True, slots=True)
class Ending:
    """How a guarded process ended."""

    kind: Literal["exit", "signal", "exec", "lost"]
    """`exec`: it could not be started; `lost`: its guard died before saying."""
    number: int = 0
    message: str = ""

    @property
    def signal(self) -> int | None:
        """The signal that ended it, a shell's 128 + n included; None when there was none."""
        if self.kind == "signal":
            return self.number
        return self.number - 128 if self.kind == "exit" and 128 < self.number < 128 + signal.NSIG else None

    @property
    def failure(self) -> FailureClass | None:
        """The class of failure that this ending stands for; None for exit 0."""
        if self.kind in {"exec", "lost"}:
            return "harness"
        if self.signal == signal.SIGKILL:
            return "oom"
        return None if self == Ending("exit", 0) else "crash"

    def words(self) -> str:
        """Say how it ended, a signal by its name."""
        if self.kind == "exec":
            return f"could not be started: {self.message}"
        if self.kind == "lost":
            return "lost its guard process, which somebody must have killed"
        if self.signal is None:
            return f"exit {self.number}"
        try:
            name = signal.Signals(self.signal).name
        except ValueError:
            name = f"signal {self.signal}"
        end = f"exit {self.number}: {name}" if self.kind == "exit" else f"killed by {name}"
        return end + (" (out of memory, or somebody killed it)" if self.signal == signal.SIGKILL else "")


class GuardedProcess:
    """One running command with its guard.

    Args:
        command: what to run, never through a shell.
        cwd: its working directory.
        env: its whole environment; None: this process's.
        pass_fds: descriptors that it inherits under the same numbers.
        stdin: a descriptor that it reads its standard input from; None: it has none.
        split_output: keep standard error apart from standard output (`Stream` says which `feed` read).
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path | None = None,
        env: Mapping[str, str] | None = None,
        pass_fds: Sequence[int] = (),
        stdin: int | None = None,
        split_output: bool = False,
    ) -> None:
        self.tail = Tail()
        self._mark = _MARK + uuid.uuid4().hex
        self._ending: Ending | None = None
        self._said = b""
        self._lifeline, theirs = socket.socketpair()
        fds = ",".join(map(str, pass_fds))
        with theirs:
            try:
                self._guard = subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_GUARD), str(theirs.fileno()), fds, "--", *command],
                    stdin=subprocess.DEVNULL if stdin is None else stdin,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE if split_output else subprocess.STDOUT,
                    bufsize=0,
                    cwd=cwd,
                    env={**(os.environ if env is None else env), **marks(), self._mark: "1"},
                    pass_fds=(theirs.fileno(), *pass_fds),
                    start_new_session=True,  # a Ctrl-C at the terminal is for the control process
                )
            except OSError:
                self._lifeline.close()
                raise
        self._poll = select.poll()
        self._poll.register(self._lifeline, select.POLLIN)
        self._streams: dict[int, Stream] = {}
        for pipe, stream in ((self._guard.stdout, "out"), (self._guard.stderr, "err")):
            if pipe is not None:
                self._streams[pipe.fileno()] = "out" if stream == "out" else "err"
                self._poll.register(pipe, select.POLLIN)

    @property
    def pid(self) -> int:
        """The guard's id: every process of the command is below it."""
        return self._guard.pid

    @property
    def ending(self) -> Ending | None:
        """How the command ended, once all its output is read; None while it runs."""
        if self._ending is None or self._ending.kind == "lost":
            return self._ending  # what outlives a lost guard may hold the streams open
        return None if self._streams else self._ending

    def watch(self, fd: int) -> None:
        """Let `feed` return early when `fd` can be read, too."""
        self._poll.register(fd, select.POLLIN)

    def forget(self, fd: int) -> None:
        """Undo `watch`."""
        self._poll.unregister(fd)

    def feed(self, timeout_s: float) -> tuple[set[int], list[tuple[Stream, bytes]]]:
        """Wait for something to happen, and read what was printed into the tail.

        Returns:
            The watched descriptors that can be read, and the chunks of output that were read.
        """
        ready: set[int] = set()
        chunks: list[tuple[Stream, bytes]] = []
        for fd, _ in self._poll.poll(max(0.0, timeout_s) * 1000):
            if fd == self._lifeline.fileno():
                self._listen()
            elif fd in self._streams:
                chunk = os.read(fd, _CHUNK)
                if not chunk:
                    self._poll.unregister(fd)
                    del self._streams[fd]
                    continue
                self.tail.add(chunk)
                chunks.append((self._streams[fd], chunk))
            else:
                ready.add(fd)
        return ready, chunks

    def _listen(self) -> None:
        try:
            said = self._lifeline.recv(4096)
        except OSError:
            said = b""
        self._said += said
        if not said:
            self._poll.unregister(self._lifeline)
            self._ending = _parse(self._said.decode(errors="replace"))

    def memory_bytes(self, limit: int) -> int:
        """Return the memory of the command's processes; shared pages are told apart only when that matters.

        Resident sets summed count a page once for each process that shares it; only a sum above `limit` is worth the
        exact proportional sum, which costs a walk over every mapping.
        """
        processes = self._descendants()
        resident = sum(_resident(process) for process in processes)
        return resident if resident <= limit else sum(_proportional(process) for process in processes)

    def _descendants(self) -> list[psutil.Process]:
        try:
            return list(psutil.Process(self._guard.pid).children(recursive=True))
        except psutil.Error:
            return []

    def settle(self) -> Ending:
        """Wait for the end of a command that has closed its line; one that lives on after that is killed."""
        self._drain(time.monotonic() + _SETTLE_S)
        return self.kill()

    def kill(self) -> Ending:
        """Kill every process of the command and wait until they are gone; calling it again costs nothing."""
        if self._guard.returncode is None:
            seen = self._descendants()
            with contextlib.suppress(OSError):
                self._lifeline.shutdown(socket.SHUT_WR)
            self._drain(time.monotonic() + _KILL_S)
            try:
                self._guard.wait(timeout=1.0)
            except subprocess.TimeoutExpired:
                self._force(seen)
        if self._ending is None or self._ending.kind == "lost" or sys.platform != "linux":
            self._hunt()
        self._lifeline.close()
        for pipe in (self._guard.stdout, self._guard.stderr):
            if pipe is not None:
                pipe.close()
        self._streams.clear()
        return self._ending or Ending("lost")

    def _hunt(self) -> None:
        """Kill whoever has the mark, wherever it went: what a killed guard left, or one that is no subreaper."""
        for process in psutil.process_iter():
            with contextlib.suppress(psutil.Error, OSError):
                if process.pid != os.getpid() and self._mark in process.environ():
                    process.kill()

    def _drain(self, deadline: float) -> None:
        while self.ending is None and time.monotonic() < deadline:
            self.feed(min(1.0, deadline - time.monotonic()))

    def _force(self, seen: list[psutil.Process]) -> None:
        """Kill without the guard, which is stopped or stuck."""
        for process in [*self._descendants(), *seen]:
            with contextlib.suppress(psutil.Error):
                process.kill()  # psutil checks that the id was not given to a stranger
        self._guard.kill()
        self._guard.wait()


def marks() -> dict[str, str]:
    """Return the marks that this process carries itself, for the environment of what it starts."""
    return {name: value for name, value in os.environ.items() if name.startswith(_MARK)}


def _parse(said: str) -> Ending:
    kind, _, rest = said.partition(" ")
    if kind == "exec":
        return Ending("exec", message=rest)
    if kind == "exit" and rest.isdigit():
        return Ending("exit", int(rest))
    if kind == "signal" and rest.isdigit():
        return Ending("signal", int(rest))
    return Ending("lost")


def _resident(process: psutil.Process) -> int:
    try:
        return int(process.memory_info().rss)
    except psutil.Error:
        return 0


def _proportional(process: psutil.Process) -> int:
    try:
        full = process.memory_full_info()
    except psutil.Error:
        return 0
    pss: int | None = getattr(full, "pss", None)  # Linux only; elsewhere what is the process's own
    return int(full.uss if pss is None else pss)
