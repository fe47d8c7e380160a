"""The host's own graph: the loop is its node `improve`, a critic of the host's stands inside the loop, and the host
keeps a diary of what came of each turn.

The loop's state stays its own: what comes out of `improve` is `attempt_id`, `outcome`, `best` and `stop_reason`.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from operator import add
from typing import Annotated, Any, TypedDict

from langgraph.graph import END, START, StateGraph

from overnight import Campaign, Choice, Float, TrajectoryStore, TurnGraph, TurnState, TurnUpdate, build_graph

from .training import train

CAMPAIGN = "curve"
MOST_WORK = 64 * 32
"""Width times batch that this host allows a trial."""


class State(TypedDict, total=False):
    """The host's state."""

    campaign: str
    attempt_id: int | None
    outcome: str | None
    best: float | None
    stop_reason: str | None
    diary: Annotated[list[str], add]


def campaign(turns: int) -> Campaign:
    """What the loop is to do, said in Python; `Campaign.load` reads a campaign file instead."""
    return Campaign.from_dict(
        {
            "campaign": {"name": CAMPAIGN, "trainer": "function", "seed": 3},
            "metric": {"name": "mse"},
            "budget": {"iterations": turns, "trial_timeout_s": 60.0},
            "decision": {"min_gain": 0.0, "audit": 0.0},
            "knobs": {
                "lr": Float(1e-4, 1e-1, log=True, default=1e-3, levels=4, doc="step size"),
                "momentum": Choice([0.0, 0.5, 0.9], doc="how much of the last step is kept"),
                "width": Choice([16, 64, 256], doc="hidden units"),
                "batch": Choice([8, 32, 128], default=32, doc="samples a step"),
            },
            "proposers": {"random": {"kind": "random"}},
        }
    )


def critic(store: TrajectoryStore) -> Callable[[TurnState], TurnUpdate]:
    """Return the host's own node: it sees each proposal before it costs anything, and may veto it."""

    def weigh(state: TurnState) -> TurnUpdate:
        attempt_id = state["attempt_id"]
        assert attempt_id is not None
        attempt = store.attempt(attempt_id)
        assert attempt.baseline_config_id is not None
        try:
            proposal = json.loads(attempt.reply or "")
            config = {**store.config_of(attempt.baseline_config_id), proposal["knob"]: proposal["new_value"]}
            work = config["width"] * config["batch"]
        except (ValueError, KeyError, TypeError):
            return {}  # not a proposal at all: the rails will say so
        return {"veto": f"width times batch is {work}; this host allows {MOST_WORK}"} if work > MOST_WORK else {}

    return weigh


def loop_graph(store: TrajectoryStore, turns: int) -> TurnGraph:
    """Return the loop with the host's trainer and critic: a context manager, since it owns a worker process."""
    return build_graph(campaign(turns), store=store, trainer=train, nodes={"after:propose": critic(store)})


def host_graph(loop: TurnGraph, store: TrajectoryStore) -> StateGraph[State, None, State, State]:
    """Return the parent graph around the loop; its node `write` adds a line to the host's diary."""

    def write(state: State) -> dict[str, Any]:
        if state["attempt_id"] is None:
            return {"diary": []}
        attempt = store.attempt(state["attempt_id"])
        return {"diary": [f"turn {attempt.iteration}: {attempt.knob} = {attempt.new_value} {state['outcome']}"]}

    graph = StateGraph(State)
    graph.add_node("improve", loop.compile())
    graph.add_node("write", write)
    graph.add_edge(START, "improve")
    graph.add_edge("improve", "write")
    graph.add_conditional_edges("write", _go_on, ["improve", END])
    return graph


def _go_on(state: State) -> str:
    return END if state["stop_reason"] else "improve"
