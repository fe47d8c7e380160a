"""Backups and copies of a store that is in use."""

from __future__ import annotations

import sqlite3
import threading
from collections.abc import Callable
from pathlib import Path

import pytest
from sqlalchemy import text

from overnight.store import copying
from overnight.store.copying import copy_store
from overnight.store.database import backup
from overnight.store.errors import InputError, StoreError
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from .suite import Campaigner
from .trajectories import as_bytes, every_stage


@pytest.fixture
def database(tmp_path: Path) -> Path:
    path = tmp_path / "store.db"
    store = SqlStore.open(path, create=True)
    campaign = Campaigner(store)
    campaign.turn(1, 0.2, "kept", 0.1)
    campaign.turn(2, 1 / 3, "failed", None)
    import_trajectory(store, as_bytes(every_stage()), name="old", origin="x")
    store.close()
    return path


def test_a_backup_of_a_store_that_is_written_to_is_sound(database: Path, tmp_path: Path) -> None:
    store, stop, written = SqlStore.open(database), threading.Event(), threading.Event()

    def write() -> None:
        while not stop.is_set():
            store.request(1, "note", {"text": "x" * 5000})
            written.set()

    writer = threading.Thread(target=write)
    writer.start()
    try:
        assert written.wait(20)
        backup(database, tmp_path / "copy.db")
    finally:
        stop.set()
        writer.join()
        store.close()
    connection = sqlite3.connect(tmp_path / "copy.db")
    assert connection.execute("PRAGMA integrity_check").fetchone() == ("ok",)
    assert connection.execute("SELECT count(*) FROM attempts").fetchone() == (8,)
    connection.close()


def test_a_copy_to_postgresql_is_verified_and_goes_on(database: Path, new_postgresql: Callable[[], str]) -> None:
    url = new_postgresql()
    copied = {each.table: each.rows for each in copy_store(database, url)}
    assert (copied["campaigns"], copied["attempts"]) == (2, 8)
    store = SqlStore.open(url)
    assert Campaigner(store, "new").turn(1, 0.5, "kept", 0.2) > 8
    store.close()


def test_a_copy_there_and_back_has_the_same_hashes(
    database: Path, new_postgresql: Callable[[], str], tmp_path: Path
) -> None:
    url = new_postgresql()
    assert copy_store(database, url) == copy_store(url, tmp_path / "back.db")


def test_a_copy_that_differs_is_not_committed(database: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = copying._copy_table

    def lossy(reading: object, writing: object, table: object) -> None:
        plain(reading, writing, table)  # type: ignore[arg-type]
        writing.execute(text("UPDATE attempts SET gain = gain * 1.0000001"))  # type: ignore[attr-defined]

    monkeypatch.setattr(copying, "_copy_table", lossy)
    with pytest.raises(StoreError, match="`attempts` differs"):
        copy_store(database, tmp_path / "copy.db")
    store = SqlStore.open(tmp_path / "copy.db")
    assert store.campaigns() == []
    store.close()


def test_a_copy_does_not_merge(database: Path, tmp_path: Path) -> None:
    copy_store(database, tmp_path / "copy.db")
    with pytest.raises(InputError, match="not empty"):
        copy_store(database, tmp_path / "copy.db")
