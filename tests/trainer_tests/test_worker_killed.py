"""A worker that is killed: by the kernel for want of memory it is the candidate's, by anybody else it is not."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

import psutil
import pytest

from overnight.store.records import Config, TrialProgress, TrialRequest, TrialResult
from overnight.trainer.memory import kernel_kills
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.shipping import ShippedFunction
from overnight.trainer.worker import WorkerTrainer

from .processes import left_over

MEMORY_CGROUP = Path("/sys/fs/cgroup/memory")
LIMIT = 256 << 20


@contextmanager
def memory_limit(process: psutil.Process) -> Iterator[None]:
    """Put a process into a control group of 256 MiB; skips the test where that is not allowed."""
    group = MEMORY_CGROUP / f"overnight-{uuid.uuid4().hex[:8]}"
    try:
        group.mkdir()
        (group / "memory.limit_in_bytes").write_text(str(LIMIT))
        (group / "cgroup.procs").write_text(str(process.pid))
    except OSError:
        with suppress(OSError):
            group.rmdir()
        pytest.skip("no right to limit a process' memory")
    try:
        yield
    finally:
        process.wait(10)
        group.rmdir()


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[WorkerTrainer]:
    def measure(config: Config, seed: int) -> float:
        import os
        import signal

        mib = int(config["mib"])
        if mib < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return float(len(b"x" * (mib << 20)))

    context = TrainerContext(campaign_dir=tmp_path, cache_dir=tmp_path, knobs={"mib": "int"}, metric="m")
    trainer = WorkerTrainer("function", {}, context, function=ShippedFunction(measure, version=""))
    trainer.prepare()
    yield trainer
    trainer.close()
    assert left_over(tmp_path) == []


def run(trainer: WorkerTrainer, mib: int) -> TrialResult:
    def ignore(progress: TrialProgress) -> None:
        """Nobody watches."""

    return trainer.run(TrialRequest({"mib": mib}, 0, timeout_s=60.0), ignore)


def test_the_kernels_kill_for_want_of_memory_is_the_candidates_failure(worker: WorkerTrainer) -> None:
    before = kernel_kills()
    assert worker.worker_pid is not None
    (process,) = psutil.Process(worker.worker_pid).children()
    with memory_limit(process):
        result = run(worker, 512)
    assert (result.failure, kernel_kills()) == ("oom", (before or 0) + 1)
    assert run(worker, 1).metric == 1 << 20


@pytest.mark.skipif(kernel_kills() is None, reason="this system does not count the kernel's kills")
def test_a_worker_that_somebody_killed_is_the_harness_failure(worker: WorkerTrainer) -> None:
    assert run(worker, -1).failure == "harness"
    assert run(worker, 1).metric == 1 << 20
