"""The LangGraph state machine, wiring only: one invocation is one turn.

The graph is uncompiled, so that a host application can use it as a subgraph with its own checkpointer or none: the
position is the store's, never the checkpoint's.
"""

from __future__ import annotations

import weakref
from collections.abc import Awaitable, Hashable, Mapping, Sequence
from functools import partial
from typing import Any, Literal, Protocol, Self, cast

from langgraph.graph import END, START, StateGraph
from langgraph.types import Send

from overnight.agent import nodes as stages
from overnight.agent.campaign import Campaign
from overnight.agent.events import Hooks
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.run import open_runtime
from overnight.agent.runtime import Runtime
from overnight.agent.state import StageName, TurnInput, TurnOutput, TurnState, TurnUpdate
from overnight.agent.visiting import Visitor
from overnight.rails.gate import Rail
from overnight.store.errors import InputError
from overnight.store.protocol import TrajectoryStore
from overnight.trainer.function import Objective
from overnight.trainer.protocol import Trainer

NODES: tuple[StageName, ...] = (
    "calibrate",
    "propose",
    "check_rails",
    "train",
    "validate",
    "decide",
    "distill",
    "race",
    "route",
    "finish",
)
Route = Literal[
    "calibrate",
    "propose",
    "check_rails",
    "train",
    "validate",
    "decide",
    "distill",
    "race",
    "route",
    "finish",
    "__end__",
]
ROUTES: Mapping[StageName, Sequence[StageName]] = {
    "calibrate": NODES[1:],
    "propose": ("propose", "check_rails", "finish"),
    "check_rails": ("propose", "train", "distill", "race", "route", "finish"),
    "train": ("validate", "finish"),
    "validate": ("decide",),
    "decide": ("distill", "race", "route", "finish"),
    "distill": ("race", "route", "finish"),
    "race": ("route", "finish"),
    "route": ("race", "finish"),
    "finish": (),
}
"""Where each node may go besides the end of the turn: the drawn edges."""
ALWAYS: Mapping[StageName, str] = {"validate": "decide", "finish": END}
"""Nodes with one way on."""


BEFORE: Mapping[StageName, StageName] = {
    "check_rails": "propose",
    "train": "check_rails",
    "validate": "train",
    "decide": "validate",
}
"""The node whose work a stage waits for."""
GOES_ON: Mapping[StageName, StageName] = {"propose": "check_rails", "train": "validate"}
"""Where these nodes go when they have done their work: only then a host's node after them runs."""


class CustomNode(Protocol):
    """A node of the host's own, ordinary or `async`; anything else that LangGraph takes for a node works too."""

    def __call__(self, state: TurnState, /) -> TurnUpdate | Awaitable[TurnUpdate]:
        """Take the graph's state, return what changes in it.

        `state["attempt_id"]` is the attempt in hand (`store.attempt(...)` has all of it). After `propose`, a `veto` in
        the update blocks the try: its text is recorded, and the proposer reads it before it tries again. What it
        raises goes to whoever invoked the graph; the next invocation comes to this node again.
        """
        ...


class TurnGraph(StateGraph[TurnState, None, TurnInput, TurnOutput]):
    """The uncompiled graph of one turn, with what it runs on: a context manager, closed at the latest when it goes.

    Closing ends the trial worker and the proposers, and gives the campaign's lease back, which a turn only holds while
    it runs. What was compiled from a closed graph raises an `InputError`.
    """

    def __init__(self, visitor: Visitor) -> None:
        super().__init__(TurnState, input_schema=TurnInput, output_schema=TurnOutput)
        self._visitor = visitor
        if visitor.embedded:  # compiled graphs keep this one alive, and nothing else does
            weakref.finalize(self, visitor.close)

    def close(self) -> None:
        """Close it now; calling it again costs nothing."""
        self._visitor.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def turn_graph(
    runtime: Runtime, custom: Mapping[str, CustomNode] | None = None, *, embedded: bool = False
) -> TurnGraph:
    """Wire the graph over a runtime, which is closed with it; `custom` maps `after:<node>` to a node of the host's own.

    Raises:
        InputError: a custom node names a place that is not there.
    """
    visitor = Visitor(runtime, embedded=embedded)
    graph = TurnGraph(visitor)
    after = _places(custom or {})
    for name in NODES:
        graph.add_node(name, partial(visitor.visit, name, getattr(stages, name), name in after))
    graph.add_conditional_edges(START, partial(_enter, visitor, frozenset(after)), _ends(*NODES))
    for name, ends in ROUTES.items():
        source: str = name
        if name in after:
            source = f"after_{name}"
            graph.add_node(source, cast("Any", after[name]))  # LangGraph's type wants the parameter's name, too
            graph.add_conditional_edges(name, partial(_divert, name, ends), {source: source, **_ends(*ends)})
        route = partial(_follow, frozenset(after) if name == "calibrate" else frozenset(), ends)
        if name in ALWAYS:
            graph.add_edge(source, ALWAYS[name])
        else:
            graph.add_conditional_edges(source, route, _ends(*ends))
    return graph


def build_graph(
    campaign: Campaign,
    *,
    store: TrajectoryStore,
    trainer: Trainer | Objective | None = None,
    proposers: Mapping[str, Proposer] | None = None,
    rails: Sequence[Rail] = (),
    hooks: Sequence[Hooks] = (),
    nodes: Mapping[str, CustomNode] | None = None,
) -> TurnGraph:
    """Return the uncompiled graph of one turn, usable as a subgraph with the host's own checkpointer or none.

    Input is `{"campaign": name}`, output `{"attempt_id", "outcome", "best", "stop_reason"}`: a `stop_reason` says that
    there is nothing more to do (`iterations`, `menu_exhausted`, ...) or that somebody `paused` it.

    Args:
        campaign: what to run.
        store: the trajectory store; it stays open when the graph is closed.
        trainer: runs trials: a `Trainer` in this process, a function `fn(config, seed) -> float` in the trial worker;
            None: the campaign's own, in the trial worker.
        proposers: by name; None: the campaign's own.
        rails: further rails, after the built-in ones.
        hooks: consumers of the event stream.
        nodes: the host's own nodes, by place (`after:propose`).

    Raises:
        CampaignError: a setting is wrong, or a key changed that may not change.
        InputError: `nodes` names a place that is not there, or the function does not take (config, seed).
        NotAllowedError: the campaign file wants something of this machine that nobody has allowed it.
    """
    _places(nodes or {})
    runtime = open_runtime(campaign, store, trainer=trainer, proposers=proposers, rails=rails, hooks=hooks)
    return turn_graph(runtime, nodes, embedded=True)


def _places(custom: Mapping[str, CustomNode]) -> dict[StageName, CustomNode]:
    """Return the host's nodes by the node that they come after."""
    found: dict[StageName, CustomNode] = {}
    for place, node in custom.items():
        where, _, after = place.partition(":")
        name = next((name for name in ROUTES if name == after), None)
        if where != "after" or name is None:
            places = ", ".join(f"`after:{name}`" for name in ROUTES)
            raise InputError(f"`nodes`: `{place}` is not a place in the graph; use one of {places}")
        found[name] = node
    return found


def _enter(visitor: Visitor, after: frozenset[StageName], state: TurnState) -> Route:
    """Go on where the store says."""
    visitor.enter()
    runtime = visitor.runtime
    asked = state.get("campaign")
    if asked is None:
        raise InputError(
            f"this graph needs `campaign` in its input (here `{runtime.name}`): the parent's state needs a key of that "
            "name, set before this node"
        )
    if asked != runtime.name:
        raise InputError(f"this graph runs campaign `{runtime.name}`, not `{asked}`; build one for that")
    return _node(_entrance(stages.next_stage(runtime), after))


def _entrance(stage: StageName, after: frozenset[StageName]) -> StageName:
    """Return where to come in for a stage: before a host's node that may not have run; what is before it passes on."""
    before = BEFORE.get(stage)
    return before if before is not None and before in after else stage


def _divert(name: StageName, ends: Sequence[StageName], state: TurnState) -> str | Send:
    """Go by the host's node when the node before it has done its work, else on without it."""
    stage = state["stage"]
    done = stage == GOES_ON.get(name, stage) and state.get("stop_reason") != "paused"
    return f"after_{name}" if done else _follow(frozenset(), ends, state)


def _follow(after: frozenset[StageName], ends: Sequence[StageName], state: TurnState) -> str | Send:
    """Go where the last node said: beyond what is drawn only where the store has moved under a checkpoint."""
    stage = _entrance(state["stage"], after)
    if stage == "done" or stage in ends:
        return _node(stage)
    return Send(stage, {**state})


def _node(stage: StageName) -> Route:
    return "__end__" if stage == "done" else stage


def _ends(*names: str) -> dict[Hashable, str]:
    return {**{name: name for name in names}, "__end__": END}
