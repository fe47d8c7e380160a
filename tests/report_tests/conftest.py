"""Stores to report on, and a real browser to read reports with."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.store.sql_store import SqlStore
from overnight.store.trajectory import import_trajectory

from ..store_tests.trajectories import SEED_FILE, as_bytes, every_stage

Browser = Callable[..., str]
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync", "--virtual-time-budget=10000",
)  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture
def first(store: SqlStore) -> SqlStore:
    """A store with the first trajectory under the menu of 13 knobs."""
    if not SEED_FILE.exists():
        pytest.skip("the first trajectory (../shared/seed) is not here")
    from overnight.agent.campaign import load_campaign

    menu: Any = load_campaign("gpt354m").spec()["knobs"]
    with SEED_FILE.open("rb") as file:
        import_trajectory(store, file, name="trajectory", origin="x", menu=menu)
    return store


@pytest.fixture
def small(store: SqlStore) -> SqlStore:
    """A store with a campaign `old` that has every stage of the first format."""
    import_trajectory(store, as_bytes(every_stage()), name="old", origin="x")
    return store


@pytest.fixture
def chromium(tmp_path: Path) -> Browser:
    """Returns what a real headless Chromium makes of an address, as the page's final HTML."""
    program = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no Chromium here (Debian: apt-get install chromium)")

    def dump(address: str, *flags: str) -> str:
        command = [program, *FLAGS, f"--user-data-dir={tmp_path / 'profile'}", *flags, "--dump-dom", address]
        return subprocess.run(command, capture_output=True, text=True, timeout=90, check=True).stdout

    return dump
