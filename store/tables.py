"""The typed tables of the trajectory store.

Configurations and prompts are content-addressed. Times are UTC in ISO 8601 text, values of unknown shape are JSON
text, and a failure has NULL where a number would be. Schema changes go through `store/migrations`; a test holds the
two together.
"""

from __future__ import annotations

from typing import Annotated

from sqlalchemy import BigInteger, Float, ForeignKey, Index, Integer, MetaData, Text, UniqueConstraint, text
from sqlalchemy.orm import DeclarativeBase, Mapped, mapped_column

from overnight.store import clock

# SQLite gives rowids to INTEGER keys only; PostgreSQL needs 64 bits for long-lived stores.
Key = Annotated[int, mapped_column(BigInteger().with_variant(Integer, "sqlite"), primary_key=True)]
CampaignKey = Annotated[int, mapped_column(ForeignKey("campaigns.id"))]
Sha = Annotated[str, mapped_column(Text)]
Json = Annotated[str, mapped_column(Text)]
Utc = Annotated[str, mapped_column(Text)]
Double = Annotated[float, mapped_column(Float(53))]


def utc_now() -> str:
    """Return the time in UTC as ISO 8601 text with milliseconds."""
    return clock.utc_text(clock.time())


class Table(DeclarativeBase):
    """Base of every table; constraints are named so that migrations can drop them on any engine."""

    metadata = MetaData(
        naming_convention={
            "ix": "ix_%(table_name)s_%(column_0_N_name)s",
            "uq": "uq_%(table_name)s_%(column_0_N_name)s",
            "fk": "fk_%(table_name)s_%(column_0_N_name)s",
            "pk": "pk_%(table_name)s",
        }
    )


class CampaignRow(Table):
    """A campaign: its specification, where it stands, and who may write it."""

    __tablename__ = "campaigns"
    id: Mapped[Key]
    name: Mapped[str] = mapped_column(Text, unique=True)
    path: Mapped[str | None] = mapped_column(Text)
    spec: Mapped[Json]
    """The campaign file as last used."""
    frozen_hash: Mapped[Sha]
    """Hash of the keys that may not change between runs."""
    seed: Mapped[int]
    metric_name: Mapped[str] = mapped_column(Text)
    direction: Mapped[str] = mapped_column(Text)
    knobs_on_menu: Mapped[int | None]
    status: Mapped[str] = mapped_column(Text)
    """`new`, `running`, `paused` or `finished`."""
    stop_reason: Mapped[str | None] = mapped_column(Text)
    baseline_config_id: Mapped[str | None] = mapped_column(ForeignKey("configs.id"))
    """What candidates are measured against now."""
    best_attempt_id: Mapped[int | None] = mapped_column(BigInteger)
    refinement: Mapped[int] = mapped_column(server_default=text("0"))
    """How often the grids of float knobs were refined."""
    trainer: Mapped[str | None] = mapped_column(Text)
    trainer_kind: Mapped[str | None] = mapped_column(Text)
    """`exact`, `noisy` or `unseeded`, found at calibration."""
    trainer_hash: Mapped[str | None] = mapped_column(Text)
    environment_hash: Mapped[str | None] = mapped_column(Text)
    environment: Mapped[str | None] = mapped_column(Text)
    noise_sd: Mapped[Double | None]
    """Standard deviation of one trial over seeds, pooled, in the metric's unit."""
    created_at: Mapped[Utc]
    started_at: Mapped[str | None] = mapped_column(Text)
    trial_s: Mapped[Double] = mapped_column(server_default=text("0"))
    """Seconds spent in trials so far."""
    trial_wh: Mapped[Double] = mapped_column(server_default=text("0"))
    """Energy of trials so far, in watt-hours, where it was measured."""
    finished_at: Mapped[str | None] = mapped_column(Text)
    lease_epoch: Mapped[int] = mapped_column(server_default=text("0"))
    lease_owner: Mapped[str | None] = mapped_column(Text)
    lease_since: Mapped[str | None] = mapped_column(Text)
    lease_seen_at: Mapped[str | None] = mapped_column(Text)


class ConfigRow(Table):
    """A complete configuration, once, whoever proposed it."""

    __tablename__ = "configs"
    id: Mapped[str] = mapped_column(Text, primary_key=True)
    body: Mapped[Json]


class PromptRow(Table):
    """A prompt, byte for byte."""

    __tablename__ = "prompts"
    id: Mapped[str] = mapped_column(Text, primary_key=True)
    body: Mapped[str] = mapped_column(Text)


class ProposerRow(Table):
    """A proposer as it was configured; a changed setting is another row."""

    __tablename__ = "proposers"
    __table_args__ = (UniqueConstraint("campaign_id", "name", "digest"),)
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    name: Mapped[str] = mapped_column(Text)
    kind: Mapped[str] = mapped_column(Text)
    description: Mapped[Json]
    digest: Mapped[Sha]
    created_at: Mapped[Utc]


class AttemptRow(Table):
    """One try of one turn: what was asked, answered, blocked or measured, and decided."""

    __tablename__ = "attempts"
    __table_args__ = (
        UniqueConstraint("campaign_id", "iteration", "try"),
        Index("ix_attempts_campaign_id_config_id", "campaign_id", "config_id"),
        Index("ix_attempts_campaign_id_id", "campaign_id", "id"),
        Index("ix_attempts_campaign_id_knob_new_value_id", "campaign_id", "knob", "new_value", "id"),
        Index("ix_attempts_campaign_id_outcome_iteration", "campaign_id", "outcome", "iteration"),
        Index("ix_attempts_request_event_id", "request_event_id"),
    )
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    iteration: Mapped[int]
    try_no: Mapped[int] = mapped_column("try")
    stage: Mapped[str] = mapped_column(Text)
    role: Mapped[str] = mapped_column(Text)
    """Why this proposer had the turn: `champion`, `duel_champion`, `duel_challenger`, `predecessor` (of a champion just
    promoted), `warmup`, `explore`, `request`, `fallback`, `imported`."""
    proposer_id: Mapped[int] = mapped_column(ForeignKey("proposers.id"))
    audit: Mapped[bool] = mapped_column(server_default=text("false"))
    """Drawn beforehand: candidate and baseline are also measured on audit seeds, whatever screening says."""
    request_event_id: Mapped[int | None] = mapped_column(BigInteger)
    """The `enqueued` event that this attempt answers."""
    prompt_id: Mapped[str | None] = mapped_column(ForeignKey("prompts.id"))
    prompt_kind: Mapped[str] = mapped_column(Text, server_default=text("'rendered'"))
    """`rendered` for a proposer that saw it, `reconstructed` for an imported attempt."""
    reply: Mapped[str | None] = mapped_column(Text)
    settings: Mapped[str | None] = mapped_column(Text)
    usage: Mapped[str | None] = mapped_column(Text)
    probabilities: Mapped[str | None] = mapped_column(Text)
    knob: Mapped[str | None] = mapped_column(Text)
    new_value: Mapped[str | None] = mapped_column(Text)
    new_value_num: Mapped[Double | None]
    reason: Mapped[str | None] = mapped_column(Text)
    baseline_config_id: Mapped[str | None] = mapped_column(ForeignKey("configs.id"))
    config_id: Mapped[str | None] = mapped_column(ForeignKey("configs.id"))
    diff: Mapped[str | None] = mapped_column(Text)
    rail: Mapped[str | None] = mapped_column(Text)
    rail_reason: Mapped[str | None] = mapped_column(Text)
    outcome: Mapped[str | None] = mapped_column(Text)
    failure: Mapped[str | None] = mapped_column(Text)
    trace: Mapped[str | None] = mapped_column(Text)
    notes: Mapped[str | None] = mapped_column(Text)
    metric: Mapped[Double | None]
    """Mean over the attempt's trials."""
    metric_se: Mapped[Double | None]
    baseline_metric: Mapped[Double | None]
    """Mean of the baseline over the same seeds."""
    gain: Mapped[Double | None]
    gain_se: Mapped[Double | None]
    gain_lower: Mapped[Double | None]
    """One-sided lower bound at the campaign's alpha."""
    trials: Mapped[int] = mapped_column(server_default=text("0"))
    decision: Mapped[str | None] = mapped_column(Text)
    """The rule's explanation, in words."""
    is_best: Mapped[bool | None]
    proposal_latency_s: Mapped[Double | None]
    wall_s: Mapped[Double | None]
    energy_wh: Mapped[Double | None]
    started_at: Mapped[Utc]
    decided_at: Mapped[str | None] = mapped_column(Text)


INFORMATION = (
    "(kept * 1e7 + (trials + failed) * 10"
    " + CASE WHEN mean_gain IS NULL THEN 1.0 ELSE abs(mean_gain) / (1.0 + abs(mean_gain)) END)"
)
"""Sorts the values of a knob as `overnight.store.prompt.information` does; an index on it keeps that short."""


class PairTotalRow(Table):
    """Running totals of one (knob, value): what prompts show of ALL history without reading it again.

    A value that is not on the menu has none: what a model wrote there is no value.
    """

    __tablename__ = "pair_totals"
    __table_args__ = (Index("ix_pair_totals_information", "campaign_id", "knob", text(INFORMATION)),)
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaigns.id"), primary_key=True)
    knob: Mapped[str] = mapped_column(Text, primary_key=True)
    new_value: Mapped[str] = mapped_column(Text, primary_key=True)
    proposed: Mapped[int]
    kept: Mapped[int]
    reverted: Mapped[int]
    blocked: Mapped[int]
    failed: Mapped[int]
    trials: Mapped[int]
    mean_gain: Mapped[Double | None]
    """Mean of the measured gains, each weighted by its trials."""


class FailureTotalRow(Table):
    """How often a (knob, value) failed in each class."""

    __tablename__ = "failure_totals"
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaigns.id"), primary_key=True)
    knob: Mapped[str] = mapped_column(Text, primary_key=True)
    new_value: Mapped[str] = mapped_column(Text, primary_key=True)
    failure: Mapped[str] = mapped_column(Text, primary_key=True)
    times: Mapped[int]


class KnobTotalRow(Table):
    """Running totals of one knob over its values, with the blocked proposals of values that are not on the menu."""

    __tablename__ = "knob_totals"
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaigns.id"), primary_key=True)
    knob: Mapped[str] = mapped_column(Text, primary_key=True)
    proposed: Mapped[int]
    kept: Mapped[int]
    blocked: Mapped[int]
    distinct_values: Mapped[int]


class TrialRow(Table):
    """One run of (configuration, seed) on one split in one environment. Imported trials have no seed."""

    __tablename__ = "trials"
    __table_args__ = (
        UniqueConstraint("campaign_id", "config_id", "trainer_hash", "environment_hash", "split", "seed", "replicate"),
        Index("ix_trials_attempt_id", "attempt_id"),
        Index("ix_trials_campaign_id_id", "campaign_id", "id"),
        Index("ix_trials_campaign_id_purpose_wall_s", "campaign_id", "purpose", "wall_s"),
    )
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    attempt_id: Mapped[int | None] = mapped_column(ForeignKey("attempts.id"))
    """The attempt that paid for it; NULL for calibration and the locked holdout."""
    purpose: Mapped[str] = mapped_column(Text)
    config_id: Mapped[str] = mapped_column(ForeignKey("configs.id"))
    trainer_hash: Mapped[str] = mapped_column(Text)
    environment_hash: Mapped[str] = mapped_column(Text)
    split: Mapped[str] = mapped_column(Text)
    seed: Mapped[int | None] = mapped_column(BigInteger)
    replicate: Mapped[int]
    mode: Mapped[str | None] = mapped_column(Text)
    metric: Mapped[Double | None]
    failure: Mapped[str | None] = mapped_column(Text)
    trace: Mapped[str | None] = mapped_column(Text)
    notes: Mapped[str | None] = mapped_column(Text)
    metrics: Mapped[str | None] = mapped_column(Text)
    steps: Mapped[int | None]
    wall_s: Mapped[Double | None]
    train_s: Mapped[Double | None]
    val_s: Mapped[Double | None]
    peak_memory_gib: Mapped[Double | None]
    energy_wh: Mapped[Double | None]
    energy_source: Mapped[str | None] = mapped_column(Text)
    ended_at: Mapped[Utc]


class DistillationRow(Table):
    """One training of a student on the campaign's history, over; one that was killed has no row."""

    __tablename__ = "distillations"
    __table_args__ = (Index("ix_distillations_campaign_id_id", "campaign_id", "id"),)
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    iteration: Mapped[int]
    """The turn after which it was run."""
    proposer: Mapped[str] = mapped_column(Text)
    """Whose adapter it is: a `[proposers.<name>]` of kind `student`."""
    version: Mapped[int | None]
    """The adapter is `v<version>`; NULL for a failure."""
    objective: Mapped[str] = mapped_column(Text)
    corpus_hash: Mapped[str | None] = mapped_column(Text)
    """Content address of the rows that were trained on."""
    cut_attempt_id: Mapped[int | None] = mapped_column(BigInteger)
    """The last attempt that was trained on, or known to a target; what came later until `iteration` is held out."""
    rows: Mapped[int | None]
    """Rows trained on."""
    adapter: Mapped[str | None] = mapped_column(Text)
    """The version's folder; it may have been pruned since."""
    metrics: Mapped[str | None] = mapped_column(Text)
    """JSON: the corpus report, losses by epoch, held-out loss before and after, steps, energy."""
    failure: Mapped[str | None] = mapped_column(Text)
    """Why there is no adapter."""
    wall_s: Mapped[Double | None]
    started_at: Mapped[Utc]
    ended_at: Mapped[str | None] = mapped_column(Text)


class RaceRow(Table):
    """One look back over held-out turns by several proposers."""

    __tablename__ = "races"
    __table_args__ = (Index("ix_races_campaign_id_id", "campaign_id", "id"),)
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    distillation_id: Mapped[int | None] = mapped_column(ForeignKey("distillations.id"))
    """The distillation whose cut says which turns are held out; NULL where nothing was distilled."""
    challenger_id: Mapped[int | None] = mapped_column(ForeignKey("proposers.id"))
    """Whom it was run for; NULL where there was no challenger."""
    iteration: Mapped[int]
    held_out: Mapped[int] = mapped_column(server_default=text("0"))
    """Held-out turns that were to be answered."""
    verdict: Mapped[str | None] = mapped_column(Text)
    """The gate in words, or why there was nothing to look back at."""
    failure: Mapped[str | None] = mapped_column(Text)
    """Why the whole race counts for nothing: a held-out turn was in the training rows."""
    started_at: Mapped[Utc]
    ended_at: Mapped[str | None] = mapped_column(Text)


class RaceItemRow(Table):
    """One proposer's answer to one held-out turn."""

    __tablename__ = "race_items"
    __table_args__ = (UniqueConstraint("race_id", "attempt_id", "proposer_id", "draw"),)
    id: Mapped[Key]
    race_id: Mapped[int] = mapped_column(ForeignKey("races.id"))
    attempt_id: Mapped[int] = mapped_column(ForeignKey("attempts.id"))
    proposer_id: Mapped[int] = mapped_column(ForeignKey("proposers.id"))
    draw: Mapped[int]
    """0, 1, ...: a stochastic proposer is asked several times."""
    source: Mapped[str] = mapped_column(Text, server_default=text("'asked'"))
    """`asked`; `recorded`: its own choice of then, read from the attempt; `drawn` from the probabilities of draw 0."""
    reply: Mapped[str | None] = mapped_column(Text)
    knob: Mapped[str | None] = mapped_column(Text)
    new_value: Mapped[str | None] = mapped_column(Text)
    config_id: Mapped[str | None] = mapped_column(ForeignKey("configs.id"))
    """What the answer would have run; NULL where no configuration came of it."""
    valid: Mapped[bool | None]
    """Whether the answer passes the rails of that moment; NULL where there was no answer."""
    rail: Mapped[str | None] = mapped_column(Text)
    """The rail that blocks it."""
    failure: Mapped[str | None] = mapped_column(Text)
    """Why there was no answer; such an item is missing, not lost."""
    knob_match: Mapped[bool | None]
    exact_match: Mapped[bool | None]
    modal_match: Mapped[bool | None]
    """On draw 0: whether the most frequent (or most probable) answer is what was tried."""
    agreement: Mapped[Double | None]
    """On draw 0: the chance that two of its draws agree, the ceiling of any match rate."""
    tried_probability: Mapped[Double | None]
    """On draw 0 of a proposer that knows its probabilities: that of what was tried."""
    probabilities: Mapped[str | None] = mapped_column(Text)
    """On draw 0: JSON, each change with its probability."""
    expected_gain: Mapped[Double | None]
    """Gain of the pick where it was measured against that baseline; NULL where it never was."""
    latency_s: Mapped[Double | None]
    """NULL for a draw that asked nobody."""


class DuelRow(Table):
    """Champion and challenger answer one prompt in two turns in a row; both are measured on one fresh seed."""

    __tablename__ = "duels"
    __table_args__ = (
        UniqueConstraint("campaign_id", "iteration"),
        Index("ix_duels_campaign_id_champion_id_challenger_id", "campaign_id", "champion_id", "challenger_id"),
    )
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    iteration: Mapped[int]
    """The first of its two turns."""
    kind: Mapped[str] = mapped_column(Text)
    """`challenge`; `return`: the challenger is the predecessor of a promoted champion."""
    seed: Mapped[int] = mapped_column(BigInteger)
    """Of its trials; no other duel and no decision uses it."""
    champion_id: Mapped[int] = mapped_column(ForeignKey("proposers.id"))
    challenger_id: Mapped[int] = mapped_column(ForeignKey("proposers.id"))
    champion_attempt_id: Mapped[int | None] = mapped_column(ForeignKey("attempts.id"))
    challenger_attempt_id: Mapped[int | None] = mapped_column(ForeignKey("attempts.id"))
    champion_gain: Mapped[Double | None]
    """Paired gain on the duel's seed; NULL where the answer was blocked or failed."""
    challenger_gain: Mapped[Double | None]
    gain_se: Mapped[Double | None]
    """Standard error of either gain."""
    champion_banked: Mapped[Double | None]
    """Posterior gain where positive, up to `cap`; 0 for a blocked or failed answer."""
    challenger_banked: Mapped[Double | None]
    cap: Mapped[Double | None]
    """The most that a side may bank, known before the duel."""
    item: Mapped[Double | None]
    """(challenger banked - champion banked) / cap, in [-1, 1]; NULL while it runs, and where it counts for nothing."""
    note: Mapped[str | None] = mapped_column(Text)
    """What is to be said of it: the same answer, or why there is no item."""
    started_at: Mapped[Utc]
    settled_at: Mapped[str | None] = mapped_column(Text)


class AliasRow(Table):
    """Who stands where now: `champion`, `challenger`, `previous`."""

    __tablename__ = "aliases"
    campaign_id: Mapped[int] = mapped_column(ForeignKey("campaigns.id"), primary_key=True)
    alias: Mapped[str] = mapped_column(Text, primary_key=True)
    proposer_id: Mapped[int] = mapped_column(ForeignKey("proposers.id"))
    iteration: Mapped[int]
    """The turn after which it was set."""
    at: Mapped[Utc]


class PromotionRow(Table):
    """A switch of the champion, with its evidence."""

    __tablename__ = "promotions"
    __table_args__ = (Index("ix_promotions_campaign_id_id", "campaign_id", "id"),)
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    iteration: Mapped[int]
    """The turn after which it happened."""
    kind: Mapped[str] = mapped_column(Text)
    """`promotion` or `rollback`."""
    from_proposer_id: Mapped[int | None] = mapped_column(ForeignKey("proposers.id"))
    to_proposer_id: Mapped[int] = mapped_column(ForeignKey("proposers.id"))
    evidence: Mapped[Json]
    decided_by: Mapped[str] = mapped_column(Text)
    """`router`, or `person`."""
    reason: Mapped[str | None] = mapped_column(Text)
    request_event_id: Mapped[int | None] = mapped_column(BigInteger)
    """The event by which a person asked for it."""
    at: Mapped[Utc]


class EventRow(Table):
    """Something that happened, or that a person asked for."""

    __tablename__ = "events"
    __table_args__ = (Index("ix_events_campaign_id_kind", "campaign_id", "kind"),)
    id: Mapped[Key]
    campaign_id: Mapped[CampaignKey]
    at: Mapped[Utc]
    kind: Mapped[str] = mapped_column(Text)
    iteration: Mapped[int | None]
    attempt_id: Mapped[int | None] = mapped_column(BigInteger)
    payload: Mapped[Json]
