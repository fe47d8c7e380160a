"""The store on a real PostgreSQL server."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import pytest
from sqlalchemy import text

from overnight.store.sql_store import SqlStore

from .suite import Campaigner, StoreConformance


class TestPostgresql(StoreConformance):
    @pytest.fixture
    def store(self, new_postgresql: Callable[[], str]) -> Iterator[SqlStore]:
        store = SqlStore.open(new_postgresql(), create=True)
        yield store
        store.close()


def test_the_server_is_one_that_is_supported(new_postgresql: Callable[[], str]) -> None:
    store = SqlStore.open(new_postgresql(), create=True)
    with store.engine.connect() as connection:
        assert int(connection.execute(text("SHOW server_version_num")).scalar_one()) >= 150000
    store.close()


def test_two_campaigns_write_at_once(new_postgresql: Callable[[], str]) -> None:
    """Both share configurations, so that their transactions meet in the same rows."""
    url, turns = new_postgresql(), 15
    SqlStore.open(url, create=True).close()
    together = threading.Barrier(2)

    def run(name: str) -> None:
        store = SqlStore.open(url)
        try:
            campaign = Campaigner(store, name)
            together.wait(20)
            for turn in range(1, turns + 1):
                campaign.turn(turn, turn / 10, "reverted", -0.1)
        finally:
            store.close()

    with ThreadPoolExecutor(2) as pool:
        list(pool.map(run, ("one", "two"), timeout=60))
    store = SqlStore.open(url)
    with store.engine.connect() as connection:
        rows = connection.execute(text("SELECT campaign, iterations, screening_trials FROM campaign_stats ORDER BY 1"))
        assert [tuple(row) for row in rows] == [("one", turns, turns), ("two", turns, turns)]
        assert connection.execute(text("SELECT count(*) FROM configs")).scalar() == turns  # 0.1 is the baseline itself
    store.close()
