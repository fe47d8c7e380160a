"""A race as a table and as a figure: each held-out turn, what was tried in it, and what each proposer picked.

Everything is read from the store. A pick is told by its first answer that somebody was asked for; a proposer's own
choice of then is shown as that, for it matches itself.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

from overnight.store.contests import label
from overnight.store.sql_store import SqlStore

EXACT, KNOB, MISS, NONE, OWN, BLOCKED = "exact", "knob only", "miss", "no answer", "its own choice", "blocked"
COLORS = {
    EXACT: "#2a9d5c", KNOB: "#e0a030", MISS: "#8a94a6", BLOCKED: "#d1495b", NONE: "#ffffff", OWN: "#3b6fd4",
}  # fmt: skip
OUTCOMES = {"kept": "#2a9d5c", "reverted": "#8a94a6", "blocked": "#d1495b", "failed": "#d1495b"}
_STATS = """
SELECT proposer, items, missing, valid_rate, knob_match_rate, exact_match_rate, modal_match_rate, agreement,
    tried_probability, distinct_pairs, mean_expected_gain, unmeasured_rate, mean_latency_s, median_latency_s,
    p95_latency_s, verdict
FROM race_stats WHERE race_id = :race ORDER BY race_id, proposer"""
_ITEMS = """
SELECT i.attempt_id, a.iteration, a.knob AS tried_knob, a.new_value AS tried_value, a.outcome, a.gain, p.name,
    p.description, i.proposer_id, i.draw, i.source, i.knob, i.new_value, i.valid, i.rail, i.failure, i.exact_match,
    i.knob_match, i.agreement, i.tried_probability, i.expected_gain, i.latency_s
FROM race_items AS i JOIN attempts AS a ON a.id = i.attempt_id JOIN proposers AS p ON p.id = i.proposer_id
WHERE i.race_id = :race ORDER BY a.iteration, i.proposer_id, i.draw"""


@dataclass(frozen=True, slots=True)
class Table:
    """Rows with their columns."""

    columns: Sequence[str]
    rows: Sequence[Sequence[object]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Pick:
    """What one proposer answered to one held-out turn."""

    proposer: str
    change: str
    match: str
    """`exact`, `knob only`, `miss`, `blocked`, `no answer` or `its own choice`."""
    exact: int
    """Of its asked draws, how many are what was tried."""
    draws: int
    agreement: float | None
    tried_probability: float | None
    expected_gain: float | None
    latency_s: float | None
    why: str
    """The rail that blocks it, or why there is no answer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """One held-out turn."""

    iteration: int
    tried: str
    outcome: str
    gain: float | None
    picks: Mapping[str, Pick]


@dataclass(frozen=True, slots=True)
class RaceItems:
    """A race, turn by turn."""

    items: Sequence[Item]
    proposers: Sequence[str]

    @property
    def columns(self) -> Sequence[str]:
        """Of the long table: a row a turn and proposer."""
        return (
            "iteration", "tried", "outcome", "gain", "proposer", "pick", "match", "exact_draws", "draws", "agreement",
            "tried_probability", "expected_gain", "latency_s", "why",
        )  # fmt: skip

    @property
    def rows(self) -> Sequence[Sequence[object]]:
        """Of the long table."""
        return [
            (item.iteration, item.tried, item.outcome, item.gain, pick.proposer, pick.change, pick.match, pick.exact,
             pick.draws, pick.agreement, pick.tried_probability, pick.expected_gain, pick.latency_s, pick.why)
            for item in self.items for pick in item.picks.values()
        ]  # fmt: skip

    @property
    def wide_columns(self) -> Sequence[str]:
        """Of the wide table: a row a turn, a column a proposer."""
        return ("turn", "tried", "outcome", "gain", *self.proposers)

    @property
    def wide_rows(self) -> Sequence[Sequence[object]]:
        """Of the wide table."""
        return [
            (item.iteration, item.tried, item.outcome, item.gain, *(_cell(item.picks.get(p)) for p in self.proposers))
            for item in self.items
        ]


def _cell(pick: Pick | None) -> str:
    if pick is None or pick.match == NONE:
        return NONE
    return f"{pick.change} ({pick.match})"


def stats_of(store: SqlStore, race_id: int) -> Table:
    """Return how each proposer answered."""
    with store.engine.connect() as connection:
        result = connection.execute(text(_STATS), {"race": race_id})
        return Table(list(result.keys()), [tuple(row) for row in result])


def items_of(store: SqlStore, race_id: int) -> RaceItems:
    """Return a race, turn by turn."""
    with store.engine.connect() as connection:
        return read_items(connection, race_id)


def read_items(connection: Connection, race_id: int) -> RaceItems:
    """Return a race, turn by turn."""
    turns: dict[int, list[Mapping[str, Any]]] = {}
    for row in connection.execute(text(_ITEMS), {"race": race_id}).mappings():
        turns.setdefault(row["attempt_id"], []).append(dict(row))
    items = [_item(rows) for rows in turns.values()]
    proposers = dict.fromkeys(name for item in items for name in item.picks)
    return RaceItems(items, list(proposers))


def _item(rows: Sequence[Mapping[str, Any]]) -> Item:
    by_proposer: dict[int, list[Mapping[str, Any]]] = {}
    for row in rows:
        by_proposer.setdefault(row["proposer_id"], []).append(row)
    picks = [_pick(draws) for draws in by_proposer.values()]
    first = rows[0]
    return Item(
        iteration=first["iteration"],
        tried=f"{first['tried_knob']} = {first['tried_value']}",
        outcome=first["outcome"],
        gain=first["gain"],
        picks={pick.proposer: pick for pick in picks},
    )


def _pick(draws: Sequence[Mapping[str, Any]]) -> Pick:
    import json

    asked = [row for row in draws if row["source"] != "recorded" and row["failure"] is None]
    shown = asked[0] if asked else draws[0]
    match = OWN if shown["source"] == "recorded" else NONE if shown["failure"] else _match(shown)
    gains = [row["expected_gain"] for row in asked or draws if row["expected_gain"] is not None]
    latencies = [row["latency_s"] for row in draws if row["latency_s"] is not None]
    return Pick(
        proposer=label(shown["name"], json.loads(shown["description"])),
        change=f"{shown['knob']} = {shown['new_value']}" if shown["knob"] else "",
        match=match,
        exact=sum(bool(row["exact_match"]) for row in asked),
        draws=len(asked),
        agreement=draws[0]["agreement"],
        tried_probability=draws[0]["tried_probability"],
        expected_gain=sum(gains) / len(gains) if gains else None,
        latency_s=sum(latencies) / len(latencies) if latencies else None,
        why=shown["failure"] or shown["rail"] or "",
    )


def _match(row: Mapping[str, Any]) -> str:
    if not row["valid"]:
        return BLOCKED
    return EXACT if row["exact_match"] else KNOB if row["knob_match"] else MISS
