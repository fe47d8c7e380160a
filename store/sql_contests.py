"""Duels, races, switches and aliases on SQL: the parts of `SqlStore` and `SqlWriter` that know of contests.

Both are mixed into the classes that bring the connection. Due-checks read one row by an index; nothing here loads
history.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, cast

from sqlalchemy import Connection, Select, and_, bindparam, delete, func, insert, select, update
from sqlalchemy.orm import aliased

from overnight.store.contests import (
    Alias,
    Contestant,
    Duel,
    DuelKind,
    HeldOutTurn,
    NewDuel,
    NewPromotion,
    NewRace,
    NewRaceItem,
    Promotion,
    Race,
    RaceItem,
    Settlement,
    Side,
    adapter_version,
)
from overnight.store.hashing import JsonValue, canonical_json, digest
from overnight.store.records import Config
from overnight.store.sql_learning import AT_ONCE, screening_gains
from overnight.store.sql_reads import SqlReads
from overnight.store.tables import (
    AliasRow,
    AttemptRow,
    CampaignRow,
    DistillationRow,
    DuelRow,
    EventRow,
    PromotionRow,
    ProposerRow,
    RaceItemRow,
    RaceRow,
    Table,
    utc_now,
)

MAX_REASON_CHARS = 2_000


def _columns(table: type[Table], record: type[Any]) -> Select[Any]:
    return select(*(getattr(table, name).label(name) for name in record.__slots__))


_DUELS = _columns(DuelRow, Duel)
_LAST_DUEL = _DUELS.where(DuelRow.campaign_id == bindparam("campaign")).order_by(DuelRow.iteration.desc()).limit(1)
_NEWEST_ADAPTER = (
    select(DistillationRow.id, DistillationRow.version, DistillationRow.adapter)
    .where(
        DistillationRow.campaign_id == bindparam("campaign"),
        DistillationRow.proposer == bindparam("student"),
        DistillationRow.version.is_not(None),
        DistillationRow.adapter.is_not(None),
    )
    .order_by(DistillationRow.id.desc())
    .limit(1)
)
_RACES = _columns(RaceRow, Race)
_PROMOTIONS = _columns(PromotionRow, Promotion)
_CONTESTANTS = select(ProposerRow.id, ProposerRow.name, ProposerRow.kind, ProposerRow.description)
_PROPOSER = select(ProposerRow.id).where(
    ProposerRow.campaign_id == bindparam("campaign"),
    ProposerRow.name == bindparam("of_name"),
    ProposerRow.digest == bindparam("sha"),
)


def proposer_digest(kind: str, description: Mapping[str, JsonValue]) -> str:
    """Content address of a proposer as it is configured."""
    return digest({"kind": kind, **description})


def _contestant(row: Mapping[str, Any]) -> Contestant:
    return Contestant(row["id"], row["name"], row["kind"], json.loads(row["description"]))


class SqlContestReads(SqlReads):
    """Implements `ContestReader`."""

    def proposer_id(self, campaign_id: int, name: str, description: Mapping[str, JsonValue]) -> int | None:
        """Return the id of a proposer as it is configured, or None where the campaign does not know it."""
        sha = proposer_digest(str(description.get("kind", name)), description)
        row = self._one(_PROPOSER, {"campaign": campaign_id, "of_name": name, "sha": sha})
        return None if row is None else int(row["id"])

    def contestant(self, proposer_id: int) -> Contestant:
        """Return a stored proposer."""
        row = self._one(_CONTESTANTS.where(ProposerRow.id == proposer_id))
        assert row is not None
        return _contestant(row)

    def aliases(self, campaign_id: int) -> Mapping[Alias, Contestant]:
        """Return who stands where."""
        query = (
            _CONTESTANTS.add_columns(AliasRow.alias)
            .join(AliasRow, AliasRow.proposer_id == ProposerRow.id)
            .where(AliasRow.campaign_id == campaign_id)
        )
        return {cast(Alias, row["alias"]): _contestant(row) for row in self._rows(query)}

    def newest_adapter(self, campaign_id: int, proposer: str) -> tuple[int, str, str] | None:
        """Return distillation, version and folder of a student's newest adapter."""
        row = self._one(_NEWEST_ADAPTER, {"campaign": campaign_id, "student": proposer})
        return None if row is None else (row["id"], f"v{row['version']}", row["adapter"])

    def adapter_folder(self, campaign_id: int, proposer: str, version: str) -> str | None:
        """Return the folder of an adapter: `v3` of this campaign's student, or `other/v3` of another campaign's."""
        other, _, own = version.rpartition("/")
        number = own.removeprefix("v")
        if not number.isdecimal():
            return None
        whose = (
            (DistillationRow.campaign_id == campaign_id) & (DistillationRow.proposer == proposer)
            if not other
            else DistillationRow.campaign_id.in_(select(CampaignRow.id).where(CampaignRow.name == other))
        )
        query = select(DistillationRow.adapter).where(whose, DistillationRow.version == int(number))
        row = self._one(query.order_by(DistillationRow.id.desc()).limit(1))
        return None if row is None else cast(str | None, row["adapter"])

    def known_versions(self, campaign_id: int, proposer: str) -> Sequence[str]:
        """Return the adapter versions with which a proposer took part, the newest to do so first."""
        own = ProposerRow.campaign_id == campaign_id, ProposerRow.name == proposer
        rows = self._rows(_CONTESTANTS.where(*own).order_by(ProposerRow.id.desc()))
        versions = (adapter_version(_contestant(row).description) for row in rows)
        return [version for version in versions if version is not None]

    def last_duel(self, campaign_id: int) -> Duel | None:
        """Return the newest duel."""
        row = self._one(_LAST_DUEL, {"campaign": campaign_id})
        return None if row is None else Duel(**row)

    def items_between(
        self, campaign_id: int, *, champion_id: int, challenger_id: int, kind: DuelKind, after: int = 0
    ) -> Sequence[float]:
        """Return the items of two contestants' duels in turns after `after`, oldest first."""
        query = select(DuelRow.item).where(
            DuelRow.campaign_id == campaign_id,
            DuelRow.champion_id == champion_id,
            DuelRow.challenger_id == challenger_id,
            DuelRow.kind == kind,
            DuelRow.iteration > after,
            DuelRow.item.is_not(None),
        )
        return [float(row["item"]) for row in self._rows(query.order_by(DuelRow.iteration))]

    def challenges(self, campaign_id: int) -> Sequence[tuple[int, int]]:
        """Return each (champion, challenger) that ever met in a `challenge`, in the order they first did."""
        query = (
            select(DuelRow.champion_id, DuelRow.challenger_id)
            .where(DuelRow.campaign_id == campaign_id, DuelRow.kind == "challenge")
            .group_by(DuelRow.champion_id, DuelRow.challenger_id)
            .order_by(func.min(DuelRow.iteration))
        )
        return [(row["champion_id"], row["challenger_id"]) for row in self._rows(query)]

    def races(self, campaign_id: int) -> Sequence[Race]:
        """Return the campaign's races, oldest first."""
        return [
            Race(**row) for row in self._rows(_RACES.where(RaceRow.campaign_id == campaign_id).order_by(RaceRow.id))
        ]

    def last_race(self, campaign_id: int, challenger_id: int) -> Race | None:
        """Return the newest finished race that was run for a challenger."""
        query = _RACES.where(
            RaceRow.campaign_id == campaign_id, RaceRow.challenger_id == challenger_id, RaceRow.ended_at.is_not(None)
        )
        row = self._one(query.order_by(RaceRow.id.desc()).limit(1))
        return None if row is None else Race(**row)

    def open_race(self, campaign_id: int, challenger_id: int | None) -> Race | None:
        """Return the newest race, if it was run for this challenger and is not over."""
        row = self._one(_RACES.where(RaceRow.campaign_id == campaign_id).order_by(RaceRow.id.desc()).limit(1))
        found = None if row is None else Race(**row)
        return found if found and found.ended_at is None and found.challenger_id == challenger_id else None

    def race_items(self, race_id: int) -> Sequence[RaceItem]:
        """Return a race's draws, by turn, proposer and draw."""
        query = _columns(RaceItemRow, RaceItem).where(RaceItemRow.race_id == race_id)
        order = RaceItemRow.attempt_id, RaceItemRow.proposer_id, RaceItemRow.draw
        return [RaceItem(**row) for row in self._rows(query.order_by(*order))]

    def promotions(self, campaign_id: int) -> Sequence[Promotion]:
        """Return every switch, oldest first."""
        query = _PROMOTIONS.where(PromotionRow.campaign_id == campaign_id).order_by(PromotionRow.id)
        return [Promotion(**row) for row in self._rows(query)]

    def held_out(self, campaign_id: int, *, after: int, until: int) -> Sequence[HeldOutTurn]:
        """Return the turns in (`after`, `until`] that proposed a configuration, each with its last try."""
        own, same = _proposed(campaign_id), aliased(AttemptRow)
        one_prompt = and_(
            same.campaign_id == campaign_id,
            same.prompt_id == AttemptRow.prompt_id,
            same.iteration.between(AttemptRow.iteration - 1, AttemptRow.iteration),
        )
        first = [
            func.coalesce(select(func.min(theirs)).where(one_prompt).scalar_subquery(), mine).label(name)
            for name, theirs, mine in (
                ("asked_in", same.iteration, AttemptRow.iteration),
                ("asked_as", same.id, AttemptRow.id),
            )
        ]
        elsewhere = ("attempt_id", "proposer", "asked_in", "asked_as")
        query = (
            select(
                AttemptRow.id.label("attempt_id"),
                ProposerRow.name.label("proposer"),
                *first,
                *(getattr(AttemptRow, name).label(name) for name in HeldOutTurn.__slots__ if name not in elsewhere),
            )
            .join(ProposerRow, ProposerRow.id == AttemptRow.proposer_id)
            .where(own, AttemptRow.iteration > after, AttemptRow.iteration <= until)
            .order_by(AttemptRow.iteration, AttemptRow.try_no)
        )
        last = {row["iteration"]: HeldOutTurn(**row) for row in self._rows(query)}
        return list(last.values())

    def decided_turns(self, campaign_id: int) -> tuple[int, int]:
        """Return how many turns proposed a configuration and are decided, and the number of the newest."""
        count, newest = func.count(AttemptRow.iteration.distinct()), func.max(AttemptRow.iteration)
        row = self._one(select(count.label("turns"), newest.label("newest")).where(_proposed(campaign_id)))
        assert row is not None
        return int(row["turns"]), int(row["newest"] or 0)

    def turn_before(self, campaign_id: int, newest: int, count: int) -> int:
        """Return the turn after which the last `count` turns up to `newest` with a configuration lie."""
        turns = (
            select(AttemptRow.iteration)
            .where(_proposed(campaign_id), AttemptRow.iteration <= newest)
            .distinct()
            .order_by(AttemptRow.iteration.desc())
            .limit(count)
            .subquery()
        )
        row = self._one(select(func.min(turns.c.iteration).label("first")))
        return newest if row is None or row["first"] is None else int(row["first"]) - 1

    def gains_on(self, campaign_id: int, baseline_config_id: str, config_ids: Sequence[str]) -> Mapping[str, float]:
        """Return the mean measured gain of configurations against one baseline, over their attempts."""
        found: dict[str, float] = {}
        for start in range(0, len(config_ids), AT_ONCE):
            query = (
                select(AttemptRow.config_id, func.avg(AttemptRow.gain).label("gain"))
                .where(
                    AttemptRow.campaign_id == campaign_id,
                    AttemptRow.config_id.in_(config_ids[start : start + AT_ONCE]),
                    AttemptRow.baseline_config_id == baseline_config_id,
                    AttemptRow.gain.is_not(None),
                )
                .group_by(AttemptRow.config_id)
            )
            found |= {row["config_id"]: float(row["gain"]) for row in self._rows(query)}
        return found

    def recent_gains(self, campaign_id: int, *, before: int, most: int) -> Sequence[float]:
        """Return the first paired gains of the last `most` measured candidates of turns before `before`."""
        query = screening_gains(campaign_id, before - 1).order_by(AttemptRow.id.desc()).limit(most)
        return [float(row["gain"]) for row in self._rows(query) if row["gain"] is not None]

    def last_of(self, campaign_id: int, kinds: Sequence[str]) -> tuple[int, str, Mapping[str, JsonValue]] | None:
        """Return the newest event of some kinds: its id, its kind and what it says."""
        query = select(EventRow.id, EventRow.kind, EventRow.payload).where(
            EventRow.campaign_id == campaign_id, EventRow.kind.in_(kinds)
        )
        row = self._one(query.order_by(EventRow.id.desc()).limit(1))
        return None if row is None else (row["id"], row["kind"], json.loads(row["payload"]))

    def refinements(self, campaign_id: int) -> Sequence[str]:
        """Return when the grids were refined (UTC, ISO 8601), in order."""
        refined = and_(EventRow.campaign_id == campaign_id, EventRow.kind == "grid_refined")
        return [row["at"] for row in self._rows(select(EventRow.at.label("at")).where(refined).order_by(EventRow.id))]


def _proposed(campaign_id: int) -> Any:
    """Decided tries that came to a configuration and a baseline."""
    return and_(
        AttemptRow.campaign_id == campaign_id,
        AttemptRow.stage == "decided",
        AttemptRow.config_id.is_not(None),
        AttemptRow.baseline_config_id.is_not(None),
        AttemptRow.knob.is_not(None),
    )


class SqlContestWrites:
    """Implements `ContestWriter` on one open transaction."""

    _connection: Connection
    _campaign_id: int

    def _insert(self, table: type[Table], **values: Any) -> bool:
        raise NotImplementedError

    def config(self, config: Config) -> str:
        """Store a configuration once; return its id."""
        raise NotImplementedError

    def begin_duel(self, new: NewDuel) -> int:
        """Store a duel with its first side's attempt; return its id. One duel begins in a turn."""
        self._insert(
            DuelRow,
            campaign_id=self._campaign_id,
            iteration=new.iteration,
            kind=new.kind,
            seed=new.seed,
            champion_id=new.champion_id,
            challenger_id=new.challenger_id,
            **{f"{new.first}_attempt_id": new.attempt_id},
            started_at=utc_now(),
        )
        own = DuelRow.campaign_id == self._campaign_id, DuelRow.iteration == new.iteration
        return self._connection.execute(select(DuelRow.id).where(*own)).scalar_one()

    def answer_duel(self, duel_id: int, side: Side, attempt_id: int) -> None:
        """Note the second side's attempt, once."""
        column = DuelRow.champion_attempt_id if side == "champion" else DuelRow.challenger_attempt_id
        statement = update(DuelRow).where(DuelRow.id == duel_id, column.is_(None)).values({column: attempt_id})
        self._connection.execute(statement)

    def settle_duel(self, new: Settlement) -> bool:
        """Store what a duel came to; say whether it was still open, for only then anything was written."""
        statement = (
            update(DuelRow)
            .where(DuelRow.id == new.duel_id, DuelRow.settled_at.is_(None))
            .values(
                champion_gain=new.champion_gain,
                challenger_gain=new.challenger_gain,
                gain_se=new.gain_se,
                champion_banked=new.champion_banked,
                challenger_banked=new.challenger_banked,
                cap=new.cap,
                item=new.item,
                note=new.note,
                settled_at=utc_now(),
            )
        )
        return self._connection.execute(statement).rowcount == 1

    def begin_race(self, new: NewRace) -> int:
        """Store a look back that begins; return its id."""
        values = {name: getattr(new, name) for name in NewRace.__slots__}
        statement = insert(RaceRow).values(campaign_id=self._campaign_id, started_at=utc_now(), **values)
        return int(self._connection.execute(statement.returning(RaceRow.id)).scalar_one())

    def race_item(self, race_id: int, new: NewRaceItem) -> None:
        """Store one draw, once."""
        from overnight.store.writer import MAX_REPLY_CHARS, MAX_TRACE_CHARS, storable

        told = ("reply", "failure", "config", "probabilities")
        values = {name: getattr(new, name) for name in NewRaceItem.__slots__ if name not in told}
        self._insert(
            RaceItemRow,
            race_id=race_id,
            **values,
            reply=storable(new.reply, MAX_REPLY_CHARS),
            failure=storable(new.failure, MAX_TRACE_CHARS),
            config_id=None if new.config is None else self.config(new.config),
            probabilities=None if new.probabilities is None else canonical_json(new.probabilities),
        )

    def pick_measured(self, race_id: int, baseline_config_id: str, config_id: str, gain: float) -> None:
        """Store the gain of a race's pick that was measured for the race."""
        turns = select(AttemptRow.id).where(
            AttemptRow.campaign_id == self._campaign_id, AttemptRow.baseline_config_id == baseline_config_id
        )
        own = RaceItemRow.race_id == race_id, RaceItemRow.config_id == config_id, RaceItemRow.valid.is_(True)
        self._connection.execute(
            update(RaceItemRow).where(*own, RaceItemRow.attempt_id.in_(turns)).values(expected_gain=gain)
        )

    def end_race(self, race_id: int, *, verdict: str, failure: str | None = None) -> None:
        """Store what a race showed, or why it counts for nothing."""
        statement = update(RaceRow).where(RaceRow.id == race_id)
        self._connection.execute(statement.values(verdict=verdict, failure=failure, ended_at=utc_now()))

    def promotion(self, new: NewPromotion) -> None:
        """Store a switch, and move the aliases `champion` and `previous` with it."""
        from overnight.store.writer import storable

        values = {name: getattr(new, name) for name in NewPromotion.__slots__ if name not in ("evidence", "reason")}
        self._connection.execute(
            insert(PromotionRow).values(
                campaign_id=self._campaign_id,
                evidence=canonical_json(new.evidence),
                reason=storable(new.reason, MAX_REASON_CHARS),
                at=utc_now(),
                **values,
            )
        )
        self.alias("champion", new.to_proposer_id, new.iteration)
        if new.from_proposer_id is not None:
            self.alias("previous", new.from_proposer_id, new.iteration)
        standing = AliasRow.campaign_id == self._campaign_id, AliasRow.alias == "challenger"
        self._connection.execute(delete(AliasRow).where(*standing, AliasRow.proposer_id == new.to_proposer_id))

    def alias(self, alias: Alias, proposer_id: int, iteration: int) -> None:
        """Say who stands where."""
        values: dict[str, Any] = {"proposer_id": proposer_id, "iteration": iteration, "at": utc_now()}
        if not self._insert(AliasRow, campaign_id=self._campaign_id, alias=alias, **values):
            there = AliasRow.campaign_id == self._campaign_id, AliasRow.alias == alias
            statement = update(AliasRow).where(*there, AliasRow.proposer_id != proposer_id)
            self._connection.execute(statement.values(**values))
