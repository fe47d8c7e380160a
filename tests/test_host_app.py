"""`examples/host_app`, installed for real: its package is called `agent`, and a kill in mid-turn costs it nothing."""

from __future__ import annotations

import os
import shutil
import signal
import site
import sqlite3
import subprocess
import sys
import time
import venv
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

from overnight.store.reading import query

EXAMPLE = Path(__file__).parents[1] / "examples" / "host_app"
TURNS = 4
KILLED_IN = 3
"""The turn whose candidate is confirmed on five seeds: time enough to be killed in the middle."""
DEADLINE_S = 120.0
TURN_COLUMNS = "iteration, knob, new_value, outcome, metric, gain, trials"


@dataclass(frozen=True)
class Installed:
    python: Path
    command: Path


@pytest.fixture(scope="module")
def app(tmp_path_factory: pytest.TempPathFactory) -> Installed:
    """The application in a virtual environment of its own, which sees what ours has installed."""
    folder = tmp_path_factory.mktemp("host")
    venv.create(folder / "venv", with_pip=False)
    (packages,) = (folder / "venv" / "lib").glob("python*/site-packages")
    lines = [f"import site; site.addsitedir({path!r})\n" for path in site.getsitepackages()]
    (packages / "seen_from_here.pth").write_text("".join(lines))
    shutil.copytree(EXAMPLE, folder / "source", ignore=shutil.ignore_patterns("build", "*.egg-info", "__pycache__"))
    python = folder / "venv" / "bin" / "python"
    options = ["install", "-q", "--no-deps", "--no-build-isolation", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "--python", str(python), *options, str(folder / "source")]
    subprocess.run(command, check=True, capture_output=True)
    return Installed(python, python.with_name("host-app"))


def start(app: Installed, folder: Path) -> subprocess.Popen[str]:
    folder.mkdir(exist_ok=True)
    command = [str(app.command), "--turns", str(TURNS)]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process: subprocess.Popen[str]) -> list[str]:
    out, err = process.communicate(timeout=DEADLINE_S)
    assert (process.returncode, err) == (0, "")
    return out.splitlines()


def killed_in_mid_turn(process: subprocess.Popen[str], folder: Path) -> set[int]:
    """Kill the application while a candidate is being measured; return the processes that it had."""
    began = time.monotonic()
    while True:
        assert time.monotonic() - began < DEADLINE_S
        assert process.poll() is None, process.communicate()
        if (folder / "overnight.db").exists() and measured(folder / "overnight.db") >= 1:
            break
        time.sleep(0.005)
    below = {child.pid for child in psutil.Process(process.pid).children(recursive=True)}
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    return below


def measured(database: Path) -> int:
    """How many trials the third turn's candidate has so far."""
    connection = sqlite3.connect(f"file:{database}?mode=ro", uri=True)
    try:
        statement = (
            "SELECT count(*) FROM trials JOIN attempts ON attempts.id = trials.attempt_id "
            "WHERE attempts.iteration = ? AND attempts.stage = 'checked'"
        )
        return int(connection.execute(statement, (KILLED_IN,)).fetchone()[0])
    except sqlite3.OperationalError:  # its tables are just being made
        return 0
    finally:
        connection.close()


def test_its_package_and_ours_are_both_called_agent(app: Installed) -> None:
    code = (
        "import sys, agent.graph, overnight.agent.graph\n"
        "assert sys.prefix != sys.base_prefix and agent.__file__.startswith(sys.prefix)\n"
        "print(agent.graph is overnight.agent.graph)"
    )
    done = subprocess.run([app.python, "-P", "-c", code], capture_output=True, text=True, check=False)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_killed_in_mid_turn_it_goes_on_as_if_nothing_had_been(app: Installed, tmp_path: Path) -> None:
    undisturbed, disturbed = tmp_path / "undisturbed", tmp_path / "disturbed"
    first = start(app, undisturbed)
    below = killed_in_mid_turn(start(app, disturbed), disturbed)
    before = finish(first)
    after = finish(start(app, disturbed))

    # The host's own state, from its own checkpointer: every turn once, in order, the critic's veto among them.
    assert after[0] == "going on where the last run was cut off"
    assert after[1:] == before[KILLED_IN - 1 :]
    assert before[-1] == after[-1] == f"{TURNS} turns in the diary"

    # The store: the same turns with the same numbers, and no (configuration, seed) was measured twice.
    turns = [
        query(folder / "overnight.db", f"SELECT {TURN_COLUMNS} FROM iterations") for folder in (undisturbed, disturbed)
    ]
    assert turns[0].rows == turns[1].rows
    assert [row["outcome"] for row in turns[1]].count("kept") == 1
    runs = "SELECT config_id, split, seed, replicate, metric FROM trial_log ORDER BY 1, 2, 3, 4"
    assert query(undisturbed / "overnight.db", runs).rows == query(disturbed / "overnight.db", runs).rows
    (vetoed,) = query(disturbed / "overnight.db", "SELECT iteration, rail_reason FROM attempts WHERE rail = 'veto'")
    assert "this host allows 2048" in str(vetoed["rail_reason"])

    assert not below & {process.pid for process in psutil.process_iter()}
