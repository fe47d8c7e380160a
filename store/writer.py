"""The writes of one transaction on the SQL store.

Each method moves an attempt from one stage to the next and does nothing where it is already there, so that a node that
runs twice writes once. Untrusted text is made storable and cut here, in one place.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from typing import Any

from sqlalchemy import Connection, Executable, Text, bindparam, func, select, update
from sqlalchemy.dialects import postgresql, sqlite

from overnight.store.hashing import JsonValue, canonical_json, digest, text_digest
from overnight.store.protocol import Measurement, NewAttempt, NewDecision, NewTrial, NewVerdict
from overnight.store.records import Config, FailureClass, KnobValue, TrainerInfo, TrainerKind
from overnight.store.sql_contests import SqlContestWrites, proposer_digest
from overnight.store.sql_learning import SqlLearningWrites
from overnight.store.tables import (
    AttemptRow,
    CampaignRow,
    ConfigRow,
    EventRow,
    FailureTotalRow,
    KnobTotalRow,
    PairTotalRow,
    PromptRow,
    ProposerRow,
    Table,
    TrialRow,
    utc_now,
)

MAX_REPLY_CHARS = 65_536
MAX_TRACE_CHARS = 8_192
MAX_NOTES_CHARS = 2_000
OFF_MENU_RAILS = ("R1_schema", "R2_menu", "R3_range")
"""What these block is no value of the menu but text of a model: it has no running totals."""


def storable(text: str | None, limit: int) -> str | None:
    """Return `text` as any engine can hold it: no NUL, no unpaired surrogate, at most `limit` characters."""
    if text is None:
        return None
    cut = text if len(text) <= limit else text[: limit - 1] + "…"
    return cut.replace("\0", "\ufffd").encode("utf-8", "replace").decode()


def value_text(value: KnobValue) -> str:
    """Return a knob's value as the store writes it: a word as it is, a number as JSON."""
    return value if isinstance(value, str) else json.dumps(value)


class SqlWriter(SqlLearningWrites, SqlContestWrites):
    """Implements `StoreWriter` on one open transaction."""

    def __init__(self, connection: Connection, campaign_id: int) -> None:
        self._connection = connection
        self._campaign_id = campaign_id

    def _insert(self, table: type[Table], **values: Any) -> bool:
        """Insert a row once; say whether it was not there."""
        return self._connection.execute(insert_once(self._connection.dialect.name, table), values).first() is not None

    def config(self, config: Config) -> str:
        """Store a configuration once; return its id."""
        config_id = digest(config)
        self._insert(ConfigRow, id=config_id, body=canonical_json(config))
        return config_id

    def proposer(self, name: str, kind: str, description: Mapping[str, JsonValue]) -> int:
        """Store a proposer as it is configured; return its id."""
        sha = proposer_digest(kind, description)
        self._insert(
            ProposerRow,
            campaign_id=self._campaign_id,
            name=name,
            kind=kind,
            description=canonical_json(description),
            digest=sha,
            created_at=utc_now(),
        )
        query = select(ProposerRow.id).where(
            ProposerRow.campaign_id == self._campaign_id, ProposerRow.name == name, ProposerRow.digest == sha
        )
        return self._connection.execute(query).scalar_one()

    def attempt(self, new: NewAttempt) -> int:
        """Store a try at stage `proposed` (or `decided` when it failed); return its id."""
        prompt_id = text_digest(new.prompt)
        self._insert(PromptRow, id=prompt_id, body=new.prompt)
        failed = new.failure is not None
        self._insert(
            AttemptRow,
            campaign_id=self._campaign_id,
            iteration=new.iteration,
            **{"try": new.try_no},
            stage="decided" if failed else "proposed",
            role=new.role,
            audit=new.audit,
            proposer_id=new.proposer_id,
            request_event_id=new.request_event_id,
            prompt_id=prompt_id,
            reply=storable(new.reply, MAX_REPLY_CHARS),
            settings=canonical_json(new.settings),
            usage=canonical_json(new.usage) if new.usage else None,
            probabilities=canonical_json(new.probabilities) if new.probabilities else None,
            baseline_config_id=new.baseline_config_id,
            outcome="failed" if failed else None,
            failure=new.failure,
            trace=storable(new.trace, MAX_TRACE_CHARS) or None,
            proposal_latency_s=new.latency_s,
            started_at=new.started_at,
            decided_at=utc_now() if failed else None,
        )
        query = select(AttemptRow.id).where(
            AttemptRow.campaign_id == self._campaign_id,
            AttemptRow.iteration == new.iteration,
            AttemptRow.try_no == new.try_no,
        )
        return self._connection.execute(query).scalar_one()

    def verdict(self, new: NewVerdict) -> None:
        """Take a try from `proposed` to `checked`, or to `decided` when it is blocked."""
        blocked = new.rail is not None
        text = None if new.new_value is None else storable(value_text(new.new_value), MAX_NOTES_CHARS)
        number = float(new.new_value) if isinstance(new.new_value, int | float) else None
        moved = self._advance(
            new.attempt_id,
            "proposed",
            stage="decided" if blocked else "checked",
            knob=new.knob,
            new_value=text,
            new_value_num=number,
            reason=new.reason,
            config_id=None if new.config is None else self.config(new.config),
            diff=None if new.diff is None else canonical_json(new.diff),
            rail=new.rail,
            rail_reason=storable(new.rail_reason, MAX_NOTES_CHARS) or None,
            outcome="blocked" if blocked else None,
            decided_at=utc_now() if blocked else None,
        )
        if moved and new.knob is not None and text is not None:
            counts = {"proposed": 1, "blocked": int(blocked)}
            is_new = new.rail not in OFF_MENU_RAILS and self._add_to_pair(new.knob, text, counts)
            self._add_to_knob(new.knob, {**counts, "distinct_values": int(is_new)})

    def trial(self, new: NewTrial) -> None:
        """Store a finished run and add its cost to the campaign's."""
        result = new.result
        inserted = self._insert(
            TrialRow,
            campaign_id=self._campaign_id,
            attempt_id=new.attempt_id,
            purpose=new.purpose,
            config_id=new.config_id,
            trainer_hash=new.trainer_hash,
            environment_hash=new.environment_hash,
            split=new.split,
            seed=new.seed,
            replicate=new.replicate,
            mode=result.mode,
            metric=result.metric,
            failure=result.failure,
            trace=storable(result.trace, MAX_TRACE_CHARS) or None,
            notes=storable(result.notes, MAX_NOTES_CHARS) or None,
            metrics=canonical_json(result.metrics) if result.metrics else None,
            steps=result.steps,
            wall_s=result.wall_s,
            train_s=result.train_s,
            val_s=result.val_s,
            peak_memory_gib=result.peak_memory_gib,
            energy_wh=None if result.energy_j is None else result.energy_j / 3600,
            energy_source=result.energy_source,
            ended_at=new.ended_at or utc_now(),
        )
        if inserted:
            self._campaign(
                trial_s=CampaignRow.trial_s + result.wall_s,
                trial_wh=CampaignRow.trial_wh + (result.energy_j or 0.0) / 3600,
            )

    def trained(self, attempt_id: int) -> None:
        """Take an attempt from `checked` to `trained`: no more trials are needed."""
        self._advance(attempt_id, "checked", stage="trained")

    def measured_anew(self, attempt_id: int) -> None:
        """Take an attempt that is not decided back to `checked`: its trials belong to another environment."""
        for stage in ("trained", "validated"):
            self._advance(attempt_id, stage, stage="checked")

    def measurement(self, new: Measurement) -> None:
        """Take an attempt from `trained` to `validated`."""
        self._advance(
            new.attempt_id,
            "trained",
            stage="validated",
            metric=new.metric,
            metric_se=new.metric_se,
            baseline_metric=new.baseline_metric,
            gain=new.gain,
            gain_se=new.gain_se,
            gain_lower=new.gain_lower,
            trials=new.trials,
            failure=new.failure,
            trace=storable(new.trace, MAX_TRACE_CHARS) or None,
            notes=storable(new.notes, MAX_NOTES_CHARS) or None,
            wall_s=new.wall_s,
            energy_wh=new.energy_wh,
        )

    def decision(self, new: NewDecision) -> None:
        """Take an attempt from `validated` to `decided`, with what it does to the campaign."""
        moved = self._advance(
            new.attempt_id,
            "validated",
            stage="decided",
            outcome=new.outcome,
            decision=new.explanation,
            is_best=new.is_best,
            decided_at=utc_now(),
        )
        if not moved:
            return
        columns = AttemptRow.knob, AttemptRow.new_value, AttemptRow.trials, AttemptRow.gain, AttemptRow.failure
        row = self._connection.execute(select(*columns).where(AttemptRow.id == new.attempt_id)).one()
        self._add_to_pair(
            row.knob,
            row.new_value,
            {new.outcome: 1},
            trials=row.trials if row.gain is not None else 0,
            gain=row.gain,
            failure=row.failure,
        )
        self._add_to_knob(row.knob, {"kept": int(new.outcome == "kept")})
        if new.new_baseline_config_id is not None:
            self.baseline(new.new_baseline_config_id)
        if new.is_best:
            self._campaign(best_attempt_id=new.attempt_id)

    def trainer(self, info: TrainerInfo, kind: TrainerKind | None, noise_sd: float | None) -> None:
        """Record which trainer, data and environment the campaign measures in."""
        self._campaign(
            trainer=info.trainer,
            trainer_kind=kind,
            trainer_hash=trainer_hash(info),
            environment_hash=digest(info.environment),
            environment=canonical_json(info.environment),
            noise_sd=noise_sd,
        )

    def baseline(self, config_id: str) -> None:
        """Set what candidates are measured against."""
        self._campaign(baseline_config_id=config_id)

    def refined(self, refinement: int) -> None:
        """Record that float grids were refined."""
        self._campaign(refinement=refinement)

    def status(self, status: str, stop_reason: str | None = None) -> None:
        """Record that the campaign runs, paused or finished."""
        now = utc_now()
        started = {"started_at": func.coalesce(CampaignRow.started_at, now)} if status == "running" else {}
        finished = {"finished_at": now if status == "finished" else None}
        self._campaign(status=status, stop_reason=stop_reason, **started, **finished)

    def event(
        self,
        kind: str,
        payload: Mapping[str, JsonValue],
        *,
        iteration: int | None = None,
        attempt_id: int | None = None,
        at: str | None = None,
    ) -> None:
        """Record something that happened, now or at a time that has passed."""
        self._connection.execute(
            _insert_into(self._connection, EventRow).values(
                campaign_id=self._campaign_id,
                at=at or utc_now(),
                kind=kind,
                iteration=iteration,
                attempt_id=attempt_id,
                payload=canonical_json(payload),
            )
        )

    def _campaign(self, **values: Any) -> None:
        self._connection.execute(update(CampaignRow).where(CampaignRow.id == self._campaign_id).values(**values))

    def _advance(self, attempt_id: int, from_stage: str, **values: Any) -> bool:
        """Update an attempt that is at `from_stage`; say whether it was."""
        at = {"at_id": attempt_id, "at_stage": from_stage}
        return self._connection.execute(_ADVANCE, {**values, **at}).rowcount == 1

    def _add_to_pair(
        self,
        knob: str,
        new_value: str,
        counts: Mapping[str, int],
        *,
        trials: int = 0,
        gain: float | None = None,
        failure: FailureClass | None = None,
    ) -> bool:
        """Add to the running totals of a (knob, value); say whether it had none."""
        key = {"campaign_id": self._campaign_id, "knob": knob, "new_value": new_value}
        is_new = self._connection.execute(select(PairTotalRow.knob).filter_by(**key)).first() is None
        added = {name: counts.get(name, 0) for name in ("proposed", "kept", "reverted", "blocked", "failed")}
        added["trials"] = trials if gain is not None else 0
        now: dict[str, Any] = {}
        if gain is not None:
            total = PairTotalRow
            mean = (func.coalesce(total.mean_gain, 0.0) * total.trials + gain * trials) / (total.trials + trials)
            now["mean_gain"] = mean
        if failure is not None:
            self._add(FailureTotalRow, {**key, "failure": failure}, {"times": 1})
        self._add(PairTotalRow, key, added, first={"mean_gain": gain}, now=now)
        return is_new

    def _add_to_knob(self, knob: str, counts: Mapping[str, int]) -> None:
        """Add to the running totals of a knob."""
        added = {name: counts.get(name, 0) for name in ("proposed", "kept", "blocked", "distinct_values")}
        self._add(KnobTotalRow, {"campaign_id": self._campaign_id, "knob": knob}, added)

    def _add(
        self,
        table: type[Table],
        key: Mapping[str, Any],
        added: Mapping[str, int],
        *,
        first: Mapping[str, Any] | None = None,
        now: Mapping[str, Any] | None = None,
    ) -> None:
        """Add to counters of the row with this key.

        Args:
            table: whose row.
            key: its primary key.
            added: by how much each counter grows.
            first: what a new row holds besides.
            now: what a row that was there is set to besides.
        """
        insert = _insert_into(self._connection, table).values(**{**(first or {}), **key, **added})
        sums = {name: getattr(table, name) + value for name, value in added.items()}
        self._connection.execute(insert.on_conflict_do_update(index_elements=list(key), set_={**sums, **(now or {})}))


def trainer_hash(info: TrainerInfo) -> str:
    """Content address of the trainer, its settings and its data: what a trial's key holds besides (config, seed)."""
    return digest({"trainer": info.trainer, "metric": info.metric, "data": info.data_hash})


_ATTEMPTS = Table.metadata.tables["attempts"]
_ADVANCE = update(_ATTEMPTS).where(
    _ATTEMPTS.c.id == bindparam("at_id"), _ATTEMPTS.c.stage == bindparam("at_stage", type_=Text)
)
"""Built once: making a statement costs more than running it."""


@cache
def insert_once(dialect: str, table: type[Table]) -> Executable:
    """An INSERT that does nothing, and returns nothing, where the row is there; for `execute` with the values."""
    rows = Table.metadata.tables[table.__tablename__]
    insert = postgresql.insert(rows) if dialect == "postgresql" else sqlite.insert(rows)
    return insert.on_conflict_do_nothing().returning(*rows.primary_key)


def _insert_into(connection: Connection, table: type[Table]) -> sqlite.Insert | postgresql.Insert:
    if connection.dialect.name == "postgresql":
        return postgresql.insert(table)
    return sqlite.insert(table)
