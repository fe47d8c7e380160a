"""The store on a real PostgreSQL server."""

from collections.abc import Callable, Iterator

import pytest

from overnight.store.sql_store import SqlStore

from .suite import StoreConformance


class TestPostgresql(StoreConformance):
    @pytest.fixture
    def store(self, new_postgresql: Callable[[], str]) -> Iterator[SqlStore]:
        store = SqlStore.open(new_postgresql(), create=True)
        yield store
        store.close()
