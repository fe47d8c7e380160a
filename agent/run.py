"""Running a campaign to its end or to a pause: the loop around the graph.

One pass of the loop is one graph invocation, one turn. Signals and requests to pause are seen between trials; what was
committed is never lost, so stopping the process at any moment is safe.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar, cast

import platformdirs

from overnight.agent.campaign import Campaign, frozen_part
from overnight.agent.checkpoints import checkpointer
from overnight.agent.deadline import deadline_of
from overnight.agent.events import Hooks, Paused, RunStarted, Stopped
from overnight.agent.finish import finish
from overnight.agent.inherit import check_inherited
from overnight.agent.measure import probe
from overnight.agent.proposers.protocol import Proposer, ProposerContext
from overnight.agent.proposers.registry import build_proposers
from overnight.agent.runtime import Runtime
from overnight.agent.signals import Interrupted, PauseRequested, PauseSwitch
from overnight.agent.state import BudgetSpent
from overnight.agent.trust import require
from overnight.distill.adapter import sweep_unfinished
from overnight.rails.gate import Rail
from overnight.rails.registry import RailContext, build_rails
from overnight.store import clock
from overnight.store.errors import CampaignError, LeaseLostError, StorageFaultError, StoreError, TrainerError
from overnight.store.protocol import CampaignState, TrajectoryStore
from overnight.store.records import TrainerInfo
from overnight.trainer.function import Objective
from overnight.trainer.protocol import Trainer, TrainerContext
from overnight.trainer.registry import trainer_class
from overnight.trainer.shipping import ShippedFunction
from overnight.trainer.worker import WorkerTrainer

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.graph.state import CompiledStateGraph
    from langgraph.types import Durability

    from overnight.agent.state import TurnInput, TurnOutput, TurnState

T = TypeVar("T")
MAX_REASON = 500
HARNESS_IN_A_ROW = 3
"""After so many candidates in a row that the harness lost, it is tried on the baseline, and waited for."""


@dataclass(frozen=True, slots=True)
class RunResult:
    """How a run ended."""

    stop_reason: str
    """`paused`, or the budget that ended the campaign."""
    finished: bool


def cache_folder() -> Path:
    """Return where token files and converted models are kept between campaigns."""
    return Path(os.environ.get("OVERNIGHT_CACHE") or platformdirs.user_cache_dir("overnight"))


class Heartbeat:
    """Called about every second while a trial runs: renews the lease of the runtime that it beats for."""

    def __init__(self) -> None:
        self.runtime: Runtime | None = None

    def __call__(self) -> None:
        """Beat once."""
        if self.runtime is not None:
            self.runtime.idle()


def open_runtime(
    campaign: Campaign,
    store: TrajectoryStore,
    *,
    trainer: Trainer | Objective | None = None,
    proposers: Mapping[str, Proposer] | None = None,
    rails: Sequence[Rail] = (),
    hooks: Sequence[Hooks] = (),
    runs_trials: bool = True,
) -> Runtime:
    """Put together what a campaign runs with, building what the caller did not bring; starts no process.

    Without trials to run, an imported history goes with any file: nothing has to compare with it.

    Raises:
        CampaignError: a trainer or proposer setting is wrong, or a key changed that may not change.
        NotAllowedError: the file wants something of this machine that nobody has allowed it.
    """
    require(campaign, "brief")
    if runs_trials or not is_imported(store.campaign(campaign.name)):
        check_frozen(campaign, store)
    heartbeat = Heartbeat()
    if not isinstance(trainer, Trainer):
        trainer = host_trainer(campaign, heartbeat, trainer)
    runtime = Runtime(
        campaign=campaign,
        store=store,
        trainer=trainer,
        proposers=proposers if proposers is not None else proposers_of(campaign, heartbeat),
        extra_rails=[*rails_of(campaign), *rails],
        hooks=hooks,
        deadline=deadline_of(campaign, store, clock.time()),
        free_memory=trainer.free_memory if isinstance(trainer, WorkerTrainer) else lambda: None,
    )
    heartbeat.runtime = runtime
    return runtime


def proposers_of(campaign: Campaign, idle: Callable[[], None] = lambda: None) -> dict[str, Proposer]:
    """Build the campaign's proposers; `idle` is called about every second while one of them makes the campaign wait.

    Raises:
        CampaignError: a kind is not installed, or a setting is wrong; the message names file and key.
        NotAllowedError: a plugin, a path or a key that nobody has allowed the file.
    """
    require(campaign, "proposers")
    context = ProposerContext(campaign_dir=campaign.folder, cache_dir=cache_folder(), menu=campaign.menu, idle=idle)
    try:
        return build_proposers(campaign.file.proposers, context)
    except CampaignError as error:
        raise CampaignError(f"{campaign.path}: {error}") from error


def rails_of(campaign: Campaign) -> list[Rail]:
    """Build the installed rails that the campaign names.

    Raises:
        CampaignError: one is not installed, or refuses the campaign; the message names file and key.
        NotAllowedError: nobody has allowed the file that plugin.
    """
    require(campaign, "rails")
    try:
        return build_rails(campaign.file.rails.extra, RailContext(campaign.folder, campaign.menu))
    except CampaignError as error:
        raise CampaignError(f"{campaign.path}: {error}") from error


def host_trainer(campaign: Campaign, idle: Callable[[], None], function: Objective | None = None) -> WorkerTrainer:
    """Return the campaign's trainer, or a function, in a worker process of its own, checked; starts no process yet.

    Raises:
        CampaignError: the trainer is not installed, or a setting or a knob is wrong; the message names file and key.
        NotAllowedError: a command, a plugin or a path that nobody has allowed the file.
        InputError: the function does not take (config, seed), or cannot be sent to the worker.
    """
    if function is None:
        require(campaign, "trainer")
    settings = campaign.file.trainer
    context = TrainerContext(
        campaign_dir=campaign.folder,
        cache_dir=cache_folder(),
        knobs={knob.name: knob.type for knob in campaign.menu.knobs},
        metric=campaign.file.metric.name,
        memory_gib=campaign.file.budget.memory_gib,
    )
    if function is not None:
        version = str(settings.get("version", ""))
        return WorkerTrainer("function", {}, context, idle=idle, function=ShippedFunction(function, version=version))
    name = campaign.file.campaign.trainer
    try:
        trainer_class(name).from_settings(settings, context)
    except CampaignError as error:
        raise CampaignError(f"{campaign.path}: {error}") from error
    return WorkerTrainer(name, settings, context, idle=idle)


def prepared(campaign: Campaign, trainer: Trainer) -> TrainerInfo:
    """Prepare the trainer: its data is built, its device found.

    Raises:
        CampaignError: a setting cannot be met here; the message names file and key.
        TrainerError: the device or the disk cannot do it.
    """
    try:
        return trainer.prepare()
    except CampaignError as error:
        raise CampaignError(f"{campaign.path}: {error}") from error


def is_imported(state: CampaignState | None) -> bool:
    """Whether a campaign's history came from a file."""
    from overnight.store.trajectory import IMPORTED

    return state is not None and state.stop_reason == IMPORTED


def check_frozen(campaign: Campaign, store: TrajectoryStore) -> None:
    """Refuse a file whose frozen keys differ from those the campaign began with.

    Raises:
        CampaignError: names the first key that changed.
    """
    state = store.campaign(campaign.name)
    if state is None or state.baseline_config_id is None or state.frozen_hash == campaign.frozen_hash():
        return
    before, now = frozen_part(state.spec), campaign.frozen()
    key = next((key for key in now if before.get(key) != now[key]), "campaign")
    raise CampaignError(
        f"{campaign.path}: `{key}` changed since campaign `{campaign.name}` began, so old and new trials do not "
        "compare; put it back, or start anew with `--fresh`"
    )


def run_campaign(runtime: Runtime, *, checkpoints: Path | None = None, switch: PauseSwitch | None = None) -> RunResult:
    """Run turns until the campaign ends or pauses; what fails outside once it has measured something is waited out.

    Args:
        runtime: the campaign with its parts; closed by the caller.
        checkpoints: a SQLite file for LangGraph's checkpoints; None: none are kept.
        switch: collects reasons to pause.

    Raises:
        LeaseHeldError: another process runs the campaign.
        LeaseLostError: another process took it over; nothing more was written from here.
        CampaignError, TrainerError, StoreError: as the nodes do; the position is kept, and why it stopped.
    """
    runtime.switch = switch = switch or runtime.switch
    began = clock.time()
    _check_contestants(runtime)
    try:
        with runtime.waiting():
            runtime.info = prepared(runtime.campaign, runtime.trainer)
    except PauseRequested:
        return _pause(runtime, switch.reason or "SIGTERM")
    _start(runtime, prepared_s=clock.time() - began)
    campaign_id = runtime.state().id

    def pause_wanted() -> str | None:
        if switch.reason is None and runtime.store.pause_requested(campaign_id):
            switch.reason = "asked by `overnight pause`"
        return switch.reason

    runtime.pause_wanted = pause_wanted
    try:
        result = _run_turns(runtime, checkpoints)
    except (PauseRequested, Interrupted):
        result = None
    except LeaseLostError:
        raise  # the campaign is somebody else's: nothing is written
    except Exception as error:  # the run's boundary: whatever stops it is recorded, and raised on
        _record_stop(runtime, error)
        raise
    return result or _pause(runtime, switch.reason or "what was asked of this run is done")


def _run_turns(runtime: Runtime, checkpoints: Path | None) -> RunResult | None:
    """Run turns to the campaign's end; None when it is to pause."""
    from overnight.agent.graph import turn_graph

    with _kept(checkpoints, asks=runtime.campaign.file.router.ask) as saver:
        graph = turn_graph(runtime).compile(checkpointer=saver)
        lost = 0
        try:
            while (output := _waiting_out(runtime, lambda: _turn(runtime, graph, saver))) is not None:
                state = runtime.state()
                if state.status == "finished":
                    return RunResult(state.stop_reason or "iterations", finished=True)
                if output.get("stop_reason") is not None:
                    return None
                lost = lost + 1 if _was_lost(runtime, output) else 0
                if lost >= HARNESS_IN_A_ROW:
                    _waiting_out(runtime, lambda: probe(runtime, runtime.state()))
        except BudgetSpent as spent:
            return _end(runtime, spent.reason)
        return None


def _end(runtime: Runtime, reason: str) -> RunResult:
    """Close a campaign whose time ran out while it waited; the look at the holdout may wait until the very end."""
    while True:
        state = runtime.state()
        try:
            finish(runtime, state, reason, runtime.store.next_stage(state.id).iteration - 1)
        except TrainerError as error:
            with suppress(BudgetSpent):  # there is no time left to look at it, and `finish` says so
                runtime.faults.hold("trainer", error, last=True)
        else:
            return RunResult(reason, finished=True)


@contextmanager
def _kept(checkpoints: Path | None, *, asks: bool) -> Iterator[BaseCheckpointSaver[str] | None]:
    """Open the checkpoint file; a campaign that asks people has to keep a question somewhere."""
    from langgraph.checkpoint.memory import InMemorySaver

    with checkpointer(checkpoints) as saver:
        yield saver or (InMemorySaver() if asks else None)


def _turn(
    runtime: Runtime,
    graph: CompiledStateGraph[TurnState, None, TurnInput, TurnOutput],
    saver: BaseCheckpointSaver[str] | None,
) -> TurnOutput | None:
    """Run one turn, or what is left of one; None when there is none to run."""
    from langgraph.types import Command

    from overnight.agent.nodes import next_stage

    if runtime.switch.take_hangup():
        runtime.faults.noted("terminal", "the terminal closed; the campaign goes on without it")
    if runtime.pause_wanted() is not None or next_stage(runtime) == "done":
        return None
    config: RunnableConfig = {"configurable": {"thread_id": runtime.name}}
    if saver is not None:
        saver.delete_thread(runtime.name)  # old positions tell nothing that the store does not
    durability: Durability | None = "exit" if saver else None
    output = graph.invoke({"campaign": runtime.name}, config, durability=durability)
    while "__interrupt__" in output:
        with runtime.waiting():
            answer = runtime.ask_person(output["__interrupt__"][0].value)
        output = graph.invoke(Command(resume=answer), config, durability=durability)
    return cast("TurnOutput", output)


def _waiting_out(runtime: Runtime, step: Callable[[], T]) -> T:
    """Do a step, as often as it takes: what was not committed is done again, what was is found in the store."""
    while True:
        try:
            return step()
        except StorageFaultError as error:
            runtime.faults.hold("storage", error)
        except TrainerError as error:
            if not runtime.has_measured:
                raise  # it never worked: somebody who has just started it should hear of it
            runtime.faults.hold("trainer", error)


def _was_lost(runtime: Runtime, output: TurnOutput) -> bool:
    attempt_id = output.get("attempt_id")
    if output.get("outcome") != "failed" or attempt_id is None:
        return False
    return runtime.store.attempt(attempt_id).failure == "harness"


def _check_contestants(runtime: Runtime) -> None:
    """Refuse to begin without somebody whom the file names; `doctor` opens a runtime with those that it could build."""
    campaign, router = runtime.campaign, runtime.campaign.file.router
    for name in (campaign.champion, router.challenger, *router.controls):
        if name is not None and name not in runtime.proposers:
            raise CampaignError(f"{campaign.path}: `[router]` names `{name}`, which is not among the `proposers` given")
    check_inherited(runtime)


def go_on(runtime: Runtime) -> None:
    """Open the campaign inside a host's graph: prepare the trainer, and record that this process runs it now.

    Raises:
        LeaseHeldError: another process runs the campaign.
        CampaignError, TrainerError: it cannot be run here.
    """
    _check_contestants(runtime)
    runtime.info = runtime.info or prepared(runtime.campaign, runtime.trainer)
    _start(runtime)
    campaign_id = runtime.state().id
    asked = "asked by `overnight pause`"
    runtime.pause_wanted = lambda: asked if runtime.store.pause_requested(campaign_id) else None


def stand_still(runtime: Runtime) -> None:
    """Record that a host's graph paused because somebody asked for it; its next invocation goes on."""
    _pause(runtime, runtime.pause_wanted() or "asked for")


def _start(runtime: Runtime, *, prepared_s: float = 0.0) -> None:
    before = runtime.state()
    with runtime.writing(changes_campaign=True) as writer:
        writer.status("running")
    sweep_unfinished(runtime.store.home() / "adapters" / runtime.name)
    # Only the one writer records a file that changed.
    campaign = runtime.campaign
    runtime.record_file()
    position = runtime.store.next_stage(runtime.state().id)
    with runtime.writing(changes_campaign=True):
        runtime.emit(
            RunStarted(
                campaign=runtime.name,
                iteration=position.iteration,
                budget=campaign.file.budget.iterations,
                pid=os.getpid(),
                until=campaign.file.budget.until,
                deadline=None if runtime.deadline is None else clock.utc_text(runtime.deadline),
                prepared_s=prepared_s,
                last_seen=before.lease_seen_at if before.status == "running" else None,
            )
        )


def _pause(runtime: Runtime, reason: str) -> RunResult:
    position = runtime.store.next_stage(runtime.state().id)
    with runtime.writing(changes_campaign=True) as writer:
        writer.status("paused", reason)
        runtime.emit(Paused(campaign=runtime.name, iteration=position.iteration, reason=reason))
    return RunResult("paused", finished=False)


def _record_stop(runtime: Runtime, error: Exception) -> None:
    """Say in the store why the campaign stopped, where that can still be written."""
    reason = f"{type(error).__name__}: {' '.join(str(error).split())}"[:MAX_REASON]
    with suppress(StoreError):
        position = runtime.store.next_stage(runtime.state().id)
        with runtime.writing(changes_campaign=True) as writer:
            writer.status("paused", f"stopped by a fault: {reason}")
            runtime.emit(Stopped(campaign=runtime.name, iteration=position.iteration, reason=reason))
