"""What a campaign's history says about its search: rates, repeats, noise, costs, and how far to trust its keeps.

Everything is read from one snapshot. Sums come from the views; the turns are read once, for the curve and for what
depends on their order. It does not promise to tell luck from skill: it says how many keeps noise alone would explain.
"""

from __future__ import annotations

import json
import math
import statistics
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import cached_property
from itertools import pairwise
from typing import Any

from sqlalchemy import Connection, text

from overnight.report.hours import Hours, read_hours
from overnight.report.races import RaceItems, read_items
from overnight.store.database import snapshot
from overnight.store.errors import InputError
from overnight.store.records import GainKind
from overnight.store.sql_store import SqlStore

WINDOW = 10
"""Turns in a window of the repeat rate."""
Row = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn's last try, as far as the analysis needs it."""

    iteration: int
    attempt_id: int
    config_id: str | None
    proposer: str
    role: str
    knob: str | None
    new_value: str | None
    reason: str | None
    outcome: str | None
    rail: str | None
    failure: str | None
    metric: float | None
    metric_se: float | None
    baseline_metric: float | None
    gain: float | None
    gain_se: float | None
    trials: int
    is_best: bool | None
    wall_s: float | None
    energy_wh: float | None
    started_at: str
    is_repeat: int | None
    decision: str | None


@dataclass(frozen=True, slots=True)
class Window:
    """Some turns in a row."""

    first: int
    last: int
    proposals: int
    repeats: int
    kept: int

    @property
    def repeat_rate(self) -> float | None:
        """Share of proposals that had been proposed before."""
        return self.repeats / self.proposals if self.proposals else None


@dataclass(frozen=True, slots=True)
class Replicated:
    """A configuration that was measured more than once."""

    label: str
    config_id: str
    metrics: Sequence[float]
    kept: int
    reverted: int

    @property
    def mean(self) -> float:
        """Mean of its measurements."""
        return math.fsum(self.metrics) / len(self.metrics)

    @property
    def sd(self) -> float:
        """Their standard deviation."""
        return math.sqrt(math.fsum((m - self.mean) ** 2 for m in self.metrics) / (len(self.metrics) - 1))


@dataclass(frozen=True, slots=True)
class Noise:
    """How large the noise is beside what is kept."""

    sd: float
    """Of one run, in the metric's unit."""
    threshold: float
    """Smallest gain that is kept, in the metric's unit."""
    chance: float
    """Probability that a change that does nothing is kept, at most."""
    explained: float
    """Keeps expected from noise alone over the measured attempts."""

    @property
    def ratio(self) -> float:
        """The threshold in standard deviations of a difference of two runs."""
        return self.threshold / (self.sd * math.sqrt(2)) if self.sd else math.inf


@dataclass(frozen=True)
class Analysis:
    """One campaign, read whole."""

    name: str
    spec: Mapping[str, Any]
    stats: Row
    """Its row of `campaign_stats`."""
    turns: Sequence[Turn]
    knobs: Sequence[Row]
    pairs: Sequence[Row]
    proposers: Sequence[Row]
    races: Sequence[Row]
    promotions: Sequence[Row]
    duels: Sequence[Row]
    race: RaceItems | None
    """The newest race, turn by turn."""
    weighed: Sequence[Row]
    """How far challengers were, after each duel and race."""
    failures: Sequence[Row]
    replicated: Sequence[Replicated]
    first_baseline: Mapping[str, Any] | None
    winner: Mapping[str, Any] | None
    baseline_metric: float | None
    """Of the first baseline: the mean of its calibration."""
    holdout: Mapping[str, Any] | None
    """What `holdout_measured` said, or `{"reason": ...}` where it was skipped."""
    campaign: Row
    """Its row of `campaigns`."""
    hours: Hours | None
    """Where the time went; None for an imported trajectory."""

    @property
    def lower_is_better(self) -> bool:
        """Whether less of the metric is better."""
        return bool(self.campaign["direction"] == "min")

    @property
    def gain_kind(self) -> GainKind:
        """Whether gains are shares of the baseline or differences."""
        return "relative" if self.spec["metric"]["gain"] == "relative" else "absolute"

    @property
    def is_relative(self) -> bool:
        """Whether gains are shares of the baseline."""
        return self.gain_kind == "relative"

    @property
    def menu(self) -> Sequence[str]:
        """The knobs of the campaign file; empty where it is not known."""
        return list(self.spec.get("knobs") or {})

    @property
    def untouched(self) -> Sequence[str]:
        """Knobs on the menu that were never proposed."""
        touched = {row["knob"] for row in self.knobs}
        return [knob for knob in self.menu if knob not in touched]

    @cached_property
    def windows(self) -> Sequence[Window]:
        """Repeats and keeps in windows of ten turns."""
        return list(_windows(self.turns))

    @cached_property
    def failure_repeats(self) -> int:
        """Proposals of a (knob, value) that had failed before."""
        failed: set[tuple[str | None, str | None]] = set()
        repeats = 0
        for turn in self.turns:
            pair = turn.knob, turn.new_value
            repeats += turn.knob is not None and pair in failed
            if turn.outcome == "failed" and turn.knob is not None:
                failed.add(pair)
        return repeats

    @cached_property
    def top_pair(self) -> Row | None:
        """The (knob, value) proposed most often."""
        return max(self.pairs, key=lambda row: row["proposed"], default=None)

    @property
    def top_pair_share(self) -> float | None:
        """Its share of all proposals."""
        total = sum(row["proposed"] for row in self.pairs)
        return self.top_pair["proposed"] / total if self.top_pair and total else None

    @cached_property
    def best_so_far(self) -> Sequence[tuple[int, float]]:
        """(turn, best kept metric up to then), at each improvement."""
        best: float | None = None
        steps = []
        for turn in self.turns:
            if turn.outcome == "kept" and turn.metric is not None and (best is None or self._better(turn.metric, best)):
                best = turn.metric
                steps.append((turn.iteration, best))
        return steps

    def _better(self, one: float, other: float) -> bool:
        return one < other if self.lower_is_better else one > other

    def gain_of(self, metric: float) -> float | None:
        """Return a metric's gain over the first baseline, as the campaign file defines gains."""
        if self.baseline_metric is None:
            return None
        better = self.baseline_metric - metric if self.lower_is_better else metric - self.baseline_metric
        return better / abs(self.baseline_metric) if self.is_relative and self.baseline_metric else better

    @property
    def total_gain(self) -> float | None:
        """Gain of the best kept metric over the first baseline; the best of noisy numbers flatters."""
        return self.gain_of(self.best_so_far[-1][1]) if self.best_so_far else None

    @property
    def gpu_hours(self) -> float:
        """Hours in trials of any purpose."""
        return float(self.campaign["trial_s"]) / 3600

    @property
    def energy_kwh(self) -> float | None:
        """Energy of trials; None where nothing was measured."""
        return float(self.campaign["trial_wh"]) / 1000 or None

    @property
    def gain_per_gpu_hour(self) -> float | None:
        """Total gain for each hour in trials."""
        return self.total_gain / self.gpu_hours if self.total_gain is not None and self.gpu_hours else None

    @property
    def gain_per_kwh(self) -> float | None:
        """Total gain for each kilowatt-hour."""
        return self.total_gain / self.energy_kwh if self.total_gain is not None and self.energy_kwh else None

    def seconds_to(self, turn: int | None) -> float | None:
        """Seconds from the first turn's start to the end of a turn."""
        if turn is None or not self.turns:
            return None
        found = next((each for each in self.turns if each.iteration == turn), None)
        if found is None:
            return None
        begin, there = (datetime.fromisoformat(each.started_at) for each in (self.turns[0], found))
        return (there - begin).total_seconds() + (found.wall_s or 0.0)

    @property
    def seconds_to_first_keep(self) -> float | None:
        """Seconds until the first keep."""
        return self.seconds_to(self.stats["first_keep"])

    @property
    def seconds_to_best(self) -> float | None:
        """Seconds until the best keep."""
        return self.seconds_to(self.best_so_far[-1][0] if self.best_so_far else None)

    @cached_property
    def noise(self) -> Noise | None:
        """The noise beside the threshold; None where it is not known."""
        sd, decision = self.campaign["noise_sd"], self.spec.get("decision") or {}
        min_gain = decision.get("min_gain")
        if not sd or min_gain is None or self.baseline_metric is None:
            return None
        threshold = min_gain * abs(self.baseline_metric) if self.is_relative else min_gain
        if decision.get("rule") == "confirmed":
            chance = min(float(decision.get("alpha", 0.01)), self._confirmed_by_chance(min_gain, decision))
        else:
            chance = _upper_tail(threshold / (sd * math.sqrt(2)))
        measured = sum(turn.metric is not None for turn in self.turns)
        return Noise(sd, threshold, chance, chance * measured)

    def _confirmed_by_chance(self, min_gain: float, decision: Mapping[str, Any]) -> float:
        """Return the chance that noise alone reaches `min_gain` over all trials; 1 where no attempt had them all."""
        errors = [turn.gain_se for turn in self.turns if turn.trials == decision.get("max_trials") and turn.gain_se]
        return _upper_tail(min_gain / statistics.median(errors)) if errors else 1.0

    @cached_property
    def contradicted(self) -> Sequence[Replicated]:
        """Configurations that were kept at one time and reverted at another."""
        return [each for each in self.replicated if each.kept and each.reverted]

    @cached_property
    def kept_configs(self) -> int:
        """Different configurations that were kept."""
        return len({turn.config_id for turn in self.turns if turn.outcome == "kept"})

    @cached_property
    def winner_replicates(self) -> Replicated | None:
        """All measurements of the winner's configuration, where it was measured more than once."""
        best = next(
            (turn for turn in reversed(self.turns) if turn.attempt_id == self.campaign["best_attempt_id"]), None
        )
        return next((each for each in self.replicated if best and each.config_id == best.config_id), None)

    @property
    def winner_diff(self) -> Sequence[tuple[str, Any, Any]]:
        """(knob, first value, winner's value) where the two differ."""
        if self.first_baseline is None or self.winner is None:
            return []
        before = self.first_baseline
        return [(knob, before.get(knob), value) for knob, value in self.winner.items() if before.get(knob) != value]


def _upper_tail(z: float) -> float:
    return 0.5 * math.erfc(z / math.sqrt(2))


def _windows(turns: Sequence[Turn]) -> Iterator[Window]:
    for start in range(0, len(turns), WINDOW):
        part = turns[start : start + WINDOW]
        yield Window(
            part[0].iteration,
            part[-1].iteration,
            sum(turn.knob is not None for turn in part),
            sum(turn.is_repeat == 1 for turn in part),
            sum(turn.outcome == "kept" for turn in part),
        )


def analyse(store: SqlStore, campaign: str) -> Analysis:
    """Read a campaign.

    Raises:
        InputError: there is none of that name.
    """
    with snapshot(store.engine) as connection:
        found = _rows(connection, "SELECT * FROM campaigns WHERE name = :name", name=campaign)
        if not found:
            raise InputError(f"no campaign `{campaign}` in this database; `overnight status` lists those it has")
        row = found[0]
        turns = [Turn(**each) for each in _rows(connection, _TURNS, name=campaign)]
        by_name = {
            view: _rows(connection, f"SELECT * FROM {view} WHERE campaign = :name ORDER BY {order}", name=campaign)
            for view, order in _VIEWS.items()
        }
        baseline_id = _first_baseline(connection, row, turns)
        return Analysis(
            name=campaign,
            spec=json.loads(row["spec"]),
            stats=by_name["campaign_stats"][0],
            turns=turns,
            knobs=by_name["knob_stats"],
            pairs=by_name["pair_stats"],
            proposers=by_name["proposer_stats"],
            races=by_name["race_stats"],
            promotions=by_name["promotion_log"],
            duels=by_name["duel_log"],
            race=None if not by_name["race_stats"] else read_items(connection, by_name["race_stats"][-1]["race_id"]),
            weighed=[json.loads(each["payload"]) for each in _rows(connection, _WEIGHED, id=row["id"])],
            failures=_rows(connection, _FAILURES, id=row["id"]),
            replicated=_replicated(connection, row["id"], baseline_id, turns),
            first_baseline=_config(connection, baseline_id),
            winner=_config(connection, _winner(turns, row["best_attempt_id"])),
            baseline_metric=_baseline_metric(connection, row["id"], baseline_id, turns),
            holdout=_holdout(connection, campaign),
            campaign=row,
            hours=read_hours(connection, row["id"]),
        )


_TURNS = f"SELECT {', '.join(Turn.__slots__)} FROM iterations WHERE campaign = :name ORDER BY iteration"
_VIEWS = {
    "campaign_stats": "campaign",
    "knob_stats": "proposed DESC, knob",
    "pair_stats": "proposed DESC, knob, new_value",
    "proposer_stats": "proposals DESC, proposer",
    "race_stats": "race_id, proposer",
    "promotion_log": "iteration, at",
    "duel_log": "iteration",
}
_WEIGHED = "SELECT payload FROM events WHERE campaign_id = :id AND kind = 'weighed' ORDER BY id"
_FAILURES = """
SELECT COALESCE(failure, rail) AS what, CASE WHEN failure IS NULL THEN 'blocked' ELSE 'failed' END AS kind,
    count(*) AS times, max(iteration) AS last_turn,
    max(CASE WHEN failure IS NULL THEN rail_reason ELSE trace END) AS example
FROM attempts WHERE campaign_id = :id AND outcome IN ('blocked', 'failed') GROUP BY 1, 2 ORDER BY times DESC"""
_REPLICATED = """
SELECT t.config_id, t.metric FROM trials AS t WHERE t.campaign_id = :id AND t.split = 'val' AND t.metric IS NOT NULL
    AND t.config_id IN (SELECT r.config_id FROM trials AS r WHERE r.campaign_id = :id AND r.split = 'val'
        AND r.metric IS NOT NULL GROUP BY r.config_id HAVING count(*) > 1)
ORDER BY t.id"""


def _rows(connection: Connection, query: str, **values: object) -> list[dict[str, Any]]:
    return [dict(row) for row in connection.execute(text(query), values).mappings()]


def _config(connection: Connection, config_id: str | None) -> Mapping[str, Any] | None:
    found = _rows(connection, "SELECT body FROM configs WHERE id = :id", id=config_id)
    return json.loads(found[0]["body"]) if found else None


def _first_baseline(connection: Connection, row: Row, turns: Sequence[Turn]) -> str | None:
    """Return the configuration that the campaign began with: what its first attempt was measured against."""
    query = "SELECT baseline_config_id AS id FROM attempts WHERE campaign_id = :id ORDER BY iteration, id LIMIT 1"
    found = _rows(connection, query, id=row["id"]) if turns else []
    first: str | None = found[0]["id"] if found and found[0]["id"] else row["baseline_config_id"]
    return first


def _winner(turns: Sequence[Turn], best_attempt_id: int | None) -> str | None:
    return next((turn.config_id for turn in turns if turn.attempt_id == best_attempt_id), None)


def _baseline_metric(
    connection: Connection, campaign_id: int, baseline_id: str | None, turns: Sequence[Turn]
) -> float | None:
    query = """SELECT avg(metric) AS metric FROM trials WHERE campaign_id = :id AND config_id = :config
        AND purpose = 'calibration' AND split = 'val'"""
    found = _rows(connection, query, id=campaign_id, config=baseline_id)[0]["metric"]
    return (
        found if found is not None else next((t.baseline_metric for t in turns if t.baseline_metric is not None), None)
    )


def _replicated(
    connection: Connection, campaign_id: int, baseline_id: str | None, turns: Sequence[Turn]
) -> list[Replicated]:
    labels: dict[str, str] = {}
    for turn in turns:
        if turn.config_id is not None:
            labels.setdefault(turn.config_id, f"{turn.knob} = {turn.new_value}")
    if baseline_id is not None:
        labels[baseline_id] = "the baseline"
    outcomes = Counter((turn.config_id, turn.outcome) for turn in turns)
    metrics: dict[str, list[float]] = {}
    for row in _rows(connection, _REPLICATED, id=campaign_id):
        metrics.setdefault(row["config_id"], []).append(row["metric"])
    found = [
        Replicated(labels.get(key, key[:8]), key, values, outcomes[key, "kept"], outcomes[key, "reverted"])
        for key, values in metrics.items()
    ]
    return sorted(found, key=lambda each: (-len(each.metrics), each.label))


def _holdout(connection: Connection, campaign: str) -> Mapping[str, Any] | None:
    query = """SELECT kind, payload FROM event_log WHERE campaign = :name
        AND kind IN ('holdout_measured', 'holdout_skipped') ORDER BY kind, event_id"""
    found = _rows(connection, query, name=campaign)
    return json.loads(found[0]["payload"]) if found else None


def spread_evenly(items: Sequence[Any], most: int) -> list[Any]:
    """Return at most `most` items, evenly spread, the first and the last among them."""
    if len(items) <= most:
        return list(items)
    picked = [round(i * (len(items) - 1) / (most - 1)) for i in range(most)]
    return [items[i] for i, after in pairwise([*picked, -1]) if i != after]
