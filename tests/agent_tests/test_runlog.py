"""The log beside the store: one JSON line for each stage of an attempt, nothing secret, and no way to stop a run."""

from __future__ import annotations

import json
import logging
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import runlog
from overnight.agent.events import Event, Stopped, TrialStepped
from overnight.agent.runlog import RunLog, secrets_of
from overnight.store.errors import LeaseHeldError
from overnight.store.sql_store import SqlStore

from .campaigns import campaign, run, scripted
from .servers import LoopbackServer, Wire

KEY = 'sk-"very"-secret-0123456789'


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_stage_of_each_attempt_is_one_line(tmp_path: Path, store: SqlStore) -> None:
    of = campaign(tmp_path, budget={"iterations": 3})
    path = tmp_path / "run.log"
    with RunLog(path, of) as log:
        run(of, store, proposers=scripted(("b", 3), "prose", ("b", 9), ("a", 0.25)), hooks=[log])
    logged = lines(path)
    assert all(list(line)[:3] == ["at", "level", "event"] and line["campaign"] == "c" for line in logged)
    of_turn = Counter((line["event"], line["iteration"]) for line in logged if line.get("iteration") and line["event"] != "trial_finished")  # fmt: skip  # noqa: E501
    for stage in ("proposed", "accepted", "trained", "validated", "decided"):
        assert [of_turn[stage, turn] for turn in (1, 2, 3)] == [1, 2 if stage == "proposed" else 1, 1]
    assert of_turn["blocked", 2] == 1
    assert (logged[0]["event"], logged[-1]["event"]) == ("run_started", "finished")


def test_steps_are_not_logged_and_a_fault_stands_out(tmp_path: Path) -> None:
    with RunLog(tmp_path / "run.log", campaign(tmp_path)) as log:
        log.on_event(TrialStepped(campaign="c", step=1, steps=2, loss=0.5))
        log.on_event(Stopped(campaign="c", iteration=1, reason="the disk is gone"))
    (line,) = lines(tmp_path / "run.log")
    assert (line["level"], line["reason"]) == ("error", "the disk is gone")


async def tells_the_key_back(wire: Wire) -> None:
    await wire.answer(401, {"error": {"message": f"bad key {wire.headers['authorization']}"}})


class Blabs:
    """A consumer that fails and says the key."""

    def on_event(self, event: Event) -> None:
        raise RuntimeError(f"my key is {KEY}")


def test_no_key_is_ever_in_the_log(tmp_path: Path, store: SqlStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("A_KEY", KEY)
    with LoopbackServer(tells_the_key_back) as server:
        model = {"kind": "openai", "base_url": server.url, "model": "m", "structured": "none", "api_key_env": "A_KEY"}
        of = campaign(tmp_path, proposers={"model": model}, router={"champion": "model"}, budget={"iterations": 1})
        with RunLog(tmp_path / "run.log", of) as log:
            run(of, store, hooks=[log, Blabs()])
    text = (tmp_path / "run.log").read_text()
    assert "RuntimeError: my key is ***" in text
    assert "very" not in text
    assert "proposal_failed" in text


def test_every_variable_that_a_file_names_is_secret(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for number, name in enumerate(("KEY_A", "HOOK", "TOKEN")):
        monkeypatch.setenv(name, f"value-number-{number}")
    monkeypatch.setenv("SHORT", "on")
    of = campaign(
        tmp_path,
        proposers={"p": {"kind": "openai", "api_key_env": "KEY_A"}},
        router={"champion": "p"},
        trainer={"env": ["TOKEN", "SHORT"]},
        notify={"command": ["x"], "env": ["HOOK"]},
    )
    assert sorted(secrets_of(of)) == ["value-number-0", "value-number-1", "value-number-2"]


def test_a_run_that_another_process_has_did_not_end(tmp_path: Path) -> None:
    with pytest.raises(LeaseHeldError), RunLog(tmp_path / "run.log", campaign(tmp_path)):
        raise LeaseHeldError("another process runs it")
    assert lines(tmp_path / "run.log") == []


def test_what_ends_a_run_is_the_last_line(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="away"), RunLog(tmp_path / "run.log", campaign(tmp_path)):
        raise OSError("the disk went away")
    (line,) = lines(tmp_path / "run.log")
    assert (line["event"], line["level"]) == ("run_ended", "error")
    assert line["exception"].endswith("OSError: the disk went away")


def test_warnings_of_the_package_are_in_it_and_the_logger_is_left_as_it_was(tmp_path: Path) -> None:
    before = list(logging.getLogger("overnight").handlers)
    with RunLog(tmp_path / "run.log", campaign(tmp_path)):
        logging.getLogger("overnight.agent.notify").warning("`notify.command` %s", "failed")
    assert lines(tmp_path / "run.log")[0]["event"] == "`notify.command` failed"
    assert logging.getLogger("overnight").handlers == before


def test_the_log_rotates(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runlog, "MAX_BYTES", 2000)
    with RunLog(tmp_path / "run.log", campaign(tmp_path)) as log:
        for turn in range(200):
            log.on_event(Stopped(campaign="c", iteration=turn, reason="x" * 100))
    files = sorted(path.name for path in tmp_path.glob("run.log*"))
    assert files == ["run.log", "run.log.1", "run.log.2", "run.log.3"]
    assert all((tmp_path / name).stat().st_size < 2000 + 400 for name in files)
    assert lines(tmp_path / "run.log")[-1]["iteration"] == 199


def test_a_full_disk_stops_no_run(tmp_path: Path, store: SqlStore, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "run.log").symlink_to("/dev/full")
    of = campaign(tmp_path, budget={"iterations": 2})
    with RunLog(tmp_path / "run.log", of) as log:
        assert run(of, store, hooks=[log]).finished
    assert capfd.readouterr().err == ""
