"""`open_store`: the trajectory store for a host application."""

from __future__ import annotations

from pathlib import Path

from overnight.store.sql_store import SqlStore


def open_store(where: str | Path = "overnight.db", *, create: bool = False) -> SqlStore:
    """Open the trajectory store at a path of a SQLite file or a `postgresql://` URL; a context manager.

    Args:
        where: the database.
        create: make it where there is none.

    Raises:
        InputError: there is no database, or the file is none of ours.
        SchemaError: it is older or newer than this version; the message says what to do.
        StoreError: it cannot be reached.
    """
    return SqlStore.open(where, create=create)
