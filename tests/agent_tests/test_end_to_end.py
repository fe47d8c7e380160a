"""Whole campaigns over real parts: a served model, the GPT trainer in its worker, the command line."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import tomlkit

from overnight.agent.campaign import load_campaign
from overnight.agent.run import open_runtime, run_campaign
from overnight.rails.menu import Change
from overnight.store.sql_store import SqlStore

from .campaigns import campaign, data, run
from .servers import ChatServer


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def tries(store: SqlStore, iteration: int) -> list[Any]:
    state = store.campaign("c")
    assert state is not None
    return list(store.attempts_of_turn(state.id, iteration))


def asking(folder: Path, url: str, **keys: Any) -> Any:
    endpoint = {"kind": "openai", "base_url": url, "structured": "none", **keys}
    return campaign(folder, proposers={"model": endpoint}, router={"champion": "model"}, budget={"iterations": 2})


def test_a_model_that_writes_prose_is_blocked_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, transformers_serve: ChatServer
) -> None:
    of = asking(tmp_path, transformers_serve.url, model=transformers_serve.model, max_tokens=8)
    assert run(of, store).stop_reason == "iterations"
    first = tries(store, 1)
    assert [attempt.rail for attempt in first[:3]] == ["R1_schema"] * 3
    assert (first[3].role, first[3].outcome in ("kept", "reverted")) == ("fallback", True)


def test_a_model_that_is_late_ends_as_a_timeout_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, transformers_serve: ChatServer
) -> None:
    of = asking(tmp_path, transformers_serve.url, model=transformers_serve.model, deadline_s=0.05, max_tokens=4000)
    assert run(of, store).stop_reason == "iterations"
    assert [attempt.failure for attempt in tries(store, 1)] == ["llm_timeout", None]


def test_an_endpoint_that_is_down_leaves_its_turns_to_the_fallback(tmp_path: Path, store: SqlStore) -> None:
    of = asking(tmp_path, "http://127.0.0.1:9/v1", model="gone", deadline_s=2.0)
    assert run(of, store).stop_reason == "iterations"
    assert [(attempt.role, attempt.failure) for attempt in tries(store, 2)] == [
        ("champion", "llm_error"),
        ("fallback", None),
    ]


def test_a_key_never_reaches_the_store(tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OVERNIGHT_TEST_KEY", "sk-very-secret")
    of = asking(tmp_path, "http://127.0.0.1:9/v1", model="gone", deadline_s=1.0, api_key_env="OVERNIGHT_TEST_KEY")
    run(of, store)
    store.close()
    assert all(b"very-secret" not in path.read_bytes() for path in tmp_path.glob("store.db*"))


def test_the_quickstart_trains_and_measures_for_real(tmp_path: Path, store: SqlStore) -> None:
    of = load_campaign("quickstart")
    runtime = open_runtime(of, store, proposers=dict.fromkeys(of.file.proposers, FirstMove()))
    runtime.iterations = 1
    try:
        run_campaign(runtime)
    finally:
        runtime.close()
    state = store.campaign("quickstart")
    assert state is not None
    (attempt,) = store.recent(state.id, 5)
    assert state.trainer_kind == "exact"
    assert attempt.metric is not None
    assert 1.0 < attempt.metric < 8.0


class FirstMove:
    """Takes the first open move."""

    name = "first"

    def propose(self, ask: Any) -> Any:
        from overnight.agent.proposers.protocol import Answer, reply_text

        move: Change = ask.moves[0]
        return Answer(reply=reply_text(move.knob, move.value, "first"), latency_s=0.0)

    def describe(self) -> dict[str, Any]:
        return {"kind": "first"}

    def close(self) -> None:
        """Nothing to close."""


def test_the_control_process_loads_no_torch(tmp_path: Path) -> None:
    tables = data(budget={"iterations": 2}, proposers={"tpe": {"kind": "optuna"}}, router={"champion": "tpe"})
    (tmp_path / "campaign.toml").write_text(tomlkit.dumps(tables))
    code = (
        "import sys, json\n"
        "from overnight.agent.cli import overnight\n"
        "overnight.main(['run', '.'], standalone_mode=False)\n"
        "print(json.dumps('torch' in sys.modules))"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert json.loads(result.stdout.splitlines()[-1]) is False
