"""The worker: whatever a trial does, it becomes a result of its class, the next trial is fine, and nothing is left."""

import contextlib
import importlib.util
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import psutil
import pytest

from overnight.store.errors import CampaignError, TrainerError
from overnight.store.records import FailureClass, TrialProgress, TrialRequest, TrialResult
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.testing import TrainerConformance
from overnight.trainer.worker import GRACE_S, WorkerTrainer

from .processes import descendants, left_over

SETTINGS = {"optimum": {"lr": 0.01}, "noise_sd": 0.1}

PLUGIN = """
import ctypes, os, signal, subprocess, sys, time
from pathlib import Path
from overnight.store.records import TrainerInfo, TrialResult, TrialProgress

SLEEPER = "import os, sys, time; os.fork() or os.setsid(); time.sleep(1e6)"

class Bad:
    def __init__(self, settings, context):
        self.folder = Path(context.campaign_dir)
    @classmethod
    def from_settings(cls, settings, context):
        return cls(settings, context)
    def prepare(self):
        if (self.folder / "unready").exists():
            raise RuntimeError("no device today")
        device = (self.folder / "device").read_text() if (self.folder / "device").exists() else "one"
        return TrainerInfo("bad", "m", "0" * 64, {"device": device}, False)
    def run(self, request, report):
        act = request.config["act"]
        if act == "garbage":
            os.write(int(sys.argv[1]), b"\\xff" * 64)
            time.sleep(1e6)
        if act == "lie":
            return TrialResult(1.0, "nan")
        if act == "nothing":
            return TrialResult(None)
        if act == "infinite":
            return TrialResult(float("inf"))
        if act == "flood":
            for _ in range(16384):
                os.write(1, b"x" * 65536)
            os.write(2, b"the last words\\n")
            os._exit(1)
        if act == "memory":
            raise MemoryError("no more")
        if act == "killed":
            os.kill(os.getpid(), signal.SIGKILL)
        if act == "family":
            for _ in range(3):
                subprocess.Popen([sys.executable, "-c", SLEEPER, str(self.folder)], start_new_session=True)
            time.sleep(1e6)
        if act == "gil":
            ctypes.PyDLL(None).sleep(1000000)
        if act == "slow":
            for step in range(1, 10001):
                report(TrialProgress(step, 10000))
                time.sleep(0.01)
        if act == "odd":
            return TrialResult(1.0, metrics={"loss": float("nan"), "speed": 2.0}, notes="\\x1b[31mred\\n" + "n" * 5000)
        return TrialResult(1.0)
    def estimate_memory(self, config):
        return None
    def unsupported(self, config):
        return None
    def release(self):
        pass
    def close(self):
        pass
"""


def ignore(progress: TrialProgress) -> None:
    """Nobody watches."""


def context(folder: Path, knobs: Mapping[str, str]) -> TrainerContext:
    return TrainerContext(campaign_dir=folder, cache_dir=folder, knobs=knobs, metric="m")


def wait_for(condition: Callable[[], object], seconds: float = 20.0) -> None:
    """Poll until `condition` holds."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition did not come true in time"
        time.sleep(0.01)


def peak_rss(*, reset: bool = False) -> int:
    """Return this process' largest resident set since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def scripted(tmp_path: Path) -> Iterator[WorkerTrainer]:
    trainer = WorkerTrainer("scripted", SETTINGS, context(tmp_path, {"lr": "float"}))
    yield trainer
    trainer.close()
    assert left_over(tmp_path) == []


@pytest.fixture
def bad(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[WorkerTrainer]:
    plugin = tmp_path / "plugin"
    (plugin / "bad_trainer-1.0.dist-info").mkdir(parents=True)
    (plugin / "bad_trainer.py").write_text(PLUGIN)
    (plugin / "bad_trainer-1.0.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: bad-trainer\nVersion: 1.0\n"
    )
    (plugin / "bad_trainer-1.0.dist-info" / "entry_points.txt").write_text(
        "[overnight.trainers]\nbad = bad_trainer:Bad\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(plugin), prepend=os.pathsep)
    trainer = WorkerTrainer("bad", {}, context(tmp_path, {"act": "str"}))
    yield trainer
    trainer.close()
    assert left_over(tmp_path) == []


def act(trainer: WorkerTrainer, what: str, timeout_s: float | None = 60.0) -> TrialResult:
    return trainer.run(TrialRequest({"act": what}, 0, timeout_s=timeout_s), ignore)


class TestWorkerTrainerConforms(TrainerConformance):
    trainer_type = WorkerTrainer
    settings: ClassVar[Mapping[str, object]] = {"trainer": "scripted", **SETTINGS}
    config: ClassVar[Mapping[str, float]] = {"lr": 0.02}


@pytest.mark.parametrize(
    ("what", "failure", "words"),
    [
        ("garbage", "harness", "frame of 4294967295 bytes"),
        ("lie", "harness", "either a metric or a failure"),
        ("nothing", "harness", "either a metric or a failure"),
        ("infinite", "nan", "inf"),
        ("memory", "oom", "no more"),
        ("killed", "harness", "SIGKILL"),
        ("family", "timeout", "still running after 1 s"),
        ("gil", "timeout", "still running after 1 s"),
    ],
)
def test_a_fault_becomes_its_class_and_the_next_trial_is_fine(
    bad: WorkerTrainer, tmp_path: Path, what: str, failure: FailureClass, words: str
) -> None:
    bad.prepare()
    result = act(bad, what, timeout_s=1.0)
    assert (result.metric, result.failure) == (None, failure)
    assert words in result.trace
    if failure != "nan":
        assert left_over(tmp_path) == []
    assert act(bad, "fine").metric == 1.0


@pytest.mark.parametrize(
    ("fault", "words"), [("segfault", "SIGSEGV"), ("exit", "exit 3"), ("raise", "RuntimeError: scripted")]
)
def test_a_crash_says_how(tmp_path: Path, fault: str, words: str) -> None:
    trainer = WorkerTrainer("scripted", {"faults": {"lr=0.1": fault}}, context(tmp_path, {"lr": "float"}))
    result = trainer.run(TrialRequest({"lr": 0.1}, 0), ignore)
    trainer.close()
    assert result.failure == "crash"
    assert words in result.trace


def test_a_trial_is_killed_soon_after_its_deadline(bad: WorkerTrainer) -> None:
    bad.prepare()
    started = time.monotonic()
    act(bad, "gil", timeout_s=0.5)
    assert time.monotonic() - started < 0.5 + GRACE_S + 2.0


def test_a_flood_of_output_leaves_the_parent_flat_and_its_end_in_the_trace(bad: WorkerTrainer) -> None:
    bad.prepare()
    before = peak_rss(reset=True)
    result = act(bad, "flood")
    assert result.trace.endswith("the last words\nthe trial worker ended: exit 1")
    assert peak_rss() - before < 8 << 20


def test_a_failure_brings_a_fresh_worker_and_success_keeps_it(bad: WorkerTrainer) -> None:
    bad.prepare()
    first = bad.worker_pid
    act(bad, "fine")
    kept = bad.worker_pid
    act(bad, "memory")
    act(bad, "fine")
    assert first == kept
    assert bad.worker_pid not in {first, None}


def test_numbers_that_are_not_finite_and_long_notes_do_not_come_through(bad: WorkerTrainer) -> None:
    result = act(bad, "odd")
    assert result.metrics == {"speed": 2.0}
    assert result.notes.startswith("\\x1b[31mred nnn")
    assert len(result.notes) == 500


def test_progress_is_reported_while_the_trial_runs(tmp_path: Path) -> None:
    trainer = WorkerTrainer("scripted", {"steps": 4, "sleep_s": 0.4}, context(tmp_path, {}))
    seen: list[TrialProgress] = []
    trainer.run(TrialRequest({}, 0), seen.append)
    trainer.close()
    assert seen == [TrialProgress(step, 4) for step in (1, 2, 3, 4)]


class Stop(Exception):
    pass


def test_what_idle_raises_ends_the_trial_and_is_passed_on(tmp_path: Path) -> None:
    def lost() -> None:
        raise Stop

    trainer = WorkerTrainer("scripted", {"sleep_s": 600.0}, context(tmp_path, {}), idle=lost)
    with pytest.raises(Stop):
        trainer.run(TrialRequest({}, 0), ignore)
    assert left_over(tmp_path) == []


def test_idle_is_called_every_second_while_progress_comes(bad: WorkerTrainer, tmp_path: Path) -> None:
    calls: list[float] = []
    talkative = WorkerTrainer("bad", {}, context(tmp_path, {}), idle=lambda: calls.append(time.monotonic()))
    assert act(talkative, "slow", timeout_s=1.5).failure == "timeout"
    assert len(calls) >= 2


def test_a_worker_that_cannot_be_prepared_is_an_error_with_its_trace(bad: WorkerTrainer, tmp_path: Path) -> None:
    (tmp_path / "unready").touch()
    with pytest.raises(TrainerError, match="no device today"):
        bad.prepare()


def test_a_fresh_worker_that_cannot_be_prepared_is_the_harness_fault(bad: WorkerTrainer, tmp_path: Path) -> None:
    bad.prepare()
    act(bad, "killed")
    (tmp_path / "unready").touch()
    assert act(bad, "fine").failure == "harness"
    (tmp_path / "unready").unlink()
    assert act(bad, "fine").metric == 1.0


def test_a_fresh_worker_in_another_environment_stops_the_campaign(bad: WorkerTrainer, tmp_path: Path) -> None:
    bad.prepare()
    act(bad, "killed")
    (tmp_path / "device").write_text("another")
    with pytest.raises(CampaignError, match="environment of trainer `bad` changed"):
        act(bad, "fine")


def test_an_unknown_trainer_is_told_what_is_installed(tmp_path: Path) -> None:
    trainer = WorkerTrainer("no_such", {}, context(tmp_path, {}))
    with pytest.raises(CampaignError, match=r"`trainer = \"no_such\"` in `\[campaign\]` is not installed.*`scripted`"):
        trainer.prepare()
    assert left_over(tmp_path) == []


def test_a_folder_named_like_the_package_does_not_stand_in_for_it(
    scripted: WorkerTrainer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "overnight").mkdir()
    (tmp_path / "overnight" / "__init__.py").write_text("raise RuntimeError('the wrong package')")
    monkeypatch.chdir(tmp_path)
    assert scripted.prepare().trainer == "scripted"


def test_the_terminal_s_signals_do_not_reach_the_worker(scripted: WorkerTrainer) -> None:
    scripted.prepare()
    sessions = {os.getsid(process.pid) for process in descendants()}
    assert len(sessions) == 2
    assert os.getsid(0) not in sessions


def test_free_memory_is_held_to_the_campaign_s_limit(tmp_path: Path) -> None:
    limited = TrainerContext(campaign_dir=tmp_path, cache_dir=tmp_path, knobs={}, metric="m", memory_gib=0.25)
    trainer = WorkerTrainer("scripted", {}, limited)
    assert trainer.free_memory() == 1 << 28
    trainer.close()


def test_the_control_process_loads_no_torch(tmp_path: Path) -> None:
    code = "import sys, overnight.trainer.worker, overnight.trainer.registry; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-P", "-c", code], check=False, cwd=tmp_path).returncode == 0


def test_a_round_trip_takes_less_than_two_milliseconds(scripted: WorkerTrainer) -> None:
    scripted.prepare()
    times = []
    for seed in range(300):
        started = time.perf_counter()
        scripted.run(TrialRequest({"lr": 0.02}, seed), ignore)
        times.append(time.perf_counter() - started)
    assert statistics.median(times) < 0.002


def worker_rss(trainer: WorkerTrainer) -> int:
    assert trainer.worker_pid is not None
    return sum(child.memory_info().rss for child in psutil.Process(trainer.worker_pid).children(recursive=True))


def test_five_hundred_trials_do_not_grow_the_worker(scripted: WorkerTrainer) -> None:
    for seed in range(10):
        scripted.run(TrialRequest({"lr": 0.02}, seed), ignore)
    before = worker_rss(scripted)
    for seed in range(500):
        scripted.run(TrialRequest({"lr": 0.02}, seed), ignore)
    assert worker_rss(scripted) < 1.02 * before


@pytest.mark.slow
@pytest.mark.skipif(
    importlib.util.find_spec("overnight.trainer.gpt") is None, reason="the GPT trainer is not installed"
)
def test_five_hundred_trials_of_the_gpt_do_not_grow_the_worker(tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 4000)
    settings = {
        "steps": 2,
        "data": "text.txt",
        "val_tokens": 1024,
        "n_layer": 1,
        "n_head": 2,
        "d_model": 32,
        "d_ff": 64,
    }
    settings |= {"batch_size": 2, "seq_len": 64, "lr_warmup": 0, "device": "cpu"}
    gpt_context = TrainerContext(campaign_dir=tmp_path, cache_dir=tmp_path, knobs={"lr": "float"}, metric="val_bpb")
    trainer = WorkerTrainer("gpt", settings, gpt_context)
    for seed in range(20):
        assert trainer.run(TrialRequest({"lr": 1e-3}, seed), ignore).failure is None
    before = worker_rss(trainer)
    for seed in range(500):
        trainer.run(TrialRequest({"lr": 1e-3}, seed), ignore)
    after = worker_rss(trainer)
    trainer.close()
    assert after < 1.02 * before


CONTROL = """
import sys
from pathlib import Path
from overnight.store.records import TrialRequest
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.worker import WorkerTrainer
folder = Path(sys.argv[1])
context = TrainerContext(campaign_dir=folder, cache_dir=folder, knobs={}, metric="m")
trainer = WorkerTrainer("command", {"command": ["{python}", str(folder / "family.py")]}, context)
result = trainer.run(TrialRequest({}, 0), lambda progress: None)
sys.exit(f"{result.failure}: {result.trace}")
"""
FAMILY = """
import os, time
if os.fork() == 0:
    os.setsid()
    os.fork()
time.sleep(1e6)
"""


@pytest.mark.parametrize(
    "victims",
    [
        ("control",),
        ("guard",),
        ("control", "worker"),
        ("control", "guard"),
        ("control", "inner guard"),
        ("guard", "inner guard"),
        ("worker", "inner guard"),
        ("guard", "worker"),
        ("inner guard", "script"),
    ],
)
def test_sigkill_of_any_two_processes_leaves_nothing_running(tmp_path: Path, victims: tuple[str, ...]) -> None:
    (tmp_path / "family.py").write_text(FAMILY)
    control = subprocess.Popen([sys.executable, "-P", "-c", CONTROL, str(tmp_path)], stderr=subprocess.DEVNULL)
    everybody: list[psutil.Process] = []
    try:
        below = psutil.Process(control.pid)
        wait_for(lambda: len(below.children(recursive=True)) == 6)
        guard = below.children()[0]
        worker = guard.children()[0]
        inner = worker.children()[0]
        chain = {
            "control": below,
            "guard": guard,
            "worker": worker,
            "inner guard": inner,
            "script": inner.children()[0],
        }
        everybody = below.children(recursive=True)
        for victim in victims:
            with contextlib.suppress(ProcessLookupError):  # the first death may have brought the second
                os.kill(chain[victim].pid, signal.SIGKILL)
        wait_for(lambda: not any(p.is_running() and p.status() != psutil.STATUS_ZOMBIE for p in everybody))
    finally:
        control.kill()
        control.wait(timeout=20)
        for process in everybody:
            if process.is_running():
                process.kill()
