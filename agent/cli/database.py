"""`overnight db`: migrate or copy the store."""

from __future__ import annotations

from pathlib import Path

import click

from overnight.agent.cli.options import db_option, format_option, print_rows
from overnight.store.database import HEAD, backup, database_url, existing_file, make_engine, upgrade


@click.group()
def db() -> None:
    """Migrate or copy the store."""


@db.command("upgrade")
@db_option
def upgrade_command(db: str) -> None:
    """Bring the database to this version's schema."""
    url = database_url(db)
    if url.get_backend_name() == "sqlite":
        existing_file(url)
    engine = make_engine(url)
    try:
        before = upgrade(engine)
    finally:
        engine.dispose()
    click.echo(f"the schema is {HEAD}" + (" already" if before == HEAD else f", from {before or 'nothing'}"), err=True)


@db.command("backup")
@click.argument("target", type=click.Path(path_type=Path))
@db_option
def backup_command(target: Path, db: str) -> None:
    """Copy a live SQLite store soundly to TARGET."""
    backup(db, target)
    click.echo(f"copied to {target}", err=True)


@db.command("copy")
@click.argument("target")
@db_option
@format_option
def copy_command(target: str, db: str, form: str) -> None:
    """Copy the whole store to TARGET, a new SQLite file or a postgresql:// URL; counts and hashes are verified."""
    from overnight.store.copying import copy_store

    copied = copy_store(db, target)
    print_rows(("table", "rows", "sha256"), [(each.table, each.rows, each.sha256) for each in copied], form)
    click.echo(f"copied and verified {sum(each.rows for each in copied)} rows", err=True)
