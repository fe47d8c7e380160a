"""SQL for people on PostgreSQL: one statement, as a role of its own that may only SELECT our tables.

`SET ROLE` would not do: one statement can undo it (`set_config` and then `query_to_xml`, which runs SQL inside). So the
statement runs in a session that logged in as the reading role, which `overnight db upgrade` makes; its password is
derived from the owner's, so that nothing more has to be stored. A `--db` whose user may only read is used as it is.
The statement becomes a cursor in a read-only transaction, through the extended protocol, which takes one statement.
"""

from __future__ import annotations

import hashlib
import hmac
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from sqlalchemy import URL, Connection, text

from overnight.store.database import check_revision
from overnight.store.errors import InputError, QueryError, StoreError
from overnight.store.reading import QueryResult, take
from overnight.store.tables import Table
from overnight.store.views import VIEWS

if TYPE_CHECKING:
    import psycopg

FETCH = 500
"""Rows fetched at once: what is beyond a limit is not read."""
_MAY_WRITE = """
SELECT r.rolsuper OR r.rolcreaterole OR r.rolcreatedb OR r.rolreplication
    OR EXISTS (SELECT 1 FROM pg_auth_members AS m WHERE m.member = r.oid)
    OR EXISTS (SELECT 1 FROM pg_class AS t WHERE t.relowner = r.oid)
    OR EXISTS (SELECT 1 FROM pg_class AS t JOIN pg_namespace AS n ON n.oid = t.relnamespace
        WHERE t.relkind IN ('r', 'p') AND n.nspname NOT LIKE 'pg\\_%' AND n.nspname <> 'information_schema'
        AND has_table_privilege(r.oid, t.oid, 'INSERT, UPDATE, DELETE, TRUNCATE'))
FROM pg_roles AS r WHERE r.rolname = session_user"""


def query_postgresql(url: URL, statement: str, timeout_s: float, max_rows: int) -> QueryResult:
    """Run one read-only statement; see `overnight.store.reading.query`."""
    try:
        import psycopg
    except ModuleNotFoundError as error:
        raise InputError("`--db`: no driver for PostgreSQL; `pip install 'overnight[postgres]'`") from error
    deadline = time.monotonic() + timeout_s
    try:
        with _reading_session(url) as connection:
            connection.read_only = True
            found = connection.execute("SELECT version_num FROM alembic_version").fetchone()
            check_revision(str(found[0]) if found else None, "the database")
            return _ask(connection, statement, deadline, max_rows)
    except psycopg.errors.QueryCanceled as error:
        raise QueryError(f"the query ran over {timeout_s:g} s and was cut; narrow it, or raise `--timeout`") from error
    except psycopg.errors.UndefinedTable as error:
        raise QueryError(f"{_first_line(error)}; `overnight sql --schema` lists tables, views and columns") from error
    except (psycopg.errors.InsufficientPrivilege, psycopg.errors.ReadOnlySqlTransaction) as error:
        raise QueryError(f"only reading is allowed here ({_first_line(error)})") from error
    except psycopg.OperationalError as error:
        raise StoreError(f"the database cannot be read: {_first_line(error)}") from error
    except psycopg.Error as error:
        raise QueryError(f"{_first_line(error)}; `overnight sql` takes one SELECT") from error


def _reading_session(url: URL) -> psycopg.Connection[tuple[object, ...]]:
    """Log in as a role that may only read: the URL's own user if that is one, else the database's reading role."""
    import psycopg

    own = _login(url)
    try:
        row = own.execute(_MAY_WRITE).fetchone()
    finally:
        own.close()
    if row is not None and not row[0]:
        return _login(url)
    assert url.database is not None
    reader = url.set(username=reader_name(url.database), password=reader_password(url))
    try:
        return _login(reader)
    except psycopg.OperationalError as error:
        raise StoreError(
            f"cannot log in as the reading role `{reader.username}` ({_first_line(error)}); `overnight db upgrade` "
            "as a user that may create roles makes it, or give `--db` a user that may only SELECT"
        ) from error


def _login(url: URL) -> psycopg.Connection[tuple[object, ...]]:
    import psycopg
    from psycopg.types.numeric import FloatLoader

    connection = psycopg.connect(url.set(drivername="postgresql").render_as_string(hide_password=False))
    connection.adapters.register_loader("numeric", FloatLoader)  # a mean of literals is `numeric`: still a number
    return connection


def _ask(
    connection: psycopg.Connection[tuple[object, ...]], statement: str, deadline: float, max_rows: int
) -> QueryResult:
    _limit(connection, deadline)
    # The newline ends a comment at the statement's end. A cursor takes a SELECT that writes nothing, and nothing else.
    declare = f"DECLARE asked NO SCROLL CURSOR FOR {statement.strip().rstrip(';')}\n"
    connection.execute(declare.encode(), prepare=True)
    columns: list[str] = []
    rows, cut = take(_fetched(connection, columns, deadline), max_rows)
    return QueryResult(columns, rows, cut)


def _fetched(
    connection: psycopg.Connection[tuple[object, ...]], columns: list[str], deadline: float
) -> Iterator[Sequence[object]]:
    while True:
        _limit(connection, deadline)
        cursor = connection.execute(f"FETCH {FETCH} FROM asked".encode())
        columns[:] = [column.name for column in cursor.description or ()]
        rows = cursor.fetchall()
        yield from rows
        if len(rows) < FETCH:
            return


def _limit(connection: psycopg.Connection[tuple[object, ...]], deadline: float) -> None:
    left_ms = max(1, int((deadline - time.monotonic()) * 1000))
    connection.execute(f"SET LOCAL statement_timeout = {left_ms}".encode())


def reader_name(database: str) -> str:
    """Return the name of a database's reading role; names over PostgreSQL's 63 bytes are cut by their hash."""
    name = f"{database}_reader"
    return name if len(name.encode()) <= 63 else f"overnight_{hashlib.sha256(name.encode()).hexdigest()[:16]}_reader"


def reader_password(url: URL) -> str | None:
    """Return the reading role's password, derived from the owner's; None where the owner logs in without one."""
    if not url.password:
        return None
    return hmac.new(str(url.password).encode(), f"overnight reader of {url.database}".encode(), "sha256").hexdigest()


def grant_reading(connection: Connection) -> None:
    """Make the reading role inside a migration where this user may, and let it SELECT our tables and views."""
    database = connection.engine.url.database
    assert database is not None
    role = reader_name(database)
    quote = connection.dialect.identifier_preparer.quote_identifier
    is_known = connection.execute(text("SELECT 1 FROM pg_roles WHERE rolname = :role"), {"role": role}).scalar()
    may = "SELECT rolsuper OR rolcreaterole FROM pg_roles WHERE rolname = current_user"
    if connection.execute(text(may)).scalar():
        if not is_known:
            connection.exec_driver_sql(f"CREATE ROLE {quote(role)}")
        _set_up(connection, role)
    elif not is_known:
        return
    schema = connection.execute(text("SELECT current_schema()")).scalar_one()
    names = [table.name for table in Table.metadata.sorted_tables] + [view.name for view in VIEWS] + ["alembic_version"]
    connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA {quote(schema)} TO {quote(role)}")
    connection.exec_driver_sql(f"GRANT SELECT ON {', '.join(names)} TO {quote(role)}")


def _set_up(connection: Connection, role: str) -> None:
    """Give the role its password (encrypted here, so that no server log has it) and nothing else."""
    password, hidden = reader_password(connection.engine.url), "NULL"
    if password is not None:
        driver = connection.connection.driver_connection
        assert driver is not None
        hidden = f"'{driver.pgconn.encrypt_password(password.encode(), role.encode()).decode()}'"
    quoted = connection.dialect.identifier_preparer.quote_identifier(role)
    connection.exec_driver_sql(f"ALTER ROLE {quoted} LOGIN PASSWORD {hidden}")
    connection.exec_driver_sql(f"ALTER ROLE {quoted} SET default_transaction_read_only = on")


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
