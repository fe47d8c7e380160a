"""The graph as a guest in a host's graph: what goes in and out, who holds what, and what a host's nodes may do."""

from __future__ import annotations

import asyncio
import gc
import shutil
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, TypedDict

import psutil
import pytest
from langgraph.checkpoint.base import BaseCheckpointSaver
from langgraph.checkpoint.memory import InMemorySaver
from langgraph.graph import END, START, StateGraph

from overnight.agent.graph import NODES, TurnGraph, build_graph
from overnight.agent.proposers.protocol import Ask
from overnight.agent.state import TurnState, TurnUpdate
from overnight.store.clock import running_on
from overnight.store.errors import InputError, ProposerError, TrainerError
from overnight.store.protocol import MAX_TRIES
from overnight.store.records import TrialRequest, TrialResult
from overnight.store.sql_store import SqlStore
from overnight.trainer.protocol import Report
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import campaign, proposing, runtime, scripted
from .clocks import START as EVENING
from .clocks import FakeClock, TimedTrainer

LIMIT = 25
"""LangGraph's own default for a host's graph."""
OUTPUT = {"attempt_id", "outcome", "best", "stop_reason"}


class HostState(TypedDict, total=False):
    campaign: str
    attempt_id: int | None
    outcome: str | None
    best: float | None
    stop_reason: str | None
    note: str


@pytest.fixture(scope="module")
def new_database(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An empty store, made once: migrating is most of what a test here would take."""
    path = tmp_path_factory.mktemp("new") / "store.db"
    with SqlStore.open(path, create=True):
        return path


@pytest.fixture
def store(tmp_path: Path, new_database: Path) -> Iterator[SqlStore]:
    shutil.copy(new_database, tmp_path / "store.db")
    with SqlStore.open(tmp_path / "store.db") as store:
        yield store


class Watched(ScriptedTrainer):
    """A trainer in this process that does something of a test's before each trial."""

    before: Callable[[TrialRequest], None] = staticmethod(lambda request: None)

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        self.before(request)
        return super().run(request, report)


def watched(folder: Path, before: Callable[[TrialRequest], None] = lambda request: None) -> Watched:
    trainer = Watched(ScriptedSettings.model_validate(campaign(folder).file.trainer), metric="loss")
    trainer.before = before
    return trainer


def graph(folder: Path, store: SqlStore, *replies: Any, iterations: int = 3, **options: Any) -> TurnGraph:
    of = campaign(folder, budget={"iterations": iterations})
    options.setdefault("trainer", watched(folder))
    options.setdefault("proposers", scripted(*(replies or (("b", 3), ("b", 9), ("a", 0.25)))))
    return build_graph(of, store=store, **options)


def host(turn: TurnGraph, checkpointer: BaseCheckpointSaver[str] | None = None) -> Any:
    parent = StateGraph(HostState)
    parent.add_node("loop", turn.compile())
    parent.add_node("after", lambda state: {"note": f"saw {state['outcome']}"})
    parent.add_edge(START, "loop")
    parent.add_edge("loop", "after")
    parent.add_edge("after", END)
    return parent.compile(checkpointer=checkpointer)


def test_each_way_to_run_a_host_gives_the_turn_and_nothing_else(tmp_path: Path, store: SqlStore) -> None:
    async def asynchronously() -> tuple[Any, list[Any]]:
        result = await app.ainvoke({"campaign": "c"})
        return result, [part async for part in app.astream({"campaign": "c"}, subgraphs=True)]

    app = host(graph(tmp_path, store))
    plain = app.invoke({"campaign": "c"})
    result, parts = asyncio.run(asynchronously())
    assert set(plain) == set(result) == {"campaign", *OUTPUT, "note"}
    assert [plain["outcome"], result["outcome"]] == ["kept", "reverted"]
    inner = [name for path, part in parts if path for name in part]
    assert inner == ["propose", "check_rails", "train", "validate", "decide", "finish"]
    (loop,) = [part["loop"] for path, part in parts if not path and "loop" in part]
    assert set(loop) == OUTPUT
    assert loop["stop_reason"] == "iterations"


def test_a_stream_of_the_host_has_no_key_of_ours(tmp_path: Path, store: SqlStore) -> None:
    values = list(host(graph(tmp_path, store)).stream({"campaign": "c"}, stream_mode="values"))
    assert set().union(*values) == {"campaign", *OUTPUT, "note"}


@pytest.mark.parametrize("saver", [None, InMemorySaver()])
def test_with_and_without_a_checkpointer_the_store_ends_alike(
    tmp_path: Path, store: SqlStore, saver: BaseCheckpointSaver[str] | None
) -> None:
    app = host(graph(tmp_path, store), saver)
    config = {"configurable": {"thread_id": "1"}}
    outcomes = [app.invoke({"campaign": "c"}, config)["outcome"] for _ in range(3)]
    assert outcomes == ["kept", "reverted", "kept"]


def test_a_thread_that_goes_on_remembers_no_earlier_turn(tmp_path: Path, store: SqlStore) -> None:
    app = graph(tmp_path, store, iterations=1).compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    assert app.invoke({"campaign": "c"}, config)["outcome"] == "kept"
    again = app.invoke({"campaign": "c"}, config)
    assert (again["attempt_id"], again["outcome"], again["stop_reason"]) == (None, None, "iterations")


def test_a_finished_campaign_says_so_and_writes_nothing(tmp_path: Path, store: SqlStore) -> None:
    graph(tmp_path, store, iterations=1).compile().invoke({"campaign": "c"})
    state = store.campaign("c")
    assert state is not None
    with sqlite3.connect(tmp_path / "store.db") as connection:
        (before,) = connection.execute("SELECT count(*) FROM events").fetchone()
        output = graph(tmp_path, store, iterations=1).compile().invoke({"campaign": "c"})
        (after,) = connection.execute("SELECT count(*) FROM events").fetchone()
    assert (output["stop_reason"], after) == ("iterations", before)


def test_another_campaigns_name_is_refused(tmp_path: Path, store: SqlStore) -> None:
    with pytest.raises(InputError, match="this graph runs campaign `c`, not `d`"):
        graph(tmp_path, store).compile().invoke({"campaign": "d"})


# The lease, the worker, and closing.


ACQUIRE = """
import sys
from overnight.store.errors import LeaseHeldError
from overnight.store.sql_store import SqlStore
with SqlStore.open(sys.argv[1]) as store:
    try:
        store.release(store.acquire(store.campaign("c").id))
        print("free", end="")
    except LeaseHeldError:
        print("held", end="")
"""


def others_find_it(database: Path) -> str:
    """Try to become the campaign's writer in another process."""
    command = [sys.executable, "-P", "-c", ACQUIRE, str(database)]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_between_turns_anyone_may_write_and_during_one_nobody(tmp_path: Path, store: SqlStore) -> None:
    during: list[str] = []

    def look(request: TrialRequest) -> None:
        if not during:
            during.append(others_find_it(tmp_path / "store.db"))

    turn = graph(tmp_path, store, trainer=watched(tmp_path, look))
    turn.compile().invoke({"campaign": "c"})
    assert (during, others_find_it(tmp_path / "store.db")) == (["held"], "free")


def test_a_node_that_fails_gives_the_lease_back(tmp_path: Path, store: SqlStore) -> None:
    def fail(request: TrialRequest) -> None:
        raise TrainerError("the device is gone")

    turn = graph(tmp_path, store, trainer=watched(tmp_path, fail))
    with pytest.raises(TrainerError, match="the device is gone"):
        turn.compile().invoke({"campaign": "c"})
    state = store.campaign("c")
    assert state is not None
    assert state.lease_owner is None


def test_another_writer_between_turns_is_seen(tmp_path: Path, store: SqlStore) -> None:
    one = graph(tmp_path, store, ("b", 3), ("b", 4), iterations=9).compile()
    two = graph(tmp_path, store, ("a", 0.25), iterations=9).compile()
    outputs = [app.invoke({"campaign": "c"}) for app in (one, two, one)]
    attempts = [store.attempt(output["attempt_id"]) for output in outputs]
    assert [(attempt.iteration, attempt.outcome) for attempt in attempts] == [(1, "kept"), (2, "kept"), (3, "reverted")]
    assert attempts[2].baseline_config_id == attempts[1].config_id


def children() -> set[int]:
    return {process.pid for process in psutil.Process().children(recursive=True)}


def wait_until(true: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 20
    while not true():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def in_worker(folder: Path, store: SqlStore) -> TurnGraph:
    return graph(folder, store, trainer=lambda config, seed: float(config["a"]) + 1.0)


def test_closing_ends_the_worker_and_refuses_more(tmp_path: Path, store: SqlStore) -> None:
    before = children()
    with in_worker(tmp_path, store) as turn:
        app = turn.compile()
        app.invoke({"campaign": "c"})
        assert children() - before
    wait_until(lambda: not children() - before)
    with pytest.raises(InputError, match="the graph of campaign `c` was closed"):
        app.invoke({"campaign": "c"})
    turn.close()


def test_a_graph_that_nobody_holds_any_more_is_closed(tmp_path: Path, store: SqlStore) -> None:
    before = children()
    app = host(in_worker(tmp_path, store))
    app.invoke({"campaign": "c"})
    gc.collect()
    assert children() - before  # the compiled graph keeps it
    del app
    gc.collect()
    wait_until(lambda: not children() - before)


# Resuming from a host's checkpoint.


class Killed(BaseException):
    """Stands for a process that ends in the middle of a node, without a word."""


def test_a_turn_killed_in_a_trial_goes_on_from_the_hosts_checkpoint(tmp_path: Path, store: SqlStore) -> None:
    def kill(request: TrialRequest) -> None:
        if request.config["b"] == 3:
            raise Killed

    config: Any = {"configurable": {"thread_id": "1"}}
    saver = InMemorySaver()
    with pytest.raises(Killed):
        host(graph(tmp_path, store, trainer=watched(tmp_path, kill)), saver).invoke({"campaign": "c"}, config)
    trainer = watched(tmp_path)
    result = host(graph(tmp_path, store, trainer=trainer), saver).invoke(None, config)
    assert (result["outcome"], result["note"]) == ("kept", "saw kept")
    assert {request.config["b"] for request in trainer.requests} == {3}  # the baseline was not measured again
    state = store.campaign("c")
    assert state is not None
    assert store.spent(state.id).iterations == 1


def test_a_turn_that_others_finished_meanwhile_ends_with_its_own_result(tmp_path: Path, store: SqlStore) -> None:
    def kill(request: TrialRequest) -> None:
        if request.config["b"] == 3:
            raise Killed

    config: Any = {"configurable": {"thread_id": "1"}}
    saver = InMemorySaver()
    with pytest.raises(Killed):
        host(graph(tmp_path, store, trainer=watched(tmp_path, kill)), saver).invoke({"campaign": "c"}, config)
    elsewhere = graph(tmp_path, store, ("b", 9), ("a", 0.25), iterations=5).compile()
    for _ in range(3):
        elsewhere.invoke({"campaign": "c"})
    late = watched(tmp_path)
    result = host(graph(tmp_path, store, trainer=late, iterations=5), saver).invoke(None, config)
    assert store.attempt(result["attempt_id"]).iteration == 1
    assert (result["outcome"], late.requests) == ("kept", [])


def test_two_invocations_at_once_take_one_node_at_a_time(tmp_path: Path, store: SqlStore) -> None:
    app = graph(tmp_path, store, ("b", 3), ("b", 9), ("a", 0.25), ("b", 2), iterations=9).compile()
    outputs: list[dict[str, Any]] = []
    threads = [threading.Thread(target=lambda: outputs.append(app.invoke({"campaign": "c"}))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert len(outputs) == 3
    state = store.campaign("c")
    assert state is not None
    turns = range(1, store.spent(state.id).iterations + 1)
    assert all([attempt.try_no for attempt in store.attempts_of_turn(state.id, turn)] == [1] for turn in turns)
    seeds = [(t.config_id, t.seed, t.replicate) for t in store.trials_of_attempt(outputs[0]["attempt_id"])]
    assert len(seeds) == len(set(seeds))


# The host's own nodes.


def critic(store: SqlStore, seen: list[str | None]) -> Callable[[TurnState], TurnUpdate]:
    """Return a node that is against the value 9."""

    def against_nine(state: TurnState) -> TurnUpdate:
        attempt_id = state["attempt_id"]
        assert attempt_id is not None
        reply = store.attempt(attempt_id).reply
        seen.append(reply)
        return {"veto": "nine never worked here; go lower"} if '"new_value": 9' in (reply or "") else {}

    return against_nine


def test_a_critic_may_veto_and_the_proposer_is_told(tmp_path: Path, store: SqlStore) -> None:
    seen: list[str | None] = []
    proposers = scripted(("b", 9), ("b", 3))
    turn = graph(tmp_path, store, proposers=proposers, nodes={"after:propose": critic(store, seen)})
    output = turn.compile().invoke({"campaign": "c"})
    state = store.campaign("c")
    assert state is not None
    first, second = store.attempts_of_turn(state.id, 1)
    assert (first.outcome, first.rail, first.rail_reason) == ("blocked", "veto", "nine never worked here; go lower")
    assert (second.new_value, output["outcome"], len(seen)) == ("3", "kept", 2)
    rejection = proposers["random"].asks[-1].rejections[0]
    assert (rejection.rail, rejection.reason) == ("veto", "nine never worked here; go lower")


def test_a_rail_speaks_before_a_veto(tmp_path: Path, store: SqlStore) -> None:
    turn = graph(tmp_path, store, ("b", 7), ("b", 3), nodes={"after:propose": lambda state: {"veto": "no"}})
    turn.compile().invoke({"campaign": "c"})
    state = store.campaign("c")
    assert state is not None
    rails = [attempt.rail for attempt in store.attempts_of_turn(state.id, 1)]
    assert rails == ["R3_range", "veto", "R3_range", "veto"]


def test_an_async_critic_runs_in_an_async_host(tmp_path: Path, store: SqlStore) -> None:
    async def wait_and_veto(state: TurnState) -> TurnUpdate:
        await asyncio.sleep(0)
        return {"veto": "not today"}

    turn = graph(tmp_path, store, nodes={"after:propose": wait_and_veto})
    assert asyncio.run(turn.compile().ainvoke({"campaign": "c"}))["outcome"] == "blocked"


def test_a_critic_that_raised_is_asked_again_before_anything_is_trained(tmp_path: Path, store: SqlStore) -> None:
    def raises(state: TurnState) -> TurnUpdate:
        raise RuntimeError("the critic's model is down")

    seen: list[str | None] = []
    with pytest.raises(RuntimeError, match="the critic's model is down"):
        graph(tmp_path, store, nodes={"after:propose": raises}).compile().invoke({"campaign": "c"})
    trainer = watched(tmp_path)
    # Another process, no checkpointer: the position is the store's, and it says that the rails come next.
    turn = graph(tmp_path, store, trainer=trainer, nodes={"after:propose": critic(store, seen)})
    assert turn.compile().invoke({"campaign": "c"})["outcome"] == "kept"
    assert len(seen) == 1
    state = store.campaign("c")
    assert state is not None
    assert len(store.attempts_of_turn(state.id, 1)) == 1


def test_a_critic_is_not_asked_where_nobody_answered(tmp_path: Path, store: SqlStore) -> None:
    def silent(ask: Ask) -> str:
        raise ProposerError("no answer", failure="llm_timeout")

    seen: list[str | None] = []
    proposers = proposing(silent)
    app = graph(tmp_path, store, proposers=proposers, nodes={"after:propose": critic(store, seen)}).compile()
    names = [name for part in app.stream({"campaign": "c"}) for name in part]
    assert len(proposers["random"].asks) == 1
    assert names[:4] == ["calibrate", "propose", "propose", "after_propose"]
    assert None not in seen


def test_every_place_takes_a_node_that_runs_after_it(tmp_path: Path, store: SqlStore) -> None:
    calls: list[str] = []

    def noted(name: str) -> Callable[[TurnState], TurnUpdate]:
        def note(state: TurnState) -> TurnUpdate:
            calls.append(name)
            return {}

        return note

    places = {f"after:{name}": noted(name) for name in NODES}
    app = graph(tmp_path, store, iterations=1, nodes=places).compile()
    ran = [name for part in app.stream({"campaign": "c"}, {"recursion_limit": 50}) for name in part]
    stages = ["calibrate", "propose", "check_rails", "train", "validate", "decide", "finish"]
    assert ran == [name for stage in stages for name in (stage, f"after_{stage}")]
    assert calls == stages


# The recursion limit.


def test_the_longest_turn_fits_the_default_limit(tmp_path: Path, store: SqlStore) -> None:
    """Calibration, four tries with nodes after proposal and rails, a whole measurement, the end of the campaign."""
    tries = iter(["no JSON", "no JSON", "no JSON"])

    def vetoes_at_first(state: TurnState) -> TurnUpdate:
        return {}

    replies = proposing(lambda ask: next(tries))
    nodes = {"after:propose": vetoes_at_first, "after:check_rails": vetoes_at_first}
    app = graph(tmp_path, store, proposers=replies, iterations=1, nodes=nodes).compile()
    not_here = 3  # distill, race, route
    steps = list(app.stream({"campaign": "c"}, {"recursion_limit": LIMIT - not_here}))
    names = [name for step in steps for name in step]
    assert (names.count("propose"), names[0], names[-1]) == (MAX_TRIES, "calibrate", "finish")
    assert set(NODES) - set(names) == {"distill", "race", "route"}


def test_a_menu_that_is_gridded_finer_costs_no_step(tmp_path: Path, store: SqlStore) -> None:
    knobs = {"a": {"type": "float", "range": [0.0, 1.0], "default": 0.0, "levels": 2}, "b": None}
    of = campaign(tmp_path, knobs=knobs, trainer={"optimum": {"a": 0.0}}, budget={"iterations": 9})
    trainer = ScriptedTrainer(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
    app = build_graph(of, store=store, trainer=trainer).compile()
    turns = [[name for part in app.stream({"campaign": "c"}) for name in part] for _ in range(2)]
    state = store.campaign("c")
    assert state is not None
    assert (state.refinement, turns[1].count("propose")) == (1, 1)


def test_a_turn_in_a_host_needs_no_more_than_the_default_limit(tmp_path: Path, store: SqlStore) -> None:
    app = host(graph(tmp_path, store, "no JSON", iterations=1))
    assert app.invoke({"campaign": "c"}, {"recursion_limit": LIMIT})["stop_reason"] == "iterations"


# Pausing.


def test_overnight_pause_ends_the_turn_and_the_next_invocation_goes_on(tmp_path: Path, store: SqlStore) -> None:
    def ask_to_pause(request: TrialRequest) -> None:
        state = store.campaign("c")
        assert state is not None
        if request.config["b"] == 3 and not asked:
            asked.append(store.request(state.id, "pause_requested", {}))

    asked: list[int] = []
    app = graph(tmp_path, store, trainer=watched(tmp_path, ask_to_pause)).compile()
    paused = app.invoke({"campaign": "c"})
    assert (paused["outcome"], paused["stop_reason"]) == (None, "paused")
    state = store.campaign("c")
    assert state is not None
    assert (state.status, state.lease_owner) == ("paused", None)
    assert app.invoke({"campaign": "c"})["outcome"] == "kept"


def test_a_pause_in_the_look_at_the_holdout_is_forgotten_afterwards(tmp_path: Path, store: SqlStore) -> None:
    def ask_to_pause(request: TrialRequest) -> None:
        state = store.campaign("c")
        assert state is not None
        if request.split == "holdout" and not asked:
            asked.append(store.request(state.id, "pause_requested", {}))

    asked: list[int] = []
    turn = graph(tmp_path, store, iterations=1, trainer=watched(tmp_path, ask_to_pause))
    app = turn.compile(checkpointer=InMemorySaver())
    config: Any = {"configurable": {"thread_id": "1"}}
    reasons = [app.invoke({"campaign": "c"}, config)["stop_reason"] for _ in range(2)]
    assert reasons == ["paused", "iterations"]
    state = store.campaign("c")
    assert state is not None
    assert (state.status, state.stop_reason) == ("finished", "iterations")


def test_what_only_the_lease_holder_may_rely_on_is_forgotten_with_the_lease(tmp_path: Path, store: SqlStore) -> None:
    held = runtime(campaign(tmp_path), store)
    with held.writing():
        pass
    state = held.state()
    held.trials[("config", "val")] = held.own_trials[1] = ()
    other = SqlStore.open(tmp_path / "store.db")
    with other.writing(other.acquire(state.id)) as writer:
        writer.refined(7)
    held.rest()
    assert (held.lease, held.trials, held.own_trials, held.state().refinement) == (None, {}, {}, 7)
    held.close()
    other.close()


def test_a_host_that_lives_for_days_goes_on_the_next_evening(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()
    with running_on(clock):
        until = datetime.fromtimestamp(EVENING + 3600).strftime("%H:%M")
        of = campaign(tmp_path, budget={"iterations": 9, "until": until})
        trainer = TimedTrainer(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
        trainer.clock = clock
        app = build_graph(
            of, store=store, trainer=trainer, proposers=scripted(("b", 3), ("b", 9), ("a", 0.25))
        ).compile()
        assert app.invoke({"campaign": "c"})["outcome"] == "kept"
        clock.now += 2 * 3600
        assert app.invoke({"campaign": "c"})["stop_reason"] == "until"
        clock.now += 3600
        assert app.invoke({"campaign": "c"})["outcome"] == "reverted"
