"""`overnight sql` on SQLite: only reading, under limits, and nothing else on the disk is touched."""

from __future__ import annotations

import hashlib
import sqlite3
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from sqlalchemy import event

from overnight.store.errors import InputError, QueryError, SchemaError, StoreError
from overnight.store.reading import query
from overnight.store.sql_store import SqlStore

from .suite import Campaigner

FOREVER = "WITH RECURSIVE n(i) AS (SELECT 1 UNION ALL SELECT i + 1 FROM n) SELECT count(*) FROM n"
WRITES = (
    "INSERT INTO configs VALUES ('x', '{}')",
    "UPDATE campaigns SET name = 'x'",
    "DELETE FROM attempts",
    "DROP TABLE attempts",
    "CREATE TABLE mine (a)",
    "CREATE TEMP TABLE mine (a)",
    "ATTACH 'file:new.db?mode=rwc' AS new",
    "VACUUM",
    "VACUUM INTO 'copy.db'",
    "PRAGMA journal_mode = DELETE",
    "PRAGMA query_only = 0",
    "SELECT * FROM pragma_journal_mode",
    "SELECT load_extension('./evil')",
    "SELECT writefile('new.txt', 'x')",
    "SELECT readfile('/etc/passwd')",
    "WITH gone AS (SELECT 1) DELETE FROM attempts WHERE id IN gone",
    "WITH x AS (DELETE FROM attempts RETURNING id) SELECT * FROM x",
    "SELECT 1; DELETE FROM attempts",
    "BEGIN IMMEDIATE",
    "REINDEX",
    "",
    "-- nothing",
)


def snapshot(folder: Path) -> dict[str, str]:
    """Return the hash of every file in a folder."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


@pytest.fixture
def database(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A store that nobody has open, alone in its folder, which is where the process stands."""
    path = tmp_path / "store.db"
    store = SqlStore.open(path, create=True)
    Campaigner(store).turn(1, 0.2, "kept", 0.1)
    store.close()
    assert [file.name for file in tmp_path.iterdir()] == ["store.db"]
    monkeypatch.chdir(tmp_path)
    return path


@pytest.fixture
def live(database: Path) -> Iterator[Path]:
    """The same store with a writer that has it open, as `overnight run` has."""
    store = SqlStore.open(database)
    with store.engine.connect() as held:
        held.exec_driver_sql("SELECT 1 FROM campaigns")
        yield database
    store.close()


@pytest.mark.parametrize("statement", WRITES)
def test_nothing_but_one_reading_statement_is_taken(database: Path, statement: str) -> None:
    before = snapshot(database.parent)
    with pytest.raises(QueryError):
        query(database, statement)
    assert snapshot(database.parent) == before


@pytest.mark.parametrize("statement", WRITES)
def test_nothing_is_written_beside_a_live_writer(live: Path, statement: str) -> None:
    def kept() -> dict[str, str]:  # `-shm` holds the locks of readers, not data
        return {name: sha for name, sha in snapshot(live.parent).items() if not name.endswith("-shm")}

    before, names = kept(), set(snapshot(live.parent))
    with pytest.raises(QueryError):
        query(live, statement)
    assert (kept(), set(snapshot(live.parent))) == (before, names)


def test_asking_makes_no_file_beside_a_database_at_rest(database: Path) -> None:
    before = snapshot(database.parent)
    assert query(database, "SELECT knob FROM iterations").rows == [("lr",)]
    assert snapshot(database.parent) == before


def test_asking_sees_what_a_live_writer_committed(database: Path) -> None:
    store = SqlStore.open(database)
    before = query(database, "SELECT count(*) FROM events").rows
    store.request(1, "note", {})
    after = query(database, "SELECT count(*) FROM events").rows
    store.close()
    assert (before, after) == ([(0,)], [(1,)])


def test_what_was_read_while_a_writer_came_is_read_again(database: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from overnight.store import reading

    asked, plain = [], reading._ask

    def ask_as_a_writer_comes(*args: object) -> object:
        result = plain(*args)  # type: ignore[arg-type]
        if not asked:
            store = SqlStore.open(database)
            store.request(1, "note", {})
            store.close()
        asked.append(result)
        return result

    monkeypatch.setattr(reading, "_ask", ask_as_a_writer_comes)
    assert query(database, "SELECT count(*) FROM events").rows == [(1,)]
    assert len(asked) == 2


def test_a_query_that_runs_on_is_cut(database: Path) -> None:
    begin = time.monotonic()
    with pytest.raises(QueryError, match=r"ran over 0\.2 s and was cut"):
        query(database, FOREVER, timeout_s=0.2)
    assert time.monotonic() - begin < 2


def test_too_many_rows_are_cut_and_said_so(database: Path) -> None:
    endless = FOREVER.replace("count(*)", "i")
    result = query(database, endless, max_rows=10)
    assert (len(result.rows), result.cut) == (10, "10 rows")


def test_a_result_that_fits_exactly_is_not_called_cut(database: Path) -> None:
    assert query(database, "SELECT 1 UNION SELECT 2", max_rows=2).cut is None


def test_too_many_bytes_are_cut_and_said_so(database: Path) -> None:
    wide = FOREVER.replace("count(*)", "randomblob(50000000)")
    result = query(database, wide)
    assert (len(result.rows), result.cut) == (5, "5 rows (256 MiB)")


def test_a_text_that_grows_without_end_is_cut(database: Path) -> None:
    with pytest.raises(QueryError, match="too large"):
        query(database, "SELECT length(randomblob(100000000))")


def test_one_slow_function_call_ends_with_the_process(database: Path) -> None:
    slow = "SELECT instr(hex(zeroblob(15000000)), hex(zeroblob(7000000)) || '1')"
    begin = time.monotonic()
    overnight = str(Path(sys.executable).with_name("overnight"))
    command = [overnight, "sql", slow, "--db", str(database), "--timeout", "0.5"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (run.returncode, "was ended" in run.stderr) == (2, True)
    assert time.monotonic() - begin < 10


def test_a_missing_database_is_named_by_its_whole_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=str(tmp_path / "none.db")):
        query("none.db", "SELECT 1")
    assert list(tmp_path.iterdir()) == []


def test_a_database_of_something_else_is_refused(tmp_path: Path) -> None:
    connection = sqlite3.connect(tmp_path / "other.db")
    connection.execute("CREATE TABLE t (a)")
    connection.close()
    with pytest.raises(SchemaError, match="without overnight's tables"):
        query(tmp_path / "other.db", "SELECT 1")


def test_a_damaged_file_is_said_to_be_damaged(database: Path) -> None:
    content = bytearray(database.read_bytes())
    content[4096:] = b"\xab" * (len(content) - 4096)
    database.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        query(database, "SELECT * FROM attempts")


def test_a_damaged_file_cannot_be_opened_for_writing(database: Path) -> None:
    content = bytearray(database.read_bytes())
    content[100:] = b"\xab" * (len(content) - 100)
    database.write_bytes(content)
    with pytest.raises(StoreError, match=str(database)):
        SqlStore.open(database)


def test_a_locked_database_is_said_to_be_locked(database: Path) -> None:
    holder = sqlite3.connect(database, isolation_level=None)
    holder.execute("PRAGMA locking_mode = EXCLUSIVE")
    holder.execute("BEGIN EXCLUSIVE")
    try:
        with pytest.raises(StoreError, match="locked"):
            query(database, "SELECT 1", timeout_s=0.2)
    finally:
        holder.close()


def test_a_full_disk_is_a_clear_error_and_what_was_committed_is_there(database: Path) -> None:
    store = SqlStore.open(database)

    @event.listens_for(store.engine, "begin")
    def shrink(connection: object) -> None:
        connection.exec_driver_sql("PRAGMA max_page_count = 1")  # type: ignore[attr-defined]

    with pytest.raises(StoreError, match=r"cannot be written: .*full; what was committed is there"):
        store.request(1, "note", {"text": "x" * 100_000})
    store.close()
    assert query(database, "SELECT (SELECT count(*) FROM events), outcome FROM iterations").rows == [(0, "kept")]
