"""A store that can only read: for whoever must not be able to write, whatever goes wrong.

The SQLite file is opened as `overnight sql` opens it: read-only, with nothing made beside it. On PostgreSQL every
transaction is a read-only one.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from sqlalchemy import Engine, create_engine
from sqlalchemy.exc import DBAPIError
from sqlalchemy.pool import StaticPool

from overnight.store.database import check_revision, current_revision, database_url, existing_file, make_engine
from overnight.store.errors import OvernightError, StoreError
from overnight.store.reading import TIMEOUT_S, read_sqlite
from overnight.store.sql_store import SqlStore

T = TypeVar("T")
_MAX_REREADS = 5


def read_store(where: str | Path, ask: Callable[[SqlStore], T]) -> T:
    """Return what `ask` reads from the store; it is asked again where a writer came meanwhile, so it only reads.

    Raises:
        InputError: there is no database at `where`.
        SchemaError: it is older or newer than this code.
        StoreError: it is damaged, locked or cannot be reached; also where `ask` tries to write.
        OvernightError: what `ask` raised.
    """
    url = database_url(where)
    if url.get_backend_name() != "sqlite":
        return _ask(make_engine(url).execution_options(postgresql_readonly=True), str(where), ask)
    path = existing_file(url)
    for _ in range(_MAX_REREADS):
        connection, is_sound = read_sqlite(path, TIMEOUT_S)
        engine = create_engine("sqlite://", creator=lambda opened=connection: opened, poolclass=StaticPool)
        try:
            answer = _ask(engine, str(path), ask)
        except OvernightError:
            if is_sound():
                raise
            continue
        if is_sound():
            return answer
    raise StoreError(f"`{path}` changed {_MAX_REREADS} times while it was read; ask again")


def _ask(engine: Engine, where: str, ask: Callable[[SqlStore], T]) -> T:
    store = SqlStore(engine)
    try:
        with engine.connect() as connection:
            check_revision(current_revision(connection), where)
        return ask(store)
    except DBAPIError as error:
        raise StoreError(f"the database cannot be read: {error.orig}") from error
    finally:
        store.close()
