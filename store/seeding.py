"""Seeding a new campaign with another's history: its first prompts already say what the other one found.

Only the running totals of each (knob, value) are taken over, which is what prompts summarise and the warm-up counts.
The other campaign's attempts and trials are not: nothing is paired with them, learnt from them or blocked by them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import insert

from overnight.store.errors import InputError
from overnight.store.hashing import JsonValue
from overnight.store.sql_store import SqlStore
from overnight.store.tables import FailureTotalRow, KnobTotalRow, PairTotalRow, Table
from overnight.store.trajectory_lines import AttemptLine, Trajectory, parse
from overnight.store.writer import OFF_MENU_RAILS, SqlWriter


def seed_campaign(
    store: SqlStore,
    lines: Iterable[bytes],
    *,
    name: str,
    path: str,
    spec: Mapping[str, Any],
    frozen_hash: str,
    origin: str,
) -> tuple[int, Trajectory]:
    """Open the campaign `name` and give it a file's totals; return how many attempts they rest on, and the file.

    Raises:
        InputError: the file has nothing for this menu or measures otherwise, or the campaign has begun already.
    """
    found, knobs = parse(lines), spec["knobs"]
    attempts = [each for each in found.attempts if each.columns["knob"] in knobs and each.columns["new_value"]]
    if not attempts:
        raise InputError(
            f"`{origin}`: none of its attempts changes a knob of campaign `{name}`; give another trajectory"
        )
    metric, header = spec["metric"], found.header
    if (metric["direction"], metric["gain"]) != (header.direction, header.gain):
        raise InputError(
            f"`{origin}`: its gains are {header.gain}, {header.direction}; those of campaign `{name}` are "
            f"{metric['gain']}, {metric['direction']}, so they do not compare"
        )
    state = store.open_campaign(name=name, path=path, spec=spec, frozen_hash=frozen_hash, knobs_on_menu=len(knobs))
    if store.knob_totals(state.id):
        raise InputError(f"campaign `{name}` has a history already; only one that has not begun can be seeded")
    _write(store, state.id, attempts, {"origin": origin, "attempts": len(attempts)})
    return len(attempts), found


def _write(store: SqlStore, campaign_id: int, attempts: list[AttemptLine], told: Mapping[str, JsonValue]) -> None:
    pairs: dict[tuple[str, str], dict[str, Any]] = {}
    knobs: dict[str, dict[str, int]] = {}
    failures: Counter[tuple[str, str, str]] = Counter()
    for columns in (attempt.columns for attempt in attempts):
        total = knobs.setdefault(columns["knob"], dict.fromkeys(("proposed", "kept", "blocked", "distinct_values"), 0))
        total["proposed"] += 1
        for outcome in ("kept", "blocked"):
            total[outcome] += columns["outcome"] == outcome
        if columns["rail"] not in OFF_MENU_RAILS:
            _add(pairs, columns)
        if columns["failure"] is not None:
            failures[columns["knob"], columns["new_value"], columns["failure"]] += 1
    for knob, _ in pairs:
        knobs[knob]["distinct_values"] += 1
    of = {"campaign_id": campaign_id}
    rows: dict[type[Table], list[dict[str, Any]]] = {
        PairTotalRow: [{**of, "knob": knob, "new_value": value, **pair} for (knob, value), pair in pairs.items()],
        FailureTotalRow: [
            {**of, "knob": knob, "new_value": value, "failure": failure, "times": times}
            for (knob, value, failure), times in failures.items()
        ],
        KnobTotalRow: [{**of, "knob": knob, **total} for knob, total in knobs.items()],
    }
    with store.transaction() as connection:
        for table, found in rows.items():
            if found:
                connection.execute(insert(table), found)
        SqlWriter(connection, campaign_id).event("seeded", told)


def _add(pairs: dict[tuple[str, str], dict[str, Any]], columns: Mapping[str, Any]) -> None:
    counts = dict.fromkeys(("proposed", "kept", "reverted", "blocked", "failed", "trials"), 0)
    empty = {**counts, "mean_gain": None}
    pair = pairs.setdefault((columns["knob"], columns["new_value"]), empty)
    pair["proposed"] += 1
    pair[columns["outcome"]] += 1
    trials = max(columns["trials"], 1)
    if columns["gain"] is not None:
        sums = (pair["mean_gain"] or 0.0) * pair["trials"] + columns["gain"] * trials
        pair["trials"] += trials
        pair["mean_gain"] = sums / pair["trials"]
