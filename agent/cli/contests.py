"""`overnight race`, `promote` and `rollback`: looking back, and changing the champion, by hand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING

import click

from overnight.agent.cli.contest_lines import describe_contest
from overnight.agent.cli.learning import learning_runtime
from overnight.agent.cli.options import db_option, format_option, print_rows
from overnight.agent.cli.permission import allow_option
from overnight.store.errors import InputError
from overnight.store.lease import is_held, this_process
from overnight.store.sql_store import SqlStore

if TYPE_CHECKING:
    from overnight.agent.events import Event
    from overnight.agent.runtime import Runtime
    from overnight.store.protocol import CampaignState


class Lines:
    """Tells the events of a contest on standard error."""

    def on_event(self, event: Event) -> None:
        """Print the event's line."""
        line = describe_contest(event)
        if line is not None:
            click.echo(line, err=True)


@click.command()
@click.argument("campaign")
@click.option("--draws", type=click.IntRange(1, 100), default=5, show_default=True, help="Answers to each turn.")
@click.option("--measure", is_flag=True, help="Spend paired trials on picks that nobody measured.")
@click.option("--items", "by_turn", is_flag=True, help="With JSON or CSV: a row a turn and proposer.")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Also write the race as one HTML file.")
@allow_option
@db_option
@format_option
def race(
    *,
    campaign: str,
    draws: int,
    measure: bool,
    by_turn: bool,
    output: Path | None,
    allowing: bool,
    db: str,
    form: str,
) -> None:
    """Look back: have CAMPAIGN's champion, challenger and controls answer its held-out turns again.

    Exit code 1: there is no held-out turn, or one of them was in the training rows.
    """
    from overnight.agent.race import look_back
    from overnight.report.page import render_race, write_page
    from overnight.report.races import items_of, stats_of

    with learning_runtime(campaign, db, allowing=allowing, hooks=[Lines()]) as runtime:
        state = runtime.state()
        race_id = look_back(runtime, state, draws=draws)
        if measure:
            _measure(runtime, race_id)
        found = next(each for each in runtime.store.races(state.id) if each.id == race_id)
        store = runtime.store
        assert isinstance(store, SqlStore)
        stats, items = stats_of(store, race_id), items_of(store, race_id)
        if output is not None:
            write_page(render_race(state.name, stats, items), output)
            click.echo(f"wrote {output}", err=True)
    if form == "table":
        names = [str(row[0]) for row in stats.rows]
        print_rows(("", *names), [list(row) for row in zip(stats.columns, *stats.rows, strict=True)][1:-1], form)
        print_rows(items.wide_columns, items.wide_rows, form)
    else:
        print_rows(*((items.columns, items.rows) if by_turn else (stats.columns, stats.rows)), form)
    if found.failure is not None or found.held_out == 0:
        click.echo(f"overnight: {found.failure or found.verdict}", err=True)
        sys.exit(1)


def _measure(runtime: Runtime, race_id: int) -> None:
    from overnight.agent.race_measure import measure_picks
    from overnight.agent.run import check_frozen, prepared
    from overnight.agent.state import BudgetSpent

    check_frozen(runtime.campaign, runtime.store)
    runtime.info = prepared(runtime.campaign, runtime.trainer)
    try:
        measured, failed = measure_picks(runtime, runtime.state(), race_id)
    except BudgetSpent as spent:
        raise InputError(
            f"`budget.{spent.reason}` has no room for a trial; raise it, or leave `--measure` out"
        ) from spent
    click.echo(f"measured {measured} picks, {failed} could not be", err=True)


@click.command()
@click.argument("campaign")
@click.argument("proposer")
@click.option("--reason", default="", help="Kept with the promotion.")
@allow_option
@db_option
def promote(*, campaign: str, proposer: str, reason: str, allowing: bool, db: str) -> None:
    """Make PROPOSER (a name, or `student@v3`) the champion of CAMPAIGN, on your own word.

    A running campaign does it after its current turn. It alternates with its predecessor for 40 turns, like any other.
    """
    with learning_runtime(campaign, db, allowing=allowing, hooks=[Lines()]) as runtime:
        _switch(runtime, "promote_requested", {"proposer": proposer, "reason": reason})


@click.command()
@click.argument("campaign")
@click.option("--reason", default="", help="Kept with the rollback.")
@allow_option
@db_option
def rollback(*, campaign: str, reason: str, allowing: bool, db: str) -> None:
    """Give CAMPAIGN back to the champion before its last promotion."""
    with learning_runtime(campaign, db, allowing=allowing, hooks=[Lines()]) as runtime:
        _switch(runtime, "rollback_requested", {"reason": reason})


def _switch(runtime: Runtime, kind: str, said: dict[str, str]) -> None:
    from overnight.agent.switching import by_hand, check_by_hand

    state = runtime.state()
    check_by_hand(runtime, state, kind, said)
    if not _is_running(state):
        turn = runtime.store.next_stage(state.id).iteration - 1
        by_hand(runtime, state, turn, kind, said)
        return
    if runtime.campaign.file.router.challenger is None and not runtime.store.promotions(state.id):
        raise InputError(
            f"campaign `{state.name}` is running without a challenger, so it does not look for this; "
            f"`overnight pause {state.name}` first"
        )
    runtime.store.request(state.id, kind, said)
    click.echo(f"asked `{state.name}`, which is running: done after its current turn", err=True)


def _is_running(state: CampaignState) -> bool:
    return state.lease_owner != this_process() and is_held(state)
