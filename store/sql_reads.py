"""How the SQL store reads: each question on a connection of its own, what fails told as a fault of the store."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, Select
from sqlalchemy.exc import DBAPIError

from overnight.store.database import fault_of


class SqlReads:
    """What the parts of `SqlStore` read with."""

    _engine: Engine

    @contextmanager
    def _reading(self) -> Iterator[Connection]:
        try:
            with self._engine.connect() as connection:
                yield connection
        except DBAPIError as error:
            raise fault_of(error, f"the database cannot be read: {error.orig}") from error

    def _rows(self, query: Select[*tuple[Any, ...]], values: Mapping[str, Any] | None = None) -> list[dict[str, Any]]:
        with self._reading() as connection:
            return [dict(row) for row in connection.execute(query, values or {}).mappings()]

    def _one(self, query: Select[*tuple[Any, ...]], values: Mapping[str, Any] | None = None) -> dict[str, Any] | None:
        with self._reading() as connection:
            row = connection.execute(query, values or {}).mappings().first()
            return None if row is None else dict(row)
