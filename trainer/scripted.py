"""ScriptedTrainer: a trainer without training, for tests, benchmarks and plugin authors.

Its metric is a smooth function of the knobs around a known optimum, plus noise that hashing derives from the seed and
the configuration: exact, so that a test can say what the loop should have found. Faults are scripted by knob value.
The kinds `raise`, `exit`, `hang` and `segfault` really happen, so they belong in a worker process.
"""

from __future__ import annotations

import hashlib
import math
import os
import signal
import statistics
import time
import traceback
from collections.abc import Callable, Mapping
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overnight.store.errors import CampaignError
from overnight.store.hashing import JsonValue, canonical_json, digest
from overnight.store.records import (
    Config,
    FailureClass,
    KnobValue,
    TrainerInfo,
    TrialProgress,
    TrialRequest,
    TrialResult,
)
from overnight.trainer.output import last_lines
from overnight.trainer.protocol import Report, TrainerContext

Fault = FailureClass | Literal["raise", "exit", "hang", "segfault"]
Objective = Callable[[Config, int], float]


class ScriptedSettings(BaseModel):
    """The `[trainer]` table of a scripted campaign."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    shape: Literal["quadratic"] = "quadratic"
    """metric = base + sum of weight * distance^2 (minus, where `higher_is_better`)."""
    optimum: dict[str, int | float | str] = Field(default_factory=dict)
    """The best value of each knob; a knob that is not listed has no effect."""
    weights: dict[str, float] = Field(default_factory=dict)
    """How much a knob matters; 1.0 where not listed."""
    base: float = 1.0
    """The metric at the optimum, without noise."""
    higher_is_better: bool = False
    """Whether the optimum is the largest value."""
    seed_sd: float = Field(default=0.0, ge=0)
    """Standard deviation of what a seed adds to every configuration alike: pairing removes it."""
    noise_sd: float = Field(default=0.0, ge=0)
    """Standard deviation of what a (configuration, seed) adds: pairing leaves it."""
    repeat_sd: float = Field(default=0.0, ge=0)
    """Standard deviation between runs of the same (configuration, seed): above 0 the trainer is not exact."""
    unseeded: bool = False
    """Ignore the seed: its effects are drawn anew each run."""
    sleep_s: float = Field(default=0.0, ge=0)
    """Wall time of a trial, in seconds."""
    steps: int = Field(default=1, ge=1)
    """Steps reported per trial."""
    faults: dict[str, Fault] = Field(default_factory=dict)
    """What goes wrong, by `knob=value`: a failure class, or `raise`, `exit`, `hang`, `segfault`."""
    memory_gib: dict[str, float] = Field(default_factory=dict)
    """Estimated memory by `knob=value`; the largest that applies. Empty: the trainer cannot tell."""
    holdout: bool = True
    """Whether there is a holdout split, on which all noise is drawn anew."""


class ScriptedTrainer:
    """A deterministic synthetic objective that speaks the `Trainer` protocol.

    Args:
        settings: what it pretends; the defaults are a flat, noiseless objective.
        fn: a function of (configuration, seed) that replaces the shape and its noise; only in this process.
        metric: the name of the metric.
    """

    def __init__(
        self, settings: ScriptedSettings | None = None, *, fn: Objective | None = None, metric: str = "val_bpb"
    ) -> None:
        self.settings = settings or ScriptedSettings()
        self._fn = fn
        self._metric = metric
        self.requests: list[TrialRequest] = []
        """The last 1000 trials asked for, oldest first: what a test looks at."""

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """See `Trainer.from_settings`."""
        try:
            checked = ScriptedSettings.model_validate(dict(settings))
        except ValidationError as error:
            first = error.errors(include_url=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise CampaignError(f"`[trainer]`: `{key}` of the scripted trainer: {first['msg']}") from error
        named = {*checked.optimum, *checked.weights, *(key.partition("=")[0] for key in checked.faults)}
        unknown = sorted(named - set(context.knobs))
        if unknown:
            raise CampaignError(f"`[trainer]` names `{unknown[0]}`, which is not a knob; add `[knobs.{unknown[0]}]`")
        return cls(checked, metric=context.metric)

    def prepare(self) -> TrainerInfo:
        """See `Trainer.prepare`."""
        settings: JsonValue = self.settings.model_dump()
        return TrainerInfo(
            trainer="scripted",
            metric=self._metric,
            data_hash=digest({"scripted": settings, "metric": self._metric}),
            environment={"device": "none"},
            has_holdout=self.settings.holdout,
            numbers={"steps": float(self.settings.steps)},
        )

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        """See `Trainer.run`."""
        started = time.monotonic()
        self.requests = [*self.requests[-999:], request]
        try:
            metric, failure, trace = self._measure(request, report)
        except MemoryError:
            metric, failure, trace = None, "oom", last_lines(traceback.format_exc())
        except Exception:  # noqa: BLE001 the objective is a caller's function: whatever it raises is the trial's crash
            metric, failure, trace = None, "crash", last_lines(traceback.format_exc())
        return TrialResult(
            metric, failure, trace, wall_s=time.monotonic() - started, steps=_steps(self.settings, request)
        )

    def _measure(self, request: TrialRequest, report: Report) -> tuple[float | None, FailureClass | None, str]:
        if request.split == "holdout" and not self.settings.holdout:
            return None, "unsupported", "this trainer has no holdout"
        fault = self._fault(request.config)
        if fault is not None:
            failure = _enact(fault)
            return None, failure, f"scripted fault `{fault}`"
        for step in range(1, _steps(self.settings, request) + 1):
            if self.settings.sleep_s:
                time.sleep(self.settings.sleep_s / self.settings.steps)
            report(TrialProgress(step, self.settings.steps))
        metric = self._fn(request.config, request.seed) if self._fn else self.value(request)
        return (metric, None, "") if math.isfinite(metric) else (None, "nan", f"the metric is {metric}")

    def value(self, request: TrialRequest) -> float:
        """Return the metric of `request`, noise included."""
        settings = self.settings
        source: JsonValue = os.urandom(16).hex() if settings.unseeded else request.seed
        seed = {"seed": source, "split": request.split}
        noise = settings.seed_sd * _normal(seed)
        noise += settings.noise_sd * _normal({**seed, "config": dict(request.config)})
        if settings.repeat_sd:
            noise += settings.repeat_sd * _normal(os.urandom(16).hex())
        return self.true_value(request.config) + noise

    def true_value(self, config: Config) -> float:
        """Return the metric of `config` without noise: what infinitely many seeds would average to."""
        loss = sum(
            self.settings.weights.get(knob, 1.0) * _distance(config[knob], best) ** 2
            for knob, best in self.settings.optimum.items()
            if knob in config
        )
        return self.settings.base - loss if self.settings.higher_is_better else self.settings.base + loss

    def _fault(self, config: Config) -> Fault | None:
        return next((self.settings.faults[key] for key in _keys(config) if key in self.settings.faults), None)

    def estimate_memory(self, config: Config) -> int | None:
        """See `Trainer.estimate_memory`."""
        if not self.settings.memory_gib:
            return None
        return int(max((self.settings.memory_gib.get(key, 0.0) for key in _keys(config)), default=0.0) * (1 << 30))

    def unsupported(self, config: Config) -> str | None:
        """See `Trainer.unsupported`."""
        return "scripted as unsupported" if self._fault(config) == "unsupported" else None

    def release(self) -> None:
        """See `Trainer.release`; nothing is held."""

    def close(self) -> None:
        """See `Trainer.close`; nothing is held."""


def _steps(settings: ScriptedSettings, request: TrialRequest) -> int:
    return min(settings.steps, request.max_steps or settings.steps)


def _keys(config: Config) -> list[str]:
    return [f"{knob}={value}" for knob, value in config.items()]


def _distance(value: KnobValue, best: KnobValue) -> float:
    """Return how far a knob is from its best: in decades where both are positive, 0 or 1 for words."""
    if isinstance(value, str) or isinstance(best, str):
        return float(value != best)
    if value > 0 and best > 0:
        return math.log10(value / best)
    return float(value - best)


def _normal(key: JsonValue) -> float:
    """Return a standard normal draw that `key` alone decides."""
    word = int.from_bytes(hashlib.sha256(canonical_json(key).encode()).digest()[:8])
    return statistics.NormalDist().inv_cdf((word + 0.5) / 2**64)


def _enact(fault: Fault) -> FailureClass:
    match fault:
        case "raise":
            raise RuntimeError("scripted fault")
        case "exit":
            os._exit(3)
        case "hang":
            while True:
                time.sleep(3600)
        case "segfault":
            os.kill(os.getpid(), signal.SIGSEGV)
            return "crash"
        case _:
            return fault
