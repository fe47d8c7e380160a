"""Killed between any two writes, a campaign ends with the history of one that nobody disturbed."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from overnight.agent.campaign import Campaign
from overnight.agent.proposers.protocol import Ask, Proposer, reply_text
from overnight.agent.proposers.scripted import ScriptedProposer
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.run import run_campaign
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.store.protocol import Lease
from overnight.store.sql_store import SqlStore
from overnight.store.writer import SqlWriter

from .campaigns import campaign, runtime
from .contests import contested, sides, toward
from .history import history
from .test_distilling import KeptHost, learning

MANY = 10**9
MOST_LIVES = 900
START_WRITES = 2
"""What a run writes before it goes on: that it runs, and that it started."""


class Killed(BaseException):
    """The process is gone."""


class MortalStore(SqlStore):
    """A store whose process dies instead of committing, after so many commits."""

    commits_left = 0

    @contextmanager
    def writing(self, lease: Lease) -> Iterator[SqlWriter]:
        with super().writing(lease) as writer:
            yield writer
            if self.commits_left == 0:
                raise Killed
            self.commits_left -= 1


Parts = Callable[[], dict[str, Proposer]]


def undisturbed(of: Campaign, folder: Path, parts: Parts, checkpoints: Path | None = None) -> dict[str, list[Any]]:
    store = SqlStore.open(folder / "store.db", create=True)
    running = runtime(of, store, proposers=parts())
    assert run_campaign(running, checkpoints=checkpoints).finished
    running.close()
    found = history(store)
    store.close()
    return found


def killed_again_and_again(
    of: Campaign,
    folder: Path,
    parts: Parts,
    *,
    calm_turns: int = 0,
    between: Callable[[int], None] = lambda _life: None,
) -> tuple[dict[str, list[Any]], int]:
    """Run the campaign in lives of one write each (more, where one brings it no further); return its history."""
    breath, seen, before = 1, 0, {}
    if calm_turns:
        _live(of, folder, parts, turns=calm_turns)
    for life in range(MOST_LIVES):
        finished, now = _live(of, folder, parts, writes=START_WRITES + breath)
        if finished:
            return now, life
        breath, before = (1 if now != before else breath + 1), now
        between(seen := seen + 1)
    raise AssertionError("it never ended")


def _live(
    of: Campaign, folder: Path, parts: Parts, *, writes: int = MANY, turns: int | None = None
) -> tuple[bool, dict[str, list[Any]]]:
    """Be one process: after so many writes it dies instead of committing."""
    store = MortalStore.open(folder / "store.db", create=True)
    store.commits_left = writes
    running = runtime(of, store, proposers=parts())
    running.iterations = turns
    try:
        finished = run_campaign(running, checkpoints=folder / "checkpoints").finished
    except Killed:
        finished = False
        running.lease = None  # a dead process gives nothing back
    running.close()
    found = history(store)
    store.close()
    return finished, found


def mixed(ask: Ask) -> str:
    """Answer now and then with what the rails block, and else with the first open moves."""
    if not ask.rejections and ask.iteration % 3 == 0:
        return "raise the learning rate" if ask.iteration % 2 else reply_text("a", 7.0, "")
    move = ask.moves[min(ask.iteration, len(ask.moves) - 1)]
    return reply_text(move.knob, move.value, "")


def scripted_parts() -> dict[str, Proposer]:
    return {"random": ScriptedProposer("random", mixed)}


def small(folder: Path, turns: int = 3) -> Campaign:
    return campaign(
        folder,
        budget={"iterations": turns},
        decision={"audit": 0.3, "calibration_trials": 3, "max_trials": 4},
        router={"warmup": True, "explore": 0.2},
    )


def test_killed_before_every_write_it_ends_as_if_undisturbed(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    calm = undisturbed(small(tmp_path), tmp_path / "calm", scripted_parts)
    found, lives = killed_again_and_again(small(tmp_path), tmp_path, scripted_parts)
    assert found == calm
    assert lives > 25
    assert {row[0] for row in calm["events"]} >= {"calibrated", "finished", "holdout_measured"}


def test_a_lost_or_old_or_broken_checkpoint_file_changes_nothing(tmp_path: Path) -> None:
    (tmp_path / "calm").mkdir()
    calm = undisturbed(small(tmp_path, turns=2), tmp_path / "calm", scripted_parts)
    file, old = tmp_path / "checkpoints", tmp_path / "old"

    def harm(life: int) -> None:
        if life == 5 and file.exists():
            shutil.copy(file, old)
        match life % 4:
            case 1:
                file.unlink(missing_ok=True)
            case 2 if old.exists():
                shutil.copy(old, file)
            case 3:
                file.write_bytes(b"no database" * 100)

    found, _ = killed_again_and_again(small(tmp_path, turns=2), tmp_path, scripted_parts, between=harm)
    assert found == calm


def test_killed_in_duels_a_race_and_a_promotion_it_has_the_same_champion(tmp_path: Path) -> None:
    of = contested(tmp_path, budget={"iterations": 11})

    def parts() -> dict[str, Proposer]:
        return {**sides(toward(of, 0.1), toward(of, 0.95))}

    (tmp_path / "calm").mkdir()
    calm = undisturbed(of, tmp_path / "calm", parts)
    ((turn, *_),) = calm["promotions"]
    found, lives = killed_again_and_again(of, tmp_path, parts, calm_turns=turn - 2)
    assert calm["races"]
    assert found == calm
    assert lives > 20


@pytest.fixture(name="host")
def _host(tiny_model: Path, tmp_path: Path) -> Iterator[ModelHost]:
    host = KeptHost(find_base(str(tiny_model), tiny_model), tmp_path / "cache", device="cpu")
    yield host
    ModelHost.close(host)


def test_killed_around_a_distillation_it_learns_the_same(tmp_path: Path, tiny_model: Path, host: ModelHost) -> None:
    of = learning(tmp_path, tiny_model, turns=9)

    def parts() -> dict[str, Proposer]:
        settings = StudentProposer.Settings.parse("student", {"base_model": "tiny"})
        student = StudentProposer("student", settings, host, adapter=None)
        return {"random": RandomProposer("random"), "student": student}

    (tmp_path / "calm").mkdir()
    calm = undisturbed(of, tmp_path / "calm", parts)
    found, _ = killed_again_and_again(of, tmp_path, parts, calm_turns=7)
    assert calm["distillations"]
    assert calm["races"]
    assert found == calm
    left = sorted(path.name for path in (tmp_path / "adapters" / "c").iterdir())
    assert left == sorted(path.name for path in (tmp_path / "calm" / "adapters" / "c").iterdir())
