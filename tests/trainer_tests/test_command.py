"""The command trainer: a stranger's script, whatever it does, becomes a result; nothing of it is left running."""

import sys
import time
import tomllib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import ClassVar

import pytest

from overnight.store.errors import CampaignError
from overnight.store.records import Config, FailureClass, KnobValue, Split, TrialProgress, TrialRequest, TrialResult
from overnight.trainer.command import CommandTrainer
from overnight.trainer.protocol import TrainerContext
from overnight.trainer.testing import TrainerConformance
from overnight.trainer.worker import WorkerTrainer

from .processes import left_over

KNOBS = {"act": "str", "lr": "float"}
SCRIPT = """
import json, os, signal, subprocess, sys, time
act, lr, seed = sys.argv[1], sys.argv[2], sys.argv[3]
SLEEPER = "import os, sys, time; os.fork() or os.setsid(); time.sleep(1e6)"

def family():
    for _ in range(3):
        subprocess.Popen([sys.executable, "-c", SLEEPER, os.path.abspath(__file__)], start_new_session=True)

def say(**fields):
    print(json.dumps(fields))

match act:
    case "sleep":
        print("about to sleep")
        time.sleep(1e6)
    case "family":
        family()
        time.sleep(1e6)
    case "leave family":
        family()
        say(loss=1.0)
    case "allocate":
        hoard = []
        while True:
            hoard.append(b"x" * (1 << 24))
    case "allocate in children":
        for _ in range(4):
            if os.fork() == 0:
                hoard = [b"x" * (100 << 20)]
                time.sleep(1e6)
        time.sleep(1e6)
    case "share memory":
        hoard = b"x" * (200 << 20)
        children = [os.fork() for _ in range(3)]
        if 0 in children:
            time.sleep(1e6)
        time.sleep(1)
        say(loss=1.0)
    case "nan":
        say(loss=float("nan"))
    case "infinite":
        print('{"loss": 1e999}')
    case "null":
        say(loss=None)
    case "huge":
        print('{"loss": 1' + "0" * 400 + "}")
    case "139":
        sys.exit(139)
    case "segfault":
        os.kill(os.getpid(), signal.SIGSEGV)
    case "137":
        sys.exit(137)
    case "killed":
        os.kill(os.getpid(), signal.SIGKILL)
    case "one":
        say(loss=1.0)
        print("what a pity", file=sys.stderr)
        sys.exit(1)
    case "MemoryError":
        raise MemoryError("no more")
    case "cuda":
        class OutOfMemoryError(RuntimeError): __module__ = "torch"
        raise OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
    case "nothing":
        print("done")
    case "true":
        say(loss=True)
    case "words":
        say(loss="1.0")
    case "other":
        say(loss_of_hair=1.0)
    case "deep":
        print('{"loss":' + "[" * 30000)
    case "flood":
        say(loss=3.0)
        for _ in range(8192):
            os.write(1, b"y" * 65536)
        for _ in range(8192):
            os.write(2, (b"y" * 127 + b"\\n") * 512)
        print()  # ends the line of 512 MiB
        say(loss=1.0)
    case "twice":
        say(loss=3.0)
        say(loss=1.0)
        print("bye")
    case "torn":
        say(loss=1.0)
        print('{"loss": 2.0')
    case "no newline":
        sys.stdout.write('{"loss": 1.0}')
    case "all":
        say(step=1, steps=2, loss=5.0)
        say(loss=1.0, speed=2.5, bad=float("nan"), name="x", notes="\\x1b[31mlook\\n" + "n" * 900)
    case "seed":
        say(loss=float(seed))
    case "env":
        print(json.dumps({"loss": 1.0, "notes": " ".join(sorted(os.environ))}))
    case "progress":
        print("\\r 50%\\r100%", end="")
        print('\\r{"loss": 1.0}')
    case _:
        say(loss=1.0, notes=act)
"""


def ignore(progress: TrialProgress) -> None:
    """Nobody watches."""


def peak_rss(*, reset: bool = False) -> int:
    """Return this process' largest resident set since the last reset, in bytes."""
    if reset:
        Path("/proc/self/clear_refs").write_text("5")
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) * 1024


@pytest.fixture
def folder(tmp_path: Path) -> Iterator[Path]:
    (tmp_path / "train.py").write_text(SCRIPT)
    yield tmp_path
    assert left_over(tmp_path) == []


COMMAND = ["{python}", "train.py", "{act}", "{lr}", "{seed}"]


def context(folder: Path, knobs: Mapping[str, str] = KNOBS, memory_gib: float | None = None) -> TrainerContext:
    return TrainerContext(campaign_dir=folder, cache_dir=folder, knobs=knobs, metric="loss", memory_gib=memory_gib)


def build(folder: Path, memory_gib: float | None = None, **settings: object) -> CommandTrainer:
    table = {"command": COMMAND, **settings}
    return CommandTrainer.from_settings(table, context(folder, memory_gib=memory_gib))


def act(
    trainer: CommandTrainer | WorkerTrainer,
    what: str,
    *,
    seed: int = 0,
    timeout_s: float | None = 60.0,
    split: Split = "val",
) -> TrialResult:
    return trainer.run(TrialRequest({"act": what, "lr": 0.1}, seed, split, timeout_s), ignore)


@pytest.mark.parametrize(
    ("what", "failure", "words"),
    [
        ("sleep", "timeout", "about to sleep\nkilled: it was still running after 1 s"),
        ("family", "timeout", "still running"),
        ("allocate", "oom", "above 0.25 GiB"),
        ("allocate in children", "oom", "above 0.25 GiB"),
        ("137", "oom", "exit 137: SIGKILL"),
        ("killed", "oom", "killed by SIGKILL"),
        ("MemoryError", "oom", "MemoryError: no more"),
        ("cuda", "oom", "torch.OutOfMemoryError"),
        ("nan", "nan", "`loss` is nan"),
        ("infinite", "nan", "`loss` is inf"),
        ("null", "nan", "`loss` is nan"),
        ("huge", "nan", "`loss` is inf"),
        ("139", "crash", "exit 139: SIGSEGV"),
        ("segfault", "crash", "killed by SIGSEGV"),
        ("one", "crash", "what a pity\nexit 1"),
        ("nothing", "crash", "done\nexit 0, but no line of standard output had the metric `loss`"),
        ("true", "crash", "no line"),
        ("words", "crash", "no line"),
        ("other", "crash", "no line"),
        ("deep", "crash", "no line"),
    ],
)
def test_a_fault_becomes_its_class_and_the_next_trial_is_fine(
    folder: Path, what: str, failure: FailureClass, words: str
) -> None:
    trainer = build(folder, memory_gib=0.25)
    result = act(trainer, what, timeout_s=1.0 if failure == "timeout" else 60.0)
    assert (result.metric, result.failure) == (None, failure), result.trace
    assert words in result.trace
    assert left_over(folder) == []
    assert act(trainer, "fine").metric == 1.0


@pytest.mark.parametrize("what", ["twice", "torn", "no newline", "leave family", "share memory", "progress"])
def test_the_last_metric_printed_counts_whatever_is_around_it(folder: Path, what: str) -> None:
    result = act(build(folder, memory_gib=0.4), what)
    assert result.metric == 1.0, result.trace


def test_a_flood_of_a_gigabyte_is_drained_and_the_parent_stays_flat(folder: Path) -> None:
    trainer = build(folder)
    act(trainer, "fine")
    before = peak_rss(reset=True)
    assert act(trainer, "flood").metric == 1.0
    assert peak_rss() - before < 8 << 20


def test_in_the_worker_a_script_past_its_deadline_is_told_apart_by_its_last_words(folder: Path) -> None:
    trainer = WorkerTrainer("command", {"command": COMMAND}, context(folder))
    result = act(trainer, "sleep", timeout_s=1.0)
    trainer.close()
    assert result.failure == "timeout"
    assert result.trace.startswith("about to sleep")


def test_a_deadline_is_kept_to_a_second(folder: Path) -> None:
    started = time.monotonic()
    act(build(folder), "sleep", timeout_s=0.5)
    assert time.monotonic() - started < 1.5


def test_a_json_line_brings_numbers_notes_and_progress(folder: Path) -> None:
    seen: list[TrialProgress] = []
    result = build(folder).run(TrialRequest({"act": "all", "lr": 0.1}, 0), seen.append)
    assert seen == [TrialProgress(1, 2, 5.0)]
    assert (result.metric, result.metrics) == (1.0, {"speed": 2.5})
    assert result.notes.startswith("\\x1b[31mlook nnn")
    assert len(result.notes) == 500


def test_a_knob_s_value_is_never_read_by_a_shell_nor_as_a_template(folder: Path) -> None:
    assert act(build(folder), "; touch oops $(id) {seed}").notes == "; touch oops $(id) {seed}"
    assert not (folder / "oops").exists()


def test_the_script_sees_no_variable_that_is_not_allowed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIM_API_KEY", "secret")
    monkeypatch.setenv("DATA_ROOT", "/data")
    seen = act(build(folder, env=["DATA_ROOT"]), "env").notes.split()
    assert "DATA_ROOT" in seen
    assert "NIM_API_KEY" not in seen


def test_the_configuration_comes_as_a_json_file_that_is_gone_afterwards(folder: Path) -> None:
    code = (
        "import sys, json; c = json.load(open(sys.argv[1])); print(json.dumps({'loss': c['lr'], 'notes': sys.argv[1]}))"
    )
    code = code.replace("{", "{{").replace("}", "}}")
    result = act(build(folder, command=["{python}", "-c", code, "{config}"]), "fine")
    assert result.metric == 0.1
    assert not Path(result.notes).exists()


def test_a_regular_expression_finds_the_last_match(folder: Path) -> None:
    code = "print('loss: 3.0 lr {lr}'); print('loss: 2.5, loss: 1.5'); print('loss: none {act}')"
    trainer = build(folder, command=["{python}", "-c", code], metric_regex=r"loss: (?P<metric>\S+?)(,|$| )")
    assert act(trainer, "fine").metric == 1.5


def test_lines_with_the_prefix_are_notes(folder: Path) -> None:
    code = "print('# slow {act}'); print('# start {lr}'); print('{{\"loss\": 1}}')"
    assert act(build(folder, command=["{python}", "-c", code], notes_prefix="# "), "ok").notes == "slow ok start 0.1"


def test_relative_paths_are_relative_to_the_campaign(folder: Path) -> None:
    (folder / "code").mkdir()
    (folder / "train.py").rename(folder / "code" / "train.py")
    assert act(build(folder, cwd="code"), "fine").metric == 1.0


@pytest.mark.parametrize(
    ("settings", "metric"),
    [
        ({"command": [*COMMAND, "{split}"]}, 1.0),
        ({"holdout_command": ["{python}", "train.py", "seed", "{lr}{act}", "7"]}, 7.0),
        ({}, None),
    ],
)
def test_the_holdout_is_its_own_command_or_the_split(folder: Path, settings: Config, metric: float | None) -> None:
    trainer = build(folder, **settings)
    assert trainer.prepare().has_holdout == (metric is not None)
    assert act(trainer, "fine", split="holdout").metric == metric


def test_the_data_hash_follows_the_script_and_the_data(folder: Path) -> None:
    (folder / "data").mkdir()
    (folder / "data" / "a.txt").write_text("a")
    hashes = [build(folder, data_files=["data/*.txt"]).prepare().data_hash]
    for change in ("data/a.txt", "data/b.txt", "train.py"):
        with (folder / change).open("a") as file:
            file.write("#\n")
        hashes.append(build(folder, data_files=["data/*.txt"]).prepare().data_hash)
    (folder / "unrelated.txt").write_text("x")
    assert len(set(hashes)) == 4
    assert build(folder, data_files=["data/*.txt"]).prepare().data_hash == hashes[-1]


def test_a_script_that_disappears_is_the_harness_fault(folder: Path) -> None:
    script = folder / "run.sh"
    script.write_text("#!/bin/sh\necho '{\"loss\": 1}'\n")
    script.chmod(0o755)
    trainer = build(folder, command=["./run.sh", "{act}", "{lr}"])
    assert act(trainer, "fine").metric == 1.0
    script.unlink()
    result = act(trainer, "fine")
    assert result.failure == "harness"
    assert "No such file or directory: ./run.sh" in result.trace


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"comand": ["x"]}, "`trainer.comand` is not a setting"),
        ({"command": []}, "`trainer.command`"),
        ({"command": "python train.py"}, "`trainer.command`"),
        ({"command": ["a", "{act}", "{lr}", "{learning_rate}"]}, "placeholder `{learning_rate}`"),
        ({"command": ["a", "{act}"]}, "does not pass on knob `lr`"),
        ({"command": ["a", "{config}", "{0}"]}, "`{0}` in `{0}` is not a plain name"),
        ({"command": ["a", "{config}", "{lr.real}"]}, "not a plain name"),
        ({"command": ["a", "{config}", "{lr:>9}"]}, "not a plain name"),
        ({"command": ["a", "{config"]}, "double a brace"),
        ({"holdout_command": ["a", "{seed}"]}, "`trainer.holdout_command` does not pass on knob `act`"),
        ({"metric_regex": "loss: (.*)"}, "no group named `metric`"),
        ({"metric_regex": "("}, "`trainer.metric_regex` is not a regular expression"),
        ({"metric_regex": "(?P<metric>.*)", "metric_from": "x"}, "both given"),
        ({"env": ["A=B"]}, "`trainer.env.0`"),
    ],
)
def test_bad_settings_are_named(folder: Path, settings: dict[str, object], words: str) -> None:
    with pytest.raises(CampaignError) as caught:
        build(folder, **settings)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"cwd": "nowhere"}, "`trainer.cwd`"),
        ({"data_files": ["*.parquet"]}, "`trainer.data_files`: `*.parquet` matches no file"),
        ({"command": ["no-such-program", "{config}"]}, "`no-such-program` is not a program"),
        ({"command": ["./train.py", "{config}"]}, "`./train.py` is not a program"),
    ],
)
def test_what_the_machine_lacks_is_named_before_the_first_trial(
    folder: Path, settings: dict[str, object], words: str
) -> None:
    with pytest.raises(CampaignError) as caught:
        build(folder, **settings).prepare()
    assert words in str(caught.value)


def test_a_knob_may_not_take_a_placeholder_s_name(folder: Path) -> None:
    with pytest.raises(CampaignError, match="knob `seed`"):
        CommandTrainer.from_settings({"command": COMMAND}, context(folder, {**KNOBS, "seed": "int"}))


class TestCommandTrainerConforms(TrainerConformance):
    trainer_type = CommandTrainer
    settings: ClassVar[Mapping[str, object]] = {"command": [sys.executable, "-c", "print('{{\"val_bpb\": {lr}}}')"]}
    config: ClassVar[Mapping[str, KnobValue]] = {"lr": 0.1}


TUTORIAL = Path(__file__).parents[2] / "campaigns" / "command_example"


class TestTheTutorialConforms(TrainerConformance):
    trainer_type = CommandTrainer
    metric = "val_mse"
    settings: ClassVar[Mapping[str, object]] = {
        **tomllib.loads((TUTORIAL / "campaign.toml").read_text())["trainer"],
        "cwd": str(TUTORIAL),
    }
    config: ClassVar[Mapping[str, KnobValue]] = {"lr": 0.05, "momentum": 0.5, "degree": 4, "weight_decay": 0.0}
