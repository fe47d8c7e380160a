"""From a moment to its training row: which changes were open in it, what is known of them, what that asks for."""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, replace

from overnight.distill.augment import Augmenter, Variation
from overnight.distill.histories import Frame, OpenChanges
from overnight.distill.knowledge import Knowledge, Known
from overnight.distill.lessons import ConfigKey, Lesson
from overnight.distill.objective import Objective
from overnight.distill.rows import Reply, TrainingRow
from overnight.rails.menu import Change
from overnight.rails.reply import candidate_text, reply_text
from overnight.trainer.noise import Posterior


@dataclass(frozen=True, slots=True, kw_only=True)
class Item:
    """A teaching turn: its lesson with the prompt that it answered."""

    number: int
    """Its place among the lessons."""
    asked: int
    """The place of the first lesson that answered its prompt: a duel's second side answers the prompt of the first."""
    lesson: Lesson
    prompt_id: str
    prompt: str

    @property
    def id(self) -> str:
        """What names its row in messages."""
        return f"turn-{self.lesson.attempt.iteration}-{self.lesson.attempt.try_no}"


class Teacher:
    """Makes rows from what is known after some lessons.

    Args:
        frame: the campaign's.
        objective: what a row asks for.
        knowledge: of these lessons.
        lessons: in the order of turns.
        write: weight of a whole reply beside `outcome`'s choice; 0: none.
        writers: names of the proposers whose reasons are words of their own; the others' are not taught.
    """

    def __init__(
        self,
        frame: Frame,
        objective: Objective,
        knowledge: Knowledge,
        lessons: Sequence[Lesson],
        *,
        write: float = 0.0,
        writers: Collection[str] = (),
    ) -> None:
        self.knowledge = knowledge
        self._objective, self._write = objective, write
        self._open = OpenChanges(frame, lessons)
        self._reasons = {
            lesson.change: lesson.attempt.reason or "" for lesson in lessons if lesson.attempt.proposer in writers
        }
        self._augmenter = Augmenter(frame, lessons)

    def stored(self, item: Item) -> TrainingRow | None:
        """Return the row of a stored prompt, or None where it would teach nothing."""
        return self._row(item.id, item.prompt, item.lesson, self._open.before(item.asked))

    def varied(self, item: Item, kind: Variation, rng: random.Random) -> TrainingRow | None:
        """Return the row of a variant of a stored prompt, or None where there is none or it would teach nothing."""
        variant = self._augmenter.variant(kind, item.number, item.asked, item.prompt, rng)
        if variant is None:
            return None
        done = self._open.among(variant.shown)
        return self._row(f"{item.id}/{kind}", variant.prompt, variant.lesson, done)

    def open_changes(self, item: Item) -> list[Change]:
        """Return the changes that were open when a stored prompt was asked."""
        return [*self._open.at(item.lesson, self._open.before(item.asked))]

    def _row(
        self, row_id: str, prompt: str, lesson: Lesson, is_done: Callable[[ConfigKey], bool]
    ) -> TrainingRow | None:
        if self._objective.name == "outcome":
            return self._outcome(row_id, prompt, lesson, is_done)
        weight = self._objective.weight(self.knowledge.worth(lesson))
        if weight == 0:
            return None
        return TrainingRow(id=row_id, prompt=prompt, replies=(Reply(self._reply(lesson.change)),), weight=weight)

    def _outcome(
        self, row_id: str, prompt: str, lesson: Lesson, is_done: Callable[[ConfigKey], bool]
    ) -> TrainingRow | None:
        opened = self._open.at(lesson, is_done)
        if len(opened) < 2:
            return None
        changes = [*opened]
        known = [self._promised(lesson, change, is_repeat=again) for change, again in opened.items()]
        choice = self._objective.choice(known)
        best = max(range(len(changes)), key=choice.__getitem__)
        writes = self._write > 0 and isinstance(known[best], Posterior)
        return TrainingRow(
            id=row_id,
            prompt=prompt,
            candidates=tuple(candidate_text(change) for change in changes),
            choice=tuple(choice),
            replies=(Reply(self._reply(changes[best]), self._write),) if writes else (),
        )

    def _promised(self, lesson: Lesson, change: Change, *, is_repeat: bool) -> Known:
        """Return what a change still had to give: of one that had been decided, no gain."""
        known = self.knowledge.gain(lesson.baseline, change)
        if is_repeat and isinstance(known, Posterior):
            return Posterior(min(known.mean, 0.0), known.se)
        return known

    def _reply(self, change: Change) -> str:
        return reply_text(change.knob, change.value, self._reasons.get(change, ""))


def epochs_of(
    teacher: Teacher, item: Item, row: TrainingRow, kinds: Sequence[Variation], *, epochs: int, seed: str
) -> Iterator[TrainingRow]:
    """Yield what each epoch sees of a row: its stored prompt, and in every other epoch a variant where there is one.

    Args:
        teacher: makes the variants.
        item: the turn.
        row: its row.
        kinds: of variants, taken in turn.
        epochs: of the training.
        seed: of the draws.
    """
    for epoch in range(epochs):
        found = None
        if epoch % 2:
            kind = kinds[(epoch // 2 + item.number) % len(kinds)]
            found = teacher.varied(item, kind, random.Random(f"{seed}/{epoch}/{item.id}"))
        yield replace(found or row, epoch=epoch)
