"""Running a campaign to its end or to a pause: the loop around the graph.

One pass of the loop is one graph invocation, one turn. Signals and requests to pause are seen between trials; what was
committed is never lost, so stopping the process at any moment is safe.
"""

from __future__ import annotations

import os
import signal
import sqlite3
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING

import platformdirs

from overnight.agent.campaign import Campaign, frozen_part
from overnight.agent.events import Hooks, Paused, RunStarted
from overnight.agent.proposers.protocol import Proposer, ProposerContext
from overnight.agent.proposers.registry import build_proposers
from overnight.agent.runtime import Runtime
from overnight.rails.gate import Rail
from overnight.rails.registry import RailContext, build_rails
from overnight.store.errors import CampaignError
from overnight.store.protocol import TrajectoryStore
from overnight.store.records import TrainerInfo
from overnight.trainer.protocol import Trainer, TrainerContext
from overnight.trainer.registry import trainer_class
from overnight.trainer.worker import WorkerTrainer

if TYPE_CHECKING:
    from langchain_core.runnables import RunnableConfig
    from langgraph.checkpoint.base import BaseCheckpointSaver
    from langgraph.checkpoint.sqlite import SqliteSaver

ABORT_AFTER = 2
"""A second signal ends the process at once: what was committed is there."""


@dataclass
class PauseSwitch:
    """Collects reasons to pause: signals, and requests from other processes."""

    reason: str | None = None
    signals: int = 0
    on_signal: Callable[[str], None] = field(default=lambda _name: None)

    def receive(self, number: int, _frame: FrameType | None) -> None:
        """Handle SIGINT or SIGTERM: pause after the current trial; a second one ends the process."""
        self.signals += 1
        name = signal.Signals(number).name
        if self.signals >= ABORT_AFTER:
            raise KeyboardInterrupt
        self.reason = name
        self.on_signal(name)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle signals inside the block, and put the old handlers back after it."""
        before = {number: signal.signal(number, self.receive) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


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
    trainer: Trainer | None = None,
    proposers: Mapping[str, Proposer] | None = None,
    rails: Sequence[Rail] = (),
    hooks: Sequence[Hooks] = (),
) -> Runtime:
    """Put together what a campaign runs with, building what the caller did not bring; starts no process.

    Raises:
        CampaignError: a trainer or proposer setting is wrong, or a key changed that may not change.
    """
    check_frozen(campaign, store)
    heartbeat = Heartbeat()
    trainer = trainer or host_trainer(campaign, heartbeat)
    runtime = Runtime(
        campaign=campaign,
        store=store,
        trainer=trainer,
        proposers=proposers if proposers is not None else proposers_of(campaign),
        extra_rails=[*rails_of(campaign), *rails],
        hooks=hooks,
        free_memory=trainer.free_memory if isinstance(trainer, WorkerTrainer) else lambda: None,
    )
    heartbeat.runtime = runtime
    return runtime


def proposers_of(campaign: Campaign) -> dict[str, Proposer]:
    """Build the campaign's proposers.

    Raises:
        CampaignError: a kind is not installed, or a setting is wrong; the message names file and key.
    """
    context = ProposerContext(campaign_dir=campaign.folder, cache_dir=cache_folder(), menu=campaign.menu)
    try:
        return build_proposers(campaign.file.proposers, context)
    except CampaignError as error:
        raise CampaignError(f"{campaign.path}: {error}") from error


def rails_of(campaign: Campaign) -> list[Rail]:
    """Build the installed rails that the campaign names.

    Raises:
        CampaignError: one is not installed, or refuses the campaign; the message names file and key.
    """
    try:
        return build_rails(campaign.file.rails.extra, RailContext(campaign.folder, campaign.menu))
    except CampaignError as error:
        raise CampaignError(f"{campaign.path}: {error}") from error


def host_trainer(campaign: Campaign, idle: Callable[[], None]) -> WorkerTrainer:
    """Return the campaign's trainer in a worker process of its own, its settings checked; starts no process yet.

    Raises:
        CampaignError: the trainer is not installed, or a setting or a knob is wrong; the message names file and key.
    """
    settings = campaign.file.trainer
    context = TrainerContext(
        campaign_dir=campaign.folder,
        cache_dir=cache_folder(),
        knobs={knob.name: knob.type for knob in campaign.menu.knobs},
        metric=campaign.file.metric.name,
        memory_gib=campaign.file.budget.memory_gib,
    )
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


def next_until(text: str, now: datetime) -> datetime:
    """Return the next local time `HH:MM` after `now`."""
    hour, minute = map(int, text.split(":"))
    at = now.replace(hour=hour, minute=minute, second=0, microsecond=0)
    return at if at > now else at + timedelta(days=1)


def run_campaign(runtime: Runtime, *, checkpoints: Path | None = None, switch: PauseSwitch | None = None) -> RunResult:
    """Run turns until the campaign ends or pauses.

    Args:
        runtime: the campaign with its parts; closed by the caller.
        checkpoints: a SQLite file for LangGraph's checkpoints; None: none are kept.
        switch: collects reasons to pause.

    Raises:
        LeaseHeldError: another process runs the campaign.
        CampaignError, TrainerError, StoreError: as the nodes do; the position is kept.
    """
    from overnight.agent.graph import turn_graph
    from overnight.agent.nodes import next_stage

    switch = switch or PauseSwitch()
    runtime.info = prepared(runtime.campaign, runtime.trainer)
    _start(runtime)
    campaign_id = runtime.state().id

    def pause_wanted() -> str | None:
        if switch.reason is None and runtime.store.pause_requested(campaign_id):
            switch.reason = "asked by `overnight pause`"
        return switch.reason

    runtime.pause_wanted = pause_wanted
    with _checkpointer(checkpoints) as saver:
        graph = turn_graph(runtime).compile(checkpointer=saver)
        config: RunnableConfig = {"configurable": {"thread_id": runtime.name}}
        while pause_wanted() is None and next_stage(runtime) != "done":
            if saver is not None:
                saver.delete_thread(runtime.name)  # old positions tell nothing that the store does not
            output = graph.invoke({"campaign": runtime.name}, config, durability="exit" if saver else None)
            state = runtime.state()
            if state.status == "finished":
                return RunResult(state.stop_reason or "iterations", finished=True)
            if output.get("stop_reason") is not None:
                break
        return _pause(runtime, switch.reason or "what was asked of this run is done")


def _start(runtime: Runtime) -> None:
    runtime.state()
    with runtime.writing(changes_campaign=True) as writer:
        writer.status("running")
    # Only the one writer records a file that changed.
    campaign = runtime.campaign
    runtime.store.open_campaign(
        name=campaign.name,
        path=str(campaign.path),
        spec=campaign.spec(),
        frozen_hash=campaign.frozen_hash(),
        knobs_on_menu=len(campaign.menu.knobs),
    )
    position = runtime.store.next_stage(runtime.state().id)
    budget = campaign.file.budget.iterations
    runtime.emit(RunStarted(campaign=runtime.name, iteration=position.iteration, budget=budget, pid=os.getpid()))
    with runtime.writing(changes_campaign=True):
        pass  # the event alone


def _pause(runtime: Runtime, reason: str) -> RunResult:
    position = runtime.store.next_stage(runtime.state().id)
    runtime.emit(Paused(campaign=runtime.name, iteration=position.iteration, reason=reason))
    with runtime.writing(changes_campaign=True) as writer:
        writer.status("paused", reason)
    return RunResult("paused", finished=False)


@contextmanager
def _checkpointer(path: Path | None) -> Iterator[BaseCheckpointSaver[str] | None]:
    """Open the checkpoint file; without a usable one the run goes on, since only the store knows the position."""
    saver = None if path is None else _open_checkpoints(path)
    try:
        yield saver
    finally:
        if saver is not None:
            saver.conn.close()


def _open_checkpoints(path: Path) -> SqliteSaver | None:
    """Return a saver on the file, made anew where it is no database; None where even that cannot be."""
    from langgraph.checkpoint.sqlite import SqliteSaver

    for _ in range(2):
        connection = None
        try:
            connection = sqlite3.connect(path, check_same_thread=False)
            # What is lost with the power is made again from the store, so nothing waits for the disk here.
            connection.execute("PRAGMA journal_mode = WAL")
            connection.execute("PRAGMA synchronous = OFF")
            saver = SqliteSaver(connection)
            saver.setup()
            return saver
        except sqlite3.Error as error:
            if connection is not None:
                connection.close()
            if getattr(error, "sqlite_errorcode", None) != sqlite3.SQLITE_NOTADB:
                return None
            path.unlink()
    return None
