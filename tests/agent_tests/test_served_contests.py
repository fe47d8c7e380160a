"""Which adapter a proposer that serves them takes part with, and that each version is a contestant of its own."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import contest
from overnight.agent.campaign import Campaign
from overnight.agent.distilling import prune
from overnight.agent.doctor.proposals import ask_all
from overnight.agent.proposers.endpoint import OpenAIProposer
from overnight.agent.proposers.protocol import Proposer, reply_text
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.race import find_leak, look_back, plan_race
from overnight.agent.runtime import Runtime
from overnight.agent.switching import by_hand, named
from overnight.store.errors import InputError
from overnight.store.learning import NewDistillation
from overnight.store.protocol import CampaignState
from overnight.store.sql_store import SqlStore

from .adapters import make_adapter
from .campaigns import campaign, run, runtime
from .contests import rows
from .servers import LoopbackServer, LoraServer

BEGAN = "2026-01-01T00:00:00.000+00:00"


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture
def vllm() -> LoraServer:
    return LoraServer(reply=reply_text("a", 0.5, "a guess"))


@pytest.fixture
def url(vllm: LoraServer) -> Iterator[str]:
    with LoopbackServer(vllm) as server:
        yield server.url


class Night:
    """A campaign with a random champion and a proposer that serves adapters, and its parts."""

    def __init__(self, folder: Path, store: SqlStore, url: str, *, adapter: str | None = "promoted", **router: object):
        self.store = store
        self.table = {"base_url": url, "structured": "none", "adapter": adapter, "deadline_s": 10.0}
        self.folder = folder
        self.router = router
        self.running = self.open()

    def campaign(self, turns: int = 4) -> Campaign:
        tables: dict[str, Mapping[str, Any]] = {
            "budget": {"iterations": turns},
            "proposers": {"vllm": {"kind": "openai", **self.table}},
            "router": {"champion": "random", **self.router},
        }
        return campaign(self.folder, **tables)

    def proposers(self) -> dict[str, Proposer]:
        settings = OpenAIProposer.Settings.parse("vllm", self.table)
        return {"random": RandomProposer("random"), "vllm": OpenAIProposer("vllm", settings)}

    def open(self) -> Runtime:
        return runtime(self.campaign(), self.store, proposers=self.proposers())

    @property
    def state(self) -> CampaignState:
        return self.running.state()

    def distilled(self, version: int, *, after: int = 1, **facts: Any) -> Path:
        """Add a version as the campaign's student would have made it."""
        folder = make_adapter(self.store.home(), "c", version, **facts)
        new = NewDistillation(
            iteration=after, proposer="student", version=version, objective="clone", corpus_hash=None,
            cut_attempt_id=None, rows=1, adapter=str(folder), metrics={}, failure=None, wall_s=1.0, started_at=BEGAN,
        )  # fmt: skip
        with self.running.writing() as writer:
            writer.distillation(new)
        contest.forget(self.running)
        return folder

    def promote(self, who: str) -> None:
        by_hand(self.running, self.state, 1, "promote_requested", {"proposer": who})

    def roll_back(self) -> None:
        by_hand(self.running, self.state, 1, "rollback_requested", {})

    def play(self, turns: int) -> None:
        """Run the campaign up to this turn in a process of its own, as it were."""
        self.running.rest()
        run(self.campaign(turns), self.store, proposers=self.proposers())
        self.running = self.open()

    @property
    def seated(self) -> str:
        return contest.label_of(contest.seated(self.running, self.state, "vllm"))


def test_it_serves_what_was_promoted_and_not_rolled_back(tmp_path: Path, store: SqlStore, url: str) -> None:
    night = Night(tmp_path, store, url)
    seen = [night.seated]
    for version in (1, 2):
        night.distilled(version)
        seen.append(night.seated)
        night.promote(f"vllm@v{version}")
        seen.append(night.seated)
    night.roll_back()
    seen.append(night.seated)
    night.promote("random")
    seen.append(night.seated)
    night.roll_back()
    night.roll_back()
    seen.append(night.seated)
    assert seen == ["vllm", "vllm", "vllm@v1", "vllm@v1", "vllm@v2", "vllm@v1", "vllm@v1", "vllm"]


def test_a_version_by_name_is_served_whatever_is_promoted(tmp_path: Path, store: SqlStore, url: str) -> None:
    night = Night(tmp_path, store, url, adapter="v1")
    night.distilled(1)
    night.distilled(2)
    night.promote("vllm@v2")
    assert night.seated == "vllm@v1"


def test_without_the_key_it_serves_no_adapter(tmp_path: Path, store: SqlStore, url: str) -> None:
    night = Night(tmp_path, store, url, adapter=None)
    night.distilled(1)
    assert night.seated == "vllm"
    with pytest.raises(InputError, match="has no version `v1`"):
        named(night.running, night.state, "vllm@v1")


def test_each_version_proposes_under_a_row_of_its_own(
    tmp_path: Path, store: SqlStore, url: str, vllm: LoraServer
) -> None:
    night = Night(tmp_path, store, url, warmup=False)
    night.play(1)
    night.distilled(1)
    night.promote("vllm@v1")
    night.play(2)
    night.distilled(2)
    night.promote("vllm@v2")
    vllm.reply = reply_text("a", 0.25, "a guess")
    night.play(5)
    found = rows(
        store,
        "SELECT p.name, json_extract(p.description, '$.adapter.version') FROM attempts a "
        "JOIN proposers p ON p.id = a.proposer_id WHERE a.role <> 'fallback' ORDER BY a.id",
    )
    assert found[:2] == [("random", None), ("vllm", "v1")]
    assert {*found[2:]} == {("vllm", "v2"), ("vllm", "v1")}  # a champion on probation and its predecessor take turns
    for before, what in zip(vllm.did, vllm.did[1:], strict=False):
        kind, name = what.split()
        assert kind != "unload" or (before.startswith("ask") and not before.endswith(name))
    assert len(vllm.adapters) == 1


def test_an_adapter_that_proposed_stays_on_the_disk(tmp_path: Path, store: SqlStore, url: str) -> None:
    night = Night(tmp_path, store, url, adapter="v1", champion="vllm")
    night.distilled(1)
    night.play(1)
    for version in (2, 3):
        night.distilled(version)
    assert prune(store, night.state, 1) == [2]


def test_doctor_has_the_adapter_loaded(tmp_path: Path, store: SqlStore, url: str, vllm: LoraServer) -> None:
    night = Night(tmp_path, store, url, adapter="v1")
    night.distilled(1)
    night.play(1)
    night.running.info = night.running.trainer.prepare()
    vllm.refuses[""] = 500, "LoRA is not enabled."
    found = list(ask_all(night.running, night.state, {}))
    assert ["LoRA is not enabled" in finding.found for finding in found] == [False, True]


def test_it_races_for_itself(tmp_path: Path, store: SqlStore, url: str, vllm: LoraServer) -> None:
    night = Night(tmp_path, store, url, adapter="v1", controls=["vllm"])
    night.distilled(1, after=0)
    night.play(4)
    look_back(night.running, night.state, draws=1)
    found = rows(store, "SELECT DISTINCT proposer FROM race_stats ORDER BY proposer")
    assert found == [("random",), ("vllm@v1",)]
    assert {what for what in vllm.did if what.startswith("ask")} == {f"ask {next(iter(vllm.adapters))}"}


def test_it_challenges_with_its_adapter(tmp_path: Path, store: SqlStore, url: str) -> None:
    night = Night(tmp_path, store, url, adapter="v1", challenger="vllm")
    night.distilled(1)
    challenge = contest.standing(night.running, night.state).challenge
    assert challenge is not None
    assert contest.label_of(challenge.proposer) == "vllm@v1"


def test_a_turn_that_its_adapter_was_trained_on_fails_the_race(tmp_path: Path, store: SqlStore, url: str) -> None:
    night = Night(tmp_path, store, url, adapter="v1", controls=["vllm"])
    night.play(4)
    night.distilled(1, after=4, corpus={"attempts": [4]})
    plan = plan_race(night.running, night.state)
    assert "held-out turn 4 was in the training rows of `vllm@v1`" in (find_leak(plan) or "")


def test_a_version_that_nobody_made_fails_its_turns_and_the_campaign_goes_on(
    tmp_path: Path, store: SqlStore, url: str, vllm: LoraServer
) -> None:
    night = Night(tmp_path, store, url, adapter="v7", champion="vllm")
    night.play(2)
    ((trace,), *_) = rows(store, "SELECT trace FROM attempts WHERE outcome = 'failed'")
    assert trace == "`vllm@v7` cannot be used: no distillation of this store made adapter v7"
    assert rows(store, "SELECT count(*) FROM attempts WHERE role = 'fallback'") == [(2,)]
    assert vllm.did == []
