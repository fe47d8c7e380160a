"""Which processes a test has left running; a server that the session keeps for other tests is not among them."""

from __future__ import annotations

import os
from pathlib import Path

import psutil

_before: set[int] = set()


def remember() -> None:
    """Take what runs now as not the test's own."""
    _before.clear()
    _before.update(process.pid for process in psutil.Process().children(recursive=True))


def descendants() -> list[psutil.Process]:
    """Return the processes that the test has started, at any depth."""
    return [process for process in psutil.Process().children(recursive=True) if process.pid not in _before]


def left_over(folder: Path) -> list[psutil.Process]:
    """Return this test's descendants, and any process that has `folder` in its command line."""
    found = {process.pid: process for process in descendants()}
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and any(str(folder) in word for word in process.cmdline()):
                found[process.pid] = process
        except psutil.Error:
            continue
    return [process for process in found.values() if process.status() != psutil.STATUS_ZOMBIE]
