"""`overnight sql` on PostgreSQL: one statement, as a role that may only SELECT our tables."""

from __future__ import annotations

import time
from collections.abc import Callable

import psycopg
import pytest
from sqlalchemy import make_url

from overnight.store.database import upgrade
from overnight.store.errors import QueryError, StoreError
from overnight.store.reading import query
from overnight.store.reading_postgresql import reader_name, reader_password
from overnight.store.sql_store import SqlStore

from .suite import Campaigner

WRITES = (
    "INSERT INTO configs VALUES ('x', '{}')",
    "UPDATE campaigns SET name = 'x'",
    "DELETE FROM attempts",
    "DROP TABLE attempts",
    "CREATE TABLE mine (a int)",
    "CREATE TEMP TABLE mine (a int)",
    "SELECT * INTO mine FROM attempts",
    "WITH gone AS (DELETE FROM attempts RETURNING id) SELECT * FROM gone",
    "SELECT 1; DELETE FROM attempts",
    "SELECT 1; COMMIT; DELETE FROM attempts",
    "COPY (SELECT 1) TO '/tmp/overnight-evil'",
    "COPY configs FROM PROGRAM 'true'",
    "SELECT pg_read_file('/etc/passwd')",
    "SELECT pg_ls_dir('/')",
    "SELECT lo_import('/etc/passwd')",
    "SELECT lo_create(0)",
    "SET ROLE postgres",
    "SELECT set_config('role', 'postgres', false)",
    "SELECT set_config('session_authorization', 'postgres', false)",
    "SELECT set_config('transaction_read_only', 'off', true)",
    "SELECT set_config('role', 'postgres', true), query_to_xml('select pg_read_file(''/etc/hosts'')', true, false, '')",
    "SELECT query_to_xml('delete from attempts', true, false, '')",
    "SELECT rolpassword FROM pg_authid",
    "DO $$ BEGIN DELETE FROM attempts; END $$",
    "CALL nothing()",
    "VACUUM",
    "",
    "-- nothing",
)


@pytest.fixture
def url(new_postgresql: Callable[[], str]) -> str:
    where = new_postgresql()
    store = SqlStore.open(where, create=True)
    Campaigner(store).turn(1, 0.2, "kept", 0.1)
    store.close()
    return where


def content(url: str) -> object:
    with psycopg.connect(url) as connection:
        tables = "configs", "campaigns", "attempts", "trials", "events"
        return [connection.execute(f"SELECT * FROM {name} ORDER BY 1".encode()).fetchall() for name in tables]


def test_nothing_but_one_reading_statement_is_taken(url: str) -> None:
    before = content(url)
    for statement in WRITES:
        with pytest.raises(QueryError):
            query(url, statement)
    assert content(url) == before


def test_a_select_is_answered_with_its_columns(url: str) -> None:
    result = query(url, "SELECT knob, new_value, '100%' AS share FROM iterations; -- all")
    assert (result.columns, result.rows, result.cut) == (["knob", "new_value", "share"], [("lr", "0.2", "100%")], None)


def test_an_empty_answer_has_its_columns(url: str) -> None:
    assert query(url, "SELECT knob FROM iterations WHERE iteration = 99").columns == ["knob"]


def test_a_table_that_is_not_ours_is_not_read(url: str) -> None:
    with psycopg.connect(url) as connection:
        connection.execute("CREATE TABLE salaries (a int)")
    with pytest.raises(QueryError, match="permission denied for table salaries"):
        query(url, "SELECT * FROM salaries")


def test_a_query_that_runs_on_is_cut(url: str) -> None:
    begin = time.monotonic()
    with pytest.raises(QueryError, match=r"ran over 0\.3 s and was cut"):
        query(url, "SELECT pg_sleep(600)", timeout_s=0.3)
    assert time.monotonic() - begin < 3


def test_a_query_that_lifts_its_own_limit_is_cut(url: str) -> None:
    lifted = "SELECT set_config('statement_timeout', '0', false), pg_sleep(600)"
    with pytest.raises(QueryError, match="was cut"):
        query(url, lifted, timeout_s=0.3)


def test_too_many_rows_are_cut_and_said_so(url: str) -> None:
    result = query(url, "SELECT generate_series(1, 1000000000)", max_rows=1200, timeout_s=5)
    assert (len(result.rows), result.cut) == (1200, "1200 rows")


def test_the_reading_role_is_let_in_again_after_an_upgrade(url: str) -> None:
    store = SqlStore.open(url)
    upgrade(store.engine)
    store.close()
    assert query(url, "SELECT count(*) FROM campaign_stats").rows == [(1,)]


def test_without_the_reading_role_nothing_is_asked(url: str) -> None:
    role = reader_name(str(make_url(url).database))
    with psycopg.connect(url) as connection:
        connection.execute(f"DROP OWNED BY {role}".encode())
        connection.execute(f"DROP ROLE {role}".encode())
    with pytest.raises(StoreError, match="overnight db upgrade"):
        query(url, "SELECT 1")


def test_a_user_that_may_only_read_is_used_as_it_is(url: str) -> None:
    role = reader_name(str(make_url(url).database))
    own = make_url(url).set(username=role).render_as_string(hide_password=False)
    assert query(own, "SELECT session_user").rows == [(role,)]


def test_the_reading_password_is_not_the_owners_and_differs_by_database() -> None:
    one, two = (make_url(f"postgresql://me:secret@host/{name}") for name in ("one", "two"))
    assert len({reader_password(one), reader_password(two), "secret"}) == 3


def test_a_writer_at_work_does_not_stop_a_reader(url: str) -> None:
    store = SqlStore.open(url)
    with store.engine.begin() as held:
        held.exec_driver_sql("UPDATE campaigns SET status = 'paused'")
        assert query(url, "SELECT status FROM campaigns", timeout_s=5).rows == [("new",)]
    store.close()
