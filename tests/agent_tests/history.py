"""A campaign's whole history as plain rows, without times and row ids: two runs that did the same have the same."""

from __future__ import annotations

from typing import Any

from sqlalchemy import Engine, text

from overnight.store.sql_store import SqlStore

ATTEMPTS = """
SELECT a.iteration, a."try", a.role, p.name, p.digest, a.stage, a.audit, a.prompt_id, a.reply, a.knob, a.new_value,
    a.config_id, a.baseline_config_id, a.rail, a.outcome, a.failure, a.metric, a.baseline_metric, a.gain, a.gain_lower,
    a.trials, a.is_best, a.decision
FROM attempts AS a JOIN proposers AS p ON p.id = a.proposer_id ORDER BY 1, 2"""
TRIALS = """
SELECT t.purpose, a.iteration, a."try", t.config_id, t.split, t.seed, t.replicate, t.metric, t.failure
FROM trials AS t LEFT JOIN attempts AS a ON a.id = t.attempt_id ORDER BY 4, 5, 6, 7"""
CAMPAIGN = """
SELECT status, stop_reason, baseline_config_id, best_attempt_id IS NULL, refinement, trainer_kind, noise_sd
FROM campaigns"""
DISTILLATIONS = """
SELECT iteration, objective, corpus_hash, version, rows, failure FROM distillations ORDER BY id"""
RACES = """
SELECT r.iteration, r.verdict, a.iteration, p.name, p.digest, i.draw, i.reply, i.valid, i.exact_match
FROM races AS r LEFT JOIN race_items AS i ON i.race_id = r.id LEFT JOIN attempts AS a ON a.id = i.attempt_id
LEFT JOIN proposers AS p ON p.id = i.proposer_id ORDER BY r.id, 3, 4, 5, 6"""
DUELS = """
SELECT d.iteration, d.kind, d.seed, d.champion_gain, d.challenger_gain, d.item, d.note FROM duels AS d ORDER BY 1"""
PROMOTIONS = """
SELECT m.iteration, m.kind, f.name, t.name, t.digest, m.decided_by, m.evidence FROM promotions AS m
LEFT JOIN proposers AS f ON f.id = m.from_proposer_id JOIN proposers AS t ON t.id = m.to_proposer_id ORDER BY m.id"""
ONCE = """
SELECT kind, iteration, count(*) FROM events
WHERE kind IN ('calibrated', 'grid_refined', 'holdout_measured', 'holdout_skipped', 'finished', 'distilled',
    'distill_failed', 'race_finished', 'duel_settled', 'promoted', 'rolled_back', 'weighed')
GROUP BY 1, 2 ORDER BY 1, 2"""
"""Events of things that happen once, however often the process dies."""
QUERIES = {
    "attempts": ATTEMPTS, "trials": TRIALS, "campaign": CAMPAIGN, "distillations": DISTILLATIONS, "races": RACES,
    "duels": DUELS, "promotions": PROMOTIONS, "events": ONCE,
}  # fmt: skip


def history(store: SqlStore) -> dict[str, list[Any]]:
    """Return what happened."""
    return history_in(store.engine)


def history_in(engine: Engine) -> dict[str, list[Any]]:
    """Return what happened, from an engine."""
    with engine.connect() as connection:
        return {name: [tuple(row) for row in connection.execute(text(query))] for name, query in QUERIES.items()}
