"""`optimize`: a function in, an honest result out, through the trial worker and the store of any campaign."""

from __future__ import annotations

import asyncio
import gc
import math
import os
import random
import signal
import subprocess
import sys
import threading
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from overnight.agent.events import Decided, Event, HoldoutMeasured
from overnight.agent.knobs import Choice, Float, Int, knob_table
from overnight.agent.optimize import optimize
from overnight.agent.proposers.protocol import reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.result import Result
from overnight.store.errors import CampaignError, InputError, MenuError, TrainerError

KNOBS: Mapping[str, Any] = {"lr": Float(1e-4, 1e-1, log=True, default=1e-1, levels=4), "act": ["relu", "gelu"]}
QUICK: Mapping[str, Any] = {"settings": {"router": {"explore": 0.0}}}


def train(config: dict[str, Any], seed: int) -> float:
    noise = random.Random(f"{seed}").gauss(0, 0.05) + random.Random(f"{seed}{config}").gauss(0, 0.001)
    return 2 + (math.log10(config["lr"]) + 3) ** 2 / 10 - 0.2 * (config["act"] == "gelu") + noise


def with_split(config: dict[str, Any], seed: int, split: str) -> float:
    return train(config, seed) + (10 if split == "holdout" else 0)


class Listener:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def on_event(self, event: Event) -> None:
        self.events.append(event)


DECISIONS = Listener()


@pytest.fixture(scope="module")
def found() -> Result:
    """One campaign for the tests that only look."""
    return optimize(train, KNOBS, iterations=8, proposer="random", hooks=[DECISIONS], **QUICK)


def test_its_hooks_hear_typed_events(found: Result) -> None:
    decided = [event.outcome for event in DECISIONS.events if isinstance(event, Decided)]
    assert (len(decided), decided.count("kept")) == (found.iterations, found.kept)


def test_it_finds_the_best_configuration_and_says_how_much_better_it_is(found: Result) -> None:
    assert (found.campaign, found.finished, found.stop_reason) == ("train", True, "iterations")
    assert dict(found.best_config) == {"lr": 1e-3, "act": "gelu"}
    assert dict(found.baseline_config) == {"lr": 1e-1, "act": "relu"}
    assert found.gain is not None
    assert found.gain_interval is not None
    low, high = found.gain_interval
    true = (2.4 - 1.8) / 2.4
    assert low < found.gain < high
    assert abs(found.gain - true) < 0.02
    assert found.best_value == pytest.approx(1.8, abs=0.1)
    assert found.baseline_value == pytest.approx(2.4, abs=0.1)


def test_a_result_reads_as_a_sentence(found: Result) -> None:
    lines = repr(found).splitlines()
    assert lines[0] == f"train: {found.iterations} turns, {found.kept} kept (iterations)"
    assert lines[1].startswith("best: lr = 0.001, act = gelu, 1.")
    assert lines[2].startswith("gain: +2")
    assert lines[2].endswith("fresh seeds)")


def test_its_frame_has_a_row_a_turn_with_the_configuration_tried(found: Result) -> None:
    frame = found.to_frame()
    assert list(frame["iteration"]) == list(range(1, found.iterations + 1))
    kept = frame[frame["outcome"] == "kept"]
    assert len(kept) == found.kept
    assert kept.iloc[-1]["config_lr"] == 1e-3
    assert kept.iloc[-1]["config_act"] == "gelu"


def test_its_history_answers_sql(found: Result) -> None:
    rows = list(found.query("SELECT outcome, count(*) AS n FROM iterations GROUP BY outcome"))
    assert sum(int(str(row["n"])) for row in rows) == found.iterations


def test_its_report_is_a_page(found: Result, tmp_path: Path) -> None:
    page = found.report(tmp_path / "report.html").read_text()
    assert "Fresh seeds, on data that decisions saw: the gain holds" in page


def test_a_function_with_a_split_is_measured_on_data_kept_aside() -> None:
    listener = Listener()
    proposer = changes(("act", "gelu"))
    result = optimize(with_split, KNOBS, iterations=2, proposer=proposer, hooks=[listener], **QUICK)
    (looked,) = [event for event in listener.events if isinstance(event, HoldoutMeasured)]
    assert looked.fresh_data
    assert looked.baseline_metric == pytest.approx(12.4, abs=0.1)
    assert result.baseline_value == pytest.approx(2.4, abs=0.1)


def changes(*moves: tuple[str, Any]) -> ScriptedProposer:
    return ScriptedProposer("by_hand", [reply_text(*move, "as told") for move in moves])


def test_more_may_be_better_and_a_gain_absolute() -> None:
    result = optimize(
        lambda config, seed: config["x"] - 10.0, {"x": [1, 2]}, iterations=1, direction="max", gain="absolute",
        proposer="random",
    )  # fmt: skip
    assert result.best_config == {"x": 2}
    assert (result.gain, result.gain_interval, result.gain_kind) == (1.0, (1.0, 1.0), "absolute")
    assert result.campaign == "optimize"


def test_nothing_better_is_said_so() -> None:
    result = optimize(lambda config, seed: 1.0 + config["x"], {"x": [1, 2]}, iterations=1, proposer="random")
    assert (result.kept, result.gain, result.best_config) == (0, None, {"x": 1})
    assert "no change beat the baseline beyond its noise" in repr(result)


def test_failures_are_recorded_and_the_search_goes_on() -> None:
    def fragile(config: dict[str, Any], seed: int) -> float:
        if config["x"] == 2:
            raise RuntimeError("no such device")
        if config["x"] == 3:
            os._exit(1)
        while config["x"] == 4:
            pass
        return 1 / config["x"]

    moves = changes(("x", 2), ("x", 3), ("x", 4), ("x", 5))
    result = optimize(
        fragile, {"x": [1, 2, 3, 4, 5]}, iterations=4, proposer=moves, timeout_s=0.5,
        settings={"router": {"explore": 0.0, "warmup": False}},
    )  # fmt: skip
    rows = [(row["outcome"], row["failure"]) for row in result.query("SELECT outcome, failure FROM iterations")]
    assert rows == [("failed", "crash"), ("failed", "crash"), ("failed", "timeout"), ("kept", None)]


def test_a_constraint_is_kept() -> None:
    seen = optimize(
        lambda config, seed: 1.0 / (config["a"] + config["b"]), {"a": [1, 2, 3], "b": [1, 2, 3]}, iterations=9,
        proposer="random", constraints=["a + b <= 4"],
    ).to_frame()  # fmt: skip
    assert (seen["config_a"] + seen["config_b"]).max() == 4


def test_it_runs_inside_a_running_event_loop_and_in_a_thread_and_leaves_nothing() -> None:
    async def notebook() -> Result:
        return optimize(lambda config, seed: config["x"], {"x": [2, 1]}, iterations=1, proposer="random")

    results: list[Result] = [asyncio.run(notebook())]
    thread = threading.Thread(target=lambda: results.append(asyncio.run(notebook())))
    thread.start()
    thread.join(60)
    assert [result.kept for result in results] == [1, 1]
    folders = [Path(result.db).parent for result in results]
    assert all(folder.is_dir() for folder in folders)
    results.clear()
    gc.collect()
    assert not any(folder.exists() for folder in folders)  # a temporary database goes with its result


def test_the_same_call_goes_on_where_it_stopped(tmp_path: Path) -> None:
    def again(iterations: int) -> Result:
        return optimize(train, KNOBS, iterations=iterations, proposer="random", db=tmp_path / "mine.db", **QUICK)

    first, second, third = again(2), again(4), again(4)
    assert [result.iterations for result in (first, second, third)] == [2, 4, 4]
    trials = "SELECT count(*) AS n FROM trial_log"
    assert list(second.query(trials)) == list(third.query(trials))


def test_another_function_under_the_same_name_is_refused(tmp_path: Path) -> None:
    options: dict[str, Any] = {"iterations": 1, "proposer": "random", "db": tmp_path / "mine.db", "name": "mine"}
    optimize(lambda config, seed: config["x"], {"x": [3, 2, 1]}, **options)
    for turns in (1, 2):  # a finished campaign's result is another function's, too
        options["iterations"] = turns
        with pytest.raises(CampaignError, match="campaign `mine`: the trainer's data or settings changed"):
            optimize(lambda config, seed: config["x"] + 1.0, {"x": [3, 2, 1]}, **options)


def train_x(config: dict[str, Any], seed: int) -> float:
    return float(config["x"])


def test_going_on_in_a_temporary_database_keeps_it_as_long_as_a_result_reads_it() -> None:
    result = optimize(train_x, {"x": [3, 2, 1]}, iterations=1, proposer="random")
    first = result.db
    result = optimize(train_x, {"x": [3, 2, 1]}, iterations=2, proposer="random", db=result.db)
    gc.collect()
    assert result.query("SELECT count(*) AS n FROM iterations").rows == [(2,)]
    del result
    gc.collect()
    assert not Path(first).parent.exists()


INTERRUPTED = """
import os, signal
import overnight

def slow(config, seed):
    if config["x"] < 4 and not os.path.exists("interrupted"):
        open("interrupted", "w").close()
        os.kill(parent, signal.SIGINT)
    return float(config["x"])

parent = os.getpid()
result = overnight.optimize(slow, {"x": [4, 3, 2, 1]}, iterations=3, proposer="random", db="night.db")
print(result.finished, result.stop_reason)
"""


def test_ctrl_c_pauses_and_gives_what_there_is(tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(INTERRUPTED)

    def run() -> list[str]:
        command = [sys.executable, "script.py"]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True, timeout=120)
        return done.stdout.split()

    assert run() == ["False", "paused"]
    assert run()[0] == "True"


def test_ctrl_c_is_the_callers_own_again_afterwards(found: Result) -> None:
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


@pytest.mark.parametrize(
    ("spec", "table"),
    [
        ((1, 9), {"type": "int", "range": [1, 9], "default": 5}),
        ((0.0, 1.0), {"type": "float", "range": [0.0, 1.0], "scale": "linear", "default": 0.5}),
        ((1e-5, 1e-1, "log"), {"type": "float", "range": [1e-5, 1e-1], "scale": "log", "default": 1e-3}),
        ([8, 16], {"type": "int", "choices": [8, 16], "default": 8}),
        ([0, 0.5], {"type": "float", "choices": [0, 0.5], "default": 0}),
        (["a", "b"], {"type": "str", "choices": ["a", "b"], "default": "a"}),
        (range(1, 4), {"type": "int", "choices": [1, 2, 3], "default": 1}),
        (Int(1, 64, log=True, default=8), {"type": "int", "scale": "log", "default": 8}),
        (Choice([1, 2], default=2, doc="why"), {"type": "int", "default": 2, "doc": "why"}),
        ({"type": "int"}, {"type": "int"}),
    ],
)
def test_a_knob_may_be_said_in_short(spec: Any, table: Mapping[str, Any]) -> None:
    assert table.items() <= knob_table("k", spec).items()


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ([True, False], 'not bool; say "on" and "off", or 0 and 1'),
        ([1, "a"], "not int and str"),
        ([], "not nothing"),
        ([None, 1], "not NoneType and int"),
        ((1, 2, 3), "is no range; give"),
        ((1, "a"), "is no range; give"),
        ("relu", "is no knob; give"),
        (3, "is no knob; give"),
        ((5, 5), "`range`"),
    ],
)
def test_what_is_no_knob_is_told(spec: Any, words: str) -> None:
    with pytest.raises(MenuError, match=f"knob `k`: .*{words}"):
        knob_table("k", spec)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"fn": lambda config: 0.0}, InputError, "cannot be called as fn"),
        ({"knobs": {}}, CampaignError, "the menu has no knobs"),
        ({"knobs": {"x": (2, 1)}}, CampaignError, "knob `x`: "),
        ({"iterations": 0}, CampaignError, "`budget.iterations`"),
        ({"proposer": "hope"}, CampaignError, "sampler"),
        ({"settings": {"decision": {"trials": 3}}}, CampaignError, "`decision.trials` is not a key"),
        ({"fn": lambda config, seed: 1 / 0}, CampaignError, "the baseline failed .crash.: ZeroDivisionError"),
        ({"fn": lambda config, seed: 0.0}, CampaignError, "the baseline's `value` is 0"),
    ],
)
def test_wrong_use_is_one_clear_line(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"fn": lambda config, seed: config["x"], "knobs": {"x": [2, 1]}, "iterations": 1, **change}
    with pytest.raises(error, match=words) as raised:
        optimize(**arguments)
    assert "\n" not in str(raised.value)


def test_a_baseline_that_fails_later_is_raised_and_not_waited_out(tmp_path: Path) -> None:
    gone = tmp_path / "gone"

    def device(config: dict[str, Any], seed: int) -> float:
        if config["x"] == 2:
            gone.touch()  # the next time that the baseline is run, its device is not there
        elif gone.exists():
            raise RuntimeError("no device")
        return config["x"] + random.Random(f"{seed}{config}").gauss(0, 0.1)

    options: dict[str, Any] = {"settings": {"decision": {"calibration_trials": 2}}, "proposer": "random"}
    with pytest.raises(TrainerError, match=r"the baseline failed \(crash\) on seed"):
        optimize(device, {"x": [1, 2]}, iterations=1, direction="max", **options)
