"""A clock that a test moves, and a trainer whose trials take as long as it says."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

from overnight.store.clock import Clock
from overnight.trainer.scripted import ScriptedTrainer

START = 1_795_000_000.0


class FakeClock(Clock):
    """Time that passes only where somebody sleeps or works; `on_sleep` is told what time it is after each sleep."""

    def __init__(self, on_sleep: Callable[[float], None] = lambda _now: None) -> None:
        self.now = START
        self.slept = 0.0
        self.on_sleep = on_sleep

    def time(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        self.now += seconds
        self.slept += seconds
        self.on_sleep(self.now)


class TimedTrainer(ScriptedTrainer):
    """A scripted trainer whose trials take `seconds` of a fake clock, and cost 1 Wh a second where energy counts."""

    clock: FakeClock
    seconds: float = 60.0
    joules: float | None = None

    def run(self, request: Any, report: Any) -> Any:
        result = super().run(request, report)
        self.clock.now += self.seconds
        return replace(result, wall_s=self.seconds, energy_j=self.joules)
