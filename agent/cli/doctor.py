"""`overnight doctor`: what works here, what a campaign's night will need, and how to mend what does not work."""

from __future__ import annotations

import shutil
import sys
import textwrap
from collections.abc import Iterator
from contextlib import ExitStack

import click

from overnight.agent.cli.options import db_option, format_option, print_rows
from overnight.agent.cli.permission import allow_option, permitted
from overnight.agent.doctor.finding import Finding, amiss
from overnight.store.errors import OvernightError
from overnight.trainer.output import clean

COLUMNS = ("state", "what", "found", "remedy")
_STYLES = {"ok": {"fg": "green"}, "note": {"fg": "yellow"}, "NO": {"fg": "red", "bold": True}}


@click.command()
@click.argument("campaign", required=False)
@db_option
@format_option
@click.option("--json", "as_json", is_flag=True, help="The same as `--format json`.")
@allow_option
def doctor(*, campaign: str | None, db: str, form: str, as_json: bool, allowing: bool) -> None:
    """Say what works here, and how to mend what does not; with CAMPAIGN, try everything that its night will need.

    Trying means: one real proposal of each proposer, a trial of the defaults and two steps of the largest
    configuration. Nothing is written to the store. Exit code 0 when the campaign would start, 1 when something is
    amiss.
    """
    form = "json" if as_json else form
    found = []
    with ExitStack() as stack:
        waiting = _Waiting(stack, quiet=form != "table")
        for finding in _findings(campaign, db, allowing, waiting):
            found.append(finding)
            if form == "table":
                waiting.print(_lines(finding))
    if form != "table":
        print_rows(COLUMNS, [(each.state, each.what, each.found, each.remedy) for each in found], form)
    sys.exit(1 if any(each.state == "NO" for each in found) else 0)


class _Waiting:
    """A line on standard error that says what is being tried, where somebody watches."""

    def __init__(self, stack: ExitStack, *, quiet: bool) -> None:
        from rich.console import Console

        console = Console(stderr=True)
        self._status = None if quiet or not console.is_terminal else stack.enter_context(console.status("looking"))

    def __call__(self, what: str) -> None:
        if self._status is not None:
            self._status.update(f"trying {what}")

    def print(self, text: str) -> None:
        """Print a finding; the waiting line stays below it."""
        if self._status is not None:
            self._status.stop()
        click.echo(text)
        if self._status is not None:
            self._status.start()


def _findings(campaign: str | None, db: str, allowing: bool, waiting: _Waiting) -> Iterator[Finding]:
    from overnight.agent.doctor.checkup import campaign_findings, machine_findings
    from overnight.agent.doctor.machine import disk

    if campaign is None:
        yield from machine_findings(db)
        yield disk(db)
        return
    from overnight.agent.campaign import load_campaign

    try:  # first of all, so that a question comes while somebody is there
        loaded = permitted(load_campaign(campaign), allowing=allowing)
    except OvernightError as error:
        yield from machine_findings(db)
        yield amiss("campaign", error)
        return
    yield from machine_findings(db)
    try:
        yield from campaign_findings(loaded, db, waiting)
    except OvernightError as error:
        yield amiss("campaign", error)


def _lines(finding: Finding) -> str:
    """Return a finding for a terminal, wrapped, its remedy below it."""
    width = max(shutil.get_terminal_size((100, 24)).columns, 60)
    state = click.style(f"{finding.state:<5}", **_STYLES[finding.state])  # type: ignore[arg-type]
    body = textwrap.wrap(clean(finding.found), width - 24) or [""]
    lines = [f"{state}{clean(finding.what):<18} {body[0]}", *(" " * 24 + line for line in body[1:])]
    if finding.remedy:
        lines += [" " * 24 + line for line in textwrap.wrap(clean(f"-> {finding.remedy}"), width - 24)]
    return "\n".join(lines)
