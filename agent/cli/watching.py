"""What watches a run besides its panel: the log, the file that `status` reads, and the command that tells somebody."""

from __future__ import annotations

from contextlib import ExitStack
from typing import Self

import click

from overnight.agent.campaign import Campaign
from overnight.agent.events import Hooks
from overnight.agent.live import Limits, LiveFile, beside, live_file
from overnight.agent.notify import Notifier
from overnight.agent.runlog import RunLog
from overnight.agent.runtime import Runtime


class Watchers:
    """The consumers of one run's events; open while it runs.

    Raises:
        NotAllowedError: nobody has allowed the campaign file its `notify.command`.
    """

    def __init__(self, campaign: Campaign, db: str) -> None:
        self._log = RunLog(beside(db, campaign.name, "log"), campaign)
        self._live = LiveFile(live_file(db, campaign.name), self._limits)
        self._notifier = Notifier(campaign)
        self._runtime: Runtime | None = None
        self._stack = ExitStack()

    @property
    def hooks(self) -> list[Hooks]:
        """The consumers."""
        return [self._log, self._live, self._notifier]

    def watch(self, runtime: Runtime) -> None:
        """Say which runtime is being watched; before it starts."""
        self._runtime = runtime

    def __enter__(self) -> Self:
        with ExitStack() as stack:
            try:
                stack.enter_context(self._log)
            except OSError as error:
                click.echo(f"overnight: no log is kept: {error}", err=True)
            stack.enter_context(self._live)
            stack.enter_context(self._notifier)
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._stack.__exit__(kind, error, None)

    def _limits(self) -> Limits:
        run = self._runtime
        return Limits() if run is None else Limits(run.deadline, run.until, run.iterations)
