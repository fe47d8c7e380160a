"""`overnight status` from another terminal: what a run does at this second, without writing anything anywhere."""

from __future__ import annotations

import json
import os
import signal
import sqlite3
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from overnight.agent.events import Decided, TrialStarted, TrialStepped, TurnStarted
from overnight.agent.live import Limits, LiveFile, beside, read_live
from overnight.agent.pace import End, in_words, next_end
from overnight.store.lease import this_process
from overnight.store.protocol import Spent
from overnight.store.sql_store import SqlStore

from .servers import wait_until
from .test_cli import DEADLINE_S, overnight, started, write

STEP = TrialStepped(campaign="c", step=1, steps=None, loss=None)


def row(folder: Path) -> dict[str, Any]:
    (found,) = json.loads(overnight("status", "c", "--format", "json", cwd=folder).stdout)
    assert isinstance(found, dict)
    return found


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir() if path.is_file()}


def test_a_running_campaign_says_its_step_and_what_is_left_and_nothing_is_written(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500, "patience": 400}, trainer={"sleep_s": 2.0, "steps": 40})
    process = started("run", "mine", "--iterations", "3", cwd=tmp_path)
    try:
        live = tmp_path / "overnight.db.c.live.json"
        wait_until(live.exists, seconds=DEADLINE_S, what="the live file")
        wait_until(lambda: '"turn_s": null' not in live.read_text(), seconds=DEADLINE_S, what="a turn")
        wait_until(lambda: '"step": null' not in live.read_text(), seconds=DEADLINE_S, what="a step")
        everyone = [psutil.Process(process.pid), *psutil.Process(process.pid).children(recursive=True)]
        for one in everyone:
            one.send_signal(signal.SIGSTOP)
        before = contents(tmp_path)
        found = row(tmp_path)
        assert contents(tmp_path) == before
        assert (found["status"], found["steps"], found["next_budget"]) == ("running", 40, "--iterations")
        assert found["doing"].startswith("trial ")
        assert 1 <= found["step"] <= 40
        assert 0 < found["turn_s"] < DEADLINE_S
        assert 0 <= found["time_left_s"] <= 4 * found["turn_s"]
    finally:
        for one in everyone:
            one.send_signal(signal.SIGCONT)
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=DEADLINE_S)
    assert not live.exists()
    assert row(tmp_path)["doing"] is None


def test_status_of_all_campaigns_leaves_out_what_none_has(tmp_path: Path) -> None:
    SqlStore.open(tmp_path / "overnight.db", create=True).close()
    assert overnight("status", cwd=tmp_path).stdout.startswith("no campaign yet")
    write(tmp_path / "mine", budget={"iterations": 1})
    overnight("run", "mine", cwd=tmp_path)
    header, _, line = overnight("status", cwd=tmp_path).stdout.split("\n")[1:4]
    assert header.split()[:4] == ["campaign", "status", "turn", "turns"]
    assert "doing" not in header
    assert line.split()[:4] == ["c", "finished", "1", "1"]


def test_a_killed_run_says_nothing_of_the_present(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.2})
    process = started("run", "mine", cwd=tmp_path)
    live = tmp_path / "overnight.db.c.live.json"
    wait_until(lambda: live.exists() and "trial" in live.read_text(), seconds=DEADLINE_S, what="a trial")
    process.kill()
    process.communicate()
    assert live.exists()
    found = row(tmp_path)
    assert (found["status"], found["doing"], found["next_budget"]) == ("stopped (run it again to go on)", None, None)
    assert overnight("run", "mine", "--iterations", "1", cwd=tmp_path).returncode == 0
    assert not list(tmp_path.glob("*.live.json*"))


def test_status_of_a_paused_campaign_makes_no_file_and_needs_no_right_to_write(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 4})
    overnight("run", "mine", "--iterations", "1", cwd=tmp_path)
    before = contents(tmp_path)
    assert row(tmp_path)["status"] == "paused"
    assert contents(tmp_path) == before
    os.chmod(tmp_path / "overnight.db", 0o444)
    writer = sqlite3.connect(tmp_path / "overnight.db")  # keeps the log open as a run does
    writer.execute("SELECT count(*) FROM trials").fetchone()
    assert row(tmp_path)["turn"] == 1
    writer.close()


KEEP = "import sys; open('told', 'a').write(sys.stdin.read())"


def test_a_second_run_leaves_the_first_ones_files_alone_and_tells_nobody(tmp_path: Path) -> None:
    notify = {"command": [sys.executable, "-c", KEEP]}
    folder = write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 3.0}, notify=notify)
    process = started("run", "mine", "--allow", cwd=tmp_path)
    live, log = tmp_path / "overnight.db.c.live.json", tmp_path / "overnight.db.c.log"
    try:
        wait_until(lambda: live.exists() and "trial" in live.read_text(), seconds=DEADLINE_S, what="a trial")
        second = overnight("run", "mine", "--allow", cwd=tmp_path)
        assert (second.returncode, f"is being run by process {process.pid}" in second.stderr) == (2, True)
        assert f":{process.pid}:" in live.read_text()
        assert "run_ended" not in log.read_text()
    finally:
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=DEADLINE_S)
    assert not live.exists()
    assert not (folder / "told").exists()


def test_the_file_of_another_run_is_neither_written_nor_removed(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    ours = LiveFile(path)
    ours.on_event(STEP)
    theirs = path.read_text().replace(this_process(), "elsewhere:1:0.00")
    path.write_text(theirs)
    ours._changed.clear()
    for live in (LiveFile(path), ours):  # one that heard nothing, and one whose campaign was taken over
        with live:
            pass
        assert path.read_text() == theirs


def test_the_file_follows_the_events_at_most_once_a_second(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    with LiveFile(path, lambda: Limits(pause_after=7)) as live:
        assert not path.exists()
        live.on_event(STEP)
        assert path.exists()
        written = {path.stat().st_mtime_ns}
        begin = time.monotonic()
        for step in range(20_000):
            live.on_event(TrialStepped(campaign="c", step=step, steps=None, loss=0.5))
        took = time.monotonic() - begin
        wait_until(lambda: (found := read_live(path, this_process())) is not None and found.step == 19_999)
        written.add(path.stat().st_mtime_ns)
        found = read_live(path, this_process())
    assert found is not None
    assert (found.loss, found.limits.pause_after) == (0.5, 7)
    assert took < 2.0  # 100 microseconds a step at the worst
    assert not path.exists()
    assert read_live(path, this_process()) is None


def test_another_process_is_not_believed(tmp_path: Path) -> None:
    path = tmp_path / "live.json"
    with LiveFile(path) as live:
        live.on_event(STEP)
        assert read_live(path, "elsewhere:1:0.00") is None
        (tmp_path / "broken.json").write_text('{"owner": ')
        assert read_live(tmp_path / "broken.json", this_process()) is None


def test_the_pace_is_the_mean_of_the_last_turns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = 1000.0
    monkeypatch.setattr("overnight.store.clock.time", lambda: now)
    live = LiveFile(tmp_path / "x")
    decided = {"proposer": "p", "knob": "a", "new_value": "1", "outcome": "kept", "metric": 1.0, "gain": 0.0,
               "failure": None, "rail": None, "trials": 1, "explanation": "", "is_best": False}  # fmt: skip
    for turn in range(1, 4):
        live.on_event(TurnStarted(campaign="c", iteration=turn, try_no=1, proposer="p", role="champion"))
        live.on_event(TrialStarted(campaign="c", iteration=turn, purpose="screening", number=1, of=5))
        now += 10.0 * turn
        live.on_event(Decided(campaign="c", iteration=turn, **decided))
        assert live._pace.turn_s == 10.0 * (turn + 1) / 2


SPENT = Spent(iterations=10, since_keep=4, trial_hours=0.5, energy_kwh=0.2)


@pytest.mark.parametrize(
    ("budget", "limits", "end"),
    [
        ({}, {}, End("iterations", 9000.0)),
        ({"patience": 6}, {}, End("patience", 200.0)),
        ({"gpu_hours": 0.6}, {}, End("gpu_hours", 200.0)),
        ({"energy_kwh": 0.21}, {}, End("energy_kwh", 50.0)),
        ({"patience": 6}, {"deadline": 1030.0}, End("until", 30.0)),
        ({"patience": 6}, {"pause_after": 11}, End("--iterations", 100.0)),
        ({}, {"pause_at": 990.0}, End("--until", 0.0)),
        ({}, {"turn_s": None}, End("iterations", None)),
        ({}, {"turn_s": None, "deadline": 5000.0}, End("until", 4000.0)),
    ],
)
def test_the_budget_that_ends_first_is_named(budget: dict[str, Any], limits: dict[str, Any], end: End) -> None:
    found = next_end({"iterations": 100, **budget}, SPENT, done=10, now=1000.0, **{"turn_s": 100.0, **limits})
    assert (found.budget, found.left_s) == (end.budget, end.left_s if end.left_s is None else pytest.approx(end.left_s))


@pytest.mark.parametrize(("seconds", "words"), [(45, "45 s"), (600, "10 min"), (11_100, "3 h 05 min")])
def test_time_is_told_as_people_do(seconds: float, words: str) -> None:
    assert in_words(seconds) == words


def test_files_lie_beside_the_store_or_here_for_a_server() -> None:
    assert str(beside("runs/a.db", "c", "log")) == "runs/a.db.c.log"
    assert str(beside("sqlite:////x/a.db", "c", "log")) == "/x/a.db.c.log"
    assert str(beside("postgresql://me:secret@host/db", "c", "log")) == "overnight.c.log"
