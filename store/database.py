"""Opening the database: engine settings, schema version, migrations, backup.

SQLite runs in WAL mode with synchronous=FULL, so that a committed attempt survives a power cut and readers never block
the writer. A writing transaction takes the write lock at its start (`BEGIN IMMEDIATE`), so that it cannot fail half
way. PostgreSQL works by URL. It does not promise anything for SQLite on a network file system.
"""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import URL, Connection, Engine, create_engine, event, inspect, make_url, text
from sqlalchemy.exc import ArgumentError, DBAPIError, InterfaceError, NoSuchModuleError, OperationalError

from overnight.store.errors import InputError, SchemaError, StorageFaultError, StoreError

if TYPE_CHECKING:
    from alembic.config import Config as AlembicConfig

HEAD = "0001"
"""The schema revision that this code reads and writes; a test holds it to the newest migration."""
BUSY_TIMEOUT_S = 30.0
WRITE = {"overnight_write": True}
_SQLITE_MAGIC = b"SQLite format 3\x00"
_MIGRATING = threading.Lock()
"""Alembic's context is one for the whole process: two threads that migrate would write into each other's database."""
_PASSING = frozenset(
    (sqlite3.SQLITE_FULL, sqlite3.SQLITE_IOERR, sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_CANTOPEN,
     sqlite3.SQLITE_READONLY, sqlite3.SQLITE_NOMEM, sqlite3.SQLITE_PROTOCOL)
)  # fmt: skip
"""What may be otherwise later: a full disk, a failing one, one remounted read-only, a lock that is not let go."""


def database_url(where: str | Path) -> URL:
    """Return the URL of `where`: a path of a SQLite file, or any SQLAlchemy URL of SQLite or PostgreSQL.

    Raises:
        InputError: it is a URL of something else.
    """
    where_text = str(where)
    if "://" not in where_text:
        return URL.create("sqlite", database=where_text)
    try:
        url = make_url(where_text)
    except ArgumentError as error:
        raise InputError(f"`--db`: `{where_text}` is not a database URL; give a path or postgresql://...") from error
    backend = url.get_backend_name()
    if backend not in ("sqlite", "postgresql"):
        raise InputError(f"`--db`: `{backend}` is not supported; give a path of a SQLite file or postgresql://...")
    return url.set(drivername="postgresql+psycopg") if backend == "postgresql" else url


def is_missing(where: str | Path) -> bool:
    """Say whether `where` is a SQLite file that is not there yet.

    Raises:
        InputError: it is a URL of something else.
    """
    url = database_url(where)
    return url.get_backend_name() == "sqlite" and bool(url.database) and not Path(url.database or "").exists()


def open_engine(where: str | Path, *, create: bool = False) -> Engine:
    """Open the database and check its schema; with `create`, make one that is not there.

    Raises:
        InputError: there is no database at the path, or the file is not one.
        SchemaError: it is older or newer than this code.
        StoreError: it cannot be reached.
    """
    url = database_url(where)
    is_new = _check_file(url, create=create)
    engine = make_engine(url)
    try:
        with engine.connect() as connection:
            current = current_revision(connection)
        if current is None and (create or is_new):
            upgrade(engine)
        else:
            check_revision(current, _shown(url))
    except DBAPIError as error:
        engine.dispose()
        raise StoreError(f"`--db`: cannot use `{_shown(url)}`: {_first_line(error)}") from error
    except SchemaError:
        engine.dispose()
        raise
    return engine


def make_engine(url: URL) -> Engine:
    """Return an engine with this project's connection settings, without looking at the schema."""
    try:
        engine = create_engine(url)
    except (NoSuchModuleError, ModuleNotFoundError) as error:
        raise InputError(f"`--db`: no driver for `{url.drivername}`; `pip install 'overnight[postgres]'`") from error
    if url.get_backend_name() == "sqlite":
        event.listen(engine, "connect", _configure_sqlite)
        event.listen(engine, "begin", _begin_sqlite)
    return engine


def existing_file(url: URL) -> Path:
    """Return the path of a SQLite file that is there.

    Raises:
        InputError: there is none, or it is not a database.
    """
    _check_file(url, create=False)
    assert url.database is not None
    return Path(url.database)


def _check_file(url: URL, *, create: bool) -> bool:
    """Say whether a SQLite file has to be made; refuse a missing or foreign one."""
    if url.get_backend_name() != "sqlite" or not url.database or url.database == ":memory:":
        return True
    path = Path(url.database)
    if not path.exists() or path.stat().st_size == 0:
        if not create:
            raise InputError(f"`--db`: no database at `{path.absolute()}`; `overnight run` makes one, or give its path")
        if not path.absolute().parent.is_dir():
            raise InputError(f"`--db`: the folder of `{path.absolute()}` does not exist; make it first")
        return True
    try:
        with path.open("rb") as file:
            magic = file.read(len(_SQLITE_MAGIC))
    except OSError as error:
        raise InputError(f"`--db`: cannot read `{path.absolute()}`: {error.strerror or error}") from error
    if magic != _SQLITE_MAGIC:
        raise InputError(f"`--db`: `{path.absolute()}` is not an overnight database; give another path")
    return False


def _configure_sqlite(connection: Any, _record: object) -> None:
    connection.isolation_level = None  # transactions begin where `_begin_sqlite` says, not where the driver guesses
    cursor = connection.cursor()
    try:
        cursor.execute(f"PRAGMA busy_timeout = {int(BUSY_TIMEOUT_S * 1000)}")
        cursor.execute("PRAGMA journal_mode = WAL")
        cursor.execute("PRAGMA synchronous = FULL")
        cursor.execute("PRAGMA foreign_keys = ON")
    finally:
        cursor.close()


def _begin_sqlite(connection: Connection) -> None:
    # A read is one statement, and a statement is its own snapshot: it needs no transaction around it.
    if connection.get_execution_options().get("overnight_write"):
        connection.exec_driver_sql("BEGIN IMMEDIATE")


@contextmanager
def snapshot(engine: Engine) -> Iterator[Connection]:
    """One connection that sees the database as it is now, through many statements, whatever others write meanwhile."""
    isolation = "REPEATABLE READ" if engine.dialect.name == "postgresql" else None
    opened = engine.execution_options(isolation_level=isolation) if isolation else engine
    with opened.connect() as connection:
        if isolation is None:
            connection.exec_driver_sql("BEGIN")
        yield connection


def fault_of(error: DBAPIError, message: str) -> StoreError:
    """Return the error to raise: a `StorageFaultError` where the same may work later."""
    code = getattr(error.orig, "sqlite_errorcode", None)
    passing = isinstance(error, OperationalError | InterfaceError) if code is None else code & 0xFF in _PASSING
    return StorageFaultError(message) if passing else StoreError(message)


def current_revision(connection: Connection) -> str | None:
    """Return the schema revision of a database, or None where there are no tables of ours."""
    if not inspect(connection).has_table("alembic_version"):
        return None
    return connection.execute(text("SELECT version_num FROM alembic_version")).scalar()


def check_revision(current: str | None, where: str) -> None:
    """Raise a SchemaError unless `current` is what this code reads and writes."""
    if current == HEAD:
        return
    if current is None:
        raise SchemaError(f"`{where}` is a database without overnight's tables; `overnight db upgrade` makes them")
    if current > HEAD:
        raise SchemaError(
            f"`{where}` has schema {current}, newer than this code's {HEAD}; install a newer overnight "
            "(`overnight db upgrade` goes forward only)"
        )
    raise SchemaError(f"`{where}` has schema {current}, older than this code's {HEAD}; run `overnight db upgrade`")


def upgrade(engine: Engine) -> str | None:
    """Migrate to the newest schema in one transaction; return the revision that it started from."""
    from alembic import command

    with _MIGRATING, engine.execution_options(**WRITE).begin() as connection:
        before = current_revision(connection)
        if before is not None and before > HEAD:
            check_revision(before, _shown(engine.url))
        command.upgrade(alembic_config(connection), "head")
    return before


def alembic_config(connection: Connection) -> AlembicConfig:
    """Return Alembic's configuration for the migrations inside this package, bound to an open connection."""
    from alembic.config import Config as AlembicConfig

    config = AlembicConfig()
    config.set_main_option("script_location", str(Path(__file__).parent / "migrations"))
    config.attributes["connection"] = connection
    return config


def backup(where: str | Path, target: Path) -> None:
    """Copy a live SQLite database soundly (SQLite's online backup); the copy appears whole or not at all.

    Raises:
        InputError: it is not a SQLite file, or the target exists.
    """
    url = database_url(where)
    if url.get_backend_name() != "sqlite" or not url.database:
        raise InputError("`db backup` copies SQLite files; for PostgreSQL use pg_dump")
    _check_file(url, create=False)
    if target.exists():
        raise InputError(f"`{target}` exists; give another path or remove it first")
    partial = target.with_name(target.name + ".partial")
    source = sqlite3.connect(f"file:{Path(url.database).absolute()}?mode=ro", uri=True)
    try:
        copy = sqlite3.connect(partial)
        try:
            source.backup(copy)
        finally:
            copy.close()
        partial.rename(target)
    except sqlite3.Error as error:
        raise StoreError(f"cannot copy to `{target}`: {error}") from error
    finally:
        source.close()
        partial.unlink(missing_ok=True)


def _shown(url: URL) -> str:
    return url.render_as_string(hide_password=True) if url.get_backend_name() != "sqlite" else str(url.database)


def _first_line(error: DBAPIError) -> str:
    return str(error.orig).strip().splitlines()[0] if error.orig and str(error.orig).strip() else type(error).__name__
