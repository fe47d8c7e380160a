"""A campaign ends with whichever budget comes first, its last trial and its finish inside, and says why."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import events
from overnight.agent.budget import is_over
from overnight.agent.run import RunResult, run_campaign
from overnight.agent.runtime import Runtime
from overnight.agent.seeds import HOLDOUT_SEEDS
from overnight.store.clock import running_on
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings

from .campaigns import Recorder, campaign, first_move, proposing, runtime, scripted
from .clocks import START, FakeClock, TimedTrainer

WIDE = {"a": {"type": "float", "range": [0.0, 1.0], "default": 0.75, "levels": 9}}
GOOD_FIRST = [("b", 3), *(("a", round(0.8 + i / 1000, 6)) for i in range(150))]
"""A keep, then changes for the worse."""
FINISH_S = 2 * HOLDOUT_SEEDS * 60.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


class Night:
    """A campaign on a fake clock, with trials of 60 s."""

    def __init__(self, folder: Path, store: SqlStore, *, joules: float | None = None, **sections: Any) -> None:
        self.clock, self.recorder = FakeClock(), Recorder()
        self.campaign = campaign(folder, **{"knobs": WIDE, **sections})
        self.store, self.joules = store, joules

    def runtime(self, **options: Any) -> Runtime:
        trainer = TimedTrainer(ScriptedSettings.model_validate(self.campaign.file.trainer), metric="loss")
        trainer.clock, trainer.joules = self.clock, self.joules
        return runtime(
            self.campaign,
            self.store,
            trainer=trainer,
            proposers=scripted(*GOOD_FIRST),
            hooks=[self.recorder],
            **options,
        )

    def run(self, hours: float | None = None) -> RunResult:
        with running_on(self.clock):
            running = self.runtime()
            if hours is not None:
                running.deadline = START + hours * 3600
            try:
                return run_campaign(running)
            finally:
                running.close()

    def finished(self) -> events.Finished:
        (event,) = self.recorder.of(events.Finished)
        assert isinstance(event, events.Finished)
        return event


def test_the_last_trial_and_the_finish_are_over_before_until(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500})
    assert night.run(hours=0.75).stop_reason == "until"
    assert night.recorder.of(events.HoldoutMeasured)
    left = START + 0.75 * 3600 - night.clock.now
    assert 0 <= left < 60, "all of the time was used, and not more"


def test_stopping_says_why_in_the_store(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500})
    night.run(hours=0.75)
    shown = datetime.fromtimestamp(START + 0.75 * 3600).strftime("%H:%M")
    state = store.campaign("c")
    assert state is not None
    found = store.last_event(state.id, "finished")
    assert found is not None
    assert (state.stop_reason, found[1]["stop_reason"]) == ("until", "until")
    assert "one more trial (60 s) and the look at the holdout" in str(found[1]["why"])
    assert f"{shown}" in str(found[1]["why"])


def test_a_candidate_that_the_clock_cut_off_is_decided_when_there_is_time(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 1})
    night.run(hours=8.5 / 60)  # six trials of calibration, two of the candidate's five
    state = store.campaign("c")
    assert state is not None
    assert (state.status, store.next_stage(state.id).stage) == ("finished", "train")
    night.run()
    (attempt,) = store.recent(state.id, 9)
    assert (attempt.outcome, attempt.trials) == ("kept", 5)


def test_a_trial_that_takes_too_long_is_dropped_before_it_takes_the_finishs_time(
    tmp_path: Path, store: SqlStore
) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500})

    class Slow(TimedTrainer):
        """From its eleventh trial on it hangs, until the worker's heartbeat ends it."""

        def run(self, request: Any, report: Any) -> Any:
            while len(self.requests) > 10 and request.split == "val":
                self.clock.now += 1.0
                running.idle()
            return super().run(request, report)

    trainer = Slow(ScriptedSettings.model_validate(night.campaign.file.trainer), metric="loss")
    trainer.clock = night.clock
    with running_on(night.clock):
        running = runtime(
            night.campaign, store, trainer=trainer, proposers=scripted(*GOOD_FIRST), hooks=[night.recorder]
        )
        running.deadline = START + 3600.0
        assert run_campaign(running).stop_reason == "until"
        running.close()
    (dropped,) = night.recorder.of(events.TrialDropped)
    assert dropped.reason == "until"
    assert night.recorder.of(events.HoldoutMeasured)
    assert START + 3600 - night.clock.now < 60
    assert night.clock.now <= START + 3600


def test_a_holdout_without_time_stays_locked_until_the_next_run(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 1})
    night.run(hours=11.5 / 60)  # calibration and the candidate's five trials, no time for ten more
    (skipped,) = night.recorder.of(events.HoldoutSkipped)
    assert "it stays locked" in skipped.reason
    night.run()
    assert night.recorder.of(events.HoldoutMeasured)


@pytest.mark.parametrize("budget", ["gpu_hours", "energy_kwh"])
def test_a_measured_budget_holds_the_finish_too(tmp_path: Path, store: SqlStore, budget: str) -> None:
    limit = 0.5 if budget == "gpu_hours" else 1.8  # half an hour of trials, at 1 Wh a second
    night = Night(tmp_path, store, joules=60 * 3600.0, budget={"iterations": 500, budget: limit})
    assert night.run().stop_reason == budget
    state = store.campaign("c")
    assert state is not None
    spent = store.spent(state.id)
    used = spent.trial_hours if budget == "gpu_hours" else spent.energy_kwh
    assert limit * (1 - 1.01 / 30) <= used <= limit + 1e-9
    assert night.recorder.of(events.HoldoutMeasured)
    assert f"`{budget}`" in night.finished().why


def test_patience_counts_turns_without_a_keep(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500, "patience": 7})
    assert night.run().stop_reason == "patience"
    assert night.finished().iterations == 1 + 7
    assert night.finished().why == "`patience`: 7 turns in a row kept nothing"


@pytest.mark.parametrize("raised", [False, True])
def test_a_measured_budget_that_was_not_raised_is_over_whatever_was_reserved(
    tmp_path: Path, store: SqlStore, raised: bool
) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500, "gpu_hours": 0.5})
    night.run()
    state = store.campaign("c")
    assert state is not None
    hours = 1.0 if raised else 0.5
    again = Night(tmp_path, store, budget={"iterations": 500, "gpu_hours": hours}).runtime()
    assert is_over(again, state) is not raised


def test_a_time_asked_for_in_a_run_ends_before_it(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500})
    with running_on(night.clock):
        running = night.runtime()
        running.until = START + 1800.0
        assert run_campaign(running).stop_reason == "paused"
        running.close()
    assert 0 <= START + 1800 - night.clock.now < 60
    assert not night.recorder.of(events.HoldoutMeasured)


def test_until_is_the_next_time_after_the_start(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 2, "until": "07:00"})
    with running_on(night.clock):
        deadline = night.runtime().deadline
    assert deadline is not None
    assert datetime.fromtimestamp(deadline).strftime("%H:%M") == "07:00"
    assert 0 < deadline - START <= 24 * 3600


@pytest.mark.parametrize("how", ["crash", "SIGTERM", "Ctrl-C"])
def test_a_run_that_was_cut_off_keeps_its_deadline(tmp_path: Path, store: SqlStore, how: str) -> None:
    night = Night(tmp_path, store, budget={"iterations": 500, "until": "07:00"})

    class Cut(BaseException):
        pass

    class Ends(Recorder):
        def on_event(self, event: events.Event) -> None:
            if isinstance(event, events.TrialFinished):
                if how == "crash":
                    raise Cut
                running.switch.reason = "SIGTERM" if how == "SIGTERM" else "SIGINT"

    night.recorder = Ends()
    with running_on(night.clock):
        running = night.runtime()
        before = running.deadline
        assert before is not None
        try:
            run_campaign(running)
        except Cut:
            running.lease = None
        running.close()
        night.clock.now = before + 600
        after = night.runtime().deadline
    assert after == (before if how != "Ctrl-C" else before + 24 * 3600)


def test_what_trials_take_is_what_nine_in_ten_did_not_exceed(tmp_path: Path, store: SqlStore) -> None:
    night = Night(tmp_path, store, budget={"iterations": 12, "gpu_hours": 100.0})
    seconds = iter([10.0] * 6 + [float(n) for n in range(1, 200)])

    class Varying(TimedTrainer):
        def run(self, request: Any, report: Any) -> Any:
            return replace(super().run(request, report), wall_s=next(seconds))

    trainer = Varying(ScriptedSettings.model_validate(night.campaign.file.trainer), metric="loss")
    trainer.clock = night.clock
    from overnight.agent.budget import costs_of

    running = runtime(night.campaign, store, trainer=trainer, proposers=proposing(first_move))
    run_campaign(running)
    state = running.state()
    where = {"trainer_hash": running.trainer_hash, "environment_hash": running.environment_hash}
    last = sorted(trial.wall_s or 0.0 for trial in store.recent_trials(state.id, **where, count=40))
    assert sum(wall <= costs_of(running, state).trial_s for wall in last) >= 0.9 * len(last)
    assert costs_of(running, state).trial_s < last[-1]
    running.close()
