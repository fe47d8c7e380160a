"""Telling somebody: the campaign file's `[notify] command`, run when a campaign ends, stops, promotes or rolls back.

The command gets the event as one line of JSON on its standard input, no shell, and the environment that a trial's
command gets. It runs in a thread, one at a time and under a time limit, so that the loop waits for it only at the very
end. What goes wrong with it is logged and changes nothing.
"""

from __future__ import annotations

import json
import logging
import os
import queue
import threading
import time
from typing import Self

from overnight.agent import events
from overnight.agent.campaign import Campaign
from overnight.agent.trust import require
from overnight.store import clock
from overnight.store.errors import LeaseHeldError
from overnight.store.hashing import JsonValue

LOG = logging.getLogger(__name__)
TOLD = frozenset({"finished", "stopped", "promoted", "rolled_back"})
"""The kinds of events that somebody is told about."""
MAX_TEXT = 2000
"""Characters of a text in the event: the whole line has to fit into a pipe."""
MAX_LINE = 60_000
FAREWELL_S = 5.0
"""How long the end of a run waits beyond one command's own limit."""


class Notifier:
    """A consumer of the event stream; open while the campaign runs."""

    def __init__(self, campaign: Campaign) -> None:
        """Hold what is needed.

        Raises:
            NotAllowedError: nobody has allowed the file that command.
        """
        require(campaign, "notify")
        self._campaign = campaign
        self._waiting: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        self._stop_told = False
        self._thread = threading.Thread(target=self._keep_telling, name="overnight-notify", daemon=True)

    def __enter__(self) -> Self:
        """Begin to listen."""
        if self._campaign.file.notify.command:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Tell of an end that no event told of, and wait for the last command, within its limit.

        A campaign that another process runs has not ended: nothing is told of it.
        """
        if isinstance(error, Exception) and not isinstance(error, LeaseHeldError) and not self._stop_told:
            self._tell("stopped", {"reason": f"{type(error).__name__}: {error}"})
        if self._thread.is_alive():
            self._waiting.put(None)
            self._thread.join(self._campaign.file.notify.timeout_s + FAREWELL_S)

    def on_event(self, event: events.Event) -> None:
        """Queue an event that somebody is told about."""
        if event.kind in TOLD:
            self._stop_told = self._stop_told or event.kind == "stopped"
            self._tell(event.kind, event.payload())

    def _tell(self, kind: str, payload: dict[str, JsonValue]) -> None:
        if not self._campaign.file.notify.command:
            return
        head: dict[str, JsonValue] = {
            "event": kind,
            "campaign": self._campaign.name,
            "at": clock.utc_text(clock.time()),
        }
        line = json.dumps(head | {name: _cut(value) for name, value in payload.items()}, default=str)
        self._waiting.put(line if len(line) <= MAX_LINE else json.dumps(head))

    def _keep_telling(self) -> None:
        while (line := self._waiting.get()) is not None:
            try:
                problem = run_command(self._campaign, line)
            except Exception:  # the thread's boundary: whatever it is, the campaign goes on
                LOG.exception("`notify.command` could not be run")
                continue
            if problem:
                LOG.warning("`notify.command` %s", problem)


def run_command(campaign: Campaign, line: str) -> str | None:
    """Run the command with `line` on its standard input; return what went wrong, or None.

    Raises:
        OSError: it cannot be started.
    """
    from overnight.trainer.command import BASIC_ENV
    from overnight.trainer.process import GuardedProcess

    section = campaign.file.notify
    env = {name: os.environ[name] for name in (*BASIC_ENV, *section.env) if name in os.environ}
    reader, writer = os.pipe()
    try:
        os.write(writer, line.encode() + b"\n")
        os.close(writer)
        process = GuardedProcess(section.command, cwd=campaign.folder, env=env, stdin=reader)
    finally:
        os.close(reader)
    ends = time.monotonic() + section.timeout_s
    while process.ending is None and time.monotonic() < ends:
        process.feed(min(1.0, max(0.0, ends - time.monotonic())))
    late = process.ending is None
    ending = process.kill()
    if late:
        return f"took longer than {section.timeout_s:g} s and was killed"
    return None if ending.failure is None else f"failed ({ending.words()}): {process.tail.text()[-500:]}"


def _cut(value: JsonValue) -> JsonValue:
    return value[:MAX_TEXT] if isinstance(value, str) else value
