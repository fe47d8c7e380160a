"""The schema: migrations, tables, views and their documentation say the same, on both engines."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from alembic.autogenerate import compare_metadata
from alembic.migration import MigrationContext
from alembic.script import ScriptDirectory
from sqlalchemy import text

from overnight.store.database import HEAD, alembic_config
from overnight.store.schema_help import schema_rows
from overnight.store.sql_store import SqlStore
from overnight.store.tables import INFORMATION, Table
from overnight.store.views import VIEWS, View

from .suite import Campaigner


@pytest.fixture(params=["sqlite", "postgresql"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[SqlStore]:
    if request.param == "sqlite":
        where = str(tmp_path / "store.db")
    else:
        new_postgresql: Callable[[], str] = request.getfixturevalue("new_postgresql")
        where = new_postgresql()
    store = SqlStore.open(where, create=True)
    yield store
    store.close()


@pytest.mark.filterwarnings("ignore:.*expression-based ind")
def test_the_migrations_make_the_tables_of_this_code(store: SqlStore) -> None:
    def comparable(_object: object, name: str | None, *_more: object) -> bool:
        return name != "ix_pair_totals_information"  # engines rewrite its expression

    options = {"compare_type": True, "compare_server_default": True, "include_object": comparable}
    with store.engine.connect() as connection:
        context = MigrationContext.configure(connection, opts=options)
        assert compare_metadata(context, Table.metadata) == []


def test_the_index_over_an_expression_is_there_as_the_query_has_it(store: SqlStore) -> None:
    sqlite = "SELECT sql FROM sqlite_master WHERE name = 'ix_pair_totals_information'"
    postgresql = "SELECT indexdef FROM pg_indexes WHERE indexname = 'ix_pair_totals_information'"
    with store.engine.connect() as connection:
        if connection.dialect.name == "sqlite":
            assert INFORMATION in str(connection.exec_driver_sql(sqlite).scalar_one())
        else:
            assert "mean_gain" in str(connection.exec_driver_sql(postgresql).scalar_one())


def test_this_code_reads_the_newest_migration(store: SqlStore) -> None:
    with store.engine.connect() as connection:
        assert ScriptDirectory.from_config(alembic_config(connection)).get_current_head() == HEAD


@pytest.mark.parametrize("view", VIEWS, ids=lambda view: view.name)
def test_a_view_has_the_columns_that_are_documented(store: SqlStore, view: View) -> None:
    with store.engine.connect() as connection:
        assert list(connection.execute(text(f"SELECT * FROM {view.name}")).keys()) == list(view.columns)


def test_numbers_come_as_numbers_on_both_engines(store: SqlStore) -> None:
    campaign = Campaigner(store)
    campaign.turn(1, 0.2, "kept", 0.1)
    campaign.turn(2, 0.2, "reverted", -0.3)
    campaign.trial(None, 0.1, 0, 1.0, purpose="calibration")
    with store.engine.connect() as connection:
        for view in VIEWS:
            for row in connection.execute(text(f"SELECT * FROM {view.name}")):
                assert {type(value) for value in row} <= {int, float, str, bool, type(None)}


def test_a_campaign_without_attempts_has_its_row(store: SqlStore) -> None:
    Campaigner(store)
    with store.engine.connect() as connection:
        row = connection.execute(text("SELECT iterations, accept_rate, repeat_rate FROM campaign_stats")).one()
    assert tuple(row) == (0, None, None)


def test_every_column_of_the_design_is_there() -> None:
    documented = {(row[1], row[2]) for row in schema_rows()}
    design = {
        "iterations": "campaign, iteration, attempt_id, config_id, proposer, fallback, knob, new_value, new_value_num, "
        "reason, outcome, rail, failure, metric, baseline_metric, gain, trials, is_best, proposal_latency_s, wall_s, "
        "energy_wh, started_at",
        "knob_stats": "campaign, knob, proposed, kept, distinct_values, mean_gain, best_gain",
        "pair_stats": "campaign, knob, new_value, proposed, kept, reverted, mean_metric, sd_metric",
        "proposer_stats": "campaign, proposer, proposals, valid, kept, distinct_pairs, knobs_touched, repeat_rate, "
        "mean_latency_s",
        "campaign_stats": "campaign, metric_name, iterations, kept, reverted, blocked, failed, accept_rate, "
        "knobs_on_menu, knobs_touched, distinct_pairs, repeats, repeat_rate, first_keep, best_iteration, best_metric, "
        "best_gain, noise_sd, wall_s, energy_wh",
        "config_knobs": "config_id, knob, value, value_num",
    }
    asked = {(view, column) for view, columns in design.items() for column in columns.split(", ")}
    assert asked - documented == set()


def test_every_view_column_has_a_meaning() -> None:
    assert [row[:3] for row in schema_rows() if row[0] == "view" and not row[3]] == []


def test_a_table_column_is_explained_by_the_words_under_it() -> None:
    rows = {row[1:3]: row[3] for row in schema_rows()}
    assert rows["campaigns", "frozen_hash"] == "Hash of the keys that may not change between runs."
    assert rows["trials", "campaign_id"] == "key of `campaigns`"


def test_the_schema_is_printed_without_a_database(tmp_path: Path) -> None:
    overnight = str(Path(sys.executable).with_name("overnight"))
    run = subprocess.run([overnight, "sql", "--schema"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert "share of its proposals that anyone had proposed before" in run.stdout
    assert list(tmp_path.iterdir()) == []
