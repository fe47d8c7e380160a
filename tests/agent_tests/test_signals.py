"""Signals to a real run: ten seconds to live are enough, and a terminal that closes takes nothing with it."""

from __future__ import annotations

import json
import os
import pty
import signal
import sqlite3
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil

from .test_cli import DEADLINE_S, overnight, started, trials, wait_until, write

NOTICE_S = 10.0
"""What a machine that goes down gives, mostly."""
REPLY = '{"knob": "b", "new_value": 3, "reason": ""}'
HANGING: dict[str, Any] = {
    "trainer": {"faults": {"b=3": "hang"}},
    "budget": {"iterations": 1},
    "proposers": {"random": {"kind": "scripted", "replies": [REPLY]}},
}


def events(folder: Path, kind: str) -> list[dict[str, Any]]:
    """Return what the events of a kind say, oldest first."""
    connection = sqlite3.connect(folder / "overnight.db")
    try:
        rows = connection.execute("SELECT payload FROM events WHERE kind = ? ORDER BY id", [kind]).fetchall()
        return [json.loads(row[0]) for row in rows]
    finally:
        connection.close()


def stored(folder: Path, query: str) -> list[tuple[Any, ...]]:
    connection = sqlite3.connect(folder / "overnight.db")
    try:
        return connection.execute(query).fetchall()
    finally:
        connection.close()


def is_in_a_trial(folder: Path, process: subprocess.Popen[str]) -> bool:
    """Whether the hanging candidate is all that is left to do, and nothing but waiting for it is done."""
    assert process.poll() is None
    if trials(folder) != 6 or stored(folder, "SELECT stage FROM attempts") != [("checked",)]:
        return False
    before = psutil.Process(process.pid).cpu_times()
    time.sleep(0.5)
    return psutil.Process(process.pid).cpu_times() == before


def test_sigterm_drops_the_trial_under_way_in_time(tmp_path: Path) -> None:
    write(tmp_path / "mine", **HANGING)
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: is_in_a_trial(tmp_path, process))
    children = psutil.Process(process.pid).children(recursive=True)
    began = time.monotonic()
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=DEADLINE_S)
    took = time.monotonic() - began
    assert (process.returncode, took < NOTICE_S) == (0, True), (took, output)
    assert not any(child.is_running() for child in children)
    assert stored(tmp_path, "SELECT status, stop_reason, lease_owner FROM campaigns") == [("paused", "SIGTERM", None)]
    assert trials(tmp_path) == 6
    (dropped,) = events(tmp_path, "trial_dropped")
    assert (dropped["purpose"], dropped["reason"], dropped["iteration"]) == ("screening", "SIGTERM", 1)


def test_a_closed_terminal_does_not_end_the_campaign(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 4}, trainer={"sleep_s": 0.05})
    pid, terminal = pty.fork()
    if pid == 0:  # its own session, with the terminal as the controlling one: as a shell's window is
        os.chdir(tmp_path)
        command = str(Path(sys.executable).with_name("overnight"))
        os.execv(command, [command, "run", "mine"])
    wait_until(lambda: trials(tmp_path) > 3)
    os.close(terminal)
    ended: list[int] = []

    def is_over() -> bool:
        done, status = os.waitpid(pid, os.WNOHANG)
        ended.extend([status] if done else [])
        return bool(done)

    wait_until(is_over)
    assert os.waitstatus_to_exitcode(ended[0]) == 0
    assert stored(tmp_path, "SELECT status, stop_reason FROM campaigns") == [("finished", "iterations")]
    assert [fault["what"] for fault in events(tmp_path, "fault")] == ["terminal"]


def test_a_second_signal_ends_the_process_at_once(tmp_path: Path) -> None:
    write(tmp_path / "mine", **HANGING)
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: is_in_a_trial(tmp_path, process))
    process.send_signal(signal.SIGINT)
    time.sleep(0.2)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=DEADLINE_S)
    assert time.monotonic() - began < NOTICE_S
    assert trials(tmp_path) == 6


def test_two_runs_at_the_same_moment_have_one_writer(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 3}, trainer={"sleep_s": 0.2})
    assert overnight("run", "mine", "--iterations", "1", cwd=tmp_path).returncode == 0
    both = [started("run", "mine", cwd=tmp_path) for _ in range(2)]
    outputs = [process.communicate(timeout=DEADLINE_S)[0] for process in both]
    codes = [process.returncode for process in both]
    assert sorted(codes) == [0, 2], outputs
    winner = both[codes.index(0)].pid
    assert f"is being run by process {winner}" in outputs[codes.index(2)]
    assert " since 20" in outputs[codes.index(2)]
    assert stored(tmp_path, "SELECT max(iteration), count(*) FROM attempts") == [(3, 3)]


def test_a_writer_that_was_replaced_writes_nothing_more_and_says_so(tmp_path: Path) -> None:
    write(tmp_path / "mine", budget={"iterations": 500}, trainer={"sleep_s": 0.1})
    process = started("run", "mine", cwd=tmp_path)
    wait_until(lambda: trials(tmp_path) > 7)
    connection = sqlite3.connect(tmp_path / "overnight.db", timeout=30)
    with connection:  # what a run on another machine does when this one was silent for too long
        connection.execute("UPDATE campaigns SET lease_epoch = lease_epoch + 1, lease_owner = 'elsewhere:1:1.0'")
        written = connection.execute("SELECT count(*) FROM trials").fetchone()
    connection.close()
    output, _ = process.communicate(timeout=DEADLINE_S)
    assert process.returncode == 3
    assert "was taken over by elsewhere:1:1.0; nothing more is written from here" in output
    assert stored(tmp_path, "SELECT count(*) FROM trials") == [written]
    assert stored(tmp_path, "SELECT status, lease_owner FROM campaigns") == [("running", "elsewhere:1:1.0")]
