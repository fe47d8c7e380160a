"""The `[notify] command`: a real program that gets the event on its standard input, and can harm nothing."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest
from click.testing import CliRunner

from overnight.agent.campaign import Campaign
from overnight.agent.cli import overnight as cli
from overnight.agent.contest_events import Promoted, RolledBack
from overnight.agent.events import Event, Finished, Paused, Stopped
from overnight.agent.notify import Notifier
from overnight.store.errors import LeaseHeldError, NotAllowedError, TrainerError
from overnight.store.sql_store import SqlStore

from .campaigns import campaign, run
from .test_cli import write

KEEP = "import os, sys, json; open('told', 'a').write(sys.stdin.read()); json.dump(dict(os.environ), open('env', 'w'))"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def telling(folder: Path, *command: str, **keys: Any) -> Campaign:
    from dataclasses import replace

    words = list(command) or [sys.executable, "-c", KEEP]
    return replace(campaign(folder, notify={"command": words, **keys}, budget={"iterations": 1}), allowed=True)


def told(folder: Path) -> list[dict[str, Any]]:
    path = folder / "told"
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


SWITCH = {"campaign": "c", "iteration": 4, "from_proposer": "a", "to_proposer": "b", "decided_by": "e", "reason": "r"}


@pytest.mark.parametrize(
    ("event", "expected"),
    [
        (Promoted(**SWITCH), {"event": "promoted", "to_proposer": "b"}),
        (RolledBack(**SWITCH), {"event": "rolled_back", "to_proposer": "b"}),
        (
            Stopped(campaign="c", iteration=4, reason="the GPU is gone"),
            {"event": "stopped", "reason": "the GPU is gone"},
        ),
        (Finished(campaign="c", iterations=9, stop_reason="until"), {"event": "finished", "stop_reason": "until"}),
        (Paused(campaign="c", iteration=4, reason="SIGINT"), None),
    ],
)
def test_these_events_are_told_and_no_others(tmp_path: Path, event: Event, expected: dict[str, Any] | None) -> None:
    with Notifier(telling(tmp_path)) as notifier:
        notifier.on_event(event)
    assert [{**line, **(expected or {})} for line in told(tmp_path)] == told(tmp_path)
    assert len(told(tmp_path)) == (0 if expected is None else 1)


def test_a_campaign_that_ends_tells_of_it(tmp_path: Path, store: SqlStore) -> None:
    of = telling(tmp_path)
    with Notifier(of) as notifier:
        run(of, store, hooks=[notifier])
    (line,) = told(tmp_path)
    assert (line["event"], line["campaign"], line["iterations"]) == ("finished", "c", 1)


def test_an_end_that_no_event_told_of_is_told_once(tmp_path: Path) -> None:
    def end(*events: Event) -> None:
        with Notifier(telling(tmp_path)) as notifier:
            for event in events:
                notifier.on_event(event)
            raise TrainerError("no device")

    for events in ([], [Stopped(campaign="c", iteration=1, reason="told already")]):
        with pytest.raises(TrainerError):
            end(*events)
    assert [line["reason"] for line in told(tmp_path)] == ["TrainerError: no device", "told already"]


def test_nobody_is_told_of_an_end_while_another_process_runs_the_campaign(tmp_path: Path) -> None:
    with pytest.raises(LeaseHeldError), Notifier(telling(tmp_path)):
        raise LeaseHeldError("another process runs it")
    assert told(tmp_path) == []


def fails(*_: object) -> None:
    raise TrainerError("no device")


def test_a_second_run_is_refused_before_anything_of_it_can_fail(
    tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    of = telling(tmp_path)
    run(of, store)
    parent = psutil.Process(os.getppid())
    owner = f"{socket.gethostname()}:{parent.pid}:{parent.create_time():.2f}"
    with store.transaction() as connection:
        connection.exec_driver_sql(f"UPDATE campaigns SET status = 'running', lease_owner = '{owner}'")
    folder = write(tmp_path / "mine", notify={"command": of.file.notify.command}, budget={"iterations": 2})
    monkeypatch.setattr("overnight.agent.run.prepared", fails)
    result = CliRunner().invoke(cli, ["run", str(folder), "--allow", "--db", str(tmp_path / "store.db")])
    assert isinstance(result.exception, LeaseHeldError)
    assert f"is being run by process {parent.pid}" in str(result.exception)
    assert (told(folder), list(tmp_path.glob("*.log"))) == ([], [])


def test_a_person_who_stops_it_needs_no_telling(tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt), Notifier(telling(tmp_path)):
        raise KeyboardInterrupt
    assert told(tmp_path) == []


def test_the_command_sees_what_the_file_names_and_no_key(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NIM_API_KEY", "sk-secret")
    monkeypatch.setenv("HOOK", "https://hook")
    with Notifier(telling(tmp_path, env=["HOOK"])) as notifier:
        notifier.on_event(Finished(campaign="c", iterations=1, stop_reason="until"))
    seen = json.loads((tmp_path / "env").read_text())
    assert (seen.get("HOOK"), "NIM_API_KEY" in seen, "PATH" in seen) == ("https://hook", False, True)


def test_there_is_no_shell(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with Notifier(telling(tmp_path, "touch pwned; true")) as notifier:
        notifier.on_event(Finished(campaign="c", iterations=1, stop_reason="until"))
    assert "`notify.command` failed (could not be started" in caplog.text
    assert not (tmp_path / "pwned").exists()


def test_a_command_that_fails_is_logged_and_changes_nothing(
    tmp_path: Path, store: SqlStore, caplog: pytest.LogCaptureFixture
) -> None:
    of = telling(tmp_path, sys.executable, "-c", "import sys; sys.exit('no network')")
    with caplog.at_level(logging.WARNING), Notifier(of) as notifier:
        assert run(of, store, hooks=[notifier]).finished
    assert "`notify.command` failed (exit 1): no network" in caplog.text


def test_a_command_that_hangs_is_killed_and_blocks_nobody(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    of = telling(tmp_path, sys.executable, "-c", "import time; time.sleep(600)", timeout_s=1.0)
    begin = time.monotonic()
    with Notifier(of) as notifier:
        notifier.on_event(Finished(campaign="c", iterations=1, stop_reason="until"))
        assert time.monotonic() - begin < 0.5
    assert time.monotonic() - begin < 30
    assert "took longer than 1 s and was killed" in caplog.text
    assert [child for child in psutil.Process().children(recursive=True) if "time.sleep(600)" in child.cmdline()] == []


def test_a_huge_event_is_cut_to_what_a_pipe_takes(tmp_path: Path) -> None:
    with Notifier(telling(tmp_path)) as notifier:
        notifier.on_event(Stopped(campaign="c", iteration=1, reason="\u00e9" * 10**6))
    (line,) = told(tmp_path)
    assert len(line["reason"]) == 2000


def test_a_command_that_nobody_allowed_is_not_even_queued(tmp_path: Path) -> None:
    with pytest.raises(NotAllowedError, match=r"`notify\.command`"):
        Notifier(campaign(tmp_path, notify={"command": ["touch", "pwned"]}))
