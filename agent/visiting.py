"""What stands around every node of a graph: it runs at its own stage only, one at a time, and rests between turns.

LangGraph may run a node again (a checkpoint is written after a node's own commit), or go on from a checkpoint that
another process has overtaken. The store knows: a node whose stage is over passes on without doing anything. In a host's
graph the lease is taken with a turn's first write and given back when the turn ends, when a node fails, and while a
node of the host's own runs, so that between turns anyone may go on with the campaign.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import suppress

from overnight.agent.budget import is_over
from overnight.agent.deadline import deadline_of
from overnight.agent.nodes import next_stage
from overnight.agent.run import go_on, stand_still
from overnight.agent.runtime import Runtime
from overnight.agent.state import StageName, TurnState, TurnUpdate
from overnight.store.errors import InputError, StoreError

STAGES = ("propose", "check_rails", "train", "validate", "decide")
"""Nodes that belong to one stage of an attempt; the others find out themselves whether there is anything to do."""
Node = Callable[[Runtime, TurnState], TurnUpdate]


class Visitor:
    """Runs the nodes of one graph.

    Args:
        runtime: what they share.
        embedded: whether the graph is part of a host's: it then opens the campaign and gives the lease back itself.
    """

    def __init__(self, runtime: Runtime, *, embedded: bool) -> None:
        self.runtime = runtime
        self.closed = False
        self.embedded = embedded
        self._running = not embedded
        self._lock = threading.Lock()

    def visit(self, name: StageName, node: Node, gives_way: bool, state: TurnState) -> TurnUpdate:
        """Run a node, unless its stage is over; `gives_way` when one of the host's own comes next.

        Raises:
            InputError: the graph was closed.
        """
        with self._lock:
            self.enter()
            try:
                update = self._visit(name, node, state)
            except BaseException:  # raised on: a failed node, Ctrl-C too, gives the lease back
                self._rest()
                raise
            if gives_way or update.get("stage") == "done":
                self._rest()
            return update

    def _visit(self, name: StageName, node: Node, state: TurnState) -> TurnUpdate:
        if not self._running:
            reason = finished(self.runtime)
            if reason is not None:
                return {**self._nothing(), "stage": "done", "stop_reason": reason}
            go_on(self.runtime)
            self._running = True
        came_here = state.get("stage") == name
        if name == "finish" and not came_here:
            state = {**state, "stop_reason": None}  # an earlier invocation's
        update = passed_on(self.runtime, name, state) or node(self.runtime, state)
        if name == "propose":
            update = {"veto": None, **update}  # the last one was about another proposal
        leaves = update.get("stage") not in ("calibrate", *STAGES)
        if leaves and (name in ("calibrate", *STAGES) or not came_here):
            update = {**self._nothing(), **update}
        if self.embedded and update.get("stop_reason") is not None:
            self._running = False
            if update["stop_reason"] == "paused":
                stand_still(self.runtime)
        return update

    def _nothing(self) -> TurnUpdate:
        """Return what an invocation gives back that decided no turn: a checkpointer may remember an earlier one."""
        return {"attempt_id": None, "outcome": None, "best": best_metric(self.runtime), "stop_reason": None}

    def enter(self) -> None:
        """Look at the clock where an invocation begins: a host may live for days, and `budget.until` comes every day.

        Raises:
            InputError: the graph was closed.
        """
        runtime = self.runtime
        if self.closed:
            raise InputError(f"the graph of campaign `{runtime.name}` was closed; build another to go on")
        if not self._running:
            runtime.deadline = deadline_of(runtime.campaign, runtime.store, runtime.clock())

    def _rest(self) -> None:
        if self.embedded:
            with suppress(StoreError):  # it counts for nothing when this process ends, or was taken over already
                self.runtime.rest()

    def close(self) -> None:
        """End the trial worker and the proposers, and give the lease back; calling it again costs nothing."""
        with self._lock:
            if not self.closed:
                self.closed = True
                self.runtime.close()


def finished(runtime: Runtime) -> str | None:
    """Return why the campaign is over, or None where there is something to do."""
    state = runtime.store.campaign(runtime.name)
    if state is None or state.status != "finished" or not is_over(runtime, state):
        return None
    return state.stop_reason


def passed_on(runtime: Runtime, name: StageName, state: TurnState) -> TurnUpdate | None:
    """Return where the store says to go on when a node's stage is not the campaign's; None when it is."""
    if name not in STAGES:
        return None
    stage = next_stage(runtime)
    if stage == name:
        return None
    position = runtime.store.next_stage(runtime.state().id)
    attempt_id = state.get("attempt_id")
    if name != "propose" and attempt_id is not None:
        iteration = runtime.store.attempt(attempt_id).iteration
        if iteration < position.iteration:
            return turn_result(runtime, iteration, stage)
    if stage not in STAGES or position.attempt_id is None:
        return {"stage": stage}
    return {"stage": stage, "attempt_id": position.attempt_id}


def turn_result(runtime: Runtime, iteration: int, stage: StageName) -> TurnUpdate:
    """Return what a turn that is over came to; `stage` is the campaign's."""
    last = runtime.store.attempts_of_turn(runtime.state().id, iteration)[-1]
    return {
        "stage": "done" if stage in ("calibrate", *STAGES) else stage,
        "attempt_id": last.id,
        "outcome": last.outcome,
        "best": best_metric(runtime),
        "stop_reason": None,
    }


def best_metric(runtime: Runtime) -> float | None:
    """Return the metric of the best attempt that was kept, or None."""
    state = runtime.store.campaign(runtime.name)
    if state is None or state.best_attempt_id is None:
        return None
    return runtime.store.attempt(state.best_attempt_id).metric
