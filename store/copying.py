"""Copying a whole store into another database, such as SQLite into PostgreSQL, verified before it is committed.

The copy is one transaction: every table's rows are counted and hashed on both sides, and it is all there or nothing is.
It does not merge: the target holds no campaign yet.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, func, insert, select, text
from sqlalchemy import Table as SqlTable
from sqlalchemy.exc import DBAPIError

from overnight.store.database import WRITE, open_engine, snapshot
from overnight.store.errors import InputError, StoreError
from overnight.store.tables import Table

BATCH = 1_000


@dataclass(frozen=True, slots=True)
class Copied:
    """One table as it is on both sides."""

    table: str
    rows: int
    sha256: str


def copy_store(source: str | Path, target: str | Path) -> list[Copied]:
    """Copy every table; return what was verified.

    Raises:
        InputError: there is no database at `source`, or `target` holds campaigns already.
        StoreError: one of the two cannot be used, or they do not agree; the target is left as it was.
    """
    read_from = open_engine(source)
    try:
        write_to = open_engine(target, create=True)
        try:
            with snapshot(read_from) as reading, write_to.execution_options(**WRITE).begin() as writing:
                return _copy(reading, writing, str(target))
        except DBAPIError as error:
            raise StoreError(f"cannot copy to `{target}`: {error.orig}; nothing was copied") from error
        finally:
            write_to.dispose()
    finally:
        read_from.dispose()


def _copy(reading: Connection, writing: Connection, target: str) -> list[Copied]:
    tables = Table.metadata.sorted_tables
    for table in tables:
        if writing.execute(select(table).limit(1)).first() is not None:
            raise InputError(f"`{target}` is not empty (`{table.name}`); copy into a new database")
    verified = []
    for table in tables:
        _copy_table(reading, writing, table)
        before, after = (_fingerprint(connection, table) for connection in (reading, writing))
        if before != after:
            raise StoreError(f"`{table.name}` differs after copying: {before} against {after}; nothing was copied")
        verified.append(Copied(table.name, *after))
    if writing.dialect.name == "postgresql":
        _set_sequences(writing, tables)
    return verified


def _copy_table(reading: Connection, writing: Connection, table: SqlTable) -> None:
    rows = iter(reading.execute(select(table).order_by(*table.primary_key)).mappings())
    while batch := [dict(row) for row in islice(rows, BATCH)]:
        writing.execute(insert(table), batch)


def _fingerprint(connection: Connection, table: SqlTable) -> tuple[int, str]:
    """Return how many rows a table has and the SHA-256 over them, in an order that no engine's collation decides."""
    lines = sorted(_row_hash(row) for row in connection.execute(select(table)).mappings())
    return len(lines), hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _row_hash(row: Mapping[Any, Any]) -> str:
    values = ((name, float(value) if isinstance(value, float) else value) for name, value in row.items())
    return hashlib.sha256(repr(list(values)).encode("utf-8", "surrogatepass")).hexdigest()


def _set_sequences(connection: Connection, tables: list[SqlTable]) -> None:
    """Let keys go on after the largest that was copied."""
    for table in _numbered(tables):
        last = connection.execute(select(func.max(table.c.id))).scalar()
        if last is not None:
            sequence = f"SELECT setval(pg_get_serial_sequence('{table.name}', 'id'), :last)"
            connection.execute(text(sequence), {"last": last})


def _numbered(tables: list[SqlTable]) -> Iterator[SqlTable]:
    return (table for table in tables if "id" in table.c and table.c.id.type.python_type is int)
