"""What `overnight sql --schema` prints: every view and table, what a row of it is, and what its columns mean."""

from __future__ import annotations

import ast
from functools import cache
from pathlib import Path

from overnight.store import tables
from overnight.store.tables import Table
from overnight.store.views import VIEWS

COLUMNS = ("kind", "name", "column", "meaning")


def schema_rows() -> list[tuple[str, str, str, str]]:
    """Return (kind, name, column, meaning): first a row for a view or table itself, then one for each column."""
    rows = []
    for view in VIEWS:
        rows.append(("view", view.name, "", view.doc))
        rows += [("view", view.name, column, meaning) for column, meaning in view.columns.items()]
    for mapper in sorted(Table.registry.mappers, key=lambda mapper: mapper.class_.__tablename__):
        name = mapper.class_.__tablename__
        rows.append(("table", name, "", (mapper.class_.__doc__ or "").strip().splitlines()[0]))
        meanings = _docstrings().get(mapper.class_.__name__, {})
        for prop in mapper.column_attrs:
            column = prop.columns[0]
            points = next((f"key of `{key.column.table.name}`" for key in column.foreign_keys), "")
            rows.append(("table", name, column.name, meanings.get(prop.key) or points))
    return rows


@cache
def _docstrings() -> dict[str, dict[str, str]]:
    """Return the text under each attribute in `tables.py`, by class and attribute: the one place that explains them."""
    module = ast.parse(Path(tables.__file__).read_text(encoding="utf-8"))
    return {node.name: _attribute_texts(node) for node in module.body if isinstance(node, ast.ClassDef)}


def _attribute_texts(node: ast.ClassDef) -> dict[str, str]:
    found = {}
    for before, after in zip(node.body, node.body[1:], strict=False):
        match before, after:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(words))):
                found[name] = " ".join(words.split())
    return found
