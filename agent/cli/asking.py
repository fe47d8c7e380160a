"""`overnight sql` and `overnight show`: asking the history."""

from __future__ import annotations

import json
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict

import click

from overnight.agent.cli.options import campaign_in, db_option, format_option, print_rows, say
from overnight.store.errors import InputError
from overnight.store.protocol import Attempt, Trial
from overnight.store.reading import MAX_ROWS, TIMEOUT_S, limit_memory, query
from overnight.store.sql_store import SqlStore

GRACE_S = 2.0
"""Past its limit a query has so long to notice, before the process ends."""


@click.command()
@click.argument("statement", required=False)
@click.option("--schema", is_flag=True, help="Print tables and views with what they mean.")
@click.option(
    "--timeout",
    "timeout_s",
    type=click.FloatRange(min=0.001),
    default=TIMEOUT_S,
    show_default=True,
    help="Seconds until the query is cut.",
)
@click.option(
    "--limit",
    "max_rows",
    type=click.IntRange(min=1),
    default=MAX_ROWS,
    show_default=True,
    help="Rows until the result is cut.",
)
@db_option
@format_option
def sql(*, statement: str | None, schema: bool, timeout_s: float, max_rows: int, db: str, form: str) -> None:
    """Ask the history one read-only SQL question.

    Example: overnight sql "select knob, kept, best_gain from knob_stats order by best_gain desc"
    """
    if schema:
        from overnight.store.schema_help import COLUMNS, schema_rows

        print_rows(COLUMNS, schema_rows(), form)
        return
    if statement == "-" or (statement is None and not sys.stdin.isatty()):
        statement = sys.stdin.read()
    if not statement or not statement.strip():
        raise InputError('no SQL given; try `overnight sql "select * from campaign_stats"` or `--schema`')
    limit_memory()
    with _watchdog(timeout_s):
        result = query(db, statement, timeout_s=timeout_s, max_rows=max_rows)
    print_rows(result.columns, result.rows, form)
    if result.cut:
        click.echo(f"overnight: cut after {result.cut}; narrow the query or raise `--limit`", err=True)


@contextmanager
def _watchdog(timeout_s: float) -> Iterator[None]:
    """End the process where a query does not: one call of `instr` in a huge text never looks at the clock."""

    def end() -> None:
        click.echo(f"overnight: the query ran over {timeout_s:g} s and was ended; narrow it", err=True)
        os._exit(2)

    timer = threading.Timer(timeout_s + GRACE_S, end)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


@click.command()
@click.argument("campaign")
@click.argument("iteration", type=int)
@db_option
@format_option
def show(campaign: str, iteration: int, db: str, form: str) -> None:
    """Show one turn whole: prompt, reply, verdict, trials, decision."""
    store = SqlStore.open(db)
    try:
        state = campaign_in(store, campaign)
        attempts = store.attempts_of_turn(state.id, iteration)
        if not attempts:
            click.echo(f"overnight: campaign `{state.name}` has no turn {iteration}", err=True)
            sys.exit(1)
        trials = {attempt.id: store.trials_of_attempt(attempt.id) for attempt in attempts}
        prompts = store.prompts_of(sorted({a.prompt_id for a in attempts if a.prompt_id is not None}))
    finally:
        store.close()
    if form == "table":
        for attempt in attempts:
            _print_attempt(attempt, trials[attempt.id], prompts.get(attempt.prompt_id or "", ""))
        return
    columns = [*Attempt.__slots__, "prompt", "trial_log"]
    rows = []
    for attempt in attempts:
        log = [asdict(trial) for trial in trials[attempt.id]]
        prompt = prompts.get(attempt.prompt_id or "")
        rows.append([*asdict(attempt).values(), prompt, log if form == "json" else json.dumps(log)])
    print_rows(columns, rows, form)


def _print_attempt(attempt: Attempt, trials: list[Trial] | tuple[Trial, ...] | object, prompt: str) -> None:
    click.secho(f"Turn {attempt.iteration}, try {attempt.try_no}", bold=True, nl=False)
    say(f" by {attempt.proposer} ({attempt.role}), {attempt.started_at}: {attempt.outcome or attempt.stage}")
    for title, text in (("Prompt", prompt), ("Reply", attempt.reply or "(none)")):
        click.secho(f"\n{title}", bold=True)
        say(text.rstrip())
    click.secho("\nVerdict", bold=True)
    say(f"{attempt.rail}: {attempt.rail_reason}" if attempt.rail else "passed the rails" if attempt.knob else "-")
    if attempt.failure:
        say(f"failed: {attempt.failure}\n{attempt.trace or ''}".rstrip())
    assert isinstance(trials, list)
    if trials:
        click.secho("\nTrials", bold=True)
        columns = ("purpose", "seed", "replicate", "mode", "metric", "failure", "wall_s", "energy_wh")
        print_rows(columns, [[getattr(trial, column) for column in columns] for trial in trials], "table")
    if attempt.decision:
        click.secho("Decision", bold=True)
        say(attempt.decision)
    click.echo()
