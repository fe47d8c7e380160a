"""Small campaigns for tests, built in memory or as files."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from overnight.agent.campaign import Campaign, parse_campaign
from overnight.agent.events import Event, Hooks
from overnight.agent.proposers.protocol import Ask, Proposer, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.run import RunResult, open_runtime, run_campaign
from overnight.agent.runtime import Runtime
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

DATA: dict[str, Any] = {
    "campaign": {"name": "c", "trainer": "scripted", "seed": 7},
    "metric": {"name": "loss"},
    "budget": {"iterations": 10},
    "decision": {"min_gain": 0.0, "audit": 0.0},
    "trainer": {"optimum": {"a": 0.25, "b": 3}, "noise_sd": 0.01, "seed_sd": 0.02},
    "knobs": {
        "a": {"type": "float", "range": [0.0, 1.0], "default": 0.75, "levels": 5},
        "b": {"type": "int", "choices": [1, 2, 3, 4, 9], "default": 1},
    },
    "proposers": {"random": {"kind": "random"}},
    "router": {"warmup": False, "explore": 0.0},
}


def data(**sections: Mapping[str, Any]) -> dict[str, Any]:
    """Return the small campaign's tables with some keys changed; a key set to None is left out."""
    merged = {name: dict(table) for name, table in DATA.items()}
    for name, table in sections.items():
        merged[name] = {**merged.get(name, {}), **table}
        merged[name] = {key: value for key, value in merged[name].items() if value is not None}
    return merged


def campaign(folder: Path, **sections: Mapping[str, Any]) -> Campaign:
    """Return the small campaign with some keys changed."""
    return parse_campaign(data(**sections), folder / "campaign.toml")


class Recorder:
    """A consumer that keeps every event."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)

    def kinds(self) -> list[str]:
        return [event.kind for event in self.events]

    def of(self, kind: type[Event]) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def runtime(
    of: Campaign,
    store: SqlStore,
    *,
    trainer: ScriptedTrainer | None = None,
    proposers: Mapping[str, Proposer] | None = None,
    hooks: Sequence[Hooks] = (),
    **options: Any,
) -> Runtime:
    """Return a runtime that trains in this process."""
    settings = ScriptedSettings.model_validate(of.file.trainer)
    trainer = trainer or ScriptedTrainer(settings, metric=of.file.metric.name)
    return open_runtime(of, store, trainer=trainer, proposers=proposers, hooks=hooks, **options)


def run(of: Campaign, store: SqlStore, **options: Any) -> RunResult:
    """Run a campaign to its end in this process."""
    running = runtime(of, store, **options)
    try:
        return run_campaign(running)
    finally:
        running.close()


def scripted(*replies: tuple[str, Any] | str) -> dict[str, ScriptedProposer]:
    """Return a champion that gives these changes (or texts), in order."""
    texts = [reply if isinstance(reply, str) else reply_text(*reply, "because") for reply in replies]
    return {"random": ScriptedProposer("random", texts)}


def first_move(ask: Ask) -> str:
    """Propose the first open move."""
    move = ask.moves[0]
    return reply_text(move.knob, move.value, "the first open move")


def proposing(reply: Callable[[Ask], str]) -> dict[str, ScriptedProposer]:
    """Return a champion that answers with a function of the ask."""
    return {"random": ScriptedProposer("random", reply)}
