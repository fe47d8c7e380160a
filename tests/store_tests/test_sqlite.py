"""The store on SQLite."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from overnight.store.sql_store import SqlStore

from .suite import StoreConformance


class TestSqlite(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SqlStore]:
        store = SqlStore.open(tmp_path / "store.db", create=True)
        yield store
        store.close()
