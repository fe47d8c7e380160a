"""A moment of a campaign, whole: what its prompt says, and which changes are open in it.

Real prompts are stored and never rendered again; this renders the others, through the one renderer
(`overnight.store.prompt`): those of imported attempts, and the variants of augmentation.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

from overnight.distill.lessons import ConfigKey, Lesson, baseline_key, changed_key
from overnight.rails.menu import Change, Menu
from overnight.store.prompt import PromptFacts, information, render_prompt
from overnight.store.protocol import KnobTotal, PairTotal
from overnight.store.records import Config, FailureClass
from overnight.store.sql_store import VALUES_PER_KNOB
from overnight.store.writer import value_text


@dataclass(frozen=True, slots=True, kw_only=True)
class Frame:
    """What all prompts of a campaign share, and what its rails ask of a change."""

    facts: PromptFacts
    """The constant part and the brief; the history in it is empty."""
    menu: Menu
    recent: int
    """How many of the last attempts a prompt shows whole."""
    novelty: bool
    """Whether what was measured may not be proposed again (`R6_novelty`)."""
    neighbours: bool = False
    """Whether its student also scores the next values on either side of the current one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Moment:
    """Where a campaign stands, or stood, or might have stood."""

    baseline: Config
    baseline_metric: float | None
    shown: Sequence[Lesson]
    """The history that the prompt tells, oldest first."""
    turns: int
    gain_sd: float | None


def render(frame: Frame, moment: Moment) -> str:
    """Return the prompt of a moment, as a proposer would have been asked."""
    recent = [lesson.attempt for lesson in moment.shown[len(moment.shown) - frame.recent :]] if frame.recent else []
    return render_prompt(
        replace(
            frame.facts,
            config=moment.baseline,
            baseline_metric=moment.baseline_metric,
            turns=moment.turns,
            totals=totals(moment.shown),
            gain_sd=moment.gain_sd,
            recent=recent[::-1],
        )
    )


def totals(lessons: Iterable[Lesson]) -> list[KnobTotal]:
    """Return the running totals that the store keeps, of these lessons alone."""
    pairs: dict[str, dict[str, list[Lesson]]] = {}
    for lesson in lessons:
        pairs.setdefault(lesson.change.knob, {}).setdefault(value_text(lesson.change.value), []).append(lesson)
    return [_knob_total(knob, values) for knob, values in pairs.items()]


def _knob_total(knob: str, values: dict[str, list[Lesson]]) -> KnobTotal:
    found = [_pair_total(knob, value, lessons) for value, lessons in values.items()]
    found.sort(key=information)
    failures = sum((Counter(pair.failures) for pair in found), Counter[FailureClass]())
    return KnobTotal(
        knob=knob,
        proposed=sum(pair.proposed for pair in found),
        kept=sum(pair.kept for pair in found),
        distinct_values=len(found),
        failures=failures,
        values=found[:VALUES_PER_KNOB],
    )


def _pair_total(knob: str, value: str, lessons: Sequence[Lesson]) -> PairTotal:
    gains = [(lesson.attempt.gain, lesson.attempt.trials) for lesson in lessons if lesson.attempt.gain is not None]
    trials = sum(count for _, count in gains)
    outcomes = [lesson.attempt.outcome for lesson in lessons]
    failures = [lesson.attempt.failure for lesson in lessons if lesson.attempt.failure is not None]
    return PairTotal(
        knob=knob,
        new_value=value,
        proposed=len(lessons),
        kept=outcomes.count("kept"),
        reverted=outcomes.count("reverted"),
        blocked=0,
        failed=outcomes.count("failed"),
        trials=trials,
        mean_gain=sum(gain * count for gain, count in gains) / trials if trials else None,
        failures=Counter(failures),
    )


@dataclass(frozen=True, slots=True)
class _Legal:
    """The legal changes of one configuration, each with what it makes of it."""

    moves: Sequence[tuple[Change, ConfigKey]]
    beside: Sequence[tuple[Change, ConfigKey]]
    """The neighbours of the current values."""


class OpenChanges:
    """Which changes may be proposed at a moment: legal ones of the grid, and those that were tried off it.

    Args:
        frame: the campaign's.
        tried: lessons whose values are candidates wherever they are legal, on the grid or not.
    """

    def __init__(self, frame: Frame, tried: Iterable[Lesson] = ()) -> None:
        self._frame = frame
        tried = list(tried)
        self._tried = list(dict.fromkeys(lesson.change for lesson in tried))
        self._first: dict[ConfigKey, int] = {baseline_key(frame.menu.default): -1}
        for number, lesson in enumerate(tried):
            self._first.setdefault(changed_key(frame.menu, lesson.baseline, lesson.change), number)
        self._legal: dict[tuple[ConfigKey, int], _Legal] = {}

    def at(self, lesson: Lesson, is_done: Callable[[ConfigKey], bool]) -> dict[Change, bool]:
        """Return what was open when a lesson was proposed, and whether it would repeat what had been decided.

        `is_done` says what nothing new was to come of; where `R6_novelty` is in force, that is not open.
        """
        legal = self._of(lesson.baseline, lesson.refinement)
        found = {change: done for change, key in legal.moves if not ((done := is_done(key)) and self._frame.novelty)}
        knobs = {change.knob for change in found}
        for change, key in legal.beside:
            if change.knob in knobs and not is_done(key):
                found.setdefault(change, False)
        return found

    def before(self, number: int) -> Callable[[ConfigKey], bool]:
        """Return what was done with when the lesson at index `number` was proposed."""
        first = self._first
        return lambda key: first.get(key, number) < number

    def among(self, shown: Iterable[Lesson]) -> Callable[[ConfigKey], bool]:
        """Return what a history of these lessons is done with."""
        menu = self._frame.menu
        done = {changed_key(menu, lesson.baseline, lesson.change) for lesson in shown}
        done.add(baseline_key(menu.default))
        return done.__contains__

    def _of(self, baseline: Config, refinement: int) -> _Legal:
        key = baseline_key(baseline), refinement
        if key not in self._legal:
            menu = self._frame.menu
            moves = list(menu.moves(baseline, refinement=refinement))
            beside = menu.neighbours(baseline, menu.by_name) if self._frame.neighbours else ()
            known = set(moves)
            for change in self._tried:
                legal = change.value != baseline[change.knob] and not menu.broken_constraint(
                    menu.apply(baseline, change)
                )
                if legal and change not in known and not menu.by_name[change.knob].problem(change.value):
                    moves.append(change)
            self._legal[key] = _Legal(
                [(change, changed_key(menu, baseline, change)) for change in moves],
                [(change, changed_key(menu, baseline, change)) for change in beside],
            )
        return self._legal[key]


def gain_sd(lesson: Lesson) -> float | None:
    """Return the standard deviation of one paired gain as it was known when a lesson was decided."""
    attempt = lesson.attempt
    return None if attempt.gain_se is None else attempt.gain_se * max(attempt.trials, 1) ** 0.5
