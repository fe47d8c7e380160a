"""SQL for people: one read-only statement, under limits, that can touch nothing else.

On SQLite the connection is opened read-only and an authorizer allows selecting from tables and calling harmless
functions, nothing more: `query_only` alone would let ATTACH and VACUUM INTO make files. On PostgreSQL the statement
runs in a read-only transaction through the extended protocol, which takes one statement.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from overnight.store.database import check_revision, database_url, existing_file, make_engine
from overnight.store.errors import QueryError

TIMEOUT_S = 30.0
MAX_ROWS = 100_000
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})
_REFUSED_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer", "zeroblob"})
_STEPS_BETWEEN_LOOKS = 10_000
"""Virtual-machine instructions between two looks at the clock: well under a millisecond."""


@dataclass(frozen=True, slots=True)
class QueryResult:
    """Rows of a query; `cut` says that there were more than were read."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    cut: bool


def query(where: str | Path, statement: str, *, timeout_s: float = TIMEOUT_S, max_rows: int = MAX_ROWS) -> QueryResult:
    """Run one read-only statement.

    Raises:
        InputError: there is no database at `where`.
        QueryError: the statement is wrong, writes, is more than one, or ran over `timeout_s` seconds.
        SchemaError: the database is older or newer than this code.
    """
    url = database_url(where)
    if url.get_backend_name() == "sqlite":
        return _query_sqlite(existing_file(url), statement, timeout_s, max_rows)
    return _query_postgresql(where, statement, timeout_s, max_rows)


def _query_sqlite(path: Path, statement: str, timeout_s: float, max_rows: int) -> QueryResult:
    connection = sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=timeout_s)
    try:
        _check_schema(connection, path)
        connection.set_authorizer(_authorize)
        deadline = time.monotonic() + timeout_s
        connection.set_progress_handler(lambda: int(time.monotonic() > deadline), _STEPS_BETWEEN_LOOKS)
        cursor = connection.execute(statement)
        rows = cursor.fetchmany(max_rows + 1)
        columns = [column[0] for column in cursor.description or ()]
    except (sqlite3.Error, sqlite3.Warning) as error:
        raise QueryError(_in_words(error, timeout_s)) from error
    finally:
        connection.close()
    if not columns:
        raise QueryError("the statement returns nothing; `overnight sql` takes one SELECT")
    return QueryResult(columns, rows[:max_rows], len(rows) > max_rows)


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    try:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError:
        found = None
    check_revision(found[0] if found else None, str(path))


def _authorize(action: int, _table: str | None, detail: str | None, _database: str | None, _trigger: str | None) -> int:
    if action in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and detail not in _REFUSED_FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _in_words(error: Exception, timeout_s: float) -> str:
    message = str(error)
    if message == "interrupted":
        return f"the query ran over {timeout_s:g} s and was cut; narrow it, or give it longer"
    if "not authorized" in message or "prohibited" in message or "readonly" in message:
        return f"only reading is allowed here ({message}); `overnight sql` takes one SELECT"
    if "one statement" in message:
        return "only one statement at a time"
    return f"{message}; `overnight sql --schema` lists tables, views and columns"


def _query_postgresql(where: str | Path, statement: str, timeout_s: float, max_rows: int) -> QueryResult:
    engine = make_engine(database_url(where))
    try:
        with engine.connect() as connection:
            check_revision(connection.execute(text("SELECT version_num FROM alembic_version")).scalar(), "the database")
            connection.rollback()
            connection.execute(text("SET TRANSACTION READ ONLY"))
            connection.execute(text(f"SET LOCAL statement_timeout = {int(timeout_s * 1000)}"))
            driver = connection.connection.driver_connection
            assert driver is not None
            cursor = driver.execute(statement, prepare=True)
            if cursor.description is None:
                raise QueryError("the statement returns nothing; `overnight sql` takes one SELECT")
            rows = cursor.fetchmany(max_rows + 1)
            return QueryResult([column.name for column in cursor.description], rows[:max_rows], len(rows) > max_rows)
    except DBAPIError as error:
        raise QueryError(str(error.orig).strip().splitlines()[0]) from error
    finally:
        engine.dispose()
