"""What `overnight sql --schema` prints: every view and table, its columns, and what a row of it is."""

from __future__ import annotations

import sqlite3

from overnight.store.tables import Table
from overnight.store.views import VIEWS


def schema_rows() -> list[tuple[str, str, str, str]]:
    """Return (kind, name, columns, meaning) of each view, then of each table."""
    connection = sqlite3.connect(":memory:")
    try:
        for statement in _create_statements():
            connection.execute(statement)
        views = [("view", view.name, _columns(connection, view.name), view.doc) for view in VIEWS]
    finally:
        connection.close()
    tables = [
        ("table", mapper.class_.__tablename__, ", ".join(mapper.local_table.columns.keys()), _first_line(mapper.class_))
        for mapper in Table.registry.mappers
    ]
    return views + sorted(tables)


def _create_statements() -> list[str]:
    from sqlalchemy.dialects import sqlite
    from sqlalchemy.schema import CreateTable

    tables = [str(CreateTable(table).compile(dialect=sqlite.dialect())) for table in Table.metadata.sorted_tables]
    return tables + [f"CREATE VIEW {view.name} AS {view.sql('sqlite')}" for view in VIEWS]


def _columns(connection: sqlite3.Connection, view: str) -> str:
    return ", ".join(column[0] for column in connection.execute(f"SELECT * FROM {view} LIMIT 0").description)


def _first_line(table: type) -> str:
    return (table.__doc__ or "").strip().splitlines()[0]
