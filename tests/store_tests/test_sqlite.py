"""The store on SQLite."""

from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from threading import Barrier

import pytest

from overnight.store.sql_store import SqlStore

from .suite import StoreConformance


class TestSqlite(StoreConformance):
    @pytest.fixture
    def store(self, tmp_path: Path) -> Iterator[SqlStore]:
        store = SqlStore.open(tmp_path / "store.db", create=True)
        yield store
        store.close()


def test_threads_make_stores_of_their_own_at_the_same_time(tmp_path: Path) -> None:
    start = Barrier(4)

    def make(number: int) -> Sequence[str]:
        start.wait(10)
        store = SqlStore.open(tmp_path / f"{number}.db", create=True)
        names = store.campaigns()
        store.close()
        return names

    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(make, range(4))) == [[]] * 4
