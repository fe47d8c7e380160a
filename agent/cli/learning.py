"""`overnight distill`: teach the student from the history now, by hand."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import click
from rich.console import Console
from rich.live import Live

from overnight.agent import events
from overnight.agent.campaign import Campaign, load_campaign, renamed
from overnight.agent.cli.learning_lines import describe_learning, distill_bar, distill_line
from overnight.agent.cli.options import campaign_in, db_option, format_option, print_record, print_rows
from overnight.agent.cli.permission import allow_option, permitted
from overnight.agent.events import Hooks
from overnight.agent.runtime import Runtime
from overnight.store.errors import CorpusRefusedError, InputError, ProposerError
from overnight.store.hashing import JsonValue
from overnight.store.learning import NewDistillation
from overnight.store.sql_store import SqlStore

LINES = 10
"""Lines of progress in a log."""


@click.command()
@click.argument("campaign")
@click.option("--report", "only_report", is_flag=True, help="Say what the corpus holds; train nothing.")
@allow_option
@db_option
@format_option
def distill(campaign: str, only_report: bool, allowing: bool, db: str, form: str) -> None:
    """Train CAMPAIGN's student on its history as it stands, into a new adapter version.

    CAMPAIGN is a name in the database, or a campaign's folder. Exit code 1: the history cannot teach yet.
    """
    from overnight.agent.distilling import corpus_of, only_student, train_student

    shown = DistillProgress(sys.stderr.isatty())
    with learning_runtime(campaign, db, allowing=allowing, hooks=[shown]) as runtime:
        student = only_student(runtime)
        try:
            if only_report:
                _print(corpus_of(runtime).report.plain(), form)
                return
            iteration = runtime.store.next_stage(runtime.state().id).iteration - 1
            with shown:
                done = train_student(runtime, student, iteration, refuse=True)
        except CorpusRefusedError as refused:
            click.echo(f"overnight: {refused}", err=True)
            sys.exit(1)
    if done.failure is not None:
        raise ProposerError(f"distilling failed: {done.failure}", failure="llm_error")
    _print(_result(done), form)


def _result(done: NewDistillation) -> dict[str, JsonValue]:
    corpus, numbers = done.metrics["corpus"], dict(done.metrics)
    assert isinstance(corpus, Mapping)
    del numbers["corpus"]
    label = f"{done.proposer}@v{done.version}"
    return {"contestant": label, "adapter": done.adapter, **numbers, **corpus, "wall_s": done.wall_s}


def _print(row: Mapping[str, JsonValue], form: str) -> None:
    if form != "table":
        print_rows(list(row), [list(row.values())], form)
        return
    print_record((name, _cell(value)) for name, value in row.items())


def _cell(value: JsonValue) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {_cell(item)}" for name, item in value.items()) or "none"
    if isinstance(value, list):
        return ", ".join(_cell(item) for item in value) or "none"
    return "" if value is None else str(value)


@contextmanager
def learning_runtime(campaign: str, db: str, *, allowing: bool, hooks: list[Hooks]) -> Iterator[Runtime]:
    """Open a stored campaign for learning by hand: no trial is run, and an imported history may be learned from.

    Raises:
        InputError: the database does not have it, or its file is not there.
        LeaseHeldError: a process runs it.
    """
    from overnight.agent.run import open_runtime

    store = SqlStore.open(db)
    try:
        loaded = permitted(stored_file(store, campaign), allowing=allowing)
        runtime = open_runtime(loaded, store, hooks=hooks, runs_trials=False)
        try:
            yield runtime
        finally:
            runtime.close()
    finally:
        store.close()


def stored_file(store: SqlStore, campaign: str) -> Campaign:
    """Return the campaign file of a stored campaign, under the name that it has in the store.

    Raises:
        InputError: no such campaign, or its file is not there.
    """
    state = campaign_in(store, campaign)
    if Path(campaign).exists():
        return renamed(load_campaign(campaign), state.name)
    places = [state.path] if state.path is not None and state.path.endswith(".toml") else []
    for place in (*places, state.name):
        try:
            return renamed(load_campaign(place), state.name)
        except InputError:
            continue
    raise InputError(
        f"the campaign file of `{state.name}` is not at `{state.path}`; give its folder instead of its name"
    )


class DistillProgress:
    """Shows a distillation on standard error: a bar on a terminal, a few lines elsewhere."""

    def __init__(self, is_terminal: bool) -> None:
        self._live = Live(console=Console(stderr=True), transient=True) if is_terminal else None
        self._told = 0

    def __enter__(self) -> None:
        if self._live is not None:
            self._live.start()

    def __exit__(self, *exc: object) -> None:
        if self._live is not None:
            self._live.stop()

    def on_event(self, event: events.Event) -> None:
        """Show an event."""
        if isinstance(event, events.DistillStepped):
            if self._live is not None:
                self._live.update(distill_bar(event))
            elif event.step * LINES // event.steps > self._told:
                self._told = event.step * LINES // event.steps
                click.echo(distill_line(event), err=True)
        elif (line := describe_learning(event)) is not None:
            click.echo(line, err=True)
