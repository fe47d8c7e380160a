"""The views for people who write SQL, in one text for SQLite and PostgreSQL where the engines agree.

Each view carries its description and that of each of its columns, which `overnight sql --schema` prints. Columns may be
added, the documented ones stay. A number that cannot be computed is NULL. Aggregates group by the campaign's name in
the outermost query, so that a `WHERE campaign = ...` reaches the tables and one campaign's rows are all that is read.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from string import Template


@dataclass(frozen=True, slots=True)
class View:
    """A view: its name, what a row is, what its columns mean, and its query (a template of the engine's own words)."""

    name: str
    doc: str
    columns: Mapping[str, str]
    query: str

    def sql(self, dialect: str) -> str:
        """Return the SELECT for `sqlite` or `postgresql`."""
        return Template(self.query).substitute(_WORDS[dialect])


_WORDS = {
    "sqlite": {
        "price": "json_extract(c.spec, '$.budget.price_per_kwh')",
        "knob_rows": "json_each(c.body) AS k",
        "knob_value": "CASE WHEN k.type = 'text' THEN k.value ELSE CAST(k.atom AS TEXT) END",
        "knob_number": "CASE WHEN k.type IN ('integer', 'real') THEN CAST(k.atom AS REAL) END",
        **{
            f"label_{p}": f"{p}.name || coalesce('@' || json_extract({p}.description, '$.adapter.version'), '')"
            for p in "pft"
        },
    },
    "postgresql": {
        "price": "CAST(c.spec::jsonb #>> '{budget,price_per_kwh}' AS double precision)",
        "knob_rows": "LATERAL jsonb_each(c.body::jsonb) AS k",
        "knob_value": "k.value #>> '{}'",
        "knob_number": "CASE WHEN jsonb_typeof(k.value) = 'number' THEN (k.value #>> '{}')::double precision END",
        **{
            f"label_{p}": f"{p}.name || coalesce('@' || ({p}.description::jsonb #>> '{{adapter,version}}'), '')"
            for p in "pft"
        },
    },
}

CAMPAIGN = "the campaign's name"
_PURPOSES = {
    "calibration": "measuring the first baseline on several seeds",
    "screening": "a candidate's first trial",
    "confirmation": "a promising candidate's further trials",
    "audit": "replicates drawn beforehand, for the noise",
    "baseline": "a new baseline on seeds that it lacked",
    "duel": "both answers of a duel and the baseline, on a seed of their own",
    "race": "picks of a race that nobody had measured, and the baseline, on a seed of their own",
    "holdout": "the locked holdout",
}


def _count(condition: str, name: str) -> str:
    return f"sum(CASE WHEN {condition} THEN 1 ELSE 0 END) AS {name}"


_KEPT = "sum(CASE WHEN a.outcome = 'kept' THEN 1 ELSE 0 END)"
_PAIRS = "count(DISTINCT CASE WHEN a.knob IS NOT NULL THEN a.knob || '=' || a.new_value END)"


def _rate(condition: str, name: str, known: str = "") -> str:
    """A share as a double on both engines; PostgreSQL would make a decimal of a mean of literals."""
    unknown = f"WHEN NOT ({known}) THEN NULL " if known else ""
    return f"avg(CAST(CASE {unknown}WHEN {condition} THEN 1 ELSE 0 END AS double precision)) AS {name}"


_LAST_TRY = """a."try" = (SELECT max(b."try") FROM attempts AS b
    WHERE b.campaign_id = a.campaign_id AND b.iteration = a.iteration)"""
_IS_REPEAT = """EXISTS (SELECT 1 FROM attempts AS b
    WHERE b.campaign_id = a.campaign_id AND b.knob = a.knob AND b.new_value = a.new_value AND b.id < a.id)"""
_TRIALS_BY_PURPOSE = ", ".join(
    f"(SELECT count(*) FROM trials AS t WHERE t.campaign_id = c.id AND t.purpose = '{purpose}') AS {purpose}_trials, "
    f"(SELECT sum(t.wall_s) FROM trials AS t WHERE t.campaign_id = c.id AND t.purpose = '{purpose}') AS {purpose}_s"
    for purpose in _PURPOSES
)

VIEWS = (
    View(
        "iterations",
        "a turn's last try: what was proposed, by whom, and what came of it",
        {
            "campaign": CAMPAIGN,
            "iteration": "the turn, from 1",
            "attempt_id": "key into `attempts` and `trial_log`",
            "config_id": "the candidate: key into `configs` and `config_knobs`",
            "proposer": "who proposed",
            "fallback": "1 where the uniform proposer stood in for one that gave no usable answer",
            "knob": "the knob to change; NULL where no proposal could be read",
            "new_value": "its new value, as text",
            "new_value_num": "its new value, where that is a number",
            "reason": "the proposer's own words; untrusted text",
            "outcome": "`kept`, `reverted`, `blocked` or `failed`; NULL while the turn runs",
            "rail": "the rail that blocked it",
            "failure": "why it failed: oom, nan, timeout, crash, unsupported, llm_timeout, llm_error or harness",
            "metric": "mean over the attempt's trials; NULL for a failure",
            "baseline_metric": "mean of the baseline over the same seeds",
            "gain": "how much better than the baseline, as the campaign file defines it (relative: 0.01 is 1%)",
            "trials": "trials behind the metric",
            "is_best": "whether it was the best so far when it was decided",
            "proposal_latency_s": "seconds until the proposer answered",
            "wall_s": "seconds of the attempt's trials",
            "energy_wh": "watt-hours of the attempt's trials, where measured",
            "started_at": "UTC, ISO 8601",
            "role": "why this proposer had the turn: champion, duel_champion, duel_challenger, predecessor, warmup, "
            "explore, request, fallback or imported",
            "metric_se": "standard error of the metric",
            "gain_se": "standard error of the gain",
            "gain_lower": "one-sided lower bound of the gain at the campaign's alpha",
            "decision": "the rule's explanation in words",
            "is_repeat": "1 where the same (knob, new_value) was proposed before in this campaign",
        },
        f"""
SELECT c.name AS campaign, a.iteration, a.id AS attempt_id, a.config_id, p.name AS proposer,
    CASE WHEN a.role = 'fallback' THEN 1 ELSE 0 END AS fallback, a.knob, a.new_value, a.new_value_num, a.reason,
    a.outcome, a.rail, a.failure, a.metric, a.baseline_metric, a.gain, a.trials, a.is_best, a.proposal_latency_s,
    a.wall_s, a.energy_wh, a.started_at, a.role, a.metric_se, a.gain_se, a.gain_lower, a.decision,
    CASE WHEN a.knob IS NULL THEN NULL WHEN {_IS_REPEAT} THEN 1 ELSE 0 END AS is_repeat
FROM attempts AS a
JOIN campaigns AS c ON c.id = a.campaign_id
JOIN proposers AS p ON p.id = a.proposer_id
WHERE {_LAST_TRY}""",
    ),
    View(
        "knob_stats",
        "a knob of a campaign: how often it was proposed, kept, and what it gained",
        {
            "campaign": CAMPAIGN,
            "knob": "the knob",
            "proposed": "tries that proposed it, blocked ones too",
            "kept": "how many were kept",
            "distinct_values": "different values proposed",
            "mean_gain": "mean gain over its measured attempts",
            "best_gain": "largest gain of an attempt; the largest of many noisy ones flatters",
        },
        f"""
SELECT c.name AS campaign, a.knob, count(*) AS proposed, {_count("a.outcome = 'kept'", "kept")},
    count(DISTINCT a.new_value) AS distinct_values, avg(a.gain) AS mean_gain, max(a.gain) AS best_gain
FROM attempts AS a JOIN campaigns AS c ON c.id = a.campaign_id
WHERE a.knob IS NOT NULL
GROUP BY c.name, a.knob""",
    ),
    View(
        "pair_stats",
        "a (knob, value) of a campaign: how often it was proposed and what it measured",
        {
            "campaign": CAMPAIGN,
            "knob": "the knob",
            "new_value": "the value, as text",
            "proposed": "tries that proposed it, blocked ones too",
            "kept": "how many were kept",
            "reverted": "how many were measured and reverted",
            "mean_metric": "mean metric over its measured attempts",
            "sd_metric": "standard deviation of that metric between attempts; NULL for fewer than two",
        },
        f"""
SELECT c.name AS campaign, a.knob, a.new_value, count(*) AS proposed, {_count("a.outcome = 'kept'", "kept")},
    {_count("a.outcome = 'reverted'", "reverted")}, avg(a.metric) AS mean_metric,
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
        {
            "campaign": CAMPAIGN,
            "proposer": "its name in the campaign file",
            "proposals": "tries it was asked for; what a person asked for in its place is not its own",
            "valid": "answers that passed the rails",
            "kept": "changes that were kept",
            "distinct_pairs": "different (knob, value) among its proposals",
            "knobs_touched": "different knobs among its proposals",
            "repeat_rate": "share of its proposals that anyone had proposed before in this campaign",
            "mean_latency_s": "mean seconds to an answer",
        },
        f"""
SELECT c.name AS campaign, p.name AS proposer, count(*) AS proposals,
    {_count("a.config_id IS NOT NULL AND a.rail IS NULL", "valid")}, {_count("a.outcome = 'kept'", "kept")},
    {_PAIRS} AS distinct_pairs,
    count(DISTINCT a.knob) AS knobs_touched, {_rate(_IS_REPEAT, "repeat_rate", "a.knob IS NOT NULL")},
    avg(a.proposal_latency_s) AS mean_latency_s
FROM campaigns AS c JOIN attempts AS a ON a.campaign_id = c.id JOIN proposers AS p ON p.id = a.proposer_id
WHERE a.role <> 'request'
GROUP BY c.name, p.name""",
    ),
    View(
        "campaign_stats",
        "a campaign in one row",
        {
            "campaign": CAMPAIGN,
            "metric_name": "what is optimised",
            "iterations": "turns begun",
            "kept": "tries kept",
            "reverted": "tries measured and reverted",
            "blocked": "tries that a rail blocked",
            "failed": "tries that failed",
            "accept_rate": "kept / iterations",
            "knobs_on_menu": "knobs in the campaign file; NULL for an import without one",
            "knobs_touched": "different knobs proposed",
            "distinct_pairs": "different (knob, value) proposed",
            "repeats": "proposals whose (knob, value) was proposed before",
            "repeat_rate": "repeats / proposals that could be read",
            "first_keep": "turn of the first keep",
            "best_iteration": "turn of the best attempt",
            "best_metric": "its metric",
            "best_gain": "its gain, as the campaign file defines it",
            "noise_sd": "standard deviation of one trial over seeds, in the metric's unit",
            "wall_s": "seconds of all attempts' trials",
            "energy_wh": "watt-hours of all attempts' trials, where measured",
            "energy_cost": "what all its trials' energy cost at the campaign file's `budget.price_per_kwh`",
            "status": "new, running, paused, finished or imported",
            "stop_reason": "why it finished",
            **{
                column: meaning
                for purpose, why in _PURPOSES.items()
                for column, meaning in ((f"{purpose}_trials", f"trials: {why}"), (f"{purpose}_s", f"seconds: {why}"))
            },
        },
        f"""
SELECT c.name AS campaign, c.metric_name, count(DISTINCT a.iteration) AS iterations,
    {_count("a.outcome = 'kept'", "kept")}, {_count("a.outcome = 'reverted'", "reverted")},
    {_count("a.outcome = 'blocked'", "blocked")}, {_count("a.outcome = 'failed'", "failed")},
    CAST({_KEPT} AS double precision) / NULLIF(count(DISTINCT a.iteration), 0) AS accept_rate,
    c.knobs_on_menu, count(DISTINCT a.knob) AS knobs_touched,
    {_PAIRS} AS distinct_pairs, count(a.knob) - {_PAIRS} AS repeats,
    CAST(count(a.knob) - {_PAIRS} AS double precision) / NULLIF(count(a.knob), 0) AS repeat_rate,
    min(CASE WHEN a.outcome = 'kept' THEN a.iteration END) AS first_keep,
    (SELECT b.iteration FROM attempts AS b WHERE b.id = c.best_attempt_id) AS best_iteration,
    (SELECT b.metric FROM attempts AS b WHERE b.id = c.best_attempt_id) AS best_metric,
    (SELECT b.gain FROM attempts AS b WHERE b.id = c.best_attempt_id) AS best_gain,
    c.noise_sd, sum(a.wall_s) AS wall_s, sum(a.energy_wh) AS energy_wh,
    NULLIF(c.trial_wh, 0) / 1000 * $price AS energy_cost, c.status, c.stop_reason,
    {_TRIALS_BY_PURPOSE}
FROM campaigns AS c LEFT JOIN attempts AS a ON a.campaign_id = c.id
GROUP BY c.name, c.id""",
    ),
    View(
        "trial_log",
        "one trial: a run of (configuration, seed) with what it measured and cost",
        {
            "campaign": CAMPAIGN,
            "trial_id": "its key",
            "attempt_id": "the attempt that paid for it; NULL for calibration and the locked holdout",
            "iteration": "that attempt's turn",
            "purpose": ", ".join(_PURPOSES),
            "config_id": "what was run: key into `configs` and `config_knobs`",
            "split": "`val`, or the locked `holdout`",
            "seed": "of initial weights, data order and dropout; NULL for an imported trial",
            "replicate": "0 for the first run of this seed",
            "mode": "execution mode (eager, compiled, ...)",
            "metric": "what it measured; NULL for a failure",
            "failure": "why it failed",
            "steps": "optimizer steps",
            "wall_s": "seconds in all",
            "train_s": "seconds training",
            "val_s": "seconds validating",
            "peak_memory_gib": "most memory held",
            "energy_wh": "watt-hours, where measured",
            "energy_source": "what measured them",
            "environment_hash": "device, library versions, execution mode",
            "ended_at": "UTC, ISO 8601",
        },
        """
SELECT c.name AS campaign, t.id AS trial_id, t.attempt_id, a.iteration, t.purpose, t.config_id, t.split, t.seed,
    t.replicate, t.mode, t.metric, t.failure, t.steps, t.wall_s, t.train_s, t.val_s, t.peak_memory_gib, t.energy_wh,
    t.energy_source, t.environment_hash, t.ended_at
FROM trials AS t JOIN campaigns AS c ON c.id = t.campaign_id LEFT JOIN attempts AS a ON a.id = t.attempt_id""",
    ),
    View(
        "race_stats",
        "a race and proposer: how it answered the held-out turns",
        {
            "campaign": CAMPAIGN,
            "race_id": "the race",
            "iteration": "the turn after which it was run",
            "proposer": "who answered; `student@v3` is the student with its third adapter",
            "items": "held-out turns answered",
            "valid_rate": "share of answers that pass the rails of that moment",
            "knob_match_rate": "share that name the knob that was tried; its own recorded choices are left out",
            "exact_match_rate": "share that name the knob and value that were tried; likewise",
            "mean_expected_gain": "mean gain of its picks, where they were measured",
            "mean_latency_s": "mean seconds to an answer",
            "verdict": "what the race showed: the gate in words",
            "held_out": "turns that were to be answered",
            "missing": "turns without an answer: an endpoint was down, a model did not load",
            "modal_match_rate": "share of turns whose most frequent answer is what was tried",
            "agreement": "mean chance that two of its draws agree: the ceiling of any match rate",
            "tried_probability": "mean probability that it gives to what was tried, where it knows its probabilities",
            "distinct_pairs": "different (knob, value) among its first answers",
            "unmeasured_rate": "share of its valid picks whose gain is not known",
            "median_latency_s": "median seconds to an answer",
            "p95_latency_s": "95th percentile of the seconds to an answer",
            "failure": "why the whole race counts for nothing",
        },
        f"""
SELECT c.name AS campaign, r.id AS race_id, r.iteration, $label_p AS proposer,
    count(DISTINCT CASE WHEN i.failure IS NULL THEN i.attempt_id END) AS items,
    {_rate("i.valid", "valid_rate", "i.valid IS NOT NULL")},
    {_rate("i.knob_match", "knob_match_rate", "i.knob_match IS NOT NULL")},
    {_rate("i.exact_match", "exact_match_rate", "i.exact_match IS NOT NULL")},
    avg(i.expected_gain) AS mean_expected_gain, avg(i.latency_s) AS mean_latency_s, r.verdict, r.held_out,
    count(DISTINCT CASE WHEN i.failure IS NOT NULL AND i.draw = 0 THEN i.attempt_id END) AS missing,
    {_rate("i.modal_match", "modal_match_rate", "i.modal_match IS NOT NULL")},
    avg(i.agreement) AS agreement, avg(i.tried_probability) AS tried_probability,
    count(DISTINCT CASE WHEN i.draw = 0 AND i.knob IS NOT NULL THEN i.knob || '=' || i.new_value END) AS distinct_pairs,
    {_rate("i.expected_gain IS NULL", "unmeasured_rate", "i.valid")},
    avg(CASE WHEN i.place IN ((i.timed + 1) / 2, (i.timed + 2) / 2) THEN i.latency_s END) AS median_latency_s,
    max(CASE WHEN i.place = (95 * i.timed + 99) / 100 THEN i.latency_s END) AS p95_latency_s, r.failure
FROM campaigns AS c JOIN races AS r ON r.campaign_id = c.id
JOIN (SELECT e.*, count(e.latency_s) OVER (PARTITION BY e.race_id, e.proposer_id) AS timed,
    row_number() OVER (PARTITION BY e.race_id, e.proposer_id ORDER BY e.latency_s IS NULL, e.latency_s) AS place
    FROM race_items AS e) AS i ON i.race_id = r.id
JOIN proposers AS p ON p.id = i.proposer_id
GROUP BY c.name, r.id, r.iteration, p.id, p.name, p.description, r.verdict, r.held_out, r.failure""",
    ),
    View(
        "duel_log",
        "a duel: champion and challenger answered one prompt, both were measured on one seed of their own",
        {
            "campaign": CAMPAIGN,
            "iteration": "the first of its two turns",
            "kind": "challenge, or return: the challenger is the predecessor of a promoted champion",
            "champion": "who defended",
            "challenger": "who challenged",
            "champion_attempt_id": "key into `attempts`",
            "challenger_attempt_id": "key into `attempts`",
            "champion_pick": "knob = value that the champion proposed",
            "challenger_pick": "knob = value that the challenger proposed",
            "champion_gain": "its paired gain on the duel's seed; NULL where the answer was blocked or failed",
            "challenger_gain": "likewise",
            "champion_banked": "posterior gain where positive, up to a cap fixed before the duel; 0 for no answer",
            "challenger_banked": "likewise",
            "item": "(challenger banked - champion banked) / cap: above 0 the challenger won",
            "note": "the same answer, or why the duel counts for nothing",
            "seed": "of its trials",
            "settled_at": "UTC, ISO 8601; NULL while it runs",
        },
        """
SELECT c.name AS campaign, d.iteration, d.kind, $label_f AS champion, $label_t AS challenger, d.champion_attempt_id,
    d.challenger_attempt_id, a.knob || ' = ' || a.new_value AS champion_pick,
    b.knob || ' = ' || b.new_value AS challenger_pick, d.champion_gain, d.challenger_gain, d.champion_banked,
    d.challenger_banked, d.item, d.note, d.seed, d.settled_at
FROM duels AS d JOIN campaigns AS c ON c.id = d.campaign_id
JOIN proposers AS f ON f.id = d.champion_id JOIN proposers AS t ON t.id = d.challenger_id
LEFT JOIN attempts AS a ON a.id = d.champion_attempt_id LEFT JOIN attempts AS b ON b.id = d.challenger_attempt_id""",
    ),
    View(
        "promotion_log",
        "a switch of the champion with its evidence",
        {
            "campaign": CAMPAIGN,
            "iteration": "the turn after which it happened",
            "kind": "promotion or rollback",
            "from_proposer": "who had the turn before",
            "to_proposer": "who has it now; `student@v3` is the student with its third adapter",
            "evidence": "JSON: the numbers it rests on",
            "decided_by": "the router, or a person",
            "reason": "in words",
            "at": "UTC, ISO 8601",
        },
        """
SELECT c.name AS campaign, m.iteration, m.kind, $label_f AS from_proposer, $label_t AS to_proposer, m.evidence,
    m.decided_by, m.reason, m.at
FROM promotions AS m JOIN campaigns AS c ON c.id = m.campaign_id
LEFT JOIN proposers AS f ON f.id = m.from_proposer_id JOIN proposers AS t ON t.id = m.to_proposer_id""",
    ),
    View(
        "event_log",
        "something that happened, or that a person asked for",
        {
            "campaign": CAMPAIGN,
            "event_id": "its key; events are numbered in the order they were recorded",
            "at": "UTC, ISO 8601",
            "kind": "run_started, calibrated, holdout_measured, finished, enqueued, pause_requested, ...",
            "iteration": "the turn it belongs to",
            "attempt_id": "the attempt it belongs to",
            "payload": "JSON: what it says",
        },
        """
SELECT c.name AS campaign, e.id AS event_id, e.at, e.kind, e.iteration, e.attempt_id, e.payload
FROM events AS e JOIN campaigns AS c ON c.id = e.campaign_id""",
    ),
    View(
        "config_knobs",
        "one knob's value in one configuration",
        {
            "config_id": "the configuration",
            "knob": "the knob",
            "value": "its value, as text",
            "value_num": "its value, where that is a number",
        },
        """
SELECT c.id AS config_id, k.key AS knob, $knob_value AS value, $knob_number AS value_num
FROM configs AS c, $knob_rows""",
    ),
)
