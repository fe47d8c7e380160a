"""The order of the looks at one campaign: each finding comes as soon as it is known, and a part that is amiss ends
only what rests on it. Nothing is written to the store; a campaign that has none yet is tried on a temporary one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

from overnight.agent.campaign import Campaign, renamed
from overnight.agent.cli.options import newest_name
from overnight.agent.doctor import machine, parts, planning, proposals, trials
from overnight.agent.doctor.finding import Finding, amiss, note
from overnight.agent.proposers.protocol import Proposer
from overnight.agent.run import open_runtime
from overnight.agent.runtime import Runtime
from overnight.store.database import is_missing
from overnight.store.errors import OvernightError
from overnight.store.protocol import TrajectoryStore
from overnight.store.sql_store import SqlStore

Doing = Callable[[str], None]
"""Told what is being tried, for whoever waits."""


def machine_findings(db: str) -> Iterator[Finding]:
    """Look at the machine alone."""
    yield machine.python()
    yield machine.torch()
    yield machine.database(db)
    yield from machine.plugins()
    yield machine.port()


def campaign_findings(campaign: Campaign, db: str, doing: Doing) -> Iterator[Finding]:
    """Look at all that a campaign's night will need; it was allowed what it wants."""
    with _opened_store(campaign, db) as (newest, store, others):
        yield parts.described(newest)
        yield parts.allowed(newest)
        proposers: dict[str, Proposer] = {}
        for name, built in parts.proposers(newest):
            if isinstance(built, Finding):
                yield built
            else:
                proposers[name] = built
        try:
            runtime = open_runtime(newest, store, proposers=proposers)
        except OvernightError as error:
            yield machine.disk(db)
            yield amiss("parts", error)
            return
        try:
            yield from _tried(runtime, db, others, doing)
        finally:
            runtime.close()


def _tried(runtime: Runtime, db: str, others: TrajectoryStore | None, doing: Doing) -> Iterator[Finding]:
    campaign, state = runtime.campaign, runtime.state()
    yield parts.position(runtime, state)
    needed = planning.disk_needed(campaign, runtime.store.spent(state.id).iterations)
    yield machine.disk(db, needed, "the rest of the campaign")
    doing("preparing the trainer and its data")
    yield from trials.prepare(runtime, state)
    tried: trials.Tried | None = None
    largest: trials.Tried | None = None
    if runtime.info is not None:
        try:
            for finding, trial in _trials(runtime, doing):
                tried, largest = (trial, largest) if tried is None else (tried, trial or largest)
                yield finding
            runtime.trainer.release()  # a model host may need the memory
        except OvernightError as error:
            yield amiss("trial", error)
    latencies: dict[str, float] = {}
    if runtime.info is not None:
        doing(f"one proposal of each of {', '.join(runtime.proposers)}")
        try:
            yield from proposals.ask_all(runtime, state, latencies, others=others)
        except OvernightError as error:
            yield amiss("proposals", error)
    if tried is not None and tried.result.failure is None:
        sound = largest if largest is not None and largest.result.failure is None else None
        yield planning.time(runtime, state, tried, sound, latencies.get(campaign.champion, 0.0))
    yield from parts.licences(campaign, runtime.proposers)
    yield from filter(None, (parts.adapters(campaign, db), parts.telling(campaign)))


def _trials(runtime: Runtime, doing: Doing) -> Iterator[tuple[Finding, trials.Tried | None]]:
    """Try the defaults, then the largest configuration."""
    menu, config = runtime.campaign.menu, runtime.campaign.menu.default
    problem = runtime.capability().problem(config)
    if problem is not None:
        yield amiss("baseline", f"the defaults cannot run here: {problem}", "choose other defaults"), None
        return
    doing("a trial of the defaults")
    first = trials.try_config(runtime, config)
    yield trials.baseline(runtime, first), first
    yield trials.moves(runtime), None
    biggest = trials.largest(runtime)
    if biggest is None or biggest == menu.default:
        yield (
            note("largest", "the trainer cannot tell which configuration is the largest; the defaults were tried"),
            None,
        )
        return
    doing(f"{trials.TRIED_STEPS} steps of the largest configuration")
    last = trials.try_config(runtime, biggest)
    yield trials.biggest(runtime, last), last


@contextmanager
def _opened_store(campaign: Campaign, db: str) -> Iterator[tuple[Campaign, SqlStore, SqlStore | None]]:
    """Open the store where it knows the campaign, else a temporary one, and beside that the one that is there.

    The campaign is given back under the name that `overnight run` would go on with.
    """
    with ExitStack() as stack:
        there = None
        if not is_missing(db):
            there = stack.enter_context(closing(SqlStore.open(db)))
            campaign = renamed(campaign, newest_name(there, campaign.name, campaign.path))
            if there.campaign(campaign.name) is not None:
                yield campaign, there, None
                return
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="overnight-doctor-"))
        yield campaign, stack.enter_context(closing(SqlStore.open(Path(folder) / "doctor.db", create=True))), there
