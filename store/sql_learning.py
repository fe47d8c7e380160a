"""Learning's reads and writes on the SQL store: the parts of `SqlStore` and `SqlWriter` that corpus and node use."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from sqlalchemy import Connection, Select, case, func, insert, or_, select, update
from sqlalchemy.orm import aliased

from overnight.store.contests import adapter_version
from overnight.store.hashing import canonical_json, text_digest
from overnight.store.learning import Distillation, NewDistillation, ScreeningSums
from overnight.store.protocol import Attempt
from overnight.store.sql_reads import SqlReads
from overnight.store.tables import (
    AliasRow,
    AttemptRow,
    CampaignRow,
    DistillationRow,
    DuelRow,
    PromotionRow,
    PromptRow,
    ProposerRow,
    RaceItemRow,
    RaceRow,
    Table,
    TrialRow,
    utc_now,
)

AT_ONCE = 500
"""Prompts asked for in one query: below every engine's limit of bound parameters."""
_MEASURED = AttemptRow.config_id.is_not(None) & AttemptRow.rail.is_(None)
_HARNESS = (AttemptRow.outcome == "failed") & (AttemptRow.failure == "harness")
_TEACHES = _MEASURED & AttemptRow.outcome.in_(["kept", "reverted", "failed"]) & ~_HARNESS
_ATTEMPT = [
    ProposerRow.name.label("proposer") if name == "proposer" else getattr(AttemptRow, name).label(name)
    for name in Attempt.__slots__
]
_WORDLESS = ("random", "optuna")
"""Kinds whose reasons say how they drew."""
_CONTESTANTS = (
    DuelRow.champion_id,
    DuelRow.challenger_id,
    PromotionRow.from_proposer_id,
    PromotionRow.to_proposer_id,
    AliasRow.proposer_id,
)
_DISTILLATION = [getattr(DistillationRow, name) for name in Distillation.__slots__]


class SqlLearningReads(SqlReads):
    """Implements `LearningReads`."""

    def teaching(self, campaign_id: int, *, through: int | None = None) -> Iterator[Attempt]:
        """Yield the attempts whose change was measured, harness failures apart, in the order of turns."""
        query = (
            select(*_ATTEMPT)
            .join(ProposerRow, ProposerRow.id == AttemptRow.proposer_id)
            .where(AttemptRow.campaign_id == campaign_id, _TEACHES, *_until(through))
            .order_by(AttemptRow.iteration, AttemptRow.try_no)
        )
        with self._reading() as connection:
            for row in connection.execute(query).mappings():
                yield Attempt(**row)

    def teaching_count(self, campaign_id: int) -> int:
        """Return how many attempts `teaching` yields."""
        return self._count(campaign_id, _TEACHES)

    def harness_failures(self, campaign_id: int) -> int:
        """Return how many measured attempts are left out of `teaching`."""
        return self._count(campaign_id, _MEASURED & _HARNESS)

    def _count(self, campaign_id: int, condition: Any) -> int:
        query = select(func.count()).select_from(AttemptRow).where(AttemptRow.campaign_id == campaign_id, condition)
        with self._reading() as connection:
            return connection.execute(query).scalar_one()

    def screening_sums(self, campaign_id: int, *, through: int | None = None) -> ScreeningSums:
        """Return sums over the screening gains of the turns up to `through`."""
        gains = screening_gains(campaign_id, through).subquery()
        sums = select(
            func.count(gains.c.gain).label("n"),
            func.sum(gains.c.gain).label("total"),
            func.sum(gains.c.gain * gains.c.gain).label("squares"),
            func.avg(gains.c.noise).label("noise"),
        )
        with self._reading() as connection:
            row = connection.execute(sums).one()
        return ScreeningSums(row.n, row.total or 0.0, row.squares or 0.0, row.noise)

    def writers(self, campaign_id: int) -> frozenset[str]:
        """Return the names of the proposers whose replies are words of their own: they stored no probabilities."""
        query = (
            select(ProposerRow.name)
            .join(AttemptRow, AttemptRow.proposer_id == ProposerRow.id)
            .where(AttemptRow.campaign_id == campaign_id, AttemptRow.reply.is_not(None))
            .where(ProposerRow.kind.not_in(_WORDLESS))
            .group_by(ProposerRow.name)
            .having(func.count(AttemptRow.probabilities) == 0)
        )
        with self._reading() as connection:
            return frozenset(connection.execute(query).scalars())

    def unprompted(self, campaign_id: int) -> bool:
        """Say whether a teaching attempt has no prompt: an imported one whose prompt was not rendered yet."""
        return self._count(campaign_id, _TEACHES & AttemptRow.prompt_id.is_(None)) > 0

    def prompts_of(self, prompt_ids: Sequence[str]) -> Mapping[str, str]:
        """Return stored prompts, byte for byte, by their hash."""
        found: dict[str, str] = {}
        with self._reading() as connection:
            for start in range(0, len(prompt_ids), AT_ONCE):
                chunk = prompt_ids[start : start + AT_ONCE]
                query = select(PromptRow.id, PromptRow.body).where(PromptRow.id.in_(chunk))
                found |= {row.id: row.body for row in connection.execute(query)}
        return found

    def distillations(self, campaign_id: int) -> Sequence[Distillation]:
        """Return all distillations, newest first."""
        query = select(*_DISTILLATION).where(DistillationRow.campaign_id == campaign_id)
        with self._reading() as connection:
            rows = connection.execute(query.order_by(DistillationRow.id.desc())).mappings().all()
        return [Distillation(**{**row, "metrics": json.loads(row["metrics"] or "{}")}) for row in rows]

    def last_distillation(self, campaign_id: int) -> Distillation | None:
        """Return the newest distillation that made an adapter."""
        return next((each for each in self.distillations(campaign_id) if each.version is not None), None)

    def distilled_after(self, campaign_id: int, iteration: int) -> bool:
        """Say whether a distillation was run after this turn, well or badly."""
        query = select(DistillationRow.id).filter_by(campaign_id=campaign_id, iteration=iteration).limit(1)
        with self._reading() as connection:
            return connection.execute(query).first() is not None

    def contested_versions(self, campaign_id: int) -> Collection[str]:
        """Return the versions (`v3`) that proposed, duelled, were promoted, have an alias, or ran the newest race."""
        own = ProposerRow.campaign_id == campaign_id
        newest = select(func.max(RaceRow.id)).where(RaceRow.campaign_id == campaign_id).scalar_subquery()
        raced = select(RaceItemRow.proposer_id).where(RaceItemRow.race_id == newest)
        raced_for = select(RaceRow.challenger_id).where(RaceRow.id == newest, RaceRow.challenger_id.is_not(None))
        proposed = select(AttemptRow.proposer_id).where(AttemptRow.campaign_id == campaign_id)
        met = [raced, raced_for, proposed, *(select(column).where(column.is_not(None)) for column in _CONTESTANTS)]
        named = or_(*(ProposerRow.id.in_(query) for query in met))
        with self._reading() as connection:
            found = connection.execute(select(ProposerRow.description).where(own, named)).scalars().all()
        versions = (adapter_version(json.loads(description)) for description in found)
        return {version for version in versions if version is not None}

    def home(self) -> Path:
        """Return the folder where files of the store lie: beside the database file, or the current one."""
        with self._reading() as connection:
            url = connection.engine.url
        return Path(url.database or "").absolute().parent if url.get_backend_name() == "sqlite" else Path.cwd()


def _until(through: int | None) -> list[Any]:
    return [] if through is None else [AttemptRow.iteration <= through]


def screening_gains(campaign_id: int, through: int | None) -> Select[Any]:
    """Each measured candidate's gain on its first seed: not selected, as means of candidates that went on are.

    A candidate of one trial has it as its result. Of the others it is the pair of its screening trial; imported trials
    have no seed and no pair, but also no second trial.
    """
    candidate, base = aliased(TrialRow), aliased(TrialRow)
    sign = case((CampaignRow.direction == "max", 1.0), else_=-1.0)
    relative = AttemptRow.gain / func.nullif(AttemptRow.baseline_metric - AttemptRow.metric, 0.0)
    scale = func.abs(func.coalesce(relative, 0.0))
    pair = sign * (candidate.metric - base.metric) * scale
    same = ("campaign_id", "trainer_hash", "environment_hash", "split", "seed")
    return (
        select(
            case((AttemptRow.trials == 1, AttemptRow.gain), else_=pair).label("gain"),
            case((AttemptRow.trials == 1, AttemptRow.gain_se * AttemptRow.gain_se), else_=None).label("noise"),
        )
        .join(CampaignRow, CampaignRow.id == AttemptRow.campaign_id)
        .outerjoin(
            candidate,
            (candidate.attempt_id == AttemptRow.id)
            & (candidate.purpose == "screening")
            & (candidate.config_id == AttemptRow.config_id)
            & candidate.metric.is_not(None),
        )
        .outerjoin(
            base,
            (base.config_id == AttemptRow.baseline_config_id)
            & (base.replicate == 0)
            & base.metric.is_not(None)
            & _all_equal(base, candidate, same),
        )
        .where(AttemptRow.campaign_id == campaign_id, _TEACHES, AttemptRow.gain.is_not(None), *_until(through))
    )


def _all_equal(one: Any, other: Any, names: Sequence[str]) -> Any:
    condition = getattr(one, names[0]) == getattr(other, names[0])
    for name in names[1:]:
        condition &= getattr(one, name) == getattr(other, name)
    return condition


class SqlLearningWrites:
    """Implements `LearningWrites`."""

    _connection: Connection
    _campaign_id: int

    def _insert(self, table: type[Table], **values: Any) -> bool:
        raise NotImplementedError

    def distillation(self, new: NewDistillation) -> int:
        """Store a distillation that is over; return its id."""
        values = {name: getattr(new, name) for name in NewDistillation.__slots__}
        values |= {"metrics": canonical_json(new.metrics), "campaign_id": self._campaign_id, "ended_at": utc_now()}
        statement = insert(DistillationRow).values(**values).returning(DistillationRow.id)
        return int(self._connection.execute(statement).scalar_one())

    def reconstructed(self, attempt_id: int, prompt: str) -> None:
        """Give an imported attempt, which has no prompt, the one that its proposer would have been shown."""
        prompt_id = text_digest(prompt)
        self._insert(PromptRow, id=prompt_id, body=prompt)
        self._connection.execute(
            update(AttemptRow)
            .where(AttemptRow.id == attempt_id, AttemptRow.campaign_id == self._campaign_id)
            .where(AttemptRow.prompt_id.is_(None))
            .values(prompt_id=prompt_id, prompt_kind="reconstructed")
        )
