"""`overnight mcp`: the MCP server on standard input and output."""

from __future__ import annotations

import click

from overnight.agent.cli.options import db_option
from overnight.store.database import database_url
from overnight.store.errors import InputError


@click.command()
@click.option("--read-only", is_flag=True, help="Leave out `enqueue` and `pause`.")
@db_option
def mcp(read_only: bool, db: str) -> None:
    """Serve campaigns to a coding agent over MCP (standard input and output).

    It answers questions, checks proposals, queues one, asks for a pause; it starts no command and changes no file.
    """
    database_url(db)
    try:
        from overnight.agent.mcp_server import build_server
    except ModuleNotFoundError as error:
        raise InputError(f"`mcp` needs {error.name}; `pip install 'overnight[mcp]'`") from error
    build_server(db, read_only=read_only).run("stdio")
