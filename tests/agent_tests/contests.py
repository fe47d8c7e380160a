"""Campaigns in which two scripted proposers meet, for the tests of duels, races and switches."""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from sqlalchemy import text

from overnight.agent.campaign import Campaign
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.rails.menu import Change
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings, ScriptedTrainer

from .campaigns import campaign

BEST = 3.0
KNOBS = {
    f"k{i}": {"type": "float", "range": [0.1, 10.0], "scale": "log", "default": 1.0, "levels": 25} for i in range(4)
}
ROUTER = {"champion": "one", "challenger": "two", "duel_share": 0.5, "alpha": 0.3}
Script = Callable[[Ask], str] | list[str]


def contested(folder: Path, **sections: Mapping[str, Any]) -> Campaign:
    """Return a campaign of four knobs where `two` challenges `one`; its turns are all duels unless said otherwise."""
    given = {name: dict(table) for name, table in sections.items()}
    tables: dict[str, Any] = {
        "campaign": {"baseline": "fixed"},
        "budget": {"iterations": 8},
        "knobs": {"a": None, "b": None, **KNOBS},
        "trainer": {"optimum": dict.fromkeys(KNOBS, BEST), "noise_sd": 0.01, "seed_sd": 0.02},
        "proposers": {"random": None, "one": {"kind": "random"}, "two": {"kind": "random"}},
        "router": ROUTER,
    }
    for name, table in given.items():
        tables[name] = {**tables.get(name, {}), **table}
    return campaign(folder, **tables)


def sides(one: Script, two: Script) -> dict[str, ScriptedProposer]:
    """Return both proposers."""
    return {"one": ScriptedProposer("one", one), "two": ScriptedProposer("two", two)}


def toward(of: Campaign, share: float) -> Callable[[Ask], str]:
    """Propose a change drawn from those around the `share` quantile of true gains: 1 the best, 0 the worst."""
    trainer = ScriptedTrainer(ScriptedSettings.model_validate(of.file.trainer))

    def reply(ask: Ask) -> str:
        ranked = sorted(ask.moves, key=lambda move: -trainer.true_value(ask.menu.apply(ask.baseline, move)))
        middle, spread = round(share * (len(ranked) - 1)), max(len(ranked) // 8, 1)
        near = ranked[max(middle - spread, 0) : middle + spread + 1]
        return said(random.Random(ask.seed).choice(near))

    return reply


def said(change: Change) -> str:
    return reply_text(change.knob, change.value, "because")


def rows(store: SqlStore, query: str) -> list[Any]:
    """Return what a query finds, as tuples."""
    with store.engine.connect() as connection:
        return [tuple(row) for row in connection.execute(text(query))]
