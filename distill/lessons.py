"""Lessons: measured changes as the store has them, each with the configuration that it was tried on.

A lesson's values are the menu's own: an imported attempt whose knob or value the menu does not have teaches nothing
here, and is counted under why.
"""

from __future__ import annotations

import json
from bisect import bisect_right
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from overnight.rails.menu import Change, Menu
from overnight.store.errors import MenuError
from overnight.store.protocol import Attempt, TrajectoryStore
from overnight.store.records import Config, KnobValue

ConfigKey = tuple[KnobValue, ...]
"""A configuration's values in the menu's order: what tells two of them apart, faster than a hash."""


@dataclass(frozen=True, slots=True)
class Lesson:
    """A change that was tried and measured."""

    attempt: Attempt
    baseline: Config
    """The menu's knobs alone, in its order."""
    change: Change
    refinement: int = 0
    """How often the grids had been refined when it was proposed."""

    @property
    def failed(self) -> bool:
        """Whether the trial gave no metric: it ran out of memory, diverged, crashed or took too long."""
        return self.attempt.outcome == "failed"

    @property
    def kept(self) -> bool:
        """Whether it was kept."""
        return self.attempt.outcome == "kept"


def baseline_key(config: Config) -> ConfigKey:
    """Return what identifies a configuration among those of one menu."""
    return tuple(config.values())


def changed_key(menu: Menu, config: Config, change: Change) -> ConfigKey:
    """Return what identifies `config` with one knob changed."""
    return tuple(change.value if name == change.knob else config[name] for name in menu.by_name)


def read_lessons(
    store: TrajectoryStore, campaign_id: int, menu: Menu, *, through: int | None = None
) -> tuple[list[Lesson], Counter[str]]:
    """Return the lessons of a campaign in the order of its turns, and how many attempts are none, by reason.

    Args:
        store: where from.
        campaign_id: whose.
        menu: the campaign's.
        through: the last turn to read; None: all.
    """
    baselines: dict[str, Config | None] = {}
    lessons, excluded = [], Counter[str]()
    failures = store.harness_failures(campaign_id) if through is None else 0
    times = store.refinements(campaign_id)

    def refined(at: str) -> int:
        return bisect_right(times, at)

    if failures:
        excluded["harness failure"] = failures
    for attempt in store.teaching(campaign_id, through=through):
        sha = attempt.baseline_config_id
        if sha is not None and sha not in baselines:
            baselines[sha] = _on_menu(store.config_of(sha), menu)
        baseline = None if sha is None else baselines[sha]
        change = _change(attempt, menu)
        if change is None:
            excluded["change not on the menu"] += 1
        elif baseline is None:
            excluded["baseline not on the menu"] += 1
        else:
            lessons.append(Lesson(attempt, baseline, change, refined(attempt.started_at)))
    return lessons, excluded


def _on_menu(config: Mapping[str, KnobValue], menu: Menu) -> Config | None:
    """Return the menu's knobs of a configuration, or None where one is missing or of another type."""
    try:
        return {knob.name: knob.coerce(config[knob.name]) for knob in menu.knobs}
    except (KeyError, MenuError):
        return None


def _change(attempt: Attempt, menu: Menu) -> Change | None:
    knob = menu.by_name.get(attempt.knob or "")
    if knob is None or attempt.new_value is None:
        return None
    try:
        value = attempt.new_value if knob.type == "str" else json.loads(attempt.new_value)
        return Change(knob.name, knob.coerce(value)) if knob.problem(value) is None else None
    except (ValueError, MenuError):
        return None


def distinct_baselines(lessons: Iterable[Lesson]) -> dict[ConfigKey, list[Lesson]]:
    """Return the lessons by the configuration that they were tried on, in the order in which it was first met."""
    found: dict[ConfigKey, list[Lesson]] = {}
    for lesson in lessons:
        found.setdefault(baseline_key(lesson.baseline), []).append(lesson)
    return found
