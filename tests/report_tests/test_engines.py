"""The report says the same whichever engine holds the store."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from overnight.report.analysis import analyse
from overnight.report.page import render_report
from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from ..store_tests.conftest import new_postgresql, server
from ..store_tests.trajectories import as_bytes, every_stage, random_history

__all__ = ["new_postgresql", "server"]


@pytest.fixture
def both(tmp_path: Path, new_postgresql: Callable[[], str]) -> Iterator[tuple[SqlStore, SqlStore]]:
    stores = SqlStore.open(tmp_path / "store.db", create=True), SqlStore.open(new_postgresql(), create=True)
    for store in stores:
        import_trajectory(store, as_bytes(random_history(40)), name="old", origin="x")
        import_trajectory(store, as_bytes(every_stage()), name="every", origin="x")
    yield stores
    for store in stores:
        store.close()


@pytest.mark.parametrize("campaign", ["old", "every"])
def test_both_engines_give_the_same_page(both: tuple[SqlStore, SqlStore], campaign: str) -> None:
    pages = [re.sub("made .* UTC", "", render_report(analyse(store, campaign))) for store in both]
    assert pages[0] == pages[1]
