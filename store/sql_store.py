"""`SqlStore`: the trajectory store on SQLite or PostgreSQL.

Reads are short queries on their own connection; writes go through `writing(lease)`. Nothing here loads history to
compute what SQL can compute.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, Self, cast

from sqlalchemy import Connection, Engine, bindparam, collate, func, insert, literal_column, select, update
from sqlalchemy.exc import DatabaseError, DataError, IntegrityError, ProgrammingError

from overnight.store import lease as leases
from overnight.store.database import WRITE, fault_of, open_engine
from overnight.store.hashing import JsonValue, canonical_json
from overnight.store.protocol import (
    MAX_TRIES,
    Attempt,
    CampaignState,
    KnobTotal,
    Lease,
    Measured,
    PairTotal,
    Position,
    Spent,
)
from overnight.store.records import FailureClass, KnobValue, Stage
from overnight.store.sql_contests import SqlContestReads
from overnight.store.sql_learning import AT_ONCE, SqlLearningReads
from overnight.store.sql_trials import SqlTrialReads
from overnight.store.tables import (
    INFORMATION,
    AttemptRow,
    CampaignRow,
    ConfigRow,
    EventRow,
    FailureTotalRow,
    KnobTotalRow,
    PairTotalRow,
    PromptRow,
    ProposerRow,
    utc_now,
)
from overnight.store.writer import SqlWriter

# Statements are built once: building one with 40 columns takes longer than running it.
_STATES = select(*(getattr(CampaignRow, name) for name in CampaignState.__slots__))
_ATTEMPTS = select(
    *(
        ProposerRow.name.label("proposer") if name == "proposer" else getattr(AttemptRow, name).label(name)
        for name in Attempt.__slots__
    )
).join(ProposerRow, ProposerRow.id == AttemptRow.proposer_id)
_PAIRS = select(*(getattr(PairTotalRow, name) for name in PairTotal.__slots__ if name != "failures")).where(
    PairTotalRow.campaign_id == bindparam("campaign"), PairTotalRow.knob == bindparam("of_knob")
)
_INFORMATIVE_VALUES = {
    dialect: _PAIRS.order_by(literal_column(INFORMATION).desc(), collate(PairTotalRow.new_value, bytewise)).limit(
        bindparam("count")
    )
    for dialect, bytewise in (("sqlite", "BINARY"), ("postgresql", "C"))
}
"""The order is that of `overnight.store.prompt.information`."""
_FAILED_KNOBS = (
    select(FailureTotalRow.knob, FailureTotalRow.failure, func.sum(FailureTotalRow.times).label("times"))
    .where(FailureTotalRow.campaign_id == bindparam("campaign"))
    .group_by(FailureTotalRow.knob, FailureTotalRow.failure)
)
_FAILED_VALUES = select(
    FailureTotalRow.knob, FailureTotalRow.new_value, FailureTotalRow.failure, FailureTotalRow.times
).where(
    FailureTotalRow.campaign_id == bindparam("campaign"),
    FailureTotalRow.new_value.in_(bindparam("failed_values", expanding=True)),
)
_NEWEST_TRY = (
    select(
        AttemptRow.id,
        AttemptRow.iteration,
        AttemptRow.try_no.label("try_no"),
        AttemptRow.stage,
        AttemptRow.outcome,
        AttemptRow.failure,
    )
    .where(AttemptRow.campaign_id == bindparam("campaign"))
    .order_by(AttemptRow.iteration.desc(), AttemptRow.try_no.desc())
    .limit(1)
)
_KNOB = [getattr(KnobTotalRow, name) for name in KnobTotal.__slots__ if name not in ("values", "failures")]
VALUES_PER_KNOB = 24
"""How many values of a knob a prompt may choose from: more than it has room for."""
_NEXT: Mapping[Stage, Literal["check_rails", "train", "validate", "decide"]] = {
    "proposed": "check_rails",
    "checked": "train",
    "trained": "validate",
    "validated": "decide",
}
CONFIGS_KEPT = 64
"""Configurations kept in memory: they are content-addressed, so they never change."""


class SqlStore(SqlTrialReads, SqlLearningReads, SqlContestReads):
    """Implements `TrajectoryStore`."""

    def __init__(self, engine: Engine) -> None:
        """Use an engine that `open_engine` checked."""
        self._engine = engine
        self._writes = engine.execution_options(**WRITE)
        self._config_body = lru_cache(maxsize=CONFIGS_KEPT)(self._read_config_body)

    @classmethod
    def open(cls, where: str | Path, *, create: bool = False) -> Self:
        """Open the database at a path or URL; see `overnight.store.database.open_engine` for what it raises."""
        return cls(open_engine(where, create=create))

    @property
    def engine(self) -> Engine:
        """The SQLAlchemy engine, for readers that write their own queries."""
        return self._engine

    def close(self) -> None:
        """Close all connections."""
        self._engine.dispose()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    @contextmanager
    def transaction(self) -> Iterator[Connection]:
        """One writing transaction without a lease: for whoever takes history in.

        Raises:
            StorageFaultError: the disk or the server is at fault for now; nothing of the transaction is there.
            StoreError: the database cannot be written at all.
        """
        try:
            with self._writes.begin() as connection:
                yield connection
        except (DataError, IntegrityError, ProgrammingError):
            raise  # a mistake in this code, not the disk's
        except DatabaseError as error:
            said = f"the database cannot be written: {error.orig}; what was committed is there"
            raise fault_of(error, said) from error

    @contextmanager
    def writing(self, lease: Lease) -> Iterator[SqlWriter]:
        """One transaction under the lease."""
        with self.transaction() as connection:
            leases.check(connection, lease)
            yield SqlWriter(connection, lease.campaign_id)

    def acquire(self, campaign_id: int) -> Lease:
        """Become the campaign's one writer."""
        with self.transaction() as connection:
            return leases.acquire(connection, campaign_id)

    def renew(self, lease: Lease) -> None:
        """Show that the writer is alive."""
        with self.transaction() as connection:
            leases.renew(connection, lease)

    def release(self, lease: Lease) -> None:
        """Stop being the writer."""
        with self.transaction() as connection:
            leases.release(connection, lease)

    def open_campaign(
        self, *, name: str, path: str, spec: Mapping[str, JsonValue], frozen_hash: str, knobs_on_menu: int
    ) -> CampaignState:
        """Return the campaign `name`, made if it is new, with the file's present content recorded."""
        body = canonical_json(spec)
        with self.transaction() as connection:
            columns = CampaignRow.id, CampaignRow.spec, CampaignRow.baseline_config_id
            row = connection.execute(select(*columns).where(CampaignRow.name == name)).first()
            if row is None:
                connection.execute(
                    insert(CampaignRow).values(
                        name=name,
                        path=path,
                        spec=body,
                        frozen_hash=frozen_hash,
                        knobs_on_menu=knobs_on_menu,
                        status="new",
                        created_at=utc_now(),
                        **_columns_of(spec),
                    )
                )
            elif row.spec != body:
                values: dict[str, Any] = {"spec": body, "path": path}
                if row.baseline_config_id is None:  # nothing was decided yet, so everything may still change
                    values |= {"frozen_hash": frozen_hash, "knobs_on_menu": knobs_on_menu, **_columns_of(spec)}
                connection.execute(update(CampaignRow).where(CampaignRow.id == row.id).values(**values))
                before = json.loads(row.spec)
                changed = sorted(key for key in {*before, *spec} if before.get(key) != spec.get(key))
                SqlWriter(connection, row.id).event("file_changed", {"changed": changed})
        state = self.campaign(name)
        assert state is not None
        return state

    def campaign(self, name: str) -> CampaignState | None:
        """Return a campaign by name."""
        row = self._one(_STATES.where(CampaignRow.name == name))
        return None if row is None else CampaignState(**{**row, "spec": json.loads(row["spec"])})

    def campaigns(self) -> Sequence[str]:
        """Return the names of all campaigns, oldest first."""
        with self._reading() as connection:
            return list(connection.execute(select(CampaignRow.name).order_by(CampaignRow.id)).scalars())

    def next_stage(self, campaign_id: int) -> Position:
        """Return where the campaign goes on, from its last committed stage."""
        with self._reading() as connection:
            last = connection.execute(_NEWEST_TRY, {"campaign": campaign_id}).first()
        if last is None:
            return Position("propose", 1, 1, None)
        if last.stage != "decided":
            return Position(_NEXT[cast(Stage, last.stage)], last.iteration, last.try_no, last.id)
        retried = last.outcome == "blocked" or last.failure in ("llm_timeout", "llm_error")
        if retried and last.try_no < MAX_TRIES:
            return Position("propose", last.iteration, last.try_no + 1, None)
        return Position("propose", last.iteration + 1, 1, None)

    def last_attempt(self, campaign_id: int) -> Attempt | None:
        """Return the newest try of the newest turn."""
        rows = self._attempts(campaign_id, limit=1)
        return rows[0] if rows else None

    def attempt(self, attempt_id: int) -> Attempt:
        """Return an attempt by its id."""
        row = self._one(_ATTEMPTS.where(AttemptRow.id == attempt_id))
        assert row is not None
        return Attempt(**row)

    def last_event(self, campaign_id: int, kind: str) -> tuple[str, Mapping[str, JsonValue]] | None:
        """Return when an event of this kind happened last, and what it said."""
        query = select(EventRow.at, EventRow.payload).where(EventRow.campaign_id == campaign_id, EventRow.kind == kind)
        row = self._one(query.order_by(EventRow.id.desc()).limit(1))
        return None if row is None else (row["at"], json.loads(row["payload"]))

    def attempts_of_turn(self, campaign_id: int, iteration: int) -> Sequence[Attempt]:
        """Return a turn's tries, first to last."""
        return self._attempts(campaign_id, AttemptRow.iteration == iteration)[::-1]

    def recent(self, campaign_id: int, count: int) -> Sequence[Attempt]:
        """Return the last tries of the last decided turns, newest first."""
        newest: dict[int, Attempt] = {}
        tries = self._attempts(campaign_id, AttemptRow.stage == "decided", limit=count * 4)
        for attempt in tries:
            newest.setdefault(attempt.iteration, attempt)
        return list(newest.values())[:count]

    def _attempts(self, campaign_id: int, *where: Any, limit: int | None = None) -> list[Attempt]:
        query = (
            _ATTEMPTS.where(AttemptRow.campaign_id == campaign_id, *where)
            .order_by(AttemptRow.iteration.desc(), AttemptRow.try_no.desc())
            .limit(limit)
        )
        return [Attempt(**row) for row in self._rows(query)]

    def config_of(self, config_id: str) -> dict[str, KnobValue]:
        """Return a stored configuration."""
        config: dict[str, KnobValue] = json.loads(self._config_body(config_id))
        return config

    def _read_config_body(self, config_id: str) -> str:
        with self._reading() as connection:
            return connection.execute(select(ConfigRow.body).where(ConfigRow.id == config_id)).scalar_one()

    def prompt_of(self, prompt_id: str) -> str:
        """Return a stored prompt, byte for byte."""
        with self._reading() as connection:
            return connection.execute(select(PromptRow.body).where(PromptRow.id == prompt_id)).scalar_one()

    def earlier(
        self, campaign_id: int, config_ids: Iterable[str], *, before: int | None = None
    ) -> Mapping[str, Attempt]:
        """Return, for each configuration that the decision rule is done with, the attempt that did it."""
        ids = list(config_ids)
        done = AttemptRow.outcome.in_(["kept", "reverted"]) | (
            (AttemptRow.outcome == "failed") & (AttemptRow.failure != "harness")
        )
        if before is not None:
            done &= AttemptRow.iteration < before
        found: dict[str, Attempt] = {}
        for start in range(0, len(ids), AT_ONCE):
            chunk = ids[start : start + AT_ONCE]
            # In no order: an order would let SQLite walk the whole campaign instead of looking each id up.
            query = _ATTEMPTS.where(AttemptRow.campaign_id == campaign_id, AttemptRow.config_id.in_(chunk), done)
            for row in self._rows(query):
                found[row["config_id"]] = Attempt(**row)
        return found

    def knob_totals(self, campaign_id: int) -> Sequence[KnobTotal]:
        """Return the running totals of every knob tried, with its most informative values."""
        knobs = self._rows(select(*_KNOB).where(KnobTotalRow.campaign_id == campaign_id))
        if not knobs:
            return []
        of = {"campaign": campaign_id}
        pairs: dict[str, list[dict[str, Any]]] = {}
        by_knob: dict[str, dict[FailureClass, int]] = {}
        by_value: dict[tuple[str, str], dict[FailureClass, int]] = {}
        with self._reading() as connection:
            query = _INFORMATIVE_VALUES[connection.dialect.name]
            for name in (knob["knob"] for knob in knobs):
                rows = connection.execute(query, {**of, "of_knob": name, "count": VALUES_PER_KNOB}).mappings()
                pairs[name] = [dict(row) for row in rows]
            for name, failure, times in connection.execute(_FAILED_KNOBS, of):
                by_knob.setdefault(name, {})[cast(FailureClass, failure)] = int(times)
            failed = {pair["new_value"] for found in pairs.values() for pair in found if pair["failed"]}
            for name, value, failure, times in connection.execute(
                _FAILED_VALUES, {**of, "failed_values": sorted(failed)}
            ):
                by_value.setdefault((name, value), {})[cast(FailureClass, failure)] = times
        return [
            KnobTotal(
                **knob,
                failures=by_knob.get(name, {}),
                values=[PairTotal(**pair, failures=by_value.get((name, pair["new_value"]), {})) for pair in found],
            )
            for knob, (name, found) in zip(knobs, pairs.items(), strict=True)
        ]

    def measured_since(self, campaign_id: int, attempt_id: int) -> Iterator[Measured]:
        """Yield decided attempts with a candidate after `attempt_id`, oldest first."""
        query = (
            select(AttemptRow.id, ConfigRow.body, AttemptRow.metric, AttemptRow.failure)
            .join(ConfigRow, ConfigRow.id == AttemptRow.config_id)
            .where(
                AttemptRow.campaign_id == campaign_id,
                AttemptRow.id > attempt_id,
                AttemptRow.outcome.in_(["kept", "reverted", "failed"]),
            )
            .order_by(AttemptRow.id)
        )
        with self._reading() as connection:
            for row in connection.execute(query):
                yield Measured(attempt_id=row.id, config=json.loads(row.body), metric=row.metric, failure=row.failure)

    def spent(self, campaign_id: int) -> Spent:
        """Return what the campaign has used of its budget."""
        own = AttemptRow.campaign_id == campaign_id
        turns = select(func.max(AttemptRow.iteration)).where(own).scalar_subquery()
        keep = select(func.max(AttemptRow.iteration)).where(own, AttemptRow.outcome == "kept").scalar_subquery()
        costs = CampaignRow.trial_s, CampaignRow.trial_wh
        row = self._rows(select(turns.label("turns"), keep.label("keep"), *costs).where(CampaignRow.id == campaign_id))[
            0
        ]
        return Spent(
            iterations=row["turns"] or 0,
            since_keep=(row["turns"] or 0) - (row["keep"] or 0),
            trial_hours=row["trial_s"] / 3600,
            energy_kwh=row["trial_wh"] / 1000,
        )

    def pending_requests(self, campaign_id: int) -> Sequence[tuple[int, Mapping[str, JsonValue]]]:
        """Return people's queued proposals that no attempt has answered, oldest first: (event id, payload)."""
        answered = select(AttemptRow.id).where(AttemptRow.request_event_id == EventRow.id).exists()
        query = (
            select(EventRow.id, EventRow.payload)
            .where(EventRow.campaign_id == campaign_id, EventRow.kind == "enqueued", ~answered)
            .order_by(EventRow.id)
        )
        return [(row["id"], json.loads(row["payload"])) for row in self._rows(query)]

    def pause_requested(self, campaign_id: int) -> bool:
        """Say whether somebody asked to pause since the run started."""
        kinds = ["pause_requested", "run_started"]
        query = select(EventRow.kind).where(EventRow.campaign_id == campaign_id, EventRow.kind.in_(kinds))
        row = self._one(query.order_by(EventRow.id.desc()).limit(1))
        return row is not None and row["kind"] == "pause_requested"

    def request(self, campaign_id: int, kind: str, payload: Mapping[str, JsonValue]) -> int:
        """Record what a person asks of a running campaign; needs no lease. Returns the event's id."""
        with self.transaction() as connection:
            SqlWriter(connection, campaign_id).event(kind, payload)
            return connection.execute(
                select(func.max(EventRow.id)).where(EventRow.campaign_id == campaign_id)
            ).scalar_one()


def _columns_of(spec: Mapping[str, Any]) -> dict[str, Any]:
    """Return the parts of a campaign's specification that have a column of their own."""
    return {
        "seed": spec["campaign"]["seed"],
        "metric_name": spec["metric"]["name"],
        "direction": spec["metric"]["direction"],
    }
