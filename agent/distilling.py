"""The `distill` node, and `overnight distill`: train the student on the campaign's own history, and record how it went.

It is due after every `distill.every` turns, decided from the store alone. The adapter appears whole under a version of
its own and then its row; whatever ends the training before that leaves neither, and the next run starts it anew. A
training that fails is a row with its reason, and the campaign goes on with the champion that it has.
"""

from __future__ import annotations

import re
import shutil
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Literal

from overnight.agent.budget import ending_in_time, time_left
from overnight.agent.campaign import Campaign
from overnight.agent.campaign_file import DistillSection
from overnight.agent.events import Distilled, DistillFailed, DistillStarted, DistillStepped, DistillWaiting
from overnight.agent.proposers.student import StudentProposer
from overnight.agent.runtime import Runtime
from overnight.agent.signals import PauseRequested
from overnight.agent.state import BudgetSpent, TurnState, TurnUpdate
from overnight.agent.turns import prompt_frame
from overnight.distill.adapter import AdapterFacts, read_record, sweep_unfinished
from overnight.distill.corpus import Corpus, CorpusSettings, build_corpus, reconstruct_prompts
from overnight.distill.recipe import LoraRecipe
from overnight.distill.wire import TrainedReply, TrainingReply
from overnight.store.errors import CampaignError, CorpusRefusedError, ProposerError
from overnight.store.hashing import JsonValue
from overnight.store.learning import NewDistillation
from overnight.store.protocol import CampaignState, TrajectoryStore
from overnight.store.tables import utc_now

Due = Literal["due", "waiting", "no"]
WAITING = "distill_waiting"
FIRST_S = 60.0
"""What a first distillation is planned with, in seconds: nobody knows yet."""
_VERSION = re.compile(r"v(\d+)")


def distill_due(runtime: Runtime, state: CampaignState, iteration: int) -> Due:
    """Say whether to distil after a turn; `waiting` where the history has fewer rows than are asked for."""
    section = runtime.campaign.file.distill
    if iteration < 1 or iteration % section.every or challenger(runtime) is None:
        return "no"
    if runtime.store.distilled_after(state.id, iteration) or not _in_time(runtime, state):
        return "no"
    return "due" if runtime.store.teaching_count(state.id) >= section.min_rows else "waiting"


def _in_time(runtime: Runtime, state: CampaignState) -> bool:
    """Say whether a distillation would be over in time, if it takes what the last one took."""
    last = runtime.store.last_distillation(state.id)
    return (FIRST_S if last is None else last.wall_s or 0.0) < time_left(runtime, state)


def say_waiting(runtime: Runtime, state: CampaignState, iteration: int) -> None:
    """Tell once in a campaign that distilling waits for more rows."""
    if runtime.store.last_event(state.id, WAITING) is None:
        rows, needed = runtime.store.teaching_count(state.id), runtime.campaign.file.distill.min_rows
        with runtime.writing():
            runtime.emit(DistillWaiting(campaign=runtime.name, iteration=iteration, rows=rows, min_rows=needed))


def distill(runtime: Runtime, state: TurnState) -> TurnUpdate:  # noqa: ARG001
    """Train the challenger on the history up to now; what goes wrong is recorded, and the campaign goes on."""
    student, campaign = challenger(runtime), runtime.state()
    iteration = runtime.store.next_stage(campaign.id).iteration - 1
    if student is None or distill_due(runtime, campaign, iteration) != "due":
        return {"stage": "done"}  # it was done before a crash, or a checkpoint
    try:
        train_student(runtime, student, iteration)
    except PauseRequested:
        return {"stage": "done", "stop_reason": "paused"}
    return {"stage": "done"}


def challenger(runtime: Runtime) -> StudentProposer | None:
    """Return the challenger where it is a student."""
    name = runtime.campaign.file.router.challenger
    found = None if name is None else runtime.proposers[name]
    return found if isinstance(found, StudentProposer) else None


def only_student(runtime: Runtime) -> StudentProposer:
    """Return the student to distil by hand: the challenger, or the campaign's only one.

    Raises:
        CampaignError: it has none, or several of which none challenges.
    """
    found = challenger(runtime)
    students = [each for each in runtime.proposers.values() if isinstance(each, StudentProposer)]
    if found is not None or len(students) == 1:
        return found or students[0]
    what = "no proposer" if not students else "several proposers"
    raise CampaignError(
        f"{runtime.campaign.path}: {what} of kind `student`; set `router.challenger` to the one that is to learn"
    )


def train_student(
    runtime: Runtime, student: StudentProposer, iteration: int, *, refuse: bool = False
) -> NewDistillation:
    """Build the corpus, train, and record the distillation, a failed one too; old adapters are pruned after it.

    Raises:
        CorpusRefusedError: with `refuse`, the history cannot teach yet; nothing is recorded.
        PauseRequested: a pause that cannot wait; nothing is recorded.
        LeaseHeldError: another process runs the campaign.
        LeaseLostError, StoreError: as every write.
    """
    started, clock = utc_now(), time.perf_counter()
    section = runtime.campaign.file.distill
    corpus: Corpus | None = None
    version: int | None = None
    trained: TrainedReply | None = None
    failure: str | None = None
    with runtime.writing():
        pass  # this process' campaign: nobody else's training lies in the folder that is swept
    try:
        corpus = corpus_of(runtime)
        forget_cut_off(runtime.store, runtime.state(), corpus)
        version = next_version(runtime.store, runtime.state())
        folder = adapter_folder(runtime.store, runtime.name, version)
        trained = _train(runtime, student, corpus, iteration, folder)
    except CorpusRefusedError as refused:
        if refuse:
            raise
        failure = str(refused)
    except BudgetSpent as spent:
        failure = f"ended after {time.perf_counter() - clock:.0f} s: the end of the campaign needs the time (`{spent}`)"
    except (CampaignError, ProposerError, AssertionError, OSError) as error:
        failure = " ".join(str(error).split())
    new = NewDistillation(
        iteration=iteration,
        proposer=student.name,
        version=None if trained is None else version,
        objective=section.objective,
        corpus_hash=None if corpus is None else corpus.sha256,
        cut_attempt_id=None if corpus is None else corpus.cut_attempt_id,
        rows=None if trained is None else trained.rows,
        adapter=None if trained is None or version is None else str(folder),
        metrics=_metrics(corpus, trained),
        failure=failure,
        wall_s=time.perf_counter() - clock,
        started_at=started,
    )
    with runtime.writing() as writer:
        writer.distillation(new)
        _tell(runtime, new, trained)
    if failure is None:
        with suppress(OSError):  # one that cannot be removed stays
            prune(runtime.store, runtime.state(), section.keep_adapters)
    return new


def corpus_of(runtime: Runtime) -> Corpus:
    """Return the campaign's corpus as its history stands; imported attempts get their prompts first.

    Raises:
        CorpusRefusedError: the history cannot teach yet.
    """
    state, frame = runtime.state(), prompt_frame(runtime.campaign)
    if runtime.store.unprompted(state.id):
        with runtime.writing() as writer:
            reconstruct_prompts(runtime.store, state, frame, writer)
    return build_corpus(runtime.store, state, frame, corpus_settings(runtime.campaign))


def stored_corpus(store: TrajectoryStore, campaign: Campaign) -> Corpus:
    """Return the corpus of all stored prompts, however few there are; writes nothing and renders nothing.

    Raises:
        CorpusRefusedError: an imported attempt has no prompt yet, or no row is left to train on.
    """
    state = store.campaign(campaign.name)
    assert state is not None
    if store.unprompted(state.id):
        raise CorpusRefusedError(
            f"campaign `{state.name}`: its imported attempts have no prompts yet; `overnight distill {state.name} "
            "--report` renders them"
        )
    anything = replace(corpus_settings(campaign), min_rows=1, min_knobs=1, min_pairs=1, max_share=1.0, augment=())
    return build_corpus(store, state, prompt_frame(campaign), anything)


def corpus_settings(campaign: Campaign) -> CorpusSettings:
    """Return what of the `[distill]` table a corpus depends on."""
    section = campaign.file.distill
    fields = {name: getattr(section, name) for name in CorpusSettings.__slots__ if name != "augment"}
    return CorpusSettings(**fields, augment=tuple(section.augment))


def recipe_of(section: DistillSection) -> LoraRecipe:
    """Return how an adapter is trained."""
    same = ("r", "alpha", "dropout", "epochs", "learning_rate", "warmup", "weight_decay", "max_length", "seed")
    fields = {name: getattr(section, name) for name in same}
    return LoraRecipe(**fields, batch=section.batch * section.accumulation)


def _train(runtime: Runtime, student: StudentProposer, corpus: Corpus, iteration: int, folder: Path) -> TrainedReply:
    section = runtime.campaign.file.distill
    label = f"{student.name}@{folder.name}"
    with runtime.writing():
        rows = corpus.report.trained
        runtime.emit(DistillStarted(campaign=runtime.name, iteration=iteration, contestant=label, rows=rows))

    def progress(news: TrainingReply) -> None:
        told = {"step": news.step, "steps": news.steps, "epoch": news.epoch, "epochs": news.epochs}
        left = news.seconds_left
        runtime.emit(DistillStepped(campaign=runtime.name, **told, loss=news.loss, seconds_left=left))
        runtime.idle()

    runtime.trainer.release()
    with runtime.waiting(), ending_in_time(runtime, runtime.state()):
        return student.host.train(
            corpus.rows,
            recipe=recipe_of(section),
            facts=facts_of(runtime.name, corpus, section, folder.name),
            folder=folder,
            held_out=corpus.held_out_rows,
            memory_gib=runtime.campaign.file.budget.memory_gib,
            progress=progress,
        )


def facts_of(campaign: str, corpus: Corpus, section: DistillSection, version: str) -> AdapterFacts:
    """Return what is kept beside an adapter's weights about its training."""
    return AdapterFacts(
        campaign=campaign,
        version=version,
        objective=section.objective,
        corpus_sha256=corpus.sha256,
        cut=corpus.report.cut_turn,
        corpus={**corpus.report.plain(), **corpus.provenance()},
        augmentation={"kinds": list(section.augment), "variants": dict(corpus.report.variants)},
    )


def _metrics(corpus: Corpus | None, trained: TrainedReply | None) -> dict[str, JsonValue]:
    told: dict[str, JsonValue] = {} if corpus is None else {"corpus": corpus.report.plain()}
    if trained is not None:
        told |= {name: value for name, value in trained.model_dump(mode="json").items() if name not in ("kind", "call")}
    return told


def _tell(runtime: Runtime, new: NewDistillation, trained: TrainedReply | None) -> None:
    name, iteration = runtime.name, new.iteration
    if trained is None:
        runtime.emit(DistillFailed(campaign=name, iteration=iteration, proposer=new.proposer, reason=new.failure or ""))
        return
    runtime.emit(
        Distilled(
            campaign=name,
            iteration=iteration,
            contestant=f"{new.proposer}@v{new.version}",
            rows=trained.rows,
            too_long=len(trained.too_long),
            losses=trained.losses,
            held_out_before=trained.held_out_before,
            held_out_after=trained.held_out_after,
            wall_s=new.wall_s,
        )
    )


def adapter_folder(store: TrajectoryStore, campaign: str, version: int) -> Path:
    """Return where a version's adapter lies: `adapters/<campaign>/v<n>` beside the database file."""
    return store.home() / "adapters" / campaign / f"v{version}"


def forget_cut_off(store: TrajectoryStore, state: CampaignState, corpus: Corpus) -> None:
    """Remove what a training left that was killed before its row: unfinished files, or an adapter of this very corpus.

    Any other adapter without a row stays: the store may be an older copy, or another one may lie beside it.
    """
    folder = adapter_folder(store, state.name, 1).parent
    sweep_unfinished(folder)
    recorded = {each.version for each in store.distillations(state.id)}
    last = store.last_attempt(state.id)
    for entry in folder.glob("v*"):
        match = _VERSION.fullmatch(entry.name)
        if match is None or int(match[1]) in recorded:
            continue
        with suppress(CampaignError):  # no whole adapter: not ours to judge
            record = read_record(entry)
            is_later = last is not None and datetime.fromisoformat(record.created_at) > datetime.fromisoformat(
                last.started_at
            )
            if is_later and record.facts.get("corpus_sha256") == corpus.sha256:
                shutil.rmtree(entry)


def next_version(store: TrajectoryStore, state: CampaignState) -> int:
    """Return the first version that neither the store nor a folder has: nothing is ever overwritten."""
    taken = [each.version for each in store.distillations(state.id) if each.version is not None]
    folder = adapter_folder(store, state.name, 1).parent
    names = [entry.name for entry in folder.iterdir()] if folder.is_dir() else []
    taken += [int(match[1]) for name in names if (match := _VERSION.fullmatch(name))]
    return max(taken, default=0) + 1


def prune(
    store: TrajectoryStore, state: CampaignState, keep: int, *, remove: Callable[[Path], None] = shutil.rmtree
) -> list[int]:
    """Remove all but the newest `keep` adapters and those that `contested_versions` names; return what was removed."""
    made = [each for each in store.distillations(state.id) if each.version is not None]
    contested = store.contested_versions(state.id)
    removed = []
    for each in made[keep:]:
        folder = Path(each.adapter or "")
        if f"v{each.version}" not in contested and each.adapter is not None and folder.is_dir():
            remove(folder)
            assert each.version is not None
            removed.append(each.version)
    return removed
