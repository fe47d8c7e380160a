"""The corpus: what a campaign's history teaches a student, split by time, with a report of what is in it.

One row a measured turn, whoever proposed it, with its stored prompt byte for byte. The newest turns are held out, and
no target knows what was measured after the cut; a training row whose prompt a held-out turn shares (a duel across the
cut) is left out. Read by SQL; what is kept in memory is the rows. Nothing here loads torch or renders a stored prompt.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property

from overnight.distill.augment import Variation
from overnight.distill.corpus_report import CorpusReport, check_diversity, report_on
from overnight.distill.histories import Frame, Moment, gain_sd, render
from overnight.distill.knowledge import Knowledge
from overnight.distill.lessons import Lesson, read_lessons
from overnight.distill.objective import Objective, ObjectiveName
from overnight.distill.rows import TrainingRow, rows_digest
from overnight.distill.teaching import Item, Teacher, epochs_of
from overnight.store.errors import CorpusRefusedError
from overnight.store.hashing import JsonValue, text_digest
from overnight.store.protocol import CampaignState, StoreWriter, TrajectoryStore


@dataclass(frozen=True, slots=True, kw_only=True)
class CorpusSettings:
    """What of the `[distill]` table a corpus depends on; the campaign file says what each means."""

    objective: ObjectiveName = "outcome"
    temperature: float = 0.15
    floor: float = 0.2
    write: float = 0.0
    min_rows: int = 100
    holdout_fraction: float = 0.2
    holdout: int | None = None
    min_knobs: int = 2
    min_pairs: int = 8
    max_share: float = 0.5
    augment: tuple[Variation, ...] = ()
    epochs: int = 20
    seed: int = 0


@dataclass(frozen=True, kw_only=True)
class Corpus:
    """Rows to train on, rows held out, and where they came from."""

    rows: Sequence[TrainingRow]
    held_out_rows: Sequence[TrainingRow]
    """What the held-out turns are measured by; their targets know everything."""
    trained: Sequence[Item]
    held_out: Sequence[Item]
    cut_attempt_id: int
    """The last attempt that a training row knows of."""
    report: CorpusReport
    now: Teacher
    """Knows everything that was measured, after the cut too: for whoever judges held-out answers."""

    @cached_property
    def sha256(self) -> str:
        """Content address of the rows to train on."""
        return rows_digest(self.rows)

    def provenance(self) -> dict[str, JsonValue]:
        """Which attempts and prompts were trained on, for whoever checks that held-out turns were not."""
        return {
            "attempts": [item.lesson.attempt.id for item in self.trained],
            "prompts": sorted({item.prompt_id for item in self.trained}),
        }


def reconstruct_prompts(store: TrajectoryStore, state: CampaignState, frame: Frame, writer: StoreWriter) -> int:
    """Render the prompts of imported attempts as their proposer would have been asked; return how many.

    Each shows the baseline that the attempt was judged against and the measured history up to then.
    """
    lessons, _ = read_lessons(store, state.id, frame.menu)
    made = 0
    for number, lesson in enumerate(lessons):
        if lesson.attempt.prompt_id is None:
            moment = Moment(
                baseline=lesson.baseline,
                baseline_metric=lesson.attempt.baseline_metric,
                shown=lessons[:number],
                turns=lesson.attempt.iteration - 1,
                gain_sd=gain_sd(lesson),
            )
            writer.reconstructed(lesson.attempt.id, render(frame, moment))
            made += 1
    return made


def build_corpus(
    store: TrajectoryStore, state: CampaignState, frame: Frame, settings: CorpusSettings, *, through: int | None = None
) -> Corpus:
    """Build a campaign's corpus as its history stands, or as it stood after the turn `through`.

    Raises:
        CorpusRefusedError: too few rows, or too alike, and the message says what to run; or a stored prompt is not the
            one that its hash names.
    """
    lessons, excluded = read_lessons(store, state.id, frame.menu, through=through)
    items = _items(store, lessons, excluded)
    if len(items) < settings.min_rows:
        raise CorpusRefusedError(
            f"campaign `{state.name}`: {len(items)} rows teach, {settings.min_rows} are needed: run more turns, or "
            "lower `distill.min_rows`"
        )
    split = _split(state.name, items, settings, excluded)
    held_prompts = {item.prompt_id for item in split.held_out}
    before = [lesson for lesson in lessons if lesson.attempt.iteration <= split.cut_turn]
    then = _teacher(store, state, frame, settings, before)
    rows = list(_training_rows(then, split.trained, state.seed, settings, held_prompts))
    taught = {row.id.partition("/")[0] for row in rows}
    if len(taught) < len(split.trained):
        excluded[f"nothing that `{settings.objective}` teaches"] = len(split.trained) - len(taught)
    trained = [item for item in split.trained if item.id in taught]
    report = report_on(
        rows,
        trained,
        split.held_out,
        objective=settings.objective,
        cut_turn=split.cut_turn,
        excluded=excluded,
        knobs_on_menu=len(frame.menu.knobs),
    )
    check_diversity(
        state.name,
        report,
        min_knobs=settings.min_knobs,
        min_pairs=settings.min_pairs,
        max_share=settings.max_share,
    )
    now = _teacher(store, state, frame, settings, lessons)
    return Corpus(
        rows=rows,
        held_out_rows=[row for item in split.held_out if (row := now.stored(item)) is not None],
        trained=trained,
        held_out=split.held_out,
        cut_attempt_id=before[-1].attempt.id,
        report=report,
        now=now,
    )


def _items(store: TrajectoryStore, lessons: Sequence[Lesson], excluded: Counter[str]) -> list[Item]:
    """Return the lessons with their prompts, each checked against its hash."""
    ids = sorted({lesson.attempt.prompt_id for lesson in lessons if lesson.attempt.prompt_id is not None})
    prompts = store.prompts_of(ids)
    changed = next((sha for sha, prompt in prompts.items() if text_digest(prompt) != sha), None)
    if changed is not None:
        raise CorpusRefusedError(
            f"the stored prompt `{changed[:12]}` was changed after it was written, so nothing can be learned from it; "
            "restore a backup"
        )
    items, first = [], dict[str, int]()
    for number, lesson in enumerate(lessons):
        sha = lesson.attempt.prompt_id
        if sha is None:
            excluded["no prompt stored"] += 1
        else:
            asked = first.setdefault(sha, number)
            items.append(Item(number=number, asked=asked, lesson=lesson, prompt_id=sha, prompt=prompts[sha]))
    return items


@dataclass(frozen=True, slots=True)
class _Split:
    trained: Sequence[Item]
    held_out: Sequence[Item]
    cut_turn: int


def _split(name: str, items: Sequence[Item], settings: CorpusSettings, excluded: Counter[str]) -> _Split:
    """Hold out the newest whole turns: at least the share, or the number, that is asked for."""
    wanted = math.ceil(settings.holdout_fraction * len(items)) if settings.holdout is None else settings.holdout
    first = items[max(len(items) - wanted, 0)].lesson.attempt.iteration
    old = [item for item in items if item.lesson.attempt.iteration < first]
    held_out = items[len(old) :]
    held_prompts = {item.prompt_id for item in held_out}
    trained = [item for item in old if item.prompt_id not in held_prompts]
    if len(trained) < len(old):
        excluded["prompt shared with a held-out turn"] = len(old) - len(trained)
    if not trained:
        raise CorpusRefusedError(
            f"campaign `{name}`: with {len(held_out)} of {len(items)} rows held out, none is left to train on; run "
            "more turns, or lower `distill.holdout`"
        )
    return _Split(trained, held_out, old[-1].lesson.attempt.iteration)


def _teacher(
    store: TrajectoryStore, state: CampaignState, frame: Frame, settings: CorpusSettings, lessons: Sequence[Lesson]
) -> Teacher:
    """Return a teacher that knows these lessons, which are all up to the last one's turn."""
    sums = store.screening_sums(state.id, through=lessons[-1].attempt.iteration)
    knowledge = Knowledge(lessons, sums, frame.menu, noise_sd=_noise_sd(state, lessons))
    scale = knowledge.scale(settings.temperature)
    objective = Objective(name=settings.objective, scale=scale, floor=settings.floor)
    return Teacher(frame, objective, knowledge, lessons, write=settings.write, writers=store.writers(state.id))


def _training_rows(
    teacher: Teacher, items: Sequence[Item], seed: int, settings: CorpusSettings, held_prompts: set[str]
) -> Iterator[TrainingRow]:
    """Yield the rows of every epoch; a variant that happens to be a held-out prompt gives way to the stored one."""
    for item in items:
        row = teacher.stored(item)
        if row is None:
            continue
        if not settings.augment:
            yield row
            continue
        draws = f"{seed}/{settings.seed}"
        for made in epochs_of(teacher, item, row, settings.augment, epochs=settings.epochs, seed=draws):
            yield replace(row, epoch=made.epoch) if text_digest(made.prompt) in held_prompts else made


def _noise_sd(state: CampaignState, lessons: Sequence[Lesson]) -> float:
    """Return the noise of one gain where no standard error was stored: a difference of two imported trials."""
    metrics = [abs(lesson.attempt.baseline_metric) for lesson in lessons if lesson.attempt.baseline_metric]
    metric = state.spec["metric"]
    relative = isinstance(metric, Mapping) and metric["gain"] == "relative"
    scale = math.fsum(metrics) / len(metrics) if metrics and relative else 1.0
    return math.sqrt(2) * (state.noise_sd or 0.0) / scale
