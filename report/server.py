"""`overnight serve`: Datasette over one store, read-only, with this project's plugin, behind a gate.

Every question opens the file anew, as `overnight sql` does: what a campaign commits is seen at once, and no file is
made beside a store that nobody writes. It serves SQLite files only.
"""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from datasette.app import Datasette
from datasette.database import Database
from datasette.plugins import pm

from overnight.report import live
from overnight.report.gate import App, Gate, names_of
from overnight.store.errors import OutsideError
from overnight.store.reading import read_sqlite

SETTINGS = {
    "max_returned_rows": 1_000,
    "default_cache_ttl": 0,
    "allow_download": False,
    "suggest_facets": False,
    "num_sql_threads": 3,
    "truncate_cells_html": 600,
}
MAX_VALUE_BYTES = 2**20
_TRIES = 5


class LiveDatabase(Database):  # type: ignore[misc]
    """A database file of which each question sees what is committed, through a connection of its own."""

    async def execute_fn(self, fn: Callable[[Any], Any]) -> Any:
        """Run a question in a thread."""
        return await asyncio.get_running_loop().run_in_executor(self.ds.executor, self._ask, fn)

    def _ask(self, fn: Callable[[Any], Any]) -> Any:
        for left in reversed(range(_TRIES)):
            connection, is_sound = read_sqlite(Path(self.path), 5.0, MAX_VALUE_BYTES)
            try:
                self.ds._prepare_connection(connection, self.name)
                answer = fn(connection)
            except Exception:
                if left == 0 or is_sound():
                    raise
                continue
            finally:
                connection.close()
            if is_sound() or left == 0:
                return answer
        raise AssertionError("unreachable")

    async def execute_write_fn(self, fn: Callable[[Any], Any], block: bool = True) -> Any:  # noqa: ARG002
        """Refuse: nothing here writes."""
        raise PermissionError("the live page is read-only")


def application(path: Path, *, names: frozenset[str], port: int, token: str | None, timeout_s: float) -> App:
    """Return the whole ASGI application over a store."""
    if not pm.is_registered(live):
        pm.register(live, name="overnight")
    datasette = Datasette([], settings={**SETTINGS, "sql_time_limit_ms": int(timeout_s * 1000)})
    datasette.remove_database("_memory")
    datasette.add_database(LiveDatabase(datasette, path=str(path)), name=live.DATABASE)
    return Gate(datasette.app(), names=names, port=port, token=token)


def serve(
    path: Path,
    *,
    host: str,
    port: int,
    allow: Iterable[str],
    token: str | None,
    timeout_s: float,
    started: Callable[[int], None],
) -> None:
    """Serve until it is interrupted; `started` is told the port once it listens.

    Raises:
        OutsideError: the address cannot be bound.
    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        listening = socket.create_server((host, port), family=family)
    except OSError as error:
        raise OutsideError(
            f"cannot listen on {host} port {port}: {error.strerror or error}; give another `--port`"
        ) from error
    with listening:
        bound = int(listening.getsockname()[1])
        app = application(path, names=names_of(host, allow), port=bound, token=token, timeout_s=timeout_s)
        started(bound)
        config = uvicorn.Config(app, log_level="warning", lifespan="on", server_header=False)
        uvicorn.Server(config).run(sockets=[listening])
