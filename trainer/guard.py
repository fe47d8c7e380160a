"""Runs one command and leaves nothing of it behind: the small process between an owner and what the owner starts.

    python -I -S guard.py LIFELINE FDS -- COMMAND...

The command runs in its own session. When it ends, when the owner closes its end of the lifeline (or dies, by SIGKILL
too), or on SIGTERM, every descendant is killed, those included that changed session or lost their parent: on Linux the
guard is their subreaper, so they become its children. Then `exit N`, `signal N` or `exec MESSAGE` goes down the
lifeline. It imports nothing of `overnight`, is single-threaded, and runs no code of the command, so that it outlives a
trial that hangs. On systems without prctl only the command's process group is killed.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import select
import signal
import socket
import sys
import time
from typing import NoReturn

_PR_SET_PDEATHSIG = 1
_PR_SET_CHILD_SUBREAPER = 36
_LINUX = sys.platform == "linux"
_SWEEP_S = 10.0
"""How long to go on killing: a process that waits on a device cannot die before the device answers."""
_OOM_SCORE = b"500"
"""So that the kernel, out of memory, takes the trial before the process that records it."""


class _Told(BaseException):
    """SIGTERM, SIGINT or SIGHUP was sent to the guard."""


def main() -> None:
    """Run the command named in `sys.argv`; the exit status is 0 whatever the command's is."""
    lifeline = socket.socket(fileno=int(sys.argv[1]))
    lifeline.set_inheritable(False)
    kept = [int(fd) for fd in sys.argv[2].split(",") if fd]
    owner = os.getppid()
    if _LINUX:
        _prctl(_PR_SET_CHILD_SUBREAPER, 1)
    child, exec_error = _start(sys.argv[4:], kept)
    status = None
    try:
        for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
            signal.signal(number, _tell)
        status = _watch(child, lifeline, owner)
    except _Told:
        pass
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_IGN)
    status = _sweep(child, status)
    with contextlib.suppress(OSError):
        lifeline.sendall((_read(exec_error) or _words(status)).encode())
    os._exit(0)


def _tell(_number: int, _frame: object) -> NoReturn:
    raise _Told


def _wake(_number: int, _frame: object) -> None:
    """Nothing: that SIGCHLD has a handler makes it write to the wake-up pipe."""


def _prctl(option: int, value: int) -> None:
    ctypes.CDLL(None).prctl(option, value, 0, 0, 0)


def _start(command: list[str], kept: list[int]) -> tuple[int, int]:
    """Fork and execute `command`; return its id and a pipe that carries the reason when that fails."""
    reader, writer = os.pipe()
    guard = os.getpid()
    child = os.fork()
    if child == 0:
        _become(command, kept, writer, guard)
    os.close(writer)
    for fd in (*kept, 0, 1, 2):
        os.close(fd)  # the command's streams end when the command's last process does
    return child, reader


def _become(command: list[str], kept: list[int], writer: int, guard: int) -> NoReturn:
    try:
        os.setsid()
        if _LINUX:
            _prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
            with contextlib.suppress(OSError), open("/proc/self/oom_score_adj", "wb") as score:
                score.write(_OOM_SCORE)
        if os.getppid() != guard:
            os._exit(1)
        for number in (signal.SIGPIPE, signal.SIGXFSZ):
            signal.signal(number, signal.SIG_DFL)
        for fd in kept:
            os.set_inheritable(fd, True)
        os.execvp(command[0], command)
    except OSError as error:
        os.write(writer, f"exec {error.strerror}: {command[0]}".encode(errors="backslashreplace"))
    os._exit(127)


def _watch(child: int, lifeline: socket.socket, owner: int) -> int | None:
    """Return the child's wait status once it has ended, or None when the owner is gone."""
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    signal.set_wakeup_fd(writer, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, _wake)
    poll = select.poll()
    poll.register(lifeline, select.POLLIN)
    poll.register(reader, select.POLLIN)
    while True:
        ended = _reap()
        if child in ended:
            return ended[child]
        ready = {fd for fd, _ in poll.poll(1000)}
        if reader in ready:
            os.read(reader, 4096)
        if lifeline.fileno() in ready or os.getppid() != owner:
            return None  # the owner never writes: readable means closed


def _reap() -> dict[int, int]:
    ended = {}
    with contextlib.suppress(ChildProcessError):
        while True:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            ended[pid] = status
    return ended


def _sweep(child: int, status: int | None) -> int | None:
    """Kill until no descendant is left; return the child's wait status."""
    deadline = time.monotonic() + _SWEEP_S
    pause = 0.0005
    while time.monotonic() < deadline:
        if status is None or not _LINUX:
            with contextlib.suppress(OSError):
                os.killpg(child, signal.SIGKILL)
        for pid in _descendants(os.getpid()):
            with contextlib.suppress(OSError):
                os.kill(pid, signal.SIGKILL)
        try:
            pid, ended = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return status
        if pid == child:
            status = ended
        if pid == 0:
            time.sleep(pause)
            pause = min(2 * pause, 0.05)
    return status


def _descendants(root: int) -> list[int]:
    """Return the ids of every process below `root`, from /proc; empty where there is none."""
    children: dict[int, list[int]] = {}
    try:
        names = os.listdir("/proc")
    except OSError:
        return []
    for name in filter(str.isdigit, names):
        with contextlib.suppress(OSError, ValueError, IndexError), open(f"/proc/{name}/stat", "rb") as stat:
            parent = int(stat.read().rpartition(b")")[2].split()[1])
            children.setdefault(parent, []).append(int(name))
    found: list[int] = []
    front = [root]
    while front:
        front = [pid for parent in front for pid in children.get(parent, [])]
        found += front
    return found


def _read(fd: int) -> str:
    os.set_blocking(fd, False)
    try:
        return os.read(fd, 4096).decode(errors="replace")
    except BlockingIOError:
        return ""


def _words(status: int | None) -> str:
    if status is None:
        return f"signal {int(signal.SIGKILL)}"
    code = os.waitstatus_to_exitcode(status)
    return f"signal {-code}" if code < 0 else f"exit {code}"


if __name__ == "__main__":
    main()
