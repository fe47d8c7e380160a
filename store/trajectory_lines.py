"""What a line of a trajectory file means: the first trajectory's format, and what this project adds to it.

A header gives the baseline, a line with `iter` is an attempt, `loop_complete` and `paused` are events. What was
exported from a store carries more keys (`outcome`, `trials`, `prompt`, ...), so that it can be imported as it was.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from typing import Any, cast, get_args

from overnight.store.hashing import JsonValue, canonical_json
from overnight.store.jsonl import Fields, LineError, Skipped, knob_value, objects, storable_json
from overnight.store.records import FailureClass, KnobValue, Outcome
from overnight.store.writer import MAX_NOTES_CHARS, MAX_REPLY_CHARS, MAX_TRACE_CHARS, value_text

UNKNOWN = "imported"
"""Stands for what a file does not say: the role of a turn, the trainer and environment of a trial."""
ATTEMPTS = ("evaluated", "blocked", "eval_failed", "nim_error")
EVENTS = {"paused": "paused", "loop_complete": "finished"}
ERROR_KEYS = ("rail_reason", "trace", "block_reason", "verdict_reason", "verdict", "error", "eval_error", "reason")
"""Where files say why something was blocked or failed, the most telling first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Header:
    """What a file says of its campaign."""

    name: str | None = None
    metric_name: str = "val_bpb"
    direction: str = "min"
    gain: str = "relative"
    min_gain: float | None = None
    baseline_metric: float | None = None
    baseline: Mapping[str, KnobValue] | None = None
    extra: Mapping[str, Any] = field(default_factory=dict)
    """Columns of the campaign that only an export has."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrialLine:
    """One run: its configuration, and its columns by name. Seeds are not taken over: imported trials never pair."""

    config: Mapping[str, KnobValue]
    columns: Mapping[str, Any]


@dataclass(frozen=True, slots=True, kw_only=True)
class AttemptLine:
    """One attempt: its columns by name, and what is stored beside it."""

    columns: Mapping[str, Any]
    proposer: tuple[str, str, Mapping[str, JsonValue]]
    """Name, kind, description."""
    baseline: Mapping[str, KnobValue] | None
    config: Mapping[str, KnobValue] | None
    prompt: str | None
    trials: tuple[TrialLine, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class EventLine:
    """Something that happened."""

    kind: str
    at: str
    iteration: int | None
    payload: str


@dataclass(slots=True)
class Trajectory:
    """A file, read."""

    header: Header = field(default_factory=Header)
    attempts: list[AttemptLine] = field(default_factory=list)
    events: list[EventLine] = field(default_factory=list)
    trials: list[TrialLine] = field(default_factory=list)
    """Trials that no attempt paid for: calibration and holdout."""
    skipped: list[Skipped] = field(default_factory=list)


def parse(lines: Iterable[bytes]) -> Trajectory:
    """Read a file's lines; what cannot be read is in `skipped`."""
    found, tries = Trajectory(), dict[int, int]()
    for number, record in objects(lines, found.skipped):
        try:
            _take(record, found, tries)
        except LineError as error:
            found.skipped.append(Skipped(number, str(error)))
    found.skipped.sort(key=lambda skipped: skipped.line)
    return found


def _take(record: Fields, found: Trajectory, tries: dict[int, int]) -> None:
    stage = record.record.get("stage")
    if stage is None and ("_meta" in record or "baseline_cfg" in record):
        found.header = _header(record)
    elif stage == "trial":
        found.trials.append(_trial(record, None))
    elif stage == "event":
        found.events.append(_event(record))
    elif stage in EVENTS:
        payload = storable_json({key: value for key, value in record.record.items() if key not in ("stage", "ts")})
        found.events.append(
            EventLine(
                kind=EVENTS[stage], at=_at(record.time("ts")) or _last_time(found), iteration=record.whole("iter"),
                payload=canonical_json(payload),
            )
        )  # fmt: skip
    elif stage in ATTEMPTS:
        attempt = _attempt(record, found.header, tries)
        tries[attempt.columns["iteration"]] = attempt.columns["try"]
        found.attempts.append(attempt)
    else:
        known = ", ".join([*ATTEMPTS, *EVENTS, "event", "trial"])
        raise LineError(f"the stage is {json.dumps(stage)[:60]}, not one of {known}")


def _last_time(found: Trajectory) -> str:
    return str(found.attempts[-1].columns["decided_at"]) if found.attempts else ""


def _header(record: Fields) -> Header:
    metric = record.inner("metric")
    name = metric.text("name", 200) or "val_bpb"
    return Header(
        name=record.text("campaign", 64),
        metric_name=name,
        direction="max" if metric.text("direction") == "max" else "min",
        gain="absolute" if metric.text("gain") == "absolute" else "relative",
        min_gain=record.number("accept_delta_frac"),
        baseline_metric=record.number(f"baseline_{name}"),
        baseline=record.config("baseline_cfg"),
        extra=storable_json({key: record.record[key] for key in ("spec", "noise_sd", "columns") if key in record}),
    )


def _event(record: Fields) -> EventLine:
    kind = record.text("kind", 100)
    if kind is None:
        raise LineError("an event without its `kind`")
    payload = record.json("payload") or "{}"
    return EventLine(kind=kind, at=_at(record.time("at")), iteration=record.whole("iteration"), payload=payload)


def _attempt(record: Fields, header: Header, tries: Mapping[int, int]) -> AttemptLine:
    iteration, ended = record.whole("iter"), record.time("ts")
    if iteration is None or iteration < 1:
        raise LineError("an attempt without its turn's number, `iter`")
    if ended is None:
        raise LineError("an attempt without its time, `ts`")
    outcome = _outcome(record)
    proposal, config = record.inner("proposal"), record.config("candidate_cfg")
    baseline = record.config("baseline_cfg") or header.baseline
    metric = record.number(header.metric_name)
    measured = outcome in ("kept", "reverted")
    if measured and (metric is None or config is None or "knob" not in proposal or "new_value" not in proposal):
        raise LineError(f"an evaluated attempt without its `proposal`, `candidate_cfg` or `{header.metric_name}`")
    trials = tuple(_trial(run, config) for run in record.each("trials"))
    if not trials and measured and config is not None:
        trials = (_single_trial(record, config, metric, _at(ended)),)
    columns = {
        "iteration": iteration,
        "try": record.whole("try") or tries.get(iteration, 0) + 1,
        "outcome": outcome,
        "is_best": record.flag("is_new_best"),
        "decided_at": _at(ended),
        **_proposal_columns(record, proposal, outcome),
        **_result_columns(record, header, metric if measured else None, len(trials)),
    }
    columns["started_at"] = _started(record, ended, columns["wall_s"])
    columns["diff"] = record.json("changes") or _diff(baseline, config)
    return AttemptLine(
        columns=columns, proposer=_proposer(record), baseline=baseline, config=config,
        prompt=record.text("prompt", 10**7), trials=trials,
    )  # fmt: skip


def _proposal_columns(record: Fields, proposal: Fields, outcome: Outcome) -> dict[str, Any]:
    raw = proposal.record.get("new_value")
    value = None if raw is None else knob_value(raw, "proposal.new_value")
    why = _why(record) if outcome in ("blocked", "failed") else None
    return {
        "role": record.text("role", 40) or UNKNOWN,
        "audit": record.flag("audit") or False,
        "prompt_kind": record.text("prompt_kind", 40) or "reconstructed",
        "reply": record.text("reply", MAX_REPLY_CHARS),
        "settings": record.json("settings"),
        "usage": record.json("usage"),
        "probabilities": record.json("probabilities"),
        "knob": proposal.text("knob", 200),
        "new_value": None if value is None else value_text(value),
        "new_value_num": None if isinstance(value, str) or value is None else float(value),
        "reason": proposal.text("reason"),
        "rail": record.text("rail", 200),
        "rail_reason": why if outcome == "blocked" else record.text("rail_reason", MAX_NOTES_CHARS),
        "failure": _failure(record, why or "") if outcome == "failed" else None,
        "trace": why if outcome == "failed" else record.text("trace", MAX_TRACE_CHARS),
        "notes": record.text("notes", MAX_NOTES_CHARS),
        "proposal_latency_s": record.number("nim_latency_s"),
    }


def _result_columns(record: Fields, header: Header, metric: float | None, trials: int) -> dict[str, Any]:
    baseline = record.number(f"baseline_{header.metric_name}")
    if baseline is None and "trials_counted" not in record:
        baseline = header.baseline_metric if metric is not None else None
    counted = record.whole("trials_counted")
    return {
        "metric": metric,
        "metric_se": record.number("metric_se"),
        "baseline_metric": baseline,
        "gain": record.number("gain") if "gain" in record else _gain(metric, baseline, header),
        "gain_se": record.number("gain_se"),
        "gain_lower": record.number("gain_lower"),
        "trials": trials if counted is None else counted,
        "decision": record.text("explanation", MAX_REPLY_CHARS),
        "wall_s": record.number("iter_wall_s"),
        "energy_wh": record.number("energy_wh"),
    }


def _outcome(record: Fields) -> Outcome:
    """Return the outcome; an export says it, the first format has it in `stage` and `decision`."""
    stage, said = record.record["stage"], record.text("outcome", 20)
    if said is not None:
        if said not in get_args(Outcome):
            raise LineError(f"`outcome` is not one of {', '.join(get_args(Outcome))}")
        return cast(Outcome, said)
    if stage == "blocked":
        return "blocked"
    if stage != "evaluated":
        return "failed"
    decision = record.text("decision", 20)
    if decision not in ("keep", "revert"):
        raise LineError("an evaluated attempt whose `decision` is neither `keep` nor `revert`")
    return "kept" if decision == "keep" else "reverted"


def _failure(record: Fields, why: str) -> FailureClass:
    said = record.text("failure", 20)
    if said in get_args(FailureClass):
        return cast(FailureClass, said)
    timed_out = re.search(r"time[d ]?.?out|timeout", why, re.IGNORECASE) is not None
    if record.record["stage"] == "nim_error":
        return "llm_timeout" if timed_out else "llm_error"
    if re.search(r"out of memory|\boom\b", why, re.IGNORECASE):
        return "oom"
    if re.search(r"\bnan\b|\binf\b|not finite", why, re.IGNORECASE):
        return "nan"
    return "timeout" if timed_out else "crash"


def _why(record: Fields) -> str | None:
    for source in (record, record.inner("eval_metrics")):
        for key in ERROR_KEYS:
            if isinstance(source.record.get(key), str):
                return source.text(key, MAX_TRACE_CHARS)
    return None


def _gain(metric: float | None, baseline: float | None, header: Header) -> float | None:
    if metric is None or baseline is None:
        return None
    better = baseline - metric if header.direction == "min" else metric - baseline
    if header.gain == "absolute":
        return better
    return better / abs(baseline) if baseline else None


def _diff(baseline: Mapping[str, KnobValue] | None, config: Mapping[str, KnobValue] | None) -> str | None:
    if baseline is None or config is None:
        return None
    changed = {name: [baseline.get(name), value] for name, value in config.items() if baseline.get(name) != value}
    return canonical_json(changed)


def _proposer(record: Fields) -> tuple[str, str, Mapping[str, JsonValue]]:
    told = record.inner("proposer")
    return (told.text("name", 200) or "nim", told.text("kind", 40) or UNKNOWN, told.plain("description"))


def _trial(record: Fields, config: Mapping[str, KnobValue] | None) -> TrialLine:
    own = record.config("config") or config
    if own is None:
        raise LineError("a trial without its `config`")
    texts = {"purpose": 40, "trainer_hash": 200, "environment_hash": 200, "split": 20, "mode": 40, "failure": 40}
    texts |= {"trace": MAX_TRACE_CHARS, "notes": MAX_NOTES_CHARS, "energy_source": 200}
    numbers = ("metric", "wall_s", "train_s", "val_s", "peak_memory_gib", "energy_wh")
    columns: dict[str, Any] = {name: record.text(name, limit) for name, limit in texts.items()}
    columns |= {name: record.number(name) for name in numbers}
    columns |= {"replicate": record.whole("replicate") or 0, "steps": record.whole("steps")}
    columns |= {"metrics": record.json("metrics"), "ended_at": _at(record.time("ended_at")), "seed": None}
    defaults = {"purpose": "screening", "trainer_hash": UNKNOWN, "environment_hash": UNKNOWN, "split": "val"}
    return TrialLine(config=own, columns={**columns, **{k: columns[k] or value for k, value in defaults.items()}})


def _single_trial(record: Fields, config: Mapping[str, KnobValue], metric: float | None, at: str) -> TrialLine:
    """Return the one run behind an attempt of the first format, from its `eval_metrics`."""
    told = record.inner("eval_metrics")
    known = ("train_steps", "train_wall_s", "val_wall_s", "peak_gpu_mem_gib", "ok")
    rest = {
        key: value
        for key, value in told.record.items()
        if key not in known and isinstance(value, int | float) and not isinstance(value, bool)
    }
    train_s, val_s = told.number("train_wall_s"), told.number("val_wall_s")
    columns = {
        "purpose": "screening", "trainer_hash": UNKNOWN, "environment_hash": UNKNOWN, "split": "val", "seed": None,
        "replicate": 0, "mode": None, "metric": metric, "failure": None, "trace": None, "notes": None,
        "metrics": canonical_json(storable_json(rest)) if rest else None, "steps": told.whole("train_steps"),
        "wall_s": None if train_s is None else train_s + (val_s or 0.0), "train_s": train_s, "val_s": val_s,
        "peak_memory_gib": told.number("peak_gpu_mem_gib"), "energy_wh": record.number("energy_wh"),
        "energy_source": None, "ended_at": at,
    }  # fmt: skip
    return TrialLine(config=config, columns=columns)


def _started(record: Fields, ended: datetime, wall_s: float | None) -> str:
    """Return when an attempt began; the first format's `ts` is when it ended."""
    started = record.time("started_at")
    return _at(started if started is not None else ended - timedelta(seconds=min(max(wall_s or 0.0, 0.0), 1e7)))


def _at(time: datetime | None) -> str:
    return "" if time is None else time.isoformat(timespec="milliseconds")
