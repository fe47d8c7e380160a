"""The views for people who write SQL, in one text for SQLite and PostgreSQL where the engines agree.

Each view carries its description and that of its columns, which `overnight sql --schema` prints. Columns may be added,
the documented ones stay. A number that cannot be computed is NULL.
"""

from __future__ import annotations

from dataclasses import dataclass
from string import Template


@dataclass(frozen=True, slots=True)
class View:
    """A view: its name, what a row is, and its query (a template of the engine's own words)."""

    name: str
    doc: str
    query: str

    def sql(self, dialect: str) -> str:
        """Return the SELECT for `sqlite` or `postgresql`."""
        return Template(self.query).substitute(_WORDS[dialect])


_WORDS = {
    "sqlite": {
        "knob_rows": "json_each(c.body) AS k",
        "knob_value": "CASE WHEN k.type = 'text' THEN k.value ELSE CAST(k.atom AS TEXT) END",
        "knob_number": "CASE WHEN k.type IN ('integer', 'real') THEN CAST(k.atom AS REAL) END",
        "payload": "e.payload",
    },
    "postgresql": {
        "knob_rows": "LATERAL jsonb_each(c.body::jsonb) AS k",
        "knob_value": "k.value #>> '{}'",
        "knob_number": "CASE WHEN jsonb_typeof(k.value) = 'number' THEN (k.value #>> '{}')::double precision END",
        "payload": "e.payload",
    },
}

_LAST_TRY = """a."try" = (SELECT max(b."try") FROM attempts AS b
    WHERE b.campaign_id = a.campaign_id AND b.iteration = a.iteration)"""

VIEWS = (
    View(
        "iterations",
        "a turn's last try: what was proposed, by whom, and what came of it",
        f"""
SELECT c.name AS campaign, a.iteration, a.id AS attempt_id, a.config_id, p.name AS proposer,
    CASE WHEN a.role = 'fallback' THEN 1 ELSE 0 END AS fallback, a.knob, a.new_value, a.new_value_num, a.reason,
    a.outcome, a.rail, a.failure, a.metric, a.baseline_metric, a.gain, a.trials, a.is_best, a.proposal_latency_s,
    a.wall_s, a.energy_wh, a.started_at, a.role, a.metric_se, a.gain_se, a.gain_lower, a.decision
FROM attempts AS a
JOIN campaigns AS c ON c.id = a.campaign_id
JOIN proposers AS p ON p.id = a.proposer_id
WHERE {_LAST_TRY}""",
    ),
    View(
        "knob_stats",
        "a knob of a campaign: how often it was proposed, kept, and what it gained",
        """
SELECT c.name AS campaign, a.knob, count(*) AS proposed,
    sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END) AS kept,
    count(DISTINCT a.new_value) AS distinct_values, avg(a.gain) AS mean_gain, max(a.gain) AS best_gain
FROM attempts AS a JOIN campaigns AS c ON c.id = a.campaign_id
WHERE a.knob IS NOT NULL
GROUP BY c.name, a.knob""",
    ),
    View(
        "pair_stats",
        "a (knob, value) of a campaign: how often it was proposed and what it measured",
        """
SELECT c.name AS campaign, a.knob, a.new_value, count(*) AS proposed,
    sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END) AS kept,
    sum(CASE WHEN a.outcome = 'reverted' THEN 1 ELSE 0 END) AS reverted,
    avg(a.metric) AS mean_metric,
    CASE WHEN count(a.metric) > 1 THEN
        sqrt(abs(sum(a.metric * a.metric) - count(a.metric) * avg(a.metric) * avg(a.metric)) / (count(a.metric) - 1))
    END AS sd_metric
FROM attempts AS a JOIN campaigns AS c ON c.id = a.campaign_id
WHERE a.knob IS NOT NULL
GROUP BY c.name, a.knob, a.new_value""",
    ),
    View(
        "proposer_stats",
        "a proposer of a campaign: how its proposals fared",
        """
SELECT c.name AS campaign, p.name AS proposer, count(*) AS proposals,
    sum(CASE WHEN a.config_id IS NOT NULL AND a.rail IS NULL THEN 1 ELSE 0 END) AS valid,
    sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END) AS kept,
    count(DISTINCT CASE WHEN a.knob IS NOT NULL THEN a.knob || '=' || a.new_value END) AS distinct_pairs,
    count(DISTINCT a.knob) AS knobs_touched,
    avg(CASE WHEN a.knob IS NULL THEN NULL WHEN EXISTS (SELECT 1 FROM attempts AS b
        WHERE b.campaign_id = a.campaign_id AND b.knob = a.knob AND b.new_value = a.new_value AND b.id < a.id)
        THEN 1.0 ELSE 0.0 END) AS repeat_rate,
    avg(a.proposal_latency_s) AS mean_latency_s
FROM attempts AS a JOIN campaigns AS c ON c.id = a.campaign_id JOIN proposers AS p ON p.id = a.proposer_id
GROUP BY c.name, p.name""",
    ),
    View(
        "campaign_stats",
        "a campaign in one row; gains as its file defines them, times in seconds, energy in watt-hours",
        f"""
SELECT c.name AS campaign, c.metric_name, t.iterations, t.kept, t.reverted, t.blocked, t.failed,
    CASE WHEN t.iterations > 0 THEN 1.0 * t.kept / t.iterations END AS accept_rate,
    c.knobs_on_menu, t.knobs_touched, t.distinct_pairs, t.proposals - t.distinct_pairs AS repeats,
    CASE WHEN t.proposals > 0 THEN 1.0 * (t.proposals - t.distinct_pairs) / t.proposals END AS repeat_rate,
    t.first_keep, best.iteration AS best_iteration, best.metric AS best_metric, best.gain AS best_gain, c.noise_sd,
    t.wall_s, t.energy_wh, c.status, c.stop_reason, s.calibration_trials, s.calibration_s, s.screening_trials,
    s.screening_s, s.confirmation_trials, s.confirmation_s, s.audit_trials, s.audit_s, s.baseline_trials, s.baseline_s,
    s.holdout_trials, s.holdout_s
FROM campaigns AS c
LEFT JOIN (
    SELECT a.campaign_id,
        sum(CASE WHEN {_LAST_TRY} THEN 1 ELSE 0 END) AS iterations,
        sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END) AS kept,
        sum(CASE WHEN a.outcome = 'reverted' THEN 1 ELSE 0 END) AS reverted,
        sum(CASE WHEN a.outcome = 'blocked' THEN 1 ELSE 0 END) AS blocked,
        sum(CASE WHEN a.outcome = 'failed' THEN 1 ELSE 0 END) AS failed,
        count(DISTINCT a.knob) AS knobs_touched, count(a.knob) AS proposals,
        count(DISTINCT CASE WHEN a.knob IS NOT NULL THEN a.knob || '=' || a.new_value END) AS distinct_pairs,
        min(CASE WHEN a.outcome = 'kept' THEN a.iteration END) AS first_keep,
        sum(a.wall_s) AS wall_s, sum(a.energy_wh) AS energy_wh
    FROM attempts AS a GROUP BY a.campaign_id
) AS t ON t.campaign_id = c.id
LEFT JOIN (
    SELECT r.campaign_id, {
            ", ".join(
                f"sum(CASE WHEN r.purpose = '{purpose}' THEN 1 ELSE 0 END) AS {purpose}_trials, "
                f"sum(CASE WHEN r.purpose = '{purpose}' THEN r.wall_s ELSE 0 END) AS {purpose}_s"
                for purpose in ("calibration", "screening", "confirmation", "audit", "baseline", "holdout")
            )
        }
    FROM trials AS r GROUP BY r.campaign_id
) AS s ON s.campaign_id = c.id
LEFT JOIN attempts AS best ON best.id = c.best_attempt_id""",
    ),
    View(
        "trial_log",
        "one trial: a run of (configuration, seed) with what it measured and cost",
        """
SELECT c.name AS campaign, t.id AS trial_id, t.attempt_id, a.iteration, t.purpose, t.config_id, t.split, t.seed,
    t.replicate, t.mode, t.metric, t.failure, t.steps, t.wall_s, t.train_s, t.val_s, t.peak_memory_gib, t.energy_wh,
    t.energy_source, t.environment_hash, t.ended_at
FROM trials AS t JOIN campaigns AS c ON c.id = t.campaign_id LEFT JOIN attempts AS a ON a.id = t.attempt_id""",
    ),
    View(
        "race_stats",
        "a race and proposer: validity, matches, expected gain and latency over the held-out turns",
        """
SELECT c.name AS campaign, r.id AS race_id, r.iteration, p.name AS proposer, count(DISTINCT i.attempt_id) AS items,
    avg(CASE WHEN i.valid THEN 1.0 ELSE 0.0 END) AS valid_rate,
    avg(CASE WHEN i.knob_match THEN 1.0 ELSE 0.0 END) AS knob_match_rate,
    avg(CASE WHEN i.exact_match THEN 1.0 ELSE 0.0 END) AS exact_match_rate,
    avg(i.expected_gain) AS mean_expected_gain, avg(i.latency_s) AS mean_latency_s, r.verdict
FROM race_items AS i JOIN races AS r ON r.id = i.race_id JOIN campaigns AS c ON c.id = r.campaign_id
JOIN proposers AS p ON p.id = i.proposer_id
GROUP BY c.name, r.id, r.iteration, p.name, r.verdict""",
    ),
    View(
        "promotion_log",
        "a switch of the champion with its evidence",
        """
SELECT c.name AS campaign, m.iteration, m.kind, f.name AS from_proposer, t.name AS to_proposer, m.evidence,
    m.decided_by, m.reason, m.at
FROM promotions AS m JOIN campaigns AS c ON c.id = m.campaign_id
LEFT JOIN proposers AS f ON f.id = m.from_proposer_id JOIN proposers AS t ON t.id = m.to_proposer_id""",
    ),
    View(
        "event_log",
        "something that happened, or that a person asked for",
        """
SELECT c.name AS campaign, e.id AS event_id, e.at, e.kind, e.iteration, e.attempt_id, $payload AS payload
FROM events AS e JOIN campaigns AS c ON c.id = e.campaign_id""",
    ),
    View(
        "config_knobs",
        "one knob's value in one configuration",
        """
SELECT c.id AS config_id, k.key AS knob, $knob_value AS value, $knob_number AS value_num
FROM configs AS c, $knob_rows""",
    ),
)
