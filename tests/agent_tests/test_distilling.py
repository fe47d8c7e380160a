"""Distilling inside a campaign: a real tiny model learns from a real history; what goes wrong stops nothing."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import events
from overnight.agent.campaign import Campaign
from overnight.agent.cli.learning_lines import learning_state, time_left
from overnight.agent.distilling import adapter_folder, distill_due, next_version, prune
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.run import run_campaign
from overnight.distill.adapter import read_record
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.store.contests import NewDuel, NewRace
from overnight.store.errors import InputError, StoreError
from overnight.store.learning import Distillation, NewDistillation
from overnight.store.protocol import NewAttempt
from overnight.store.sql_store import SqlStore

from .campaigns import Recorder, campaign, run, runtime

LONG_AGO = "2026-01-01T00:00:00.000+00:00"
DISTILL: dict[str, Any] = {
    "every": 4, "min_rows": 6, "min_pairs": 2, "min_knobs": 1, "max_share": 1.0, "holdout": 2, "epochs": 1, "r": 2,
    "batch": 4,
}  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def learning(folder: Path, model: Path, *, turns: int = 9, **distill: object) -> Campaign:
    """Return a campaign whose uniform champion is challenged by a student of the tiny model; duels are off."""
    found = campaign(
        folder,
        budget={"iterations": turns},
        proposers={"student": {"kind": "student", "base_model": str(model), "device": "cpu"}},
        router={"champion": "random", "challenger": "student", "duel_share": 0.0},
        distill={**DISTILL, **distill},
    )
    return replace(found, allowed=True)


def distillations(store: SqlStore) -> list[Distillation]:
    state = store.campaign("c")
    assert state is not None
    return list(reversed(store.distillations(state.id)))


class KeptHost(ModelHost):
    """A host that outlives the campaigns of a test module, so that the model is loaded once."""

    def close(self) -> None:
        pass


@pytest.fixture(scope="module", name="host")
def _host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelHost]:
    host = KeptHost(find_base(str(tiny_model), tiny_model), tmp_path_factory.mktemp("cache"), device="cpu")
    yield host
    ModelHost.close(host)


def live(of: Campaign, store: SqlStore, host: ModelHost) -> Recorder:
    seen = Recorder()
    settings = StudentProposer.Settings.parse("student", {"base_model": "tiny"})
    student = StudentProposer("student", settings, host, adapter=None)
    run(of, store, proposers={"random": RandomProposer("random"), "student": student}, hooks=[seen])
    return seen


def test_a_student_is_distilled_when_it_is_due_and_the_rows_are_there(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    seen = live(learning(tmp_path, tiny_model, epochs=2), store, host)
    (made,) = distillations(store)
    assert (made.iteration, made.version, made.failure, made.proposer) == (8, 1, None, "student")
    assert (made.rows, made.cut_attempt_id, made.objective) == (6, 6, "outcome")
    record = read_record(tmp_path / "adapters" / "c" / "v1")
    assert made.adapter == str(tmp_path / "adapters" / "c" / "v1")
    assert record.facts["corpus_sha256"] == made.corpus_hash
    corpus = record.facts["corpus"]
    assert isinstance(corpus, dict)
    assert corpus["attempts"] == [1, 2, 3, 4, 5, 6]
    assert corpus["cut_turn"] == 6
    (done,) = seen.of(events.Distilled)
    assert (done.contestant, done.rows) == ("student@v1", 6)
    assert seen.of(events.DistillStepped)[-1].seconds_left == 0


def test_waiting_for_rows_is_said_once_and_in_the_status(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    seen = live(learning(tmp_path, tiny_model, min_rows=30), store, host)
    (waiting,) = seen.of(events.DistillWaiting)
    assert (waiting.iteration, waiting.rows, waiting.min_rows) == (4, 4, 30)
    assert distillations(store) == []
    state = store.campaign("c")
    assert state is not None
    assert learning_state(store, replace(state, status="running")) == (
        "waits for rows: 9 of 30; next look after turn 12"
    )


def test_a_history_too_alike_is_refused_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    seen = live(learning(tmp_path, tiny_model, min_knobs=3), store, host)
    (refused,) = distillations(store)
    assert refused.version is None
    assert "too alike to learn from: they try 2 knobs" in (refused.failure or "")
    assert [event.reason for event in seen.of(events.DistillFailed)] == [refused.failure]
    assert seen.kinds()[-1] == "finished"
    assert not (tmp_path / "adapters").exists()


def test_a_training_that_fails_is_recorded_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    seen = live(learning(tmp_path, tiny_model, max_length=64), store, host)
    (failed,) = distillations(store)
    assert failed.version is None
    assert "is within `max_length = 64` tokens" in (failed.failure or "")
    assert seen.of(events.Finished)[0].iterations == 9


def test_an_adapter_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    of = learning(tmp_path, tiny_model, every=8, holdout=1)
    live(of, store, host)
    folder, aside = tmp_path / "adapters" / "c", tmp_path / "aside"
    before = [file.read_bytes() for file in sorted((folder / "v1").iterdir())]
    shutil.move(folder, aside)
    folder.write_text("a file where the folder should be")
    live(learning(tmp_path, tiny_model, every=8, holdout=1, turns=17), store, host)
    first, second = distillations(store)
    assert (first.version, second.version) == (1, None)
    assert "could not be written" in (second.failure or "")
    assert [file.read_bytes() for file in sorted((aside / "v1").iterdir())] == before


def test_nothing_is_distilled_without_a_challenger_that_is_a_student(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    of = learning(tmp_path, tiny_model)
    router = of.file.router.model_copy(update={"challenger": None})
    live(replace(of, file=of.file.model_copy(update={"router": router})), store, host)
    assert distillations(store) == []


def test_a_kill_while_distilling_leaves_no_half_adapter_and_it_starts_anew(tmp_path: Path, tiny_model: Path) -> None:
    table = f'''
[campaign]
name = "c"
trainer = "scripted"
[metric]
name = "loss"
[budget]
iterations = 5
[decision]
min_gain = 0.0
[trainer]
noise_sd = 0.01
[knobs.a]
type = "float"
range = [0.0, 1.0]
default = 0.5
[proposers.random]
kind = "random"
[proposers.student]
kind = "student"
base_model = "{tiny_model}"
device = "cpu"
[router]
champion = "random"
challenger = "student"
warmup = false
duel_share = 0.0
[distill]
every = 4
min_rows = 4
min_pairs = 2
min_knobs = 1
holdout = 1
batch = 1
epochs = EPOCHS
'''
    folder = tmp_path / "campaign"
    folder.mkdir()
    file = folder / "campaign.toml"
    file.write_text(table.replace("EPOCHS", "1000"))
    overnight = [str(Path(sys.executable).with_name("overnight")), "run", str(folder), "--db", "c.db", "--allow"]
    running = subprocess.Popen(overnight, cwd=tmp_path, stdout=subprocess.DEVNULL, start_new_session=True)
    try:
        _wait_until_training(tmp_path / "c.db", running)
    finally:
        os.killpg(running.pid, signal.SIGKILL)
        running.wait(30)
    store = SqlStore.open(tmp_path / "c.db")
    assert distillations(store) == []
    adapters = tmp_path / "adapters" / "c"
    assert [each.name for each in adapters.glob("v*")] == []
    file.write_text(table.replace("EPOCHS", "1"))
    subprocess.run(overnight, cwd=tmp_path, check=True, capture_output=True, timeout=120)
    (made,) = distillations(store)
    assert (made.iteration, made.version) == (4, 1)
    assert read_record(adapters / "v1").rows == 3
    store.close()


def _wait_until_training(database: Path, running: subprocess.Popen[bytes]) -> None:
    ends = time.monotonic() + 120
    while time.monotonic() < ends and running.poll() is None:
        with suppress(StoreError, InputError):  # it is being made
            store = SqlStore.open(database)
            state = store.campaign("c")
            begun = state is not None and store.last_event(state.id, "distill_started") is not None
            store.close()
            if begun:
                time.sleep(1.0)  # into the training, which takes minutes
                return
        time.sleep(0.2)
    pytest.fail("no distillation began")


class Versions:
    """Writes distillations without training."""

    def __init__(self, folder: Path, store: SqlStore, tiny_model: Path) -> None:
        self.store = store
        self.runtime = runtime(learning(folder, tiny_model), store)
        self.state = self.runtime.state()

    def add(self, *, failed: bool = False) -> None:
        number = next_version(self.store, self.state)
        folder = adapter_folder(self.store, "c", number)
        if not failed:
            folder.mkdir(parents=True)
        with self.runtime.writing() as writer:
            writer.distillation(
                NewDistillation(
                    iteration=number, proposer="student", version=None if failed else number, objective="clone",
                    corpus_hash=None, cut_attempt_id=None, rows=None, adapter=None if failed else str(folder),
                    metrics={}, failure="no" if failed else None, wall_s=1.0, started_at=LONG_AGO,
                )
            )  # fmt: skip

    def left(self) -> list[str]:
        return sorted(entry.name for entry in (self.store.home() / "adapters" / "c").iterdir())


def test_only_the_newest_adapters_stay(tmp_path: Path, store: SqlStore, tiny_model: Path) -> None:
    versions = Versions(tmp_path, store, tiny_model)
    for _ in range(5):
        versions.add()
    assert prune(store, versions.state, 2) == [3, 2, 1]
    assert versions.left() == ["v4", "v5"]


def test_of_raced_adapters_only_those_of_the_newest_race_and_those_that_got_further_stay(
    tmp_path: Path, store: SqlStore, tiny_model: Path
) -> None:
    versions = Versions(tmp_path, store, tiny_model)
    for _ in range(9):
        versions.add()
    with versions.runtime.writing() as writer:
        ids = {
            number: writer.proposer("student", "student", {"kind": "student", "adapter": {"version": f"v{number}"}})
            for number in range(1, 10)
        }
        writer.alias("champion", ids[1], 3)
        writer.alias("previous", ids[2], 3)
        _duel(writer, ids[1], ids[3])
        for number in range(3, 9):  # v4 to v7 were looked back at, and got no further
            _race(writer, ids[number])
    assert prune(store, versions.state, 1) == [7, 6, 5, 4]
    assert versions.left() == ["v1", "v2", "v3", "v8", "v9"]


def _duel(writer: Any, champion_id: int, challenger_id: int) -> None:
    attempt_id = writer.attempt(
        NewAttempt(
            iteration=1, try_no=1, role="duel_champion", proposer_id=champion_id,
            baseline_config_id=writer.config({"a": 0.75}), prompt="", started_at=LONG_AGO,
        )
    )  # fmt: skip
    writer.begin_duel(
        NewDuel(
            iteration=1, kind="challenge", seed=1, champion_id=champion_id, challenger_id=challenger_id,
            first="champion", attempt_id=attempt_id,
        )
    )  # fmt: skip


def _race(writer: Any, proposer_id: int) -> None:
    writer.begin_race(NewRace(iteration=3, distillation_id=None, challenger_id=proposer_id, held_out=0))


def test_a_version_is_never_given_twice(tmp_path: Path, store: SqlStore, tiny_model: Path) -> None:
    versions = Versions(tmp_path, store, tiny_model)
    versions.add()
    versions.add(failed=True)
    assert next_version(store, versions.state) == 2
    (tmp_path / "adapters" / "c" / "v7").mkdir()  # another database's, beside this one
    assert next_version(store, versions.state) == 8
    shutil.rmtree(tmp_path / "adapters")
    assert next_version(store, versions.state) == 2


def test_time_left_reads_like_a_clock() -> None:
    assert [time_left(seconds) for seconds in (0.2, 65, 600)] == ["0:00", "1:05", "10:00"]


def test_an_adapter_of_a_database_beside_this_one_stays(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    live(learning(tmp_path, tiny_model), store, host)
    beside = SqlStore.open(tmp_path / "beside.db", create=True)
    live(learning(tmp_path, tiny_model), beside, host)
    first, second = distillations(store)[0], distillations(beside)[0]
    assert first.corpus_hash == second.corpus_hash
    assert (first.version, second.version) == (1, 2)
    assert sorted(entry.name for entry in (tmp_path / "adapters" / "c").glob("v*")) == ["v1", "v2"]
    beside.close()


def test_no_distillation_begins_that_would_outlast_the_night(tmp_path: Path, store: SqlStore, tiny_model: Path) -> None:
    versions = Versions(tmp_path, store, tiny_model)
    versions.runtime.campaign = learning(tmp_path, tiny_model, min_rows=1, every=5)
    versions.add()  # which took 1 s
    now = 1_000.0
    versions.runtime.clock = lambda: now
    assert distill_due(versions.runtime, versions.state, 5) == "waiting"
    versions.runtime.deadline = now + 0.5
    assert distill_due(versions.runtime, versions.state, 5) == "no"
    versions.runtime.deadline = None
    versions.runtime.until = now + 0.5
    assert distill_due(versions.runtime, versions.state, 5) == "no"


def test_a_training_that_takes_the_holdouts_time_is_ended(
    tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost
) -> None:
    now = [1_000.0]

    class Slow:
        def on_event(self, event: events.Event) -> None:
            if isinstance(event, events.DistillStarted):
                now[0] += 3_600

    of = learning(tmp_path, tiny_model)
    settings = StudentProposer.Settings.parse("student", {"base_model": "tiny"})
    student = StudentProposer("student", settings, host, adapter=None)
    running = runtime(of, store, proposers={"random": RandomProposer("random"), "student": student}, hooks=[Slow()])
    running.clock, running.deadline = lambda: now[0], now[0] + 1_800
    try:
        result = run_campaign(running)
    finally:
        running.close()
    (ended,) = distillations(store)
    assert ended.version is None
    assert "the end of the campaign needs the time (`until`)" in (ended.failure or "")
    assert result.stop_reason == "until"
    assert not list((tmp_path / "adapters").rglob("*.safetensors"))
