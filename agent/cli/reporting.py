"""`overnight report` and `overnight serve`: a campaign for reading."""

from __future__ import annotations

from contextlib import suppress
from pathlib import Path

import click

from overnight.agent.cli.options import campaign_in, db_option
from overnight.store.errors import StoreError
from overnight.store.sql_store import SqlStore


@click.command()
@click.argument("campaign")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; CAMPAIGN.html here if left out.")
@db_option
def report(campaign: str, output: Path | None, db: str) -> None:
    """Write CAMPAIGN's story as one HTML file that needs no network."""
    from overnight.report.analysis import analyse
    from overnight.report.page import render_report
    from overnight.report.story import headline

    store = SqlStore.open(db)
    try:
        found = analyse(store, campaign_in(store, campaign).name)
    finally:
        store.close()
    target = output or Path(f"{found.name}.html")
    _write(target, render_report(found))
    click.echo(headline(found))
    click.echo(f"wrote {target}", err=True)


def _write(target: Path, page: str) -> None:
    """Write beside the target and rename: the file is whole or as it was."""
    partial = target.with_name(target.name + ".partial")
    try:
        partial.write_text(page, encoding="utf-8", errors="replace")
        partial.replace(target)
    except OSError as error:
        raise StoreError(f"cannot write `{target}`: {error.strerror or error}; give another `-o`") from error
    finally:
        with suppress(OSError):
            partial.unlink(missing_ok=True)
