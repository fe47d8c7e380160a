"""A campaign as JSONL lines: what `overnight.store.trajectory` takes in again, readable by the first format's tools.

Attempts that are not decided yet are left out. Everything is read from one snapshot, in a stream, so that a running
campaign can be exported, and a long one.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from itertools import groupby
from typing import Any

from sqlalchemy import Connection, RowMapping, Select, select
from sqlalchemy.orm import aliased

from overnight.store.database import snapshot
from overnight.store.errors import InputError
from overnight.store.hashing import JsonValue
from overnight.store.sql_store import SqlStore
from overnight.store.tables import AttemptRow, CampaignRow, ConfigRow, EventRow, PromptRow, ProposerRow, TrialRow

STAGES = {"kept": "evaluated", "reverted": "evaluated", "blocked": "blocked"}
_PLAIN = (
    "role", "audit", "prompt_kind", "reply", "rail", "rail_reason", "outcome", "failure", "trace", "notes", "metric_se",
    "gain_se", "gain_lower", "energy_wh", "started_at",
)  # fmt: skip
"""Columns of an attempt that a line carries under their own names."""
_TRIAL = (
    "purpose", "trainer_hash", "environment_hash", "split", "seed", "replicate", "mode", "metric", "failure", "trace",
    "notes", "steps", "wall_s", "train_s", "val_s", "peak_memory_gib", "energy_wh", "energy_source", "ended_at",
)  # fmt: skip
_CAMPAIGN = ("trainer", "trainer_kind", "started_at", "finished_at")


def export_trajectory(store: SqlStore, campaign: str) -> Iterator[str]:
    """Yield a campaign's lines, each ending in a newline.

    Raises:
        InputError: there is no such campaign.
    """
    with snapshot(store.engine) as connection:
        query = select(CampaignRow.__table__).where(CampaignRow.name == campaign)
        row = connection.execute(query).mappings().first()
        if row is None:
            raise InputError(f"no campaign `{campaign}` in this database; `overnight status` lists those it has")
        spec = json.loads(row["spec"])
        baseline = _body(connection, row["baseline_config_id"])
        yield _line(_header(row, spec, baseline))
        yield from _attempts(connection, row["id"], row["metric_name"], baseline)
        for trial in connection.execute(_trials(row["id"]).where(TrialRow.attempt_id.is_(None))).mappings():
            yield _line({"stage": "trial", **_trial(trial), "config": json.loads(trial["config"])})
        columns = EventRow.kind, EventRow.at, EventRow.iteration, EventRow.payload
        events = select(*columns).where(EventRow.campaign_id == row["id"]).order_by(EventRow.id)
        for event in connection.execute(events).mappings():
            yield _line({"stage": "event", **event, "payload": json.loads(event["payload"])})


def _line(record: Mapping[str, Any]) -> str:
    return json.dumps(_without_nulls(record), ensure_ascii=False, allow_nan=False) + "\n"


def _without_nulls(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in record.items() if value is not None or key == "gain"}


def _body(connection: Connection, config_id: str | None) -> dict[str, JsonValue] | None:
    body = connection.execute(select(ConfigRow.body).where(ConfigRow.id == config_id)).scalar()
    return None if body is None else dict(json.loads(body))


def _header(row: RowMapping, spec: Mapping[str, Any], baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    return {
        "_meta": "overnight trajectory; this record is the campaign, then its attempts, other trials and events",
        "campaign": row["name"],
        "metric": {"name": row["metric_name"], "direction": row["direction"], "gain": spec["metric"]["gain"]},
        "baseline_cfg": baseline,
        "accept_delta_frac": spec.get("decision", {}).get("min_gain"),
        "noise_sd": row["noise_sd"],
        "columns": _without_nulls({name: row[name] for name in _CAMPAIGN}),
        "spec": spec,
    }


def _attempts(
    connection: Connection, campaign_id: int, metric_name: str, baseline: Mapping[str, Any] | None
) -> Iterator[str]:
    candidate, against = aliased(ConfigRow), aliased(ConfigRow)
    query = (
        select(
            *AttemptRow.__table__.columns,
            ProposerRow.name.label("proposer"),
            ProposerRow.kind.label("proposer_kind"),
            ProposerRow.description.label("proposer_description"),
            candidate.body.label("candidate"),
            against.body.label("against"),
            PromptRow.body.label("prompt"),
        )
        .join(ProposerRow, ProposerRow.id == AttemptRow.proposer_id)
        .outerjoin(candidate, candidate.id == AttemptRow.config_id)
        .outerjoin(against, against.id == AttemptRow.baseline_config_id)
        .outerjoin(PromptRow, PromptRow.id == AttemptRow.prompt_id)
        .where(AttemptRow.campaign_id == campaign_id, AttemptRow.stage == "decided")
        .order_by(AttemptRow.id)
    )
    paid = connection.execute(_trials(campaign_id).where(TrialRow.attempt_id.is_not(None))).mappings()
    series = groupby(paid, key=lambda trial: int(trial["attempt_id"]))
    waiting = next(series, None)
    for row in connection.execute(query).mappings():
        trials: list[dict[str, Any]] = []
        while waiting is not None and waiting[0] <= row["id"]:
            runs = [_run(trial, row["candidate"]) for trial in waiting[1]]
            trials = runs if waiting[0] == row["id"] else trials
            waiting = next(series, None)
        yield _line({**_attempt(row, metric_name, baseline), "trials": trials or None})


def _trials(campaign_id: int) -> Select[Any]:
    return (
        select(*TrialRow.__table__.columns, ConfigRow.body.label("config"))
        .join(ConfigRow, ConfigRow.id == TrialRow.config_id)
        .where(TrialRow.campaign_id == campaign_id)
        .order_by(TrialRow.attempt_id, TrialRow.id)
    )


def _trial(row: RowMapping) -> dict[str, Any]:
    metrics = None if row["metrics"] is None else json.loads(row["metrics"])
    return _without_nulls({**{name: row[name] for name in _TRIAL}, "metrics": metrics})


def _run(row: RowMapping, candidate: str | None) -> dict[str, Any]:
    """A trial in its attempt's line: its configuration is said only where it is not the candidate's."""
    own = {} if row["config"] == candidate else {"config": json.loads(row["config"])}
    return {**_trial(row), **own}


def _attempt(row: RowMapping, metric_name: str, baseline: Mapping[str, Any] | None) -> dict[str, Any]:
    against = _json(row["against"])
    outcome = row["outcome"]
    unanswered = row["failure"] in ("llm_timeout", "llm_error")
    return {
        "iter": row["iteration"],
        "try": row["try"],
        "ts": row["decided_at"],
        "stage": STAGES.get(outcome, "nim_error" if unanswered else "eval_failed"),
        **{name: row[name] for name in _PLAIN},
        "proposer": {
            "name": row["proposer"],
            "kind": row["proposer_kind"],
            "description": _json(row["proposer_description"]),
        },
        "proposal": _proposal(row),
        "prompt": row["prompt"],
        "changes": _json(row["diff"]),
        "settings": _json(row["settings"]),
        "usage": _json(row["usage"]),
        "probabilities": _json(row["probabilities"]),
        "candidate_cfg": _json(row["candidate"]),
        "baseline_cfg": None if against == baseline else against,
        metric_name: row["metric"],
        f"baseline_{metric_name}": row["baseline_metric"],
        "gain": row["gain"],
        "improvement_frac": row["gain"],
        "decision": {"kept": "keep", "reverted": "revert"}.get(outcome),
        "explanation": row["decision"],
        "is_new_best": row["is_best"],
        "trials_counted": row["trials"],
        "nim_latency_s": row["proposal_latency_s"],
        "iter_wall_s": row["wall_s"],
    }


def _json(text: str | None) -> Any:
    return None if text is None else json.loads(text)


def _proposal(row: RowMapping) -> dict[str, Any] | None:
    if row["knob"] is None:
        return None
    value = row["new_value"]
    if value is not None and row["new_value_num"] is not None:
        value = json.loads(value)
    return {"knob": row["knob"], "new_value": value, "reason": row["reason"]}
