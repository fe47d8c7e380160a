"""`overnight status`: where campaigns stand, and what a running one does at this second. Nothing is written."""

from __future__ import annotations

from datetime import datetime

import click

from overnight.agent.cli.contest_lines import COLUMNS, contest_columns
from overnight.agent.cli.learning_lines import learning_state
from overnight.agent.cli.options import campaign_in, db_option, format_option, print_record, print_rows
from overnight.agent.live import Live, live_file, read_live
from overnight.agent.pace import End, in_words, next_end
from overnight.store import clock
from overnight.store.lease import is_held
from overnight.store.protocol import CampaignState, Spent
from overnight.store.read_only import read_store
from overnight.store.sql_store import SqlStore

STATUS_COLUMNS = (
    "campaign", "status", "turn", "turns", "stage", "doing", "step", "steps", "loss", "kept", "best_metric",
    "best_gain", "since_keep", "trial_hours", "energy_kwh", "turn_s", "time_left_s", "next_budget", "running_since",
    "running_as", "stop_reason", "learning", *COLUMNS,
)  # fmt: skip
SHORT = ("campaign", "status", "turn", "turns", "stage", "doing", "kept", "best_gain", "time_left", "next_budget")
"""What the table of several campaigns has room for."""


@click.command()
@click.argument("campaign", required=False)
@db_option
@format_option
def status(campaign: str | None, db: str, form: str) -> None:
    """Say where CAMPAIGN stands, or every campaign; of a running one, its step, its loss and the time left."""

    def read(store: SqlStore) -> list[list[object]]:
        names = [campaign_in(store, campaign).name] if campaign else store.campaigns()
        return [status_row(store, name, db) for name in names]

    rows = read_store(db, read)
    if form != "table":
        print_rows(STATUS_COLUMNS, rows, form)
        return
    shown = [_for_people(dict(zip(STATUS_COLUMNS, row, strict=True))) for row in rows]
    if campaign and shown:
        print_record(shown[0].items())
    elif not shown:
        click.echo("no campaign yet; `overnight run quickstart` makes the first")
    else:
        said = [column for column in SHORT if any(row.get(column) is not None for row in shown)]
        print_rows(said, [[row.get(column) for column in said] for row in shown], "table")


def status_row(store: SqlStore, name: str, db: str | None = None) -> list[object]:
    """Return a campaign's row in the order of `STATUS_COLUMNS`; `db` says where the store is, to look beside it."""
    state = store.campaign(name)
    assert state is not None
    position, spent = store.next_stage(state.id), store.spent(state.id)
    best = None if state.best_attempt_id is None else store.attempt(state.best_attempt_id)
    budget = state.spec["budget"]
    assert isinstance(budget, dict)
    alive = is_held(state)
    stage = position.stage if state.environment_hash is not None else "calibrate"
    done = position.iteration - (0 if position.attempt_id else 1)
    live = None
    if db is not None and alive and state.lease_owner is not None:
        live = read_live(live_file(db, name), state.lease_owner)
    end = _end(store, state, live, done, spent) if alive else None
    return [
        name,
        state.status if alive or state.status != "running" else "stopped (run it again to go on)",
        done,
        budget["iterations"],
        stage if state.status != "finished" else None,
        live.doing if live else None,
        live.step if live else None,
        live.steps if live else None,
        live.loss if live else None,
        sum(total.kept for total in store.knob_totals(state.id)),
        best.metric if best else None,
        best.gain if best else None,
        spent.since_keep,
        round(spent.trial_hours, 4),
        round(spent.energy_kwh, 4),
        round(live.turn_s, 3) if live and live.turn_s is not None else None,
        round(end.left_s, 1) if end and end.left_s is not None else None,
        end.budget if end else None,
        state.lease_since if alive else None,
        state.lease_owner if alive else None,
        state.stop_reason,
        learning_state(store, state),
        *contest_columns(store, state).values(),
    ]


def _end(store: SqlStore, state: CampaignState, live: Live | None, done: int, spent: Spent) -> End:
    """Return which budget a running campaign comes to the end of first."""
    budget = state.spec["budget"]
    assert isinstance(budget, dict)
    if live is not None:
        limits = live.limits
        return next_end(
            budget,
            spent,
            done=spent.iterations,
            turn_s=live.turn_s,
            now=clock.time(),
            deadline=limits.deadline,
            pause_at=limits.pause_at,
            pause_after=limits.pause_after,
        )
    started = store.last_event(state.id, "run_started")
    deadline = started[1].get("deadline") if started else None
    at = datetime.fromisoformat(deadline).timestamp() if isinstance(deadline, str) else None
    return next_end(budget, spent, done=done, turn_s=None, now=clock.time(), deadline=at)


def _for_people(row: dict[str, object]) -> dict[str, object]:
    """Return what there is to say of a campaign, in words where they read better than numbers."""
    told: dict[str, object] = {}
    for column, value in row.items():
        if value is None or column == "steps":
            continue
        if column == "step":
            told["step"] = f"{value} of {row['steps']}" if row["steps"] else value
        elif column == "time_left_s" and isinstance(value, float):
            told["time_left"] = f"about {in_words(value)}"
        else:
            told[column] = f"{value:.6g}" if isinstance(value, float) else value
    return told
