"""The graph is drawn as designed, works inside a host's own graph, and keeps its position in the store alone."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TypedDict

import pytest
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from overnight.agent.graph import build_graph
from overnight.agent.state import TurnState, TurnUpdate
from overnight.store.errors import InputError
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import campaign, scripted

SNAPSHOT = Path(__file__).with_name("graph.mmd")


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def graph(folder: Path, store: SqlStore, **options: Any) -> Any:
    of = campaign(folder, budget={"iterations": 3})
    trainer = ScriptedTrainer(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
    return build_graph(of, store=store, trainer=trainer, proposers=scripted(("b", 3), ("b", 9), ("a", 0.25)), **options)


def test_the_drawing_is_the_designs(tmp_path: Path, store: SqlStore) -> None:
    assert graph(tmp_path, store).compile().get_graph().draw_mermaid() == SNAPSHOT.read_text()


def test_one_invocation_is_one_turn_and_gives_back_its_result(tmp_path: Path, store: SqlStore) -> None:
    compiled = graph(tmp_path, store).compile()
    outputs = [compiled.invoke({"campaign": "c"}) for _ in range(3)]
    assert all(set(output) == {"attempt_id", "outcome", "best", "stop_reason"} for output in outputs)
    assert [output["outcome"] for output in outputs] == ["kept", "reverted", "kept"]
    assert [output["stop_reason"] for output in outputs] == [None, None, "iterations"]


def test_it_runs_asynchronously(tmp_path: Path, store: SqlStore) -> None:
    compiled = graph(tmp_path, store).compile()
    assert asyncio.run(compiled.ainvoke({"campaign": "c"}))["outcome"] == "kept"


def test_events_come_through_the_stream(tmp_path: Path, store: SqlStore) -> None:
    compiled = graph(tmp_path, store).compile()
    kinds = [part["event"] for part in compiled.stream({"campaign": "c"}, stream_mode="custom")]
    assert kinds[0] == "run_started"
    assert kinds[-1] == "decided"
    assert "accepted" in kinds


class HostState(TypedDict, total=False):
    campaign: str
    outcome: str | None
    note: str


def test_it_works_as_a_subgraph_with_the_hosts_checkpointer(tmp_path: Path, store: SqlStore) -> None:
    host = StateGraph(HostState)
    host.add_node("loop", graph(tmp_path, store).compile())
    host.add_node("after", lambda state: {"note": f"saw {state['outcome']}"})
    host.add_edge(START, "loop")
    host.add_edge("loop", "after")
    host.add_edge("after", END)
    compiled = host.compile(checkpointer=InMemorySaver())
    result = compiled.invoke({"campaign": "c"}, {"configurable": {"thread_id": "1"}})
    assert result == {"campaign": "c", "outcome": "kept", "note": "saw kept"}


def test_a_custom_node_runs_at_its_place(tmp_path: Path, store: SqlStore) -> None:
    seen: list[int | None] = []

    def critic(state: TurnState) -> TurnUpdate:
        seen.append(state["attempt_id"])
        return {}

    compiled = graph(tmp_path, store, nodes={"after:propose": critic}).compile()
    assert compiled.invoke({"campaign": "c"})["outcome"] == "kept"
    assert seen == [1]


def test_a_place_that_is_not_there_is_named(tmp_path: Path, store: SqlStore) -> None:
    with pytest.raises(InputError, match=r"`before:propose` is not a place.*`after:propose`"):
        graph(tmp_path, store, nodes={"before:propose": lambda state: {}})


def test_a_lost_checkpointer_loses_no_position(tmp_path: Path, store: SqlStore) -> None:
    config = {"configurable": {"thread_id": "1"}}
    first = graph(tmp_path, store)
    first.compile(checkpointer=InMemorySaver()).invoke({"campaign": "c"}, config)
    output = first.compile(checkpointer=InMemorySaver()).invoke({"campaign": "c"}, config)
    assert store.attempt(output["attempt_id"]).iteration == 2


def test_a_turn_fits_the_hosts_recursion_limit(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, budget={"iterations": 1})
    trainer = ScriptedTrainer(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
    blocked = build_graph(of, store=store, trainer=trainer, proposers=scripted("no")).compile()
    assert blocked.invoke({"campaign": "c"}, {"recursion_limit": 25})["stop_reason"] == "iterations"


def test_importing_the_package_or_the_studio_graph_opens_nothing(tmp_path: Path) -> None:
    code = (
        "import sys, time; t = time.perf_counter(); import overnight; took = time.perf_counter() - t\n"
        "import overnight.agent.studio\n"
        "print(took < 0.3, [m for m in ('torch', 'langgraph', 'sqlalchemy') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-P", "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True
    )
    assert (result.stdout.strip(), list(tmp_path.iterdir())) == ("True []", [])
