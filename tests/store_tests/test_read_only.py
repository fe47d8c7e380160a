"""A store opened for reading only: it answers, cannot write, and makes no file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from overnight.store.errors import InputError, StoreError
from overnight.store.read_only import read_store
from overnight.store.sql_store import SqlStore

from .suite import Campaigner
from .test_reading import snapshot


def filled(where: str | Path) -> None:
    store = SqlStore.open(where, create=True)
    Campaigner(store).turn(1, 0.2, "kept", 0.1)
    store.close()


def write(store: SqlStore) -> int:
    return store.request(1, "note", {})


def test_it_reads_a_file_at_rest_and_makes_none(tmp_path: Path) -> None:
    filled(tmp_path / "store.db")
    before = snapshot(tmp_path)
    assert read_store(tmp_path / "store.db", SqlStore.campaigns) == ["c"]
    assert snapshot(tmp_path) == before


def test_it_cannot_write_a_file(tmp_path: Path) -> None:
    filled(tmp_path / "store.db")
    before = snapshot(tmp_path)
    with pytest.raises(StoreError, match="readonly"):
        read_store(tmp_path / "store.db", write)
    assert snapshot(tmp_path) == before


def test_it_sees_what_a_live_writer_committed_and_cannot_write_beside_it(tmp_path: Path) -> None:
    filled(tmp_path / "store.db")
    store = SqlStore.open(tmp_path / "store.db")
    write(store)
    assert read_store(tmp_path / "store.db", lambda read: read.last_event(1, "note")) is not None
    with pytest.raises(StoreError, match="readonly"):
        read_store(tmp_path / "store.db", write)
    store.close()


def test_what_was_read_while_a_writer_came_is_read_again(tmp_path: Path) -> None:
    path = tmp_path / "store.db"
    filled(path)
    looks = []

    def look_as_a_writer_comes(read: SqlStore) -> bool:
        found = read.last_event(1, "note") is not None
        if not looks:
            writer = SqlStore.open(path)
            write(writer)
            writer.close()
        looks.append(found)
        return found

    assert read_store(path, look_as_a_writer_comes)
    assert looks == [False, True]


def test_no_database_is_made(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no database at"):
        read_store(tmp_path / "none.db", SqlStore.campaigns)
    assert list(tmp_path.iterdir()) == []


def test_it_cannot_write_on_postgresql(new_postgresql: Callable[[], str]) -> None:
    url = new_postgresql()
    filled(url)
    assert read_store(url, SqlStore.campaigns) == ["c"]
    with pytest.raises(StoreError, match="read-only"):
        read_store(url, write)
