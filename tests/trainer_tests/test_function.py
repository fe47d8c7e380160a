"""A Python function is the trial: in the worker process, whatever it is made of, and its faults are results."""

from __future__ import annotations

import functools
import math
import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import pytest

from overnight.store.errors import CampaignError, InputError
from overnight.store.records import FailureClass, TrialProgress, TrialRequest, TrialResult
from overnight.trainer.function import FunctionTrainer, identify
from overnight.trainer.protocol import Trainer, TrainerContext
from overnight.trainer.shipping import ShippedFunction
from overnight.trainer.testing import TrainerConformance
from overnight.trainer.worker import WorkerTrainer

MODULE = """
def objective(config, seed):
    return config["x"] ** 2 + seed / 1000

def with_split(config, seed, split):
    return config["x"] + (100 if split == "holdout" else 0)

not_a_function = 3
"""


class TestFunctionTrainerConforms(TrainerConformance):
    trainer_type = FunctionTrainer
    settings: ClassVar[Mapping[str, object]] = {"function": "conforming_objective:objective"}
    config: ClassVar[Mapping[str, float]] = {"x": 2.0}

    def context(self, tmp_path: Path) -> TrainerContext:
        (tmp_path / "conforming_objective.py").write_text(MODULE)
        return super().context(tmp_path)


def context(folder: Path) -> TrainerContext:
    return TrainerContext(campaign_dir=folder, cache_dir=folder, knobs={"x": "float"}, metric="loss")


@contextmanager
def hosted(folder: Path, function: Any) -> Iterator[WorkerTrainer]:
    trainer = WorkerTrainer("function", {}, context(folder), function=ShippedFunction(function))
    try:
        trainer.prepare()
        yield trainer
    finally:
        trainer.close()


def trial(trainer: Trainer, x: float = 2.0, seed: int = 0, timeout_s: float = 60.0, **options: Any) -> TrialResult:
    return trainer.run(TrialRequest({"x": x}, seed, timeout_s=timeout_s, **options), ignore)


def ignore(progress: TrialProgress) -> None:
    """Nobody watches."""


def test_a_closure_runs_in_another_process(tmp_path: Path) -> None:
    factor = 10.0
    with hosted(tmp_path, lambda config, seed: factor * config["x"] + seed + 1e9 * (os.getpid() == here)) as trainer:
        assert trial(trainer, 2.0, seed=3).metric == 23.0


here = os.getpid()


def test_what_it_captures_may_be_larger_than_a_frame(tmp_path: Path) -> None:
    data = bytes(3 << 20)
    with hosted(tmp_path, lambda config, seed: len(data)) as trainer:
        assert trial(trainer).metric == 3 << 20


def test_a_fresh_worker_gets_the_function_again(tmp_path: Path) -> None:
    def objective(config: Mapping[str, float], seed: int) -> float:
        if seed == 1:
            os._exit(3)
        return config["x"]

    with hosted(tmp_path, objective) as trainer:
        assert [trial(trainer, seed=seed).failure for seed in (0, 1, 2)] == [None, "crash", None]


def raising(error: BaseException) -> Callable[[Mapping[str, float], int], float]:
    def objective(config: Mapping[str, float], seed: int) -> float:
        raise error

    return objective


class OutOfMemoryError(Exception):
    """Named as torch's own."""


@pytest.mark.parametrize(
    ("function", "failure", "words"),
    [
        (raising(ValueError("no such layer")), "crash", "no such layer"),
        (raising(SystemExit(2)), "crash", "SystemExit"),
        (raising(MemoryError()), "oom", "MemoryError"),
        (lambda config, seed: math.nan, "nan", "nan"),
        (lambda config, seed: math.inf, "nan", "inf"),
        (lambda config, seed: None, "crash", "returned NoneType, not a number"),
        (lambda config, seed: "0.5", "crash", "returned str, not a number"),
        (lambda config, seed: True, "crash", "returned bool, not a number"),
    ],
)
def test_what_goes_wrong_is_a_result_of_its_class(function: Any, failure: FailureClass, words: str) -> None:
    trainer = FunctionTrainer(lambda: function, metric="loss")
    trainer.prepare()
    result = trial(trainer)
    assert (result.metric, result.failure) == (None, failure)
    assert words in result.trace


def test_a_function_that_hangs_is_killed_at_its_deadline(tmp_path: Path) -> None:
    def objective(config: Mapping[str, float], seed: int) -> float:
        while seed:
            time.sleep(60)
        return 1.0

    with hosted(tmp_path, objective) as trainer:
        started = time.monotonic()
        assert trial(trainer, seed=1, timeout_s=0.2).failure == "timeout"
        assert time.monotonic() - started < 10
        assert trial(trainer, seed=0).metric == 1.0


def test_numbers_of_other_libraries_count(tmp_path: Path) -> None:
    def objective(config: Mapping[str, float], seed: int) -> Any:
        import numpy as np

        return np.float32(config["x"])

    with hosted(tmp_path, objective) as trainer:
        assert trial(trainer, 0.5).metric == 0.5


def test_a_function_that_takes_the_split_keeps_data_aside(tmp_path: Path) -> None:
    with_split = FunctionTrainer(lambda: lambda config, seed, split: float(split == "holdout"), metric="loss")
    without = FunctionTrainer(lambda: lambda config, seed: config["x"], metric="loss")
    assert (with_split.prepare().holdout_data, without.prepare().holdout_data) == (True, False)
    assert trial(with_split, split="holdout").metric == 1.0
    assert trial(with_split).metric == 0.0
    assert trial(without, 3.0, split="holdout").metric == 3.0


def test_modules_beside_the_caller_are_found_in_the_worker(tmp_path: Path) -> None:
    (tmp_path / "beside.py").write_text(MODULE)
    script = tmp_path / "script.py"
    script.write_text(
        "from pathlib import Path\nimport beside\n"
        "from overnight.store.records import TrialRequest\n"
        "from overnight.trainer.protocol import TrainerContext\n"
        "from overnight.trainer.shipping import ShippedFunction\n"
        "from overnight.trainer.worker import WorkerTrainer\n"
        "context = TrainerContext(campaign_dir=Path(), cache_dir=Path(), knobs={'x': 'float'}, metric='m')\n"
        "for function in (beside.objective, lambda config, seed: beside.objective(config, seed) + 1):\n"
        "    trainer = WorkerTrainer('function', {}, context, function=ShippedFunction(function))\n"
        "    trainer.prepare()\n"
        "    print(trainer.run(TrialRequest({'x': 2.0}, 0), print).metric)\n"
        "    trainer.close()\n"
    )
    # From another folder: what is beside the script, not where it was called, is what its imports see.
    done = subprocess.run([sys.executable, str(script)], cwd="/", capture_output=True, text=True, check=False)
    assert (done.stdout.split(), done.stderr) == (["4.0", "5.0"], "")


def test_what_cannot_be_packed_is_refused_at_once() -> None:
    lock = threading.Lock()

    def objective(config: Mapping[str, float], seed: int) -> float:
        with lock:
            return 0.0

    with pytest.raises(InputError, match=r"`objective` cannot be sent to the trial worker: .*lock"):
        ShippedFunction(objective)


async def coroutine(config: Mapping[str, float], seed: int) -> float:
    return 0.0


@pytest.mark.parametrize(
    ("function", "words"),
    [
        (lambda config: 0.0, r"cannot be called as fn\(config, seed\)"),
        (lambda config, seed, epochs: 0.0, r"missing a required argument: 'epochs'"),
        (coroutine, r"`coroutine` is an async function"),
        (0.5, r"a float is nothing that can be called"),
    ],
)
def test_a_function_that_cannot_be_called_so_is_refused_at_once(function: Any, words: str) -> None:
    with pytest.raises(InputError, match=words):
        ShippedFunction(function)


def test_a_parameter_with_a_default_and_a_partial_are_fine() -> None:
    def objective(config: Mapping[str, float], seed: int, *, width: int, epochs: int = 3) -> float:
        return config["x"] * width * epochs

    trainer = FunctionTrainer(lambda: functools.partial(objective, width=2), metric="loss")
    trainer.prepare()
    assert trial(trainer, 1.0).metric == 6.0


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("no_such_module:f", "No module named 'no_such_module'"),
        ("objectives_here:missing", "has no attribute 'missing'"),
        ("objectives_here:not_a_function", "is a int, nothing that can be called"),
    ],
)
def test_a_name_that_leads_nowhere_is_told(tmp_path: Path, name: str, words: str) -> None:
    (tmp_path / "objectives_here.py").write_text(MODULE)
    with pytest.raises(CampaignError, match=words):
        FunctionTrainer.from_settings({"function": name}, context(tmp_path)).prepare()


@pytest.mark.parametrize("settings", [{}, {"function": "no colon"}, {"function": "os:system; rm"}])
def test_a_table_without_a_function_says_what_it_takes(tmp_path: Path, settings: dict[str, object]) -> None:
    with pytest.raises(CampaignError, match=r"`trainer.function`: .*`package.module:name`"):
        FunctionTrainer.from_settings(settings, context(tmp_path))


def make(width: float, text: str = "") -> Any:
    return lambda config, seed: config["x"] * width


def test_its_identity_is_its_source_and_what_it_captured() -> None:
    assert identify(make(1.0)) == identify(make(1.0))
    assert identify(make(1.0)) != identify(make(2.0))
    assert identify(lambda config, seed: 1.0) != identify(lambda config, seed: 2.0)
    bound = functools.partial(make, text="a")
    assert identify(bound) != identify(functools.partial(make, text="b"))


def test_a_version_tells_what_the_source_does_not() -> None:
    one, two = (FunctionTrainer(lambda: make(1.0), metric="m", version=version).prepare() for version in "12")
    assert one.data_hash != two.data_hash
