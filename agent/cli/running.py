"""`overnight run`, `pause` and `enqueue`: campaigns that run, and what a person asks of them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import click

from overnight.agent.campaign import Campaign, load_campaign, renamed
from overnight.agent.cli.options import (
    DEFAULT_DB,
    campaign_in,
    db_option,
    newest_name,
    next_name,
    say,
    shown_db,
)
from overnight.agent.cli.permission import allow_option, permitted
from overnight.store import clock
from overnight.store.errors import InputError
from overnight.store.lease import is_held, refuse_held
from overnight.store.protocol import CampaignState
from overnight.store.records import gain_text
from overnight.store.sql_store import SqlStore


@click.command()
@click.argument("campaign")
@db_option
@click.option("--iterations", type=click.IntRange(min=1), help="Pause after this many turns in all; the rest waits.")
@click.option("--until", metavar="HH:MM", help="Pause at this local time; the rest waits.")
@click.option("--fresh", is_flag=True, help="Start anew as NAME-2 (NAME-3, ...); deletes nothing.")
@allow_option
def run(*, campaign: str, db: str, iterations: int | None, until: str | None, fresh: bool, allowing: bool) -> None:
    """Run CAMPAIGN (a folder, a file or a bundled name), or go on where it stopped.

    Ctrl-C pauses after the current trial; a second one stops at once. Either way nothing that was measured is lost.
    """
    from overnight.agent.budget import is_over
    from overnight.agent.cli.progress import progress_hook
    from overnight.agent.cli.questions import person
    from overnight.agent.cli.watching import Watchers
    from overnight.agent.deadline import next_until
    from overnight.agent.run import open_runtime, run_campaign
    from overnight.agent.signals import PauseSwitch

    loaded = load_campaign(campaign)
    if until is not None and not re.fullmatch(r"([01]\d|2[0-3]):[0-5]\d", until):
        raise InputError(f"`--until`: `{until}` is not a time; give HH:MM, such as 07:00")
    loaded = permitted(loaded, allowing=allowing)
    _check_first(loaded, db)
    store = SqlStore.open(db, create=True)
    try:
        name = next_name(store, loaded.name) if fresh else newest_name(store, loaded.name, loaded.path)
        loaded = renamed(loaded, name)
        hook = progress_hook(loaded)
        switch = PauseSwitch(on_signal=hook.on_signal)
        watchers = Watchers(loaded, db)
        runtime = open_runtime(loaded, store, hooks=[hook, *watchers.hooks])
        watchers.watch(runtime)
        runtime.ask_person = person(hook.quiet, idle=runtime.renew)
        runtime.iterations = iterations
        runtime.until = None if until is None else next_until(until, clock.time())
        try:
            state = store.campaign(loaded.name)
            if state is not None and state.status == "finished" and is_over(runtime, state):
                _tidy(state, db)
                click.echo(_finished_line(state), err=True)
                _summary(store, loaded.name, db)
                return
            if state is not None:
                refuse_held(state)  # before anything that watches a run could take this one's end for that one's
            with switch.listening(), hook, watchers:
                result = run_campaign(runtime, checkpoints=_checkpoints(db, loaded.name), switch=switch)
        finally:
            runtime.close()
        if not result.finished:
            click.echo(
                f"paused: {switch.reason or 'what was asked of this run is done'}; `overnight run {campaign}` goes on"
            )
        _summary(store, loaded.name, db)
    finally:
        store.close()


def _check_first(campaign: Campaign, db: str) -> None:
    """Find what is wrong with the campaign's parts before a database is made for it."""
    from overnight.agent.run import host_trainer, prepared, proposers_of, rails_of
    from overnight.store.database import is_missing

    campaign.read_brief()
    trainer = host_trainer(campaign, lambda: None)
    rails_of(campaign)
    for proposer in proposers_of(campaign).values():
        proposer.close()
    if is_missing(db):
        try:
            prepared(campaign, trainer)
        finally:
            trainer.close()


def _checkpoints(db: str, name: str) -> Path | None:
    """LangGraph's checkpoints lie beside a SQLite store; with another database none are kept."""
    from overnight.agent.live import beside
    from overnight.store.database import database_url

    return beside(db, name, "checkpoints") if database_url(db).get_backend_name() == "sqlite" else None


def _tidy(state: CampaignState, db: str) -> None:
    """Clear away what a run left that was killed after its last write."""
    from overnight.agent.checkpoints import merge
    from overnight.agent.live import forget_live

    if not is_held(state):
        forget_live(db, state.name)
        checkpoints = _checkpoints(db, state.name)
        if checkpoints is not None:
            merge(checkpoints)


def _finished_line(state: CampaignState) -> str:
    why = f"campaign `{state.name}` is finished ({state.stop_reason})"
    return f"{why}; raise its budget to go on, or start anew with `--fresh`"


def _summary(store: SqlStore, name: str, db: str) -> None:
    """Print the best change, its gain, what the holdout said, and the SQL to see more."""
    state = store.campaign(name)
    assert state is not None
    if state.best_attempt_id is None:
        click.echo("Nothing was kept: no change beat the baseline beyond its noise.")
    else:
        best = store.attempt(state.best_attempt_id)
        kept = sum(total.kept for total in store.knob_totals(state.id))
        gain = "" if best.gain is None else f", gain {_gain(state, best.gain)}"
        say(
            f"Best: {best.knob} = {best.new_value} in turn {best.iteration}{gain} over {best.trials} trials "
            f"({kept} kept in all)"
        )
    _holdout_line(store, state)
    where = "" if db == DEFAULT_DB else f" --db {shown_db(db)}"
    question = "select iteration, knob, new_value, outcome, gain, trials from iterations"
    click.echo(f"See more: overnight sql{where} \"{question} where campaign = '{name}' order by gain desc\"")


def _holdout_line(store: SqlStore, state: CampaignState) -> None:
    looked = store.last_event(state.id, "holdout_measured")
    if looked is None:
        return
    at, holdout = looked
    total, low, high = (_gain(state, float(str(holdout[key]))) for key in ("gain", "gain_low", "gain_high"))
    winner = int(str(holdout["winner_attempt_id"]))
    whose = (
        "winner" if winner == state.best_attempt_id else f"the winner of then (turn {store.attempt(winner).iteration})"
    )
    where = "Locked holdout" if holdout.get("fresh_data", True) else "Fresh seeds"
    click.echo(f"{where}, {at[:10]}: {whose} against first baseline {total} (95% interval {low} to {high})")


def _gain(state: CampaignState, gain: float) -> str:
    metric = state.spec["metric"]
    assert isinstance(metric, dict)
    return gain_text(gain, "relative" if metric["gain"] == "relative" else "absolute")


@click.command()
@click.argument("campaign")
@db_option
def pause(campaign: str, db: str) -> None:
    """Ask a running CAMPAIGN to pause after its current trial."""
    store = SqlStore.open(db)
    try:
        state = campaign_in(store, campaign)
        if not is_held(state):
            click.echo(f"campaign `{state.name}` is not running ({state.status})", err=True)
            raise SystemExit(1)
        store.request(state.id, "pause_requested", {})
        click.echo(f"asked `{state.name}` to pause after its current trial", err=True)
    finally:
        store.close()


@click.command()
@click.argument("campaign")
@click.argument("change", metavar="KNOB=VALUE")
@click.option("--reason", default="asked by a person", help="Kept with the attempt.")
@db_option
def enqueue(campaign: str, change: str, reason: str, db: str) -> None:
    """Put your own proposal next in CAMPAIGN, under the same rails."""
    knob, equals, text = change.partition("=")
    if not equals or not knob.strip():
        raise InputError(f"`{change}` is not KNOB=VALUE; give, say, lr=0.001")
    value = _value(text)
    store = SqlStore.open(db)
    try:
        state = campaign_in(store, campaign)
        knobs = state.spec["knobs"]
        assert isinstance(knobs, dict)
        if state.status == "finished":
            raise InputError(f"{_finished_line(state)}; the database has {', '.join(store.campaigns())}")
        if knob.strip() not in knobs:
            raise InputError(f"campaign `{state.name}` has no knob `{knob.strip()}`; it has {', '.join(knobs)}")
        store.request(state.id, "enqueued", {"knob": knob.strip(), "new_value": value, "reason": reason})
        click.echo(f"queued for `{state.name}`: {knob.strip()} = {value}", err=True)
    finally:
        store.close()


def _value(text: str) -> int | float | str:
    """Return a value as JSON gives it, a word as it is."""
    try:
        value = json.loads(text)
    except ValueError:
        return text
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return text
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"`{text}` is not a finite number")
    return value
