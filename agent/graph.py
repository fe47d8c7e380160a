"""The LangGraph state machine, wiring only: one invocation is one turn.

The graph is uncompiled, so that a host application can use it as a subgraph with its own checkpointer or none: the
position is the store's, never the checkpoint's.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from functools import partial
from typing import Literal, Protocol

from langgraph.graph import END, START, StateGraph

from overnight.agent import nodes as stages
from overnight.agent.campaign import Campaign
from overnight.agent.events import Hooks
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.run import open_runtime
from overnight.agent.runtime import Runtime
from overnight.agent.state import StageName, TurnInput, TurnOutput, TurnState, TurnUpdate
from overnight.rails.gate import Rail
from overnight.store.errors import InputError
from overnight.store.protocol import TrajectoryStore
from overnight.trainer.protocol import Trainer

NODES = ("calibrate", "propose", "check_rails", "train", "validate", "decide", "finish")
Route = Literal["calibrate", "propose", "check_rails", "train", "validate", "decide", "finish", "__end__"]


class CustomNode(Protocol):
    """A node of the host's own."""

    def __call__(self, state: TurnState) -> TurnUpdate:
        """Take the graph's state, return what changes in it."""
        ...


def turn_graph(
    runtime: Runtime, custom: Mapping[str, CustomNode] | None = None
) -> StateGraph[TurnState, None, TurnInput, TurnOutput]:
    """Wire the graph over a runtime; `custom` maps `after:<node>` to a node of the host's own.

    Raises:
        InputError: a custom node names a place that is not there.
    """
    graph = StateGraph(TurnState, input_schema=TurnInput, output_schema=TurnOutput)
    exits = _custom_nodes(graph, custom or {})
    for name in NODES:
        graph.add_node(name, partial(getattr(stages, name), runtime))
    graph.add_conditional_edges(START, partial(_enter, runtime), _ends(*NODES))
    graph.add_conditional_edges(exits["calibrate"], _follow, _ends(*NODES[1:]))
    graph.add_conditional_edges(exits["propose"], _follow, _ends("propose", "check_rails", "finish"))
    graph.add_conditional_edges(exits["check_rails"], _follow, _ends("propose", "train", "finish"))
    graph.add_conditional_edges(exits["train"], _follow, _ends("validate", "finish"))
    graph.add_edge(exits["validate"], "decide")
    graph.add_conditional_edges(exits["decide"], _follow, _ends("finish"))
    graph.add_edge(exits["finish"], END)
    return graph


def build_graph(
    campaign: Campaign,
    *,
    store: TrajectoryStore,
    trainer: Trainer | None = None,
    proposers: Mapping[str, Proposer] | None = None,
    rails: Sequence[Rail] = (),
    hooks: Sequence[Hooks] = (),
    nodes: Mapping[str, CustomNode] | None = None,
) -> StateGraph[TurnState, None, TurnInput, TurnOutput]:
    """Return the uncompiled graph of one turn, usable as a subgraph with the host's own checkpointer or none.

    Args:
        campaign: what `load_campaign` gave.
        store: the trajectory store; the lease is taken at the first write.
        trainer: runs trials in this process; None: the campaign's own, in a worker process.
        proposers: by name; None: the campaign's own.
        rails: further rails, after the built-in ones.
        hooks: consumers of the event stream.
        nodes: the host's own nodes, by place (`after:propose`).

    Raises:
        CampaignError: a setting is wrong, or a key changed that may not change.
        InputError: `nodes` names a place that is not there.
    """
    runtime = open_runtime(campaign, store, trainer=trainer, proposers=proposers, rails=rails, hooks=hooks)
    return turn_graph(runtime, nodes)


def _custom_nodes(
    graph: StateGraph[TurnState, None, TurnInput, TurnOutput], custom: Mapping[str, CustomNode]
) -> dict[str, str]:
    """Add the host's nodes; return the node that each stage's own edges leave from."""
    exits = {name: name for name in NODES}
    for place, node in custom.items():
        where, _, after = place.partition(":")
        if where != "after" or after not in NODES:
            places = ", ".join(f"`after:{name}`" for name in NODES)
            raise InputError(f"`nodes`: `{place}` is not a place in the graph; use one of {places}")
        name = f"after_{after}"
        graph.add_node(name, node)
        graph.add_edge(after, name)
        exits[after] = name
    return exits


def _enter(runtime: Runtime, state: TurnState) -> Route:  # noqa: ARG001
    """Go on where the store says."""
    return _node(stages.next_stage(runtime))


def _follow(state: TurnState) -> Route:
    """Go where the last node said."""
    return _node(state["stage"])


def _node(stage: StageName) -> Route:
    return "__end__" if stage == "done" else stage


def _ends(*names: str) -> dict[Hashable, str]:
    return {**{name: name for name in names}, "__end__": END}
