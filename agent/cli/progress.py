"""What `overnight run` shows: a live panel on a terminal, plain lines elsewhere, both fed by the event stream."""

from __future__ import annotations

import sys
import time
from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Protocol, Self

import click
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.panel import Panel
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from overnight.agent import contest_events, events
from overnight.agent.campaign import Campaign
from overnight.agent.cli.contest_lines import describe_contest
from overnight.agent.cli.learning_lines import describe_learning, distill_bar
from overnight.agent.cli.options import say
from overnight.store.records import gain_text
from overnight.trainer.output import clean

LAST_DECISIONS = 6
_PAUSING = {"SIGTERM": "dropping what is under way, and pausing"}
_STYLE = {"kept": "bold green", "reverted": "default", "blocked": "yellow", "failed": "red"}


class ProgressHook(Protocol):
    """A consumer that is open while a campaign runs."""

    def __enter__(self) -> Self:
        """Start showing."""
        ...

    def __exit__(self, *exc: object) -> None:
        """Stop showing."""
        ...

    def on_event(self, event: events.Event) -> None:
        """Show an event."""
        ...

    def on_signal(self, name: str) -> None:
        """Say that a signal was heard."""
        ...

    def quiet(self) -> AbstractContextManager[None]:
        """Leave the terminal to a question, inside the block."""
        ...


def progress_hook(campaign: Campaign) -> ProgressHook:
    """Return the live panel on a terminal, plain lines elsewhere."""
    console = Console()
    return LivePanel(campaign, console) if console.is_terminal else PlainLines(campaign)


def describe(event: events.Event, campaign: Campaign) -> str | None:
    """Return one line for an event, or None for those that are not worth one."""
    match event:
        case events.RunStarted():
            return f"campaign {event.campaign}: turn {event.iteration} of {event.budget}"
        case events.Calibrated():
            noise = "" if event.noise_sd is None else f", noise {event.noise_sd:.2g}"
            metric = f"{campaign.file.metric.name} {event.baseline_metric:.5g}"
            return f"baseline {metric}{noise} ({event.trainer_kind} trainer)"
        case events.EnvironmentChanged():
            return f"the environment changed ({', '.join(event.changed)}): measuring the baseline again"
        case events.Decided():
            return f"turn {event.iteration} {decision_text(event, campaign)}"
        case events.Blocked():
            return f"turn {event.iteration} try {event.try_no} blocked by {event.rail}: {event.reason}"
        case events.ProposalFailed():
            return f"turn {event.iteration}: {event.proposer} did not answer ({event.failure}): {event.reason}"
        case events.GridRefined():
            return "every legal change was tried: ranges are gridded finer"
        case events.HoldoutMeasured():
            ends = (event.gain, event.gain_low, event.gain_high)
            gain, low, high = (gain_text(end, campaign.file.metric.gain) for end in ends)
            where = "locked holdout" if event.fresh_data else "fresh seeds"
            return f"{where}: gain {gain} (95% interval {low} to {high})"
        case events.HoldoutSkipped():
            return f"locked holdout: {event.reason}"
        case events.Finished():
            return f"finished after {event.iterations} turns: {event.why or event.stop_reason}"
    return _describe_fault(event) or describe_learning(event) or describe_contest(event)


def _describe_fault(event: events.Event) -> str | None:
    match event:
        case events.Fault():
            return f"{'waiting: ' if event.waits else ''}{event.what}: {event.detail}"
        case events.FaultOver():
            return f"{event.what} works again after {event.wall_s:.0f} s"
        case events.TrialDropped():
            return f"dropped a trial after {event.wall_s:.0f} s ({event.reason}); it is run again"
    return None


def decision_text(event: events.Decided, campaign: Campaign) -> str:
    """Return a decided turn in words."""
    what = f"{event.knob} = {event.new_value}" if event.knob else "no valid proposal"
    detail = gain_text(event.gain, campaign.file.metric.gain) or event.failure or event.rail or ""
    trials = f" over {event.trials} trials" if event.trials > 1 else ""
    return f"{event.outcome}: {what} {detail}{trials} [{event.proposer}]".replace("  ", " ")


class PlainLines:
    """One line an event that matters, for logs and pipes."""

    def __init__(self, campaign: Campaign) -> None:
        self._campaign = campaign

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        sys.stdout.flush()

    def on_event(self, event: events.Event) -> None:
        """Print the event's line."""
        line = describe(event, self._campaign)
        if line is not None:
            say(line)

    def on_signal(self, name: str) -> None:
        """Say that the run stops soon."""
        click.echo(f"{name}: {_PAUSING.get(name, 'pausing after the current trial')}", err=True)

    def quiet(self) -> AbstractContextManager[None]:
        """Nothing is redrawn."""
        return nullcontext()


class LivePanel:
    """A panel that is redrawn in place: turn, trial, best so far, last decisions."""

    def __init__(self, campaign: Campaign, console: Console) -> None:
        self._campaign, self._console = campaign, console
        self._live = Live(self, console=console, refresh_per_second=8, transient=True)
        self._started = time.monotonic()
        self._turn, self._stage, self._note = 0, "starting", ""
        self._trial: events.TrialStarted | None = None
        self._step: events.TrialStepped | None = None
        self._learning: events.DistillStepped | None = None
        self._best: events.Decided | None = None
        self._baseline: events.Calibrated | None = None
        self._counts = dict.fromkeys(("kept", "reverted", "blocked", "failed"), 0)
        self._last: deque[events.Decided] = deque(maxlen=LAST_DECISIONS)

    def __enter__(self) -> Self:
        self._live.__enter__()
        return self

    def __exit__(self, *exc: object) -> None:
        self._live.__exit__(None, None, None)

    def on_signal(self, name: str) -> None:
        """Say that the run stops soon."""
        self._note = f"{name}: {_PAUSING.get(name, 'pausing after the current trial')}; again to stop at once"

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Take the panel away while somebody is asked."""
        self._live.stop()
        try:
            yield
        finally:
            self._live.start()

    def on_event(self, event: events.Event) -> None:
        """Take the event into the panel; lines that stay are printed above it."""
        match event:
            case contest_events.RaceStarted():
                self._stage, self._trial = f"looking back over {event.items} turns", None
            case contest_events.RaceStepped():
                self._stage = f"looking back: {event.done} of {event.items} turns"
            case events.TrialStarted():
                self._trial, self._step, self._stage = event, None, event.purpose
            case events.TrialStepped():
                self._step = event
            case events.TurnStarted():
                self._turn, self._stage = event.iteration, f"{event.proposer} proposes ({event.role})"
                self._trial = None
            case events.DistillStarted():
                self._stage, self._trial = f"distilling {event.contestant}", None
            case events.DistillStepped():
                self._learning = event
            case events.Distilled() | events.DistillFailed():
                self._learning, self._stage = None, "starting"
            case events.Accepted():
                self._stage = f"{event.knob}: {event.old_value} -> {event.new_value}"
            case events.Calibrated():
                self._baseline = event
            case events.Decided():
                self._last.appendleft(event)
                self._counts[event.outcome] += 1
                self._best = event if event.is_best else self._best
        line = describe(event, self._campaign)
        if line is not None and not isinstance(event, events.Decided | events.Blocked):
            self._console.print(Text(clean(line)))

    def __rich__(self) -> RenderableType:
        """Draw the panel."""
        budget = self._campaign.file.budget.iterations
        head = Table.grid(expand=True, padding=(0, 1))
        head.add_column(width=12)
        head.add_column(ratio=1)
        head.add_row(
            Text(f"turn {self._turn}/{budget}", style="bold"),
            ProgressBar(total=budget, completed=max(self._turn - 1, 0)),
        )
        head.add_row(*self._trial_row())
        head.add_row("best", self._best_text())
        counts = "  ".join(f"{count} {name}" for name, count in self._counts.items() if count)
        head.add_row("so far", Text(counts or "nothing decided yet", style="dim"))
        decisions = [
            Text(
                clean(f"{event.iteration:>4} {decision_text(event, self._campaign)}"),
                style=_STYLE[event.outcome],
                no_wrap=True,
            )
            for event in self._last
        ]
        note = [Text(self._note, style="bold yellow")] if self._note else []
        minutes, seconds = divmod(int(time.monotonic() - self._started), 60)
        title = f"overnight: {self._campaign.name}"
        return Panel(
            Group(head, *decisions, *note), title=title, subtitle=f"{minutes}:{seconds:02}", title_align="left"
        )

    def _trial_row(self) -> tuple[RenderableType, RenderableType]:
        if self._learning is not None:
            return "distill", distill_bar(self._learning)
        if self._trial is None or self._step is None:
            return "trial", Text(clean(self._stage))
        step, total = self._step.step, self._step.steps
        loss = "" if self._step.loss is None else f"  loss {self._step.loss:.4f}"
        words = f"{self._trial.purpose} {self._trial.number}/{self._trial.of}  step {step}/{total or '?'}{loss}"
        return "trial", Text(clean(words))

    def _best_text(self) -> Text:
        if self._best is not None:
            gain = gain_text(self._best.gain, self._campaign.file.metric.gain)
            best = f"{self._best.knob} = {self._best.new_value} {gain} in turn {self._best.iteration}"
            return Text(clean(best), style="green")
        if self._baseline is not None:
            return Text(f"the baseline, {self._campaign.file.metric.name} {self._baseline.baseline_metric:.5g}")
        return Text("")
