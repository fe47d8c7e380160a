"""What goes wrong outside at night: each fault really happens, is recorded, and costs nothing that was measured."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil
import pytest

from overnight.agent import events, faults
from overnight.agent.proposers.breaker import Breaker
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Ask, reply_text
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.run import HARNESS_IN_A_ROW, open_runtime, run_campaign
from overnight.agent.runtime import RENEW_EVERY_S, Runtime
from overnight.store.clock import running_on
from overnight.store.errors import CampaignError, ProposerError, StorageFaultError, TrainerError
from overnight.store.lease import REMOTE_SILENCE
from overnight.store.protocol import Lease
from overnight.store.sql_store import SqlStore
from overnight.store.writer import SqlWriter
from overnight.trainer.scripted import ScriptedSettings
from overnight.trainer.worker import WorkerTrainer

from ..disks import fill, make_room, small_disk
from .campaigns import Recorder, campaign, first_move, proposing, runtime, scripted
from .clocks import START, FakeClock, TimedTrainer
from .servers import LoopbackServer, Wire

HOUR = 3600.0
DISK_KIB = 12_288
"""Room for a small campaign; what is left is filled up."""


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture(autouse=True)
def fewer_looks(monkeypatch: pytest.MonkeyPatch) -> None:
    """A fake hour of waiting is looked at 60 times instead of 720."""
    monkeypatch.setattr(faults, "SLICE_S", 60.0)


def rows(store: SqlStore, query: str) -> list[Any]:
    with store.engine.connect() as connection:
        return [tuple(row) for row in connection.exec_driver_sql(query)]


def recorded(store: SqlStore) -> list[tuple[str, str]]:
    """Return the faults that have a row, in order."""
    return rows(
        store,
        "SELECT kind, json_extract(payload, '$.what') FROM events WHERE kind IN ('fault', 'fault_over') ORDER BY id",
    )


def decisions(store: SqlStore) -> list[Any]:
    return rows(store, "SELECT iteration, knob, new_value, outcome, gain, trials FROM attempts ORDER BY id")


def timed(folder: Path, clock: FakeClock, store: SqlStore, **options: Any) -> Runtime:
    """Return a campaign whose trials take a minute of the fake clock."""
    sections = options.pop("sections", {})
    of = campaign(folder, **{"budget": {"iterations": 6}, **sections})
    trainer = options.pop("trainer", TimedTrainer)(ScriptedSettings.model_validate(of.file.trainer), metric="loss")
    trainer.clock = clock
    return runtime(of, store, trainer=trainer, **options)


class After(Recorder):
    """Does something once, after a number of events of a kind."""

    def __init__(self, kind: type[events.Event], count: int, act: Callable[[], None]) -> None:
        super().__init__()
        self._kind, self._count, self._act = kind, count, act

    def on_event(self, event: events.Event) -> None:
        super().on_event(event)
        if isinstance(event, self._kind):
            self._count -= 1
            if self._count == 0:
                self._act()


# A disk that fills up


def undisturbed(folder: Path) -> tuple[list[Any], int]:
    store, clock = SqlStore.open(folder / "calm.db", create=True), FakeClock()
    with running_on(clock):
        running = timed(folder, clock, store)
        run_campaign(running)
        running.close()
    found = decisions(store), len(rows(store, "SELECT id FROM trials"))
    store.close()
    return found


@pytest.mark.parametrize("moment", [events.TrialStarted, events.TurnStarted])
def test_a_disk_that_fills_up_is_waited_for_and_nothing_is_lost(tmp_path: Path, moment: type[events.Event]) -> None:
    calm, trials = undisturbed(tmp_path)
    with small_disk(tmp_path / "disk", kib=DISK_KIB) as disk:

        def gets_room(now: float) -> None:
            if now > clock.full_at + HOUR and (disk / "filler").exists():
                make_room(disk)

        class Disk(FakeClock):
            full_at = float("inf")

        def fills_up() -> None:
            fill(disk)
            clock.full_at = clock.now

        clock = Disk(gets_room)
        store = SqlStore.open(disk / "overnight.db", create=True)
        with running_on(clock):
            running = timed(tmp_path, clock, store, hooks=[After(moment, 4, fills_up)])
            assert run_campaign(running, checkpoints=disk / "checkpoints").finished
            running.close()
        assert (decisions(store), len(rows(store, "SELECT id FROM trials"))) == (calm, trials)
        assert recorded(store) == [("fault", "storage"), ("fault_over", "storage")]
        ((wall_s,),) = rows(store, "SELECT json_extract(payload, '$.wall_s') FROM events WHERE kind = 'fault_over'")
        assert HOUR <= wall_s <= HOUR + 400
        store.close()


def test_a_trial_that_found_no_room_is_not_run_again(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", kib=DISK_KIB) as disk:
        clock = FakeClock(lambda _now: make_room(disk) if (disk / "filler").exists() else None)
        store = SqlStore.open(disk / "overnight.db", create=True)
        with running_on(clock):
            running = timed(tmp_path, clock, store, hooks=[After(events.TrialStarted, 9, lambda: fill(disk))])
            run_campaign(running)
            assert isinstance(running.trainer, TimedTrainer)
            assert len(running.trainer.requests) == len(rows(store, "SELECT id FROM trials"))
            running.close()
        assert recorded(store)[0] == ("fault", "storage")
        store.close()


def test_a_disk_that_stays_full_ends_the_wait(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(faults, "GIVE_UP_S", HOUR)
    with small_disk(tmp_path / "disk", kib=DISK_KIB) as disk:
        clock = FakeClock()
        store = SqlStore.open(disk / "overnight.db", create=True)
        with running_on(clock):
            running = timed(tmp_path, clock, store, hooks=[After(events.TrialStarted, 9, lambda: fill(disk))])
            with pytest.raises(StorageFaultError, match="full"):
                run_campaign(running)
            running.close()
        assert HOUR <= clock.slept <= HOUR + 400
        store.close()


# An endpoint that is away


def test_an_endpoint_away_for_hours_costs_no_turn(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()
    away = range(int(START + 0.5 * HOUR), int(START + 2.5 * HOUR))

    async def answer(wire: Wire) -> None:
        if int(clock.now) in away:
            await wire.answer(404, {"error": "no such model"})  # a proxy whose server is away; told at once
        else:
            await wire.say(reply_text("a", round(0.8 + (clock.now - START) / 1e6, 8), "a small step"))

    with LoopbackServer(answer) as server, running_on(clock):
        settings = {"base_url": server.url, "model": "m", "structured": "none", "deadline_s": 20.0}
        parsed = OpenAIProposer.Settings.parse("random", settings)
        proposer = OpenAIProposer("random", parsed, breaker=Breaker(server.url, clock=clock.time))
        wide = {"a": {"type": "float", "range": [0.0, 1.0], "default": 0.75, "levels": 25}}
        sections = {"budget": {"iterations": 120}, "knobs": wide}
        running = timed(tmp_path, clock, store, proposers={"random": proposer}, sections=sections)
        running.trainer.seconds = 300.0  # type: ignore[attr-defined]
        running.deadline = START + 5 * HOUR
        run_campaign(running)
        running.close()
    assert recorded(store) == [("fault", "proposer:random"), ("fault_over", "proposer:random")]
    ((wall_s,),) = rows(store, "SELECT json_extract(payload, '$.wall_s') FROM events WHERE kind = 'fault_over'")
    assert wall_s == pytest.approx(2 * HOUR, abs=1900)  # asked again every half an hour at the least
    roles = rows(store, "SELECT role, count(*) FROM attempts WHERE outcome IN ('kept', 'reverted') GROUP BY role")
    assert {role for role, _ in roles} == {"champion", "fallback"}
    turns = rows(store, "SELECT count(DISTINCT iteration), max(iteration) FROM attempts WHERE stage = 'decided'")
    assert turns[0][0] == turns[0][1]
    tried = rows(store, "SELECT count(*) FROM attempts WHERE failure IN ('llm_error', 'llm_timeout')")
    assert tried[0][0] > 5


def test_a_proposer_that_can_no_longer_be_used_is_as_good_as_away(tmp_path: Path, store: SqlStore) -> None:
    def reply(ask: Ask) -> str:
        if ask.iteration in (2, 3):
            raise CampaignError("the model's folder is gone")
        return first_move(ask)

    running = runtime(campaign(tmp_path, budget={"iterations": 5}), store, proposers=proposing(reply))
    assert run_campaign(running).finished
    running.close()
    assert recorded(store) == [("fault", "proposer:random"), ("fault_over", "proposer:random")]
    fallbacks = rows(store, "SELECT DISTINCT iteration FROM attempts WHERE role = 'fallback'")
    assert fallbacks == [(2,), (3,)]


def test_a_proposer_that_never_worked_is_told_at_once(tmp_path: Path, store: SqlStore) -> None:
    def reply(_ask: Ask) -> str:
        raise CampaignError("the model's folder is not there")

    running = runtime(campaign(tmp_path), store, proposers=proposing(reply))
    with pytest.raises(CampaignError, match="not there"):
        run_campaign(running)
    running.close()


def test_a_model_folder_that_disappears_is_as_good_as_away_until_it_is_back(
    tmp_path: Path, store: SqlStore, tiny_model: Path
) -> None:
    folder, aside = tmp_path / "model", tmp_path / "aside"
    shutil.copytree(tiny_model, folder)
    of = campaign(
        tmp_path,
        budget={"iterations": 4},
        proposers={"random": {"kind": "random"}, "student": {"kind": "student", "base_model": str(folder)}},
        router={"champion": "student"},
    )

    class Moves(Recorder):
        def on_event(self, event: events.Event) -> None:
            if isinstance(event, events.Decided) and event.iteration == 1:
                folder.rename(aside)
                student = running.proposers["student"]
                assert isinstance(student, StudentProposer)
                student.host.close()  # whatever ended it: the model has to be loaded again
            if isinstance(event, events.Decided) and event.iteration == 3:
                aside.rename(folder)

    running = runtime(replace(of, allowed=True), store, hooks=[Moves()])
    assert run_campaign(running).finished
    running.close()
    assert recorded(store) == [("fault", "proposer:student"), ("fault_over", "proposer:student")]
    decided = "SELECT iteration, role FROM attempts WHERE outcome IN ('kept', 'reverted') ORDER BY iteration"
    assert rows(store, decided) == [(1, "champion"), (2, "fallback"), (3, "fallback"), (4, "champion")]


# A worker that vanishes, a GPU without memory


def test_a_worker_killed_in_a_trial_costs_that_trial_only(tmp_path: Path, store: SqlStore) -> None:
    def kill_worker() -> None:
        assert isinstance(running.trainer, WorkerTrainer)
        (worker,) = psutil.Process(running.trainer.worker_pid).children()
        worker.kill()

    class InTheNinth(After):
        def on_event(self, event: events.Event) -> None:
            if not isinstance(event, events.TrialStepped) or len(self.of(events.TrialStarted)) == 9:
                super().on_event(event)

    of = campaign(tmp_path, budget={"iterations": 2}, trainer={"sleep_s": 0.2, "steps": 4})
    hooks = [InTheNinth(events.TrialStepped, 1, kill_worker)]
    running = open_runtime(of, store, proposers=scripted(("b", 3), ("b", 9)), hooks=hooks)
    assert run_campaign(running).finished
    running.close()
    assert recorded(store) == [("fault", "worker")]
    assert [row[3] for row in decisions(store)] == ["kept", "reverted"]
    assert rows(store, "SELECT failure, count(*) FROM trials WHERE metric IS NULL GROUP BY 1") == [("harness", 1)]


def test_a_harness_that_loses_every_candidate_costs_three_turns(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()

    class Broken(TimedTrainer):
        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            broken = START + 600 < clock.now < START + 4 * HOUR
            return replace(result, metric=None, failure="harness", trace="lost") if broken else result

    with running_on(clock):
        running = timed(tmp_path, clock, store, trainer=Broken, sections={"budget": {"iterations": 8}})
        assert run_campaign(running).finished
        running.close()
    assert rows(store, "SELECT count(*) FROM attempts WHERE failure = 'harness'") == [(HARNESS_IN_A_ROW,)]
    assert [row for row in recorded(store) if row[1] == "trainer"] == [("fault", "trainer"), ("fault_over", "trainer")]
    ((wall_s,),) = rows(
        store,
        "SELECT json_extract(payload, '$.wall_s') FROM events WHERE kind = 'fault_over' AND payload LIKE '%trainer%'",
    )
    assert wall_s == pytest.approx(4 * HOUR, abs=1200)


@pytest.mark.parametrize(("limit", "ends"), [("deadline", ("until", True)), ("until", (None, False))])
def test_a_campaign_that_waits_for_its_harness_ends_or_pauses_in_time(
    tmp_path: Path, store: SqlStore, limit: str, ends: tuple[str | None, bool]
) -> None:
    clock = FakeClock()

    class Broken(TimedTrainer):
        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            broken = clock.now > START + 1200
            return replace(result, metric=None, failure="harness", trace="lost") if broken else result

    with running_on(clock):
        running = timed(tmp_path, clock, store, trainer=Broken, sections={"budget": {"iterations": 500}})
        setattr(running, limit, START + 2 * HOUR)
        result = run_campaign(running)
        running.close()
    assert (result.stop_reason if result.finished else None, result.finished) == ends
    assert clock.now <= START + 2 * HOUR + 120


def test_memory_that_somebody_else_takes_is_waited_for(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()
    taken = START + 600, START + 3 * HOUR
    with running_on(clock):
        needs = {"trainer": {"memory_gib": {f"b={b}": 1.0 for b in (1, 2, 3, 4, 9)}}}
        running = timed(tmp_path, clock, store, sections={"budget": {"iterations": 12}, **needs})
        running.free_memory = lambda: 0 if taken[0] < clock.now < taken[1] else 2**34
        result = run_campaign(running)
        running.close()
    assert result.stop_reason == "iterations"
    assert [row for row in recorded(store) if row[1] == "memory"] == [("fault", "memory"), ("fault_over", "memory")]
    assert rows(store, "SELECT refinement FROM campaigns") == [(0,)]


def test_what_the_harness_lost_can_be_measured_when_it_is_proposed_again(tmp_path: Path, store: SqlStore) -> None:
    class LosesTwo(TimedTrainer):
        lost = 0

        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            if request.config["b"] == 3 and self.lost < 2:
                self.lost += 1
                return replace(result, metric=None, failure="harness", trace="lost")
            return result

    sections = {"budget": {"iterations": 2}}
    proposers = scripted(("b", 3), ("b", 3))
    running = timed(tmp_path, FakeClock(), store, trainer=LosesTwo, proposers=proposers, sections=sections)
    run_campaign(running)
    running.close()
    assert [(row[3], row[5]) for row in decisions(store)] == [("failed", 0), ("kept", 5)]


def test_a_candidate_out_of_memory_is_a_result_with_a_row(tmp_path: Path, store: SqlStore) -> None:
    faulty = campaign(tmp_path, trainer={"faults": {"b=9": "oom"}}, budget={"iterations": 2})
    running = runtime(faulty, store, proposers=scripted(("b", 9), ("b", 3)))
    run_campaign(running)
    running.close()
    assert [row[3] for row in decisions(store)] == ["failed", "kept"]
    assert recorded(store) == [("fault", "out_of_memory")]


def test_a_baseline_that_finds_the_gpu_full_is_waited_for(tmp_path: Path, store: SqlStore) -> None:
    clock = FakeClock()

    class Crowded(TimedTrainer):
        """Once calibrated, the baseline does not fit for two hours: somebody else has the memory."""

        def run(self, request: Any, report: Any) -> Any:
            result = super().run(request, report)
            full = request.config["b"] == 1 and len(self.requests) > 4 and clock.now < START + 2 * HOUR
            return replace(result, metric=None, failure="oom", trace="CUDA out of memory") if full else result

    # Two of the candidate's five seeds are new to the baseline.
    sections = {"decision": {"calibration_trials": 3}, "budget": {"iterations": 1}}
    with running_on(clock):
        running = timed(tmp_path, clock, store, trainer=Crowded, proposers=scripted(("b", 3)), sections=sections)
        assert run_campaign(running).finished
        running.close()
    waits = [row for row in recorded(store) if row[1] == "trainer"]
    assert waits == [("fault", "trainer"), ("fault_over", "trainer")]
    assert [(row[3], row[5]) for row in decisions(store)] == [("kept", 5)]
    assert clock.now > START + 2 * HOUR


def test_what_never_worked_is_told_at_once(tmp_path: Path, store: SqlStore) -> None:
    running = runtime(campaign(tmp_path, trainer={"faults": {"b=1": "harness"}}), store)
    with pytest.raises(TrainerError):
        run_campaign(running)
    running.close()


# Why it stopped, and what was going on


def test_a_stop_by_a_fault_says_why_in_the_store(tmp_path: Path, store: SqlStore) -> None:
    class Changes(TimedTrainer):
        def run(self, request: Any, report: Any) -> Any:
            if len(self.requests) == 8:
                raise CampaignError("the data changed while the campaign ran")
            return super().run(request, report)

    clock = FakeClock()
    running = timed(tmp_path, clock, store, trainer=Changes, proposers=proposing(first_move))
    with pytest.raises(CampaignError):
        run_campaign(running)
    running.close()
    assert rows(store, "SELECT status, stop_reason, lease_owner FROM campaigns") == [
        ("paused", "stopped by a fault: CampaignError: the data changed while the campaign ran", None)
    ]
    assert rows(store, "SELECT count(*) FROM events WHERE kind = 'stopped'") == [(1,)]


def test_a_fault_that_goes_on_is_recorded_once(tmp_path: Path, store: SqlStore) -> None:
    away = ProposerError("no answer", failure="llm_error")

    def reply(_ask: Ask) -> str:
        raise away

    running = runtime(campaign(tmp_path, budget={"iterations": 5}), store, proposers=proposing(reply))
    run_campaign(running)
    running.close()
    assert recorded(store) == [("fault", "proposer:random")]


def test_a_pause_asked_for_ends_the_wait(tmp_path: Path, store: SqlStore) -> None:
    asked: list[int] = []

    def asks(now: float) -> None:
        if now > START + HOUR and not asked:
            asked.append(store.request(1, "pause_requested", {}))

    class Broken(TimedTrainer):
        def run(self, request: Any, report: Any) -> Any:
            if len(self.requests) > 7:
                raise TrainerError("the driver is gone")
            return super().run(request, report)

    clock = FakeClock(asks)
    with running_on(clock):
        running = timed(tmp_path, clock, store, trainer=Broken, proposers=proposing(first_move))
        assert run_campaign(running).stop_reason == "paused"
        running.close()
    assert clock.now - START < HOUR + 400


# What is told, and when


class RefusesTheEnd(SqlStore):
    """Has no room for the commit that ends the campaign, twice."""

    refused = 0

    @contextmanager
    def writing(self, lease: Lease) -> Iterator[SqlWriter]:
        with super().writing(lease) as writer:
            yield writer
            query = "SELECT count(*) FROM events WHERE kind = 'finished'"
            if writer._connection.exec_driver_sql(query).scalar_one() and self.refused < 2:
                self.refused += 1
                raise StorageFaultError("the disk is full")


def test_the_end_is_told_once_it_is_written_and_so_is_the_end_of_the_fault(tmp_path: Path) -> None:
    store, clock = RefusesTheEnd.open(tmp_path / "store.db", create=True), FakeClock()
    written: list[tuple[str, list[Any]]] = []

    class Looks(Recorder):
        def on_event(self, event: events.Event) -> None:
            super().on_event(event)
            if isinstance(event, events.Finished | events.FaultOver):
                written.append((event.kind, rows(store, "SELECT status FROM campaigns")))

    seen = Looks()
    with running_on(clock):
        running = timed(tmp_path, clock, store, hooks=[seen], sections={"budget": {"iterations": 1}})
        assert run_campaign(running).finished
        running.close()
    assert store.refused == 2
    assert written == [("finished", [("finished",)]), ("fault_over", [("finished",)])]
    assert recorded(store) == [("fault", "storage"), ("fault_over", "storage")]
    assert rows(store, "SELECT count(*) FROM events WHERE kind = 'finished'") == [(1,)]
    store.close()


def test_what_is_emitted_in_a_transaction_is_told_after_it_in_order_and_the_rest_at_once(
    tmp_path: Path, store: SqlStore
) -> None:
    seen = Recorder()
    running = runtime(campaign(tmp_path), store, hooks=[seen])
    turns = [events.Trained(campaign="c", iteration=turn) for turn in range(1, 5)]

    def fails() -> None:
        with running.writing():
            running.emit(turns[1])
            raise StorageFaultError("the disk is full")

    running.emit(turns[0])
    with pytest.raises(StorageFaultError):
        fails()
    assert seen.events == turns[:1]
    with running.writing():
        for turn in turns[2:]:
            running.emit(turn)
        assert seen.events == turns[:1]
    assert seen.events == [turns[0], *turns[2:]]
    running.close()


# Alive, as another machine sees it


def test_a_campaign_of_short_trials_shows_that_it_is_alive_every_20_seconds(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock, renewed = FakeClock(), []
    renew = store.renew
    monkeypatch.setattr(store, "renew", lambda lease: (renewed.append(clock.now), renew(lease)))
    silent = []

    class Looks(Recorder):
        def on_event(self, event: events.Event) -> None:
            ((seen_at,),) = rows(store, "SELECT lease_seen_at FROM campaigns")
            silent.append(clock.now - datetime.fromisoformat(seen_at).timestamp())

    with running_on(clock):
        running = timed(tmp_path, clock, store, hooks=[Looks()])
        running.trainer.seconds = 7.0  # type: ignore[attr-defined]
        run_campaign(running)
        running.close()
    took = clock.now - START
    assert took > REMOTE_SILENCE.total_seconds()
    assert max(silent) < RENEW_EVERY_S + 2 * 7
    assert len(renewed) <= took / RENEW_EVERY_S
