"""The report accounts for every second of a campaign, each on one thing."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from overnight.agent import events
from overnight.agent.run import run_campaign
from overnight.report.analysis import analyse
from overnight.report.hours import DROPPED, GONE_CUT_OFF, GONE_PAUSED, LOOP, LOST, ORDER, Hours, Span, spent
from overnight.report.page import render_report
from overnight.store.clock import running_on
from overnight.store.errors import TrainerError
from overnight.store.sql_store import SqlStore
from overnight.trainer.scripted import ScriptedSettings

from ..agent_tests.campaigns import Recorder, campaign, runtime, scripted
from ..agent_tests.clocks import FakeClock, TimedTrainer

GONE_S = 3600.0


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


class Killed(BaseException):
    pass


def night(folder: Path, store: SqlStore, clock: FakeClock, act: Any = None, **options: Any) -> None:
    """Run the small campaign with trials of a minute; `act` may end the run at an event."""
    of = campaign(folder, budget={"iterations": 2})
    trainer = options.pop("trainer", TimedTrainer)(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
    trainer.clock = clock

    class Acts(Recorder):
        def on_event(self, event: events.Event) -> None:
            super().on_event(event)
            if act is not None:
                act(running, event, len(self.of(events.TrialFinished)))

    with running_on(clock):
        running = runtime(of, store, trainer=trainer, proposers=scripted(("b", 3), ("b", 9)), hooks=[Acts()])
        try:
            run_campaign(running)
        except Killed:
            running.lease = None
        finally:
            running.close()


def hours(store: SqlStore) -> Hours:
    found = analyse(store, "c").hours
    assert found is not None
    return found


def test_an_undisturbed_campaign_is_all_trials(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()
    begin = clock.now
    night(tmp_path, store, clock)
    found = hours(store)
    assert found.total == pytest.approx(clock.now - begin, abs=0.01)
    expected = {"calibration": 360, "trials of candidates": 360, "the locked holdout": 600}
    assert {what: round(s) for what, s in found.seconds.items() if s > 1} == expected
    assert found.stopped == "finished: `iterations`: all 2 turns were taken"


def test_a_pause_and_what_it_dropped_are_accounted_for(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()

    def term(running: Any, event: events.Event, trials: int) -> None:
        if isinstance(event, events.TrialStepped) and trials == 8:
            clock.now += 25.0
            running.switch.reason, running.switch.urgent = "SIGTERM", True
            raise_interrupted(running)

    def raise_interrupted(running: Any) -> None:
        from overnight.agent.signals import Interrupted

        raise Interrupted

    night(tmp_path, store, clock, term)
    clock.now += GONE_S
    night(tmp_path, store, clock)
    found = hours(store)
    assert found.seconds[GONE_PAUSED] == pytest.approx(GONE_S, abs=1)
    assert found.seconds[DROPPED] == pytest.approx(25.0, abs=1)


def test_a_crash_and_the_work_that_it_lost_are_accounted_for(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()

    def die(running: Any, event: events.Event, trials: int) -> None:
        if isinstance(event, events.TrialStepped) and trials == 8:
            clock.now += 40.0
            running.store.renew(running.lease)
            clock.now += 5.0
            raise Killed

    night(tmp_path, store, clock, die)
    clock.now += GONE_S
    night(tmp_path, store, clock)
    found = hours(store)
    assert found.seconds[LOST] == pytest.approx(40.0, abs=1)
    assert found.seconds[GONE_CUT_OFF] == pytest.approx(GONE_S + 5.0, abs=1)
    assert found.seconds["trials of candidates"] == pytest.approx(360, abs=1)


def test_waiting_for_a_fault_is_accounted_for(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()

    class Away(TimedTrainer):
        until = 0.0

        def run(self, request: Any, report: Any) -> Any:
            if len(self.requests) == 8:
                self.until = self.until or clock.now + 2 * GONE_S
                if clock.now < self.until:
                    raise TrainerError("the driver is gone")
            return super().run(request, report)

    night(tmp_path, store, clock, trainer=Away)
    found = hours(store)
    assert found.seconds["waiting for the trainer or its device"] == pytest.approx(2 * GONE_S, abs=301)
    (fault,) = found.faults
    assert (fault.what, fault.detail) == ("trainer", "the driver is gone")
    assert fault.seconds is not None
    assert fault.seconds >= 2 * GONE_S


def test_the_page_has_the_account(tmp_path: Path, store: SqlStore) -> None:
    night(tmp_path, store, FakeClock())
    page = render_report(analyse(store, "c"))
    assert "<h2>Where the time went</h2>" in page
    assert '<td>calibration</td><td class="n">0:06:00</td>' in page
    assert "all 2 turns were taken" in page


@given(
    st.lists(st.tuples(st.integers(0, 100), st.integers(0, 40), st.sampled_from(ORDER)), max_size=12),
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 30)), min_size=1, max_size=4),
)
def test_whatever_overlaps_the_parts_add_up_to_the_whole(
    work: list[tuple[int, int, str]], runs: list[tuple[int, int]]
) -> None:
    at, sessions, gaps = 0, [], []
    for length, gap in runs:
        sessions.append(Span(at, at + length, LOOP))
        gaps.append(Span(at + length, at + length + gap, GONE_PAUSED))
        at += length + gap
    spans = [Span(start, start + length, what) for start, length, what in work]
    found = spent([*spans, *sessions, *gaps[:-1]], sessions)
    assert math.isclose(sum(found.values()), sessions[-1].end - sessions[0].start)
    assert all(seconds > 0 for seconds in found.values())


def test_an_imported_trajectory_has_no_account(store: SqlStore) -> None:
    spec = {"campaign": {"seed": 0}, "metric": {"name": "m", "direction": "min", "gain": "relative"}, "knobs": {}}
    store.open_campaign(name="old", path="", spec=spec, frozen_hash="", knobs_on_menu=0)
    assert analyse(store, "old").hours is None
