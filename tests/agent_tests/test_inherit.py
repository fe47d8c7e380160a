"""`[router] inherit`: a campaign's challenger begins with what another campaign's champion learned."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest

from overnight.agent import contest
from overnight.agent import contest_events as events
from overnight.agent.campaign import Campaign
from overnight.agent.doctor.finding import Finding
from overnight.agent.doctor.proposals import ask_all
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.proposers.uniform import RandomProposer
from overnight.agent.runtime import Runtime
from overnight.agent.switching import by_hand
from overnight.distill.base import find_base
from overnight.distill.host import ModelHost
from overnight.store.errors import CampaignError
from overnight.store.learning import NewDistillation
from overnight.store.sql_store import SqlStore

from .adapters import make_adapter
from .campaigns import Recorder, campaign, run, runtime
from .contests import rows
from .test_distilling import DISTILL, LONG_AGO, KeptHost


@pytest.fixture
def store(tmp_path: Path) -> Iterator[SqlStore]:
    store = SqlStore.open(tmp_path / "store.db", create=True)
    yield store
    store.close()


@pytest.fixture(scope="module", name="host")
def _host(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[ModelHost]:
    host = KeptHost(find_base(str(tiny_model), tiny_model), tmp_path_factory.mktemp("cache"), device="cpu")
    yield host
    ModelHost.close(host)


@dataclass(frozen=True)
class Stage:
    """Where campaigns of a student are played, all in one store."""

    folder: Path
    store: SqlStore
    model: Path
    host: ModelHost

    def campaign(self, name: str, turns: int, **router: Any) -> Campaign:
        found = campaign(
            self.folder,
            campaign={"name": name},
            budget={"iterations": turns},
            proposers={"student": {"kind": "student", "base_model": str(self.model), "device": "cpu"}},
            router={"champion": "random", "challenger": "student", "duel_share": 0.0, **router},
            distill={**DISTILL, "every": 8},
        )
        return replace(found, allowed=True)

    def cast(self, of: Campaign) -> dict[str, Any]:
        settings = StudentProposer.Settings.parse("student", {"base_model": "tiny"})
        student = StudentProposer("student", settings, self.host, adapter=None)
        return {"random": RandomProposer("random"), "student": student}

    def play(self, of: Campaign) -> Recorder:
        seen = Recorder()
        run(of, self.store, proposers=self.cast(of), hooks=[seen])
        return seen

    def promote(self, of: Campaign) -> None:
        with self.opened(of) as running:
            by_hand(running, running.state(), 9, "promote_requested", {"proposer": "student"})

    def roll_back(self, of: Campaign) -> None:
        with self.opened(of) as running:
            by_hand(running, running.state(), 9, "rollback_requested", {})

    def distilled(self, of: Campaign, version: int) -> None:
        """Add a version that was never trained."""
        folder = make_adapter(self.store.home(), of.name, version)
        with self.opened(of) as running, running.writing() as writer:
            writer.distillation(
                NewDistillation(
                    iteration=version, proposer="student", version=version, objective="clone", corpus_hash=None,
                    cut_attempt_id=None, rows=1, adapter=str(folder), metrics={}, failure=None, wall_s=1.0,
                    started_at=LONG_AGO,
                )
            )  # fmt: skip

    def meet(self, of: Campaign) -> None:
        """Have the challenger take part, as a duel that begins does."""
        with self.opened(of) as running:
            challenge = contest.standing(running, running.state()).challenge
            assert challenge is not None
            with running.writing() as writer:
                writer.alias("challenger", contest.stored_id(writer, challenge.proposer), 1)

    def challenger(self, of: Campaign) -> str | None:
        with self.opened(of) as running:
            challenge = contest.standing(running, running.state()).challenge
            return None if challenge is None else contest.label_of(challenge.proposer)

    @contextmanager
    def opened(self, of: Campaign) -> Iterator[Runtime]:
        running = runtime(of, self.store, proposers=self.cast(of))
        try:
            yield running
        finally:
            running.close()


@pytest.fixture
def stage(tmp_path: Path, store: SqlStore, tiny_model: Path, host: ModelHost) -> Stage:
    return Stage(tmp_path, store, tiny_model, host)


@pytest.fixture
def old(stage: Stage) -> Campaign:
    """Return a campaign that distilled a version."""
    of = stage.campaign("old", 9)
    stage.play(of)
    return of


def test_the_challenger_is_the_other_campaigns_champion_until_it_has_learned_here(stage: Stage, old: Campaign) -> None:
    stage.promote(old)
    seen = stage.play(stage.campaign("new", 12, inherit="old", duel_share=0.5))
    met = [(event.iteration, event.challenger) for event in seen.of(events.DuelSettled)]
    assert {challenger for turn, challenger in met if turn < 8} == {"student@old/v1"}
    assert "student@old/v1" not in {challenger for turn, challenger in met if turn > 9}
    assert [event.challenger for event in seen.of(events.RaceFinished)] == ["student@v1"]


@pytest.mark.parametrize(
    ("name", "words"),
    [("nowhere", "this store has no campaign `nowhere`"), ("old", "the champion of `old` has no adapter")],
)
@pytest.mark.usefixtures("old")
def test_what_cannot_be_inherited_is_refused_in_a_line(stage: Stage, name: str, words: str) -> None:
    with pytest.raises(CampaignError, match=f"`router.inherit`: {words}"):
        stage.play(stage.campaign("new", 3, inherit=name, duel_share=0.5))
    assert rows(stage.store, "SELECT count(*) FROM attempts WHERE campaign_id = 2") == [(0,)]
    assert rows(stage.store, "SELECT count(*) FROM trials WHERE campaign_id = 2") == [(0,)]


@pytest.fixture
def begun(stage: Stage) -> tuple[Campaign, Campaign]:
    """Return a campaign whose student was promoted, and one that inherits from it and has taken a turn."""
    before, after = stage.campaign("old", 1), stage.campaign("new", 1, inherit="old")
    stage.play(before)
    stage.distilled(before, 1)
    stage.promote(before)
    stage.play(after)
    return before, after


def test_a_challenger_that_took_part_stays_although_the_other_campaign_promotes_a_newer_one(
    stage: Stage, begun: tuple[Campaign, Campaign]
) -> None:
    before, after = begun
    stage.meet(after)
    stage.distilled(before, 2)
    stage.promote(before)
    assert stage.challenger(after) == "student@old/v1"
    assert stage.challenger(stage.campaign("third", 1, inherit="old")) == "student@old/v2"


def test_a_challenger_that_took_part_stays_although_the_other_campaign_rolls_back(
    stage: Stage, begun: tuple[Campaign, Campaign]
) -> None:
    before, after = begun
    stage.meet(after)
    stage.roll_back(before)
    assert stage.challenger(after) == "student@old/v1"


def test_a_campaign_under_way_goes_on_where_there_is_nothing_to_inherit_any_more(
    stage: Stage, begun: tuple[Campaign, Campaign]
) -> None:
    before, after = begun
    stage.roll_back(before)
    assert stage.challenger(after) is None
    assert stage.play(stage.campaign("new", 2, inherit="old")).kinds()[-1] == "finished"


def asked(stage: Stage, of: Campaign, store: SqlStore, others: SqlStore | None = None) -> dict[str, Finding]:
    """Have doctor ask everybody."""
    running = runtime(of, store, proposers=stage.cast(of))
    running.info = running.trainer.prepare()
    try:
        return {finding.what: finding for finding in ask_all(running, running.state(), {}, others=others)}
    finally:
        running.close()


def contents(store: SqlStore) -> list[Any]:
    tables = [name for (name,) in rows(store, "SELECT name FROM sqlite_master WHERE type = 'table' ORDER BY name")]
    return [rows(store, f"SELECT * FROM {name}") for name in tables]


@pytest.mark.parametrize("promoted", [False, True])
def test_doctor_asks_the_version_that_challenges_or_was_promoted(stage: Stage, old: Campaign, promoted: bool) -> None:
    if promoted:
        stage.promote(old)
    going_on = stage.campaign("old", 20)
    before = contents(stage.store)
    assert asked(stage, going_on, stage.store)["proposer student@v1"].state in ("ok", "note")
    shutil.rmtree(stage.folder / "adapters" / "old" / "v1")
    gone = asked(stage, going_on, stage.store)["proposer student@v1"]
    assert (gone.state, "no such folder" in gone.found, "overnight promote" in gone.remedy) == ("NO", True, True)
    assert contents(stage.store) == before


@pytest.mark.usefixtures("old")
def test_doctor_looks_for_what_a_new_campaign_inherits_where_the_others_are(stage: Stage, tmp_path: Path) -> None:
    new = stage.campaign("new", 12, inherit="old")
    for_a_while = SqlStore.open(tmp_path / "doctor.db", create=True)
    nothing = asked(stage, new, for_a_while, stage.store)["challenger"]
    assert (nothing.state, nothing.remedy) == ("NO", "drop the key")
    assert "the champion of `old` has no adapter" in nothing.found
    stage.promote(stage.campaign("old", 9))
    found = asked(stage, new, for_a_while, stage.store)
    assert found["proposer student@old/v1"].state in ("ok", "note")
    assert "challenger" not in found
    for_a_while.close()
