"""The look at the locked holdout: a fault that passes does not lose it, a failure that repeats is said."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import events, faults
from overnight.agent.budget import is_over
from overnight.agent.run import run_campaign
from overnight.agent.runtime import Runtime
from overnight.store.clock import running_on
from overnight.store.errors import TrainerError
from overnight.store.records import FailureClass
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings

from .campaigns import Recorder, campaign, runtime, scripted
from .clocks import START, FakeClock, TimedTrainer

HOUR = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeClock]:
    """A fake clock, and a fake hour of waiting that is looked at 60 times instead of 720."""
    monkeypatch.setattr(faults, "SLICE_S", 60.0)
    clock = FakeClock()
    with running_on(clock):
        yield clock


class FailsOnHoldout(TimedTrainer):
    """Runs everything but the first trials on the holdout, or those before a time; a failed trial takes `takes_s`."""

    failure: FailureClass = "oom"
    first: int = 0
    until: float = 0.0
    takes_s: float = 60.0
    looked: int = 0

    def run(self, request: Any, report: Any) -> Any:
        result = super().run(request, report)
        if request.split != "holdout":
            return result
        self.looked += 1
        if self.looked > self.first and self.clock.now >= self.until:
            return result
        self.clock.now += self.takes_s - self.seconds
        return replace(result, metric=None, failure=self.failure, trace="what happened")


def ending(
    folder: Path, store: SqlStore, clock: FakeClock, *, iterations: int = 1, **how: Any
) -> tuple[Runtime, FailsOnHoldout, Recorder]:
    """Return a campaign that keeps its first candidate and then looks at the holdout, as its trainer lets it."""
    of = campaign(folder, budget={"iterations": iterations})
    trainer = FailsOnHoldout(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
    trainer.clock = clock
    for name, value in how.items():
        setattr(trainer, name, value)
    recorder = Recorder()
    proposers = scripted(("b", 3), ("b", 4), ("b", 9))
    return runtime(of, store, trainer=trainer, proposers=proposers, hooks=[recorder]), trainer, recorder


@pytest.mark.parametrize("failure", ["oom", "harness"])
def test_a_fault_that_passes_is_waited_out_before_the_look(
    tmp_path: Path, store: SqlStore, clock: FakeClock, failure: FailureClass
) -> None:
    running, _, recorder = ending(tmp_path, store, clock, failure=failure, until=START + HOUR)
    assert run_campaign(running).finished
    running.close()
    assert recorder.of(events.HoldoutMeasured)
    assert clock.slept > HOUR / 2
    assert clock.now < START + HOUR + 2 * faults.LONGEST_HOLD_S + 10 * 60


def test_where_nobody_waits_the_fault_is_raised_and_the_look_is_still_to_come(
    tmp_path: Path, store: SqlStore, clock: FakeClock
) -> None:
    running, _, recorder = ending(tmp_path, store, clock, first=2)
    running.waits_out_faults = False
    with pytest.raises(TrainerError, match=r"a holdout trial failed \(oom\) on seed \d+, .*: what happened; free"):
        run_campaign(running)
    running.close()
    state = store.campaign("c")
    assert state is not None
    assert state.status == "paused"
    assert not recorder.of(events.HoldoutSkipped)
    again, _, recorder = ending(tmp_path, store, clock)
    assert run_campaign(again).finished
    again.close()
    assert recorder.of(events.HoldoutMeasured)


@pytest.mark.parametrize("failure", ["nan", "timeout", "crash", "unsupported"])
def test_a_failure_of_its_own_that_repeats_ends_the_look(
    tmp_path: Path, store: SqlStore, clock: FakeClock, failure: FailureClass
) -> None:
    running, trainer, recorder = ending(tmp_path, store, clock, failure=failure, first=1000)
    assert run_campaign(running).finished
    running.close()
    (skipped,) = recorder.of(events.HoldoutSkipped)
    assert skipped.reason == f"a holdout trial failed ({failure})"
    assert trainer.looked == 2


def test_a_failure_that_does_not_repeat_costs_one_trial(tmp_path: Path, store: SqlStore, clock: FakeClock) -> None:
    running, trainer, recorder = ending(tmp_path, store, clock, failure="crash", first=1)
    run_campaign(running)
    running.close()
    assert recorder.of(events.HoldoutMeasured)
    assert trainer.looked == 1 + 10


def test_a_later_finish_looks_again_whatever_failed_before(tmp_path: Path, store: SqlStore, clock: FakeClock) -> None:
    for iterations, first in ((1, 1000), (2, 0)):
        running, _, recorder = ending(tmp_path, store, clock, iterations=iterations, failure="crash", first=first)
        state = store.campaign("c")
        assert state is None or not is_over(running, state)
        assert run_campaign(running).finished
        running.close()
    assert recorder.of(events.HoldoutMeasured)


def test_after_the_deadline_nothing_is_waited_out(tmp_path: Path, store: SqlStore, clock: FakeClock) -> None:
    running, _, recorder = ending(tmp_path, store, clock, first=1000, takes_s=HOUR)
    running.deadline = START + 1.5 * HOUR
    assert run_campaign(running).finished
    running.close()
    (skipped,) = recorder.of(events.HoldoutSkipped)
    assert (skipped.reason, clock.slept) == ("a holdout trial failed (oom)", 0.0)


def test_a_fault_that_stays_is_waited_out_until_the_deadline_only(
    tmp_path: Path, store: SqlStore, clock: FakeClock
) -> None:
    running, _, recorder = ending(tmp_path, store, clock, first=1000)
    running.deadline = START + 2 * HOUR
    assert run_campaign(running).finished
    running.close()
    (skipped,) = recorder.of(events.HoldoutSkipped)
    assert "no time left" in skipped.reason
    assert clock.slept > HOUR / 2
    assert clock.now <= START + 2 * HOUR + faults.LONGEST_HOLD_S
