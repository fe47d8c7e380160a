"""Importing and exporting a campaign's trajectory as JSONL; the lines are in `overnight.store.trajectory_lines`.

An import is one transaction: attempts that are there already are left as they are, so that importing a file twice, or
a file that grew, adds what is new and nothing else. It does not carry distillations, races and promotions.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, func, insert, select, text, update

from overnight.store.errors import InputError
from overnight.store.hashing import JsonValue, canonical_json, digest, text_digest
from overnight.store.jsonl import Skipped
from overnight.store.records import KnobValue
from overnight.store.sql_store import SqlStore
from overnight.store.tables import (
    AttemptRow,
    CampaignRow,
    EventRow,
    PromptRow,
    TrialRow,
    utc_now,
)
from overnight.store.trajectory_lines import UNKNOWN, EventLine, Header, Trajectory, TrialLine, parse
from overnight.store.writer import OFF_MENU_RAILS, SqlWriter, insert_once

IMPORTED = "imported"
"""The `stop_reason` of a campaign that came from a file."""
_CARRIED = ("trainer", "trainer_kind", "started_at", "finished_at")
"""Columns of a campaign that an export carries as they are."""
_ON_MENU = f"(a.rail IS NULL OR a.rail NOT IN ({', '.join(map(repr, OFF_MENU_RAILS))}))"
_TOTALS = (
    "DELETE FROM pair_totals WHERE campaign_id = :id",
    "DELETE FROM failure_totals WHERE campaign_id = :id",
    "DELETE FROM knob_totals WHERE campaign_id = :id",
    f"""
    INSERT INTO pair_totals (campaign_id, knob, new_value, proposed, kept, reverted, blocked, failed, trials, mean_gain)
    SELECT a.campaign_id, a.knob, a.new_value, count(*), sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END),
        sum(CASE WHEN a.outcome = 'reverted' THEN 1 ELSE 0 END), sum(CASE WHEN a.outcome = 'blocked' THEN 1 ELSE 0 END),
        sum(CASE WHEN a.outcome = 'failed' THEN 1 ELSE 0 END),
        sum(CASE WHEN a.gain IS NOT NULL THEN a.trials ELSE 0 END),
        sum(a.gain * a.trials) / NULLIF(sum(CASE WHEN a.gain IS NOT NULL THEN a.trials ELSE 0 END), 0)
    FROM attempts AS a WHERE a.campaign_id = :id AND a.knob IS NOT NULL AND a.new_value IS NOT NULL AND {_ON_MENU}
    GROUP BY a.campaign_id, a.knob, a.new_value""",
    """
    INSERT INTO failure_totals (campaign_id, knob, new_value, failure, times)
    SELECT campaign_id, knob, new_value, failure, count(*) FROM attempts
    WHERE campaign_id = :id AND knob IS NOT NULL AND new_value IS NOT NULL AND failure IS NOT NULL
    GROUP BY campaign_id, knob, new_value, failure""",
    f"""
    INSERT INTO knob_totals (campaign_id, knob, proposed, kept, blocked, distinct_values)
    SELECT a.campaign_id, a.knob, count(*), sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END),
        sum(CASE WHEN a.outcome = 'blocked' THEN 1 ELSE 0 END),
        count(DISTINCT CASE WHEN {_ON_MENU} THEN a.new_value END)
    FROM attempts AS a WHERE a.campaign_id = :id AND a.knob IS NOT NULL AND a.new_value IS NOT NULL
    GROUP BY a.campaign_id, a.knob""",
)
_NOISE = text("""
    SELECT sum(g.ss) / NULLIF(sum(g.n - 1), 0) FROM (
        SELECT count(metric) AS n, sum(metric * metric) - sum(metric) * avg(metric) AS ss FROM trials
        WHERE campaign_id = :id AND metric IS NOT NULL AND split = 'val' GROUP BY config_id) AS g""")


@dataclass(frozen=True, slots=True)
class Imported:
    """What an import did."""

    campaign: str
    added: int
    """Attempts that were new."""
    known: int
    """Attempts that were there already."""
    skipped: tuple[Skipped, ...]


def import_trajectory(
    store: SqlStore,
    lines: Iterable[bytes],
    *,
    name: str,
    origin: str,
    menu: Mapping[str, JsonValue] | None = None,
) -> Imported:
    """Take a file into the campaign `name`, made if it is new.

    Args:
        store: where to.
        lines: the file.
        name: the campaign's name.
        origin: where the file lies, for the record.
        menu: the knobs of the campaign file; None leaves coverage unknown.

    Raises:
        InputError: nothing in the file can be read, or a campaign that was run here has that name; nothing is written.
    """
    found = parse(lines)
    if not found.attempts:
        first = f"; line {found.skipped[0].line}: {found.skipped[0].why}" if found.skipped else ""
        raise InputError(f"`{origin}`: no attempt in it can be read{first}; give a trajectory as JSONL")
    with store.transaction() as connection:
        campaign_id = _campaign(connection, name, origin, found, menu)
        added = _add(connection, campaign_id, found)
        if added:
            _conclude(connection, campaign_id, found.header)
    return Imported(name, added, len(found.attempts) - added, tuple(found.skipped))


def _campaign(
    connection: Connection, name: str, origin: str, found: Trajectory, menu: Mapping[str, JsonValue] | None
) -> int:
    columns = CampaignRow.id, CampaignRow.stop_reason, CampaignRow.spec
    row = connection.execute(select(*columns).where(CampaignRow.name == name)).first()
    if row is not None:
        if row.stop_reason != IMPORTED:
            raise InputError(f"a campaign `{name}` was run in this database; give the import another `--name`")
        spec = json.loads(row.spec)
        if menu is not None and spec["knobs"] != menu:
            values: dict[str, Any] = {"spec": canonical_json({**spec, "knobs": menu}), "knobs_on_menu": len(menu)}
            connection.execute(update(CampaignRow).where(CampaignRow.id == row.id).values(**values))
        return int(row.id)
    header, spec = found.header, _spec(name, found, menu)
    carried = header.extra.get("columns") or {}
    seed = (header.baseline or {}).get("seed", 0)
    first, last = found.attempts[0].columns["started_at"], found.attempts[-1].columns["decided_at"]
    values = {
        "name": name, "path": origin, "spec": canonical_json(spec), "frozen_hash": digest({"imported": spec}),
        "seed": seed if isinstance(seed, int) and abs(seed) < 2**31 else 0, "metric_name": header.metric_name,
        "direction": header.direction, "knobs_on_menu": None if menu is None else len(menu), "status": "finished",
        "stop_reason": IMPORTED, "created_at": utc_now(), "started_at": first, "finished_at": last,
        **{key: carried[key] for key in _CARRIED if isinstance(carried.get(key), str)},
    }  # fmt: skip
    return int(connection.execute(insert(CampaignRow).values(**values).returning(CampaignRow.id)).scalar_one())


def _spec(name: str, found: Trajectory, menu: Mapping[str, JsonValue] | None) -> dict[str, JsonValue]:
    """Return the campaign file as far as a trajectory tells it."""
    header = found.header
    told = header.extra.get("spec")
    base: dict[str, JsonValue] = dict(told) if isinstance(told, Mapping) else {}
    spec: dict[str, JsonValue] = {
        "budget": {"iterations": max(attempt.columns["iteration"] for attempt in found.attempts)},
        "decision": {"rule": "single_shot", "min_gain": header.min_gain},
        "knobs": {},
        **base,
        "metric": {"name": header.metric_name, "direction": header.direction, "gain": header.gain},
    }
    campaign = base.get("campaign")
    told_campaign: Mapping[str, JsonValue] = campaign if isinstance(campaign, Mapping) else {}
    spec["campaign"] = {"trainer": UNKNOWN, "baseline": "fixed", "seed": 0, **told_campaign, "name": name}
    return {**spec, "knobs": dict(menu)} if menu is not None else spec


def _add(connection: Connection, campaign_id: int, found: Trajectory) -> int:
    """Insert what is not there; return how many attempts were added."""
    writer, dialect = _Rows(connection, campaign_id), connection.dialect.name
    keys = select(AttemptRow.iteration, AttemptRow.try_no).where(AttemptRow.campaign_id == campaign_id)
    stored = {(row[0], row[1]) for row in connection.execute(keys)}
    is_new_campaign, added = not stored, 0
    for attempt in found.attempts:
        key = attempt.columns["iteration"], attempt.columns["try"]
        if key in stored:
            continue
        stored.add(key)
        added += 1
        prompt_id = None if attempt.prompt is None else text_digest(attempt.prompt)
        if prompt_id is not None:
            connection.execute(insert_once(dialect, PromptRow), {"id": prompt_id, "body": attempt.prompt})
        values = {
            **attempt.columns,
            "campaign_id": campaign_id,
            "stage": "decided",
            "proposer_id": writer.proposer(*attempt.proposer),
            "prompt_id": prompt_id,
            "baseline_config_id": None if attempt.baseline is None else writer.config(attempt.baseline),
            "config_id": None if attempt.config is None else writer.config(attempt.config),
        }
        attempt_id = connection.execute(insert_once(dialect, AttemptRow), values).scalar_one()
        for trial in attempt.trials:
            _add_trial(writer, connection, campaign_id, attempt_id, trial)
    if is_new_campaign:
        for trial in (*found.trials, *_baseline_trial(found)):
            _add_trial(writer, connection, campaign_id, None, trial)
    for event in found.events:
        _add_event(connection, campaign_id, event)
    return added


class _Rows:
    """Configurations and proposers, each written once an import: most lines name the same few."""

    def __init__(self, connection: Connection, campaign_id: int) -> None:
        self._writer = SqlWriter(connection, campaign_id)
        self._configs: dict[str, str] = {}
        self._proposers: dict[str, int] = {}

    def config(self, config: Mapping[str, KnobValue]) -> str:
        key = canonical_json(config)
        if key not in self._configs:
            self._configs[key] = self._writer.config(config)
        return self._configs[key]

    def proposer(self, name: str, kind: str, description: Mapping[str, JsonValue]) -> int:
        key = canonical_json([name, kind, description])
        if key not in self._proposers:
            self._proposers[key] = self._writer.proposer(name, kind, description)
        return self._proposers[key]


def _add_trial(
    writer: _Rows, connection: Connection, campaign_id: int, attempt_id: int | None, trial: TrialLine
) -> None:
    values = {**trial.columns, "campaign_id": campaign_id, "attempt_id": attempt_id}
    connection.execute(
        insert_once(connection.dialect.name, TrialRow), {**values, "config_id": writer.config(trial.config)}
    )


def _baseline_trial(found: Trajectory) -> Iterator[TrialLine]:
    """Yield the one run of the baseline that the first format's header tells of."""
    header = found.header
    if header.baseline is None or header.baseline_metric is None or found.trials:
        return
    names = ("mode", "failure", "trace", "notes", "metrics", "steps", "wall_s", "train_s", "val_s", "energy_source")
    columns: dict[str, Any] = dict.fromkeys((*names, "seed", "peak_memory_gib", "energy_wh"))
    columns |= {"purpose": "calibration", "trainer_hash": UNKNOWN, "environment_hash": UNKNOWN, "split": "val"}
    columns |= {"replicate": 0, "metric": header.baseline_metric, "ended_at": found.attempts[0].columns["started_at"]}
    yield TrialLine(config=header.baseline, columns=columns)


def _add_event(connection: Connection, campaign_id: int, event: EventLine) -> None:
    values = {"campaign_id": campaign_id, "kind": event.kind, "at": event.at, "payload": event.payload}
    if connection.execute(select(EventRow.id).filter_by(**values)).first() is None:
        connection.execute(insert(EventRow).values(**values, iteration=event.iteration))


def _conclude(connection: Connection, campaign_id: int, header: Header) -> None:
    """Compute what the store keeps of a campaign's whole history: totals, cost, noise, and which attempt is best."""
    for statement in _TOTALS:
        connection.execute(text(statement), {"id": campaign_id})
    told = header.extra.get("noise_sd")
    variance = connection.execute(_NOISE, {"id": campaign_id}).scalar()
    estimated = None if variance is None else max(float(variance), 0.0) ** 0.5
    best = (
        select(AttemptRow.id)
        .where(AttemptRow.campaign_id == campaign_id, AttemptRow.is_best.is_(True), AttemptRow.outcome == "kept")
        .order_by(AttemptRow.iteration.desc(), AttemptRow.id.desc())
        .limit(1)
    )
    costs = select(func.coalesce(func.sum(TrialRow.wall_s), 0.0), func.coalesce(func.sum(TrialRow.energy_wh), 0.0))
    wall_s, energy_wh = connection.execute(costs.where(TrialRow.campaign_id == campaign_id)).one()
    values: dict[str, Any] = {
        "noise_sd": told if isinstance(told, float) else estimated,
        "best_attempt_id": connection.execute(best).scalar(),
        "trial_s": wall_s,
        "trial_wh": energy_wh,
    }
    if header.baseline is not None:
        values["baseline_config_id"] = SqlWriter(connection, campaign_id).config(header.baseline)
    connection.execute(update(CampaignRow).where(CampaignRow.id == campaign_id).values(**values))
