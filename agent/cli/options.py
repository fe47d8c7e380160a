"""Options that several commands share, and how rows are printed."""

from __future__ import annotations

import csv
import json
import shlex
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import click

from overnight.store.errors import InputError
from overnight.store.protocol import CampaignState
from overnight.store.sql_store import SqlStore
from overnight.trainer.output import clean

if TYPE_CHECKING:
    from rich.console import Console

F = TypeVar("F", bound=Callable[..., Any])
DEFAULT_DB = "overnight.db"
PIPE_WIDTH = 200
"""Of a table that goes into a file or a pipe, in characters."""
FOLDED_WIDTH = 20
"""Longer cells are folded in a table; one whose columns would have to be narrower than that is none."""
GAP = 3
"""Between two columns."""


def db_option(function: F) -> F:
    """Add `--db`."""
    return click.option(
        "--db",
        envvar="OVERNIGHT_DB",
        default=DEFAULT_DB,
        show_default=True,
        show_envvar=True,
        help="SQLite file, or a postgresql:// URL.",
    )(function)


def format_option(function: F) -> F:
    """Add `--format`."""
    return click.option(
        "--format",
        "form",
        type=click.Choice(["table", "json", "csv"]),
        default="table",
        show_default=True,
        help="JSON and CSV go alone to standard output.",
    )(function)


def print_rows(columns: Sequence[str], rows: Sequence[Sequence[object]], form: str) -> None:
    """Print rows as a table, a JSON array of objects, or CSV."""
    if form == "json":
        objects = [dict(zip(columns, row, strict=True)) for row in rows]
        click.echo(json.dumps(objects, ensure_ascii=False, indent=2, default=str))
    elif form == "csv":
        writer = csv.writer(sys.stdout)
        writer.writerow(columns)
        writer.writerows(rows)
    else:
        _print_table(columns, rows)


def _print_table(columns: Sequence[str], rows: Sequence[Sequence[object]]) -> None:
    """Print a row a line where that can be read, or else a value a line."""
    if not rows:
        click.echo("no rows")
        return
    names = [clean(column) for column in columns]
    cells = [[_cell(value) for value in row] for row in rows]
    console = _console()
    widest = [max(map(len, column)) for column in zip(names, *cells, strict=True)]
    if sum(min(width, FOLDED_WIDTH) + GAP for width in widest) > console.width:
        for number, row in enumerate(cells, 1):
            if len(cells) > 1:
                click.secho(f"row {number} of {len(cells)}", bold=True)
            print_record(zip(names, row, strict=True))
            click.echo()
        return
    from rich import box
    from rich.table import Table
    from rich.text import Text

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    numeric = [all(isinstance(row[i], int | float | None) for row in rows) for i in range(len(names))]
    for name, right in zip(names, numeric, strict=True):
        table.add_column(Text(name), justify="right" if right else "left", overflow="fold")
    for row in cells:
        table.add_row(*map(Text, row))
    console.print(table)


def print_record(fields: Iterable[tuple[str, object]]) -> None:
    """Print names and values, a pair a line; a join may have one name twice."""
    from rich.table import Table
    from rich.text import Text

    record = Table.grid(padding=(0, 2))
    for name, value in fields:
        record.add_row(Text(clean(name)), Text(_cell(value), overflow="fold"))
    console = _console()
    with console.capture() as printed:
        console.print(record)
    for line in printed.get().splitlines():
        click.echo(line.rstrip())


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else PIPE_WIDTH, highlight=False)


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.6g}" if isinstance(value, float) else clean(str(value))


def say(text: str, *, err: bool = False) -> None:
    """Print text that may hold what a model, a script or a stranger wrote: nothing in it moves the cursor."""
    click.echo(clean(text), err=err)


def campaign_in(store: SqlStore, name_or_folder: str) -> CampaignState:
    """Return a stored campaign by name, or the newest that was run from a folder.

    Raises:
        InputError: the store has none such; the message lists those it has.
    """
    state = store.campaign(name_or_folder)
    if state is None and Path(name_or_folder).exists():
        from overnight.agent.campaign import load_campaign

        loaded = load_campaign(name_or_folder)
        state = store.campaign(newest_name(store, loaded.name, loaded.path))
    if state is None:
        names = ", ".join(f"`{name}`" for name in store.campaigns()) or "none yet"
        raise InputError(f"no campaign `{name_or_folder}` in this database; it has {names}")
    return state


def newest_name(store: SqlStore, base: str, path: Path) -> str:
    """Return the newest of `base`, `base-2`, ... that `--fresh` made from the same file."""
    name, number = base, 2
    while (state := store.campaign(f"{base}-{number}")) is not None:
        name = state.name if state.path == str(path) else name
        number += 1
    return name


def next_name(store: SqlStore, base: str) -> str:
    """Return the first of `base`, `base-2`, ... that no campaign has."""
    name, number = base, 1
    while store.campaign(name) is not None:
        number += 1
        name = f"{base}-{number}"
    return name


def shown_db(db: str) -> str:
    """Return the database as it may be printed: quoted for a shell, without a password."""
    if "://" not in db:
        return shlex.quote(db)
    from overnight.store.database import database_url

    return shlex.quote(database_url(db).set(drivername="postgresql").render_as_string(hide_password=True))
