"""SQL for people: one read-only statement, under limits, that can touch nothing else.

On SQLite the file is opened read-only, so that not even the `-wal` and `-shm` files beside it are made, and an
authorizer allows selecting from tables and calling harmless functions, nothing more: `query_only` alone would let
ATTACH and VACUUM INTO make files. On PostgreSQL see `overnight.store.reading_postgresql`. It does not promise an end
in time inside one long function call (`instr` in a huge text); the command line has a watchdog for that.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from overnight.store.database import check_revision, database_url, existing_file
from overnight.store.errors import InputError, QueryError, StoreError

if TYPE_CHECKING:
    import pandas

TIMEOUT_S = 30.0
MAX_MEMORY = 2**30
"""What SQLite may hold to answer one question."""
MAX_ROWS = 100_000
MAX_BYTES = 256 * 2**20
"""Text and blobs of a result in memory; numbers are bounded by the row limit."""
MAX_VALUE_BYTES = 64 * 2**20
"""The longest text that an expression may build."""
MAX_PATTERN = 256
"""The longest LIKE pattern: matching is slow in its wildcards, and no look at the clock interrupts it."""
_ALLOWED = frozenset({sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_RECURSIVE})
_REFUSED_FUNCTIONS = frozenset({"load_extension", "readfile", "writefile", "edit", "fts3_tokenizer"})
_STEPS_BETWEEN_LOOKS = 10_000
"""Virtual-machine instructions between two looks at the clock: well under a millisecond."""
_MAX_REREADS = 5


@dataclass(frozen=True, slots=True)
class QueryResult:
    """Rows of a query, each a mapping by column when iterated over."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]
    cut: str | None
    """Which limit cut them, or None when they are all there."""

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[dict[str, object]]:
        return (dict(zip(self.columns, row, strict=True)) for row in self.rows)

    def to_frame(self) -> pandas.DataFrame:
        """Return them as a pandas frame.

        Raises:
            InputError: pandas is not installed.
        """
        try:
            import pandas
        except ModuleNotFoundError as error:
            raise InputError("`to_frame` needs pandas; `pip install 'overnight[pandas]'`") from error
        return pandas.DataFrame([list(row) for row in self.rows], columns=list(self.columns))


def query(where: str | Path, statement: str, *, timeout_s: float = TIMEOUT_S, max_rows: int = MAX_ROWS) -> QueryResult:
    """Run one read-only statement.

    Raises:
        InputError: there is no database at `where`.
        QueryError: the statement is wrong, writes, is more than one, or ran over `timeout_s` seconds.
        SchemaError: the database is older or newer than this code.
        StoreError: the database is damaged, locked or cannot be reached.
    """
    url = database_url(where)
    if url.get_backend_name() == "sqlite":
        return _query_sqlite(existing_file(url), statement, timeout_s, max_rows)
    from overnight.store.reading_postgresql import query_postgresql

    return query_postgresql(url, statement, timeout_s, max_rows)


def limit_memory(limit: int = MAX_MEMORY) -> None:
    """Bound what SQLite may hold in this PROCESS; it can only be lowered again. For processes that only ask."""
    connection = sqlite3.connect(":memory:")
    try:
        connection.execute(f"PRAGMA hard_heap_limit = {limit}")
    finally:
        connection.close()


def take(rows: Iterable[Sequence[object]], max_rows: int) -> tuple[list[Sequence[object]], str | None]:
    """Return rows up to the limits on rows and bytes, and which limit cut them."""
    taken: list[Sequence[object]] = []
    size = 0
    for row in rows:
        if len(taken) == max_rows:
            return taken, f"{max_rows} rows"
        size += sum(len(value) for value in row if isinstance(value, str | bytes))
        if size > MAX_BYTES:
            return taken, f"{len(taken)} rows ({MAX_BYTES // 2**20} MiB)"
        taken.append(row)
    return taken, None


def read_sqlite(
    path: Path, timeout_s: float, max_value_bytes: int = MAX_VALUE_BYTES
) -> tuple[sqlite3.Connection, Callable[[], bool]]:
    """Open a SQLite file for reading only, with nothing made beside it; also return a look at its soundness.

    A file that nobody has open has no `-wal` beside it, and a plain read-only connection would make one. It is opened
    as immutable instead, which takes no locks: the returned function says, after reading, whether a writer came
    meanwhile, in which case what was read is to be thrown away.
    """
    wal = path.with_name(path.name + "-wal")
    quiet, before = not wal.exists(), _stamp(path)
    connection = sqlite3.connect(
        f"{path.absolute().as_uri()}?mode=ro{'&immutable=1' if quiet else ''}",
        uri=True,
        timeout=timeout_s,
        check_same_thread=False,
    )
    try:
        connection.execute("PRAGMA temp_store = MEMORY")
        connection.setlimit(sqlite3.SQLITE_LIMIT_ATTACHED, 0)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LENGTH, max_value_bytes)
        connection.setlimit(sqlite3.SQLITE_LIMIT_LIKE_PATTERN_LENGTH, MAX_PATTERN)
    except BaseException:
        connection.close()
        raise
    return connection, lambda: not quiet or (not wal.exists() and _stamp(path) == before)


def _stamp(path: Path) -> tuple[int, int, int]:
    found = path.stat()
    return found.st_ino, found.st_size, found.st_mtime_ns


def _query_sqlite(path: Path, statement: str, timeout_s: float, max_rows: int) -> QueryResult:
    deadline = time.monotonic() + timeout_s
    for _ in range(_MAX_REREADS):
        connection, is_sound = read_sqlite(path, timeout_s)
        try:
            result = _ask(connection, path, statement, deadline, max_rows)
        except (sqlite3.Error, sqlite3.Warning, MemoryError) as error:
            if is_sound():
                raise _in_words(error, path, timeout_s) from error
            continue
        finally:
            connection.close()
        if is_sound():
            return result
    raise StoreError(f"`{path}` changed {_MAX_REREADS} times while it was read; ask again")


def _ask(connection: sqlite3.Connection, path: Path, statement: str, deadline: float, max_rows: int) -> QueryResult:
    connection.set_progress_handler(lambda: int(time.monotonic() > deadline), _STEPS_BETWEEN_LOOKS)
    _check_schema(connection, path)
    connection.set_authorizer(authorize)
    cursor = connection.execute(statement)
    columns = [column[0] for column in cursor.description or ()]
    if not columns:
        raise QueryError("the statement returns nothing; `overnight sql` takes one SELECT")
    return QueryResult(columns, *take(cursor, max_rows))


def _check_schema(connection: sqlite3.Connection, path: Path) -> None:
    try:
        found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" not in str(error):
            raise
        found = None
    check_revision(found[0] if found else None, str(path))


def authorize(action: int, _table: str | None, detail: str | None, _database: str | None, _trigger: str | None) -> int:
    """Allow what a SELECT needs, for `sqlite3.Connection.set_authorizer`."""
    if action in _ALLOWED or (action == sqlite3.SQLITE_FUNCTION and detail not in _REFUSED_FUNCTIONS):
        return sqlite3.SQLITE_OK
    return sqlite3.SQLITE_DENY


def _in_words(error: Exception, path: Path, timeout_s: float) -> Exception:
    message = str(error)
    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
    if message == "interrupted":
        return QueryError(f"the query ran over {timeout_s:g} s and was cut; narrow it, or raise `--timeout`")
    if isinstance(error, MemoryError) or "too big" in message:
        return QueryError("the query builds a text or a table too large to hold and was cut; narrow it")
    if "not authorized" in message or "prohibited" in message or "denied" in message:
        return QueryError(f"only reading is allowed here ({message}); `overnight sql` takes one SELECT")
    if "one statement" in message:
        return QueryError("only one statement at a time")
    if code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB):
        return StoreError(f"`{path}` is damaged ({message}); restore a backup, or save what can be with `.recover`")
    if code in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return StoreError(f"`{path}` is locked by another program ({message}); close it and ask again")
    if code in (sqlite3.SQLITE_IOERR, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_FULL):
        return StoreError(f"`{path}` cannot be read ({message}); look at the disk and at who may read the file")
    return QueryError(f"{message}; `overnight sql --schema` lists tables, views and columns")
