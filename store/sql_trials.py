"""What was measured, trial by trial, and how far trials scatter: the parts of `SqlStore` that decisions rest on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from operator import itemgetter

from sqlalchemy import func, select

from overnight.store.protocol import SumOfSquares, Trial
from overnight.store.records import Split
from overnight.store.sql_reads import SqlReads
from overnight.store.tables import AttemptRow, TrialRow

_TRIALS = select(*(getattr(TrialRow, name) for name in Trial.__slots__)).order_by(TrialRow.id)


class SqlTrialReads(SqlReads):
    """Trials and their noise."""

    def trials_of(
        self,
        campaign_id: int,
        config_id: str,
        *,
        trainer_hash: str,
        environment_hash: str,
        split: Split = "val",
        seeds: range | None = None,
    ) -> Sequence[Trial]:
        """Return a configuration's trials in one environment, oldest first; on these consecutive seeds, or on all."""
        query = _TRIALS.where(
            TrialRow.campaign_id == campaign_id,
            TrialRow.config_id == config_id,
            TrialRow.trainer_hash == trainer_hash,
            TrialRow.environment_hash == environment_hash,
            TrialRow.split == split,
        )
        if seeds is not None:
            query = query.where(TrialRow.seed.between(seeds[0], seeds[-1]))
        return [Trial(**row) for row in self._rows(query)]

    def recent_trials(
        self, campaign_id: int, *, trainer_hash: str, environment_hash: str, count: int
    ) -> Sequence[Trial]:
        """Return the last trials that measured something in one environment, newest first: what trials cost here."""
        query = _TRIALS.where(
            TrialRow.campaign_id == campaign_id,
            TrialRow.trainer_hash == trainer_hash,
            TrialRow.environment_hash == environment_hash,
            TrialRow.metric.is_not(None),
        )
        return [Trial(**row) for row in self._rows(query.order_by(None).order_by(TrialRow.id.desc()).limit(count))]

    def trials_of_attempt(self, attempt_id: int) -> Sequence[Trial]:
        """Return the trials that an attempt paid for, oldest first."""
        query = _TRIALS.where(TrialRow.attempt_id == attempt_id)
        return [Trial(**row) for row in self._rows(query)]

    def seed_spread(self, campaign_id: int, *, trainer_hash: str, environment_hash: str) -> SumOfSquares:
        """Return the trial noise over seeds from calibration runs in one environment."""
        query = _TRIALS.where(
            TrialRow.campaign_id == campaign_id,
            TrialRow.purpose == "calibration",
            TrialRow.trainer_hash == trainer_hash,
            TrialRow.environment_hash == environment_hash,
            TrialRow.metric.is_not(None),
        )
        # One good run of each seed: the repeat of the first would count its seed twice. Sorted here: in SQL the order
        # would have all trials walked through for these few.
        metrics: dict[str, dict[int | None, float]] = {}
        for row in sorted(self._rows(query.order_by(None)), key=itemgetter("id")):
            metrics.setdefault(row["config_id"], {}).setdefault(row["seed"], row["metric"])
        groups = [list(of.values()) for of in metrics.values()]
        squares = [(metric - math.fsum(group) / len(group)) ** 2 for group in groups for metric in group]
        return SumOfSquares(math.fsum(squares), sum(len(group) - 1 for group in groups))

    def audit_spreads(
        self, campaign_id: int, *, trainer_hash: str, environment_hash: str, since: int = 0
    ) -> Mapping[int, SumOfSquares]:
        """Return the noise of paired differences in each decided audit in one environment, by attempt, oldest first.

        Every audit measures both sides on seeds that nothing else uses, so none of the differences is selected.
        `since` leaves out the attempts up to that one.
        """
        base, candidate = TrialRow.__table__.alias("base"), TrialRow.__table__.alias("candidate")
        query = (
            select(
                (base.c.metric - candidate.c.metric).label("difference"),
                candidate.c.attempt_id.label("attempt_id"),
            )
            .select_from(AttemptRow)
            .join(candidate, candidate.c.attempt_id == AttemptRow.id)
            .join(
                base,
                (base.c.campaign_id == candidate.c.campaign_id)
                & (base.c.config_id == AttemptRow.baseline_config_id)
                & (base.c.trainer_hash == candidate.c.trainer_hash)
                & (base.c.environment_hash == candidate.c.environment_hash)
                & (base.c.split == candidate.c.split)
                & (base.c.seed == candidate.c.seed)
                & (base.c.purpose == "audit"),
            )
            .where(
                AttemptRow.campaign_id == campaign_id,
                AttemptRow.id > since,
                AttemptRow.audit,
                AttemptRow.stage == "decided",
                candidate.c.purpose == "audit",
                candidate.c.config_id == AttemptRow.config_id,
                candidate.c.trainer_hash == trainer_hash,
                candidate.c.environment_hash == environment_hash,
                candidate.c.metric.is_not(None),
                base.c.metric.is_not(None),
            )
            .subquery()
        )
        of, value = query.c.attempt_id, query.c.difference
        squares = func.sum(value * value) - func.sum(value) * func.avg(value)
        groups = select(of.label("of"), func.count(value).label("n"), squares.label("ss")).group_by(of).order_by(of)
        return {row["of"]: SumOfSquares(max(row["ss"], 0.0), row["n"] - 1) for row in self._rows(groups)}
