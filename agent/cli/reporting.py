"""`overnight report` and `overnight serve`: a campaign for reading."""

from __future__ import annotations

from pathlib import Path

import click

from overnight.agent.cli.options import campaign_in, db_option
from overnight.store.database import database_url, existing_file
from overnight.store.errors import InputError
from overnight.store.reading import query
from overnight.store.sql_store import SqlStore


@click.command()
@click.argument("campaign")
@click.option("-o", "--output", type=click.Path(path_type=Path), help="The file; CAMPAIGN.html here if left out.")
@db_option
def report(campaign: str, output: Path | None, db: str) -> None:
    """Write CAMPAIGN's story as one HTML file that needs no network."""
    from overnight.report.analysis import analyse
    from overnight.report.page import render_report, write_page
    from overnight.report.story import headline

    store = SqlStore.open(db)
    try:
        found = analyse(store, campaign_in(store, campaign).name)
    finally:
        store.close()
    target = output or Path(f"{found.name}.html")
    write_page(render_report(found), target)
    click.echo(headline(found))
    click.echo(f"wrote {target}", err=True)


@click.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Address to bind; a token is asked for beyond loopback."
)
@click.option("--port", type=click.IntRange(0, 65535), default=8001, show_default=True, help="0 takes a free one.")
@click.option("--allow-host", multiple=True, metavar="NAME", help="Another name that this server is asked under.")
@click.option("--token", envvar="OVERNIGHT_TOKEN", help="The token beyond loopback; a new one is made if left out.")
@click.option(
    "--timeout", type=click.FloatRange(min=0.1), default=5.0, show_default=True, help="Seconds until a query is cut."
)
@db_option
def serve(*, host: str, port: int, allow_host: tuple[str, ...], token: str | None, timeout: float, db: str) -> None:
    """Show running campaigns live in a browser, with SQL, read-only."""
    import secrets

    from overnight.report.gate import is_loopback

    try:
        from overnight.report.server import serve as run_server
    except ModuleNotFoundError as error:
        raise InputError(f"`serve` needs {error.name}; `pip install 'overnight[serve]'`") from error
    url = database_url(db)
    if url.get_backend_name() != "sqlite":
        raise InputError("`serve` reads SQLite files; `overnight db copy FILE` makes one from PostgreSQL")
    path = existing_file(url)
    query(path, "SELECT 1")  # the schema is ours, and of this version
    asked = None if is_loopback(host) else token or secrets.token_urlsafe(24)

    def started(bound: int) -> None:
        name = f"[{host}]" if ":" in host else host
        end = "" if asked is None else f"?token={asked}"
        click.echo(f"serving {path} at http://{name}:{bound}/{end} (Ctrl-C stops)", err=True)

    run_server(path, host=host, port=port, allow=allow_host, token=asked, timeout_s=timeout, started=started)
