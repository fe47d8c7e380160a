"""The menu: which knobs a campaign may turn, their types, ranges and levels, and the legal one-knob moves.

Pure data and arithmetic. Values are kept canonical (`coerce`), so that 1, 1.0 and "1" never make two configurations
out of one. Enumeration grids a range by its `levels` and `scale`; it never invents a value outside the range.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from overnight.rails.constraint import Constraint
from overnight.store.errors import MenuError
from overnight.store.records import Config, KnobValue

KnobType = Literal["int", "float", "str"]
Scale = Literal["linear", "log"]
MAX_INT = 2**53
"""Largest integer that JSON readers in every language agree on (RFC 8259, section 6)."""


@dataclass(frozen=True, kw_only=True)
class Knob:
    """One knob: a type, either `choices` or an inclusive range `low..high`, and a default."""

    name: str
    type: KnobType
    default: KnobValue
    choices: tuple[KnobValue, ...] = ()
    low: float | None = None
    high: float | None = None
    scale: Scale = "linear"
    levels: int = 9
    doc: str = ""

    def __post_init__(self) -> None:
        """Refuse a knob that offers no choice or whose default is not on the menu."""
        where = f"knob `{self.name}`"
        if bool(self.choices) == (self.low is not None):
            raise MenuError(f"{where}: give exactly one of `range` and `choices`")
        if self.choices:
            object.__setattr__(self, "choices", tuple(self._choice(where, choice) for choice in self.choices))
            if len(set(self.choices)) < 2:
                raise MenuError(f"{where}: `choices` needs at least two different values; remove the knob to fix it")
        else:
            self._check_range(where)
        problem = self.problem(self.default)
        if problem:
            raise MenuError(f"{where}: `default` {problem}")

    def _choice(self, where: str, choice: KnobValue) -> KnobValue:
        try:
            return self.coerce(choice)
        except MenuError as error:
            raise MenuError(f"{where}: `choices`: {error}") from error

    def _check_range(self, where: str) -> None:
        if self.type == "str":
            raise MenuError(f"{where}: a `str` knob takes `choices`, not `range`")
        if self.low is None or self.high is None or not (math.isfinite(self.low) and math.isfinite(self.high)):
            raise MenuError(f"{where}: `range` needs two finite numbers")
        if self.low >= self.high:
            raise MenuError(f"{where}: `range` must go from a smaller to a larger number; remove the knob to fix it")
        if self.type == "int" and math.floor(self.high) <= math.ceil(self.low):
            raise MenuError(f"{where}: `range` holds fewer than two whole numbers; widen it, or remove the knob")
        if self.scale == "log" and self.low <= 0:
            raise MenuError(f'{where}: a `log` scale needs a range above 0; set `scale = "linear"` or raise it')
        if self.levels < 2:
            raise MenuError(f"{where}: `levels` must be at least 2")

    def coerce(self, value: object) -> KnobValue:
        """Return `value` as this knob's type, without loss.

        Raises:
            MenuError: it is of another type: a bool is not an int, a string is not a number.
        """
        if self.type == "str":
            if isinstance(value, str):
                return value
        elif isinstance(value, bool):
            pass
        elif isinstance(value, int):
            if abs(value) <= MAX_INT:
                return value if self.type == "int" else float(value)
            raise MenuError(f"{value!r:.40} is too large a number")
        elif isinstance(value, float) and math.isfinite(value):
            if self.type == "float":
                return value + 0.0  # -0.0 and 0.0 are one value
            if value.is_integer() and abs(value) <= MAX_INT:
                return int(value)
        raise MenuError(f"{value!r:.40} is not {'an' if self.type == 'int' else 'a'} {self.type}")

    def problem(self, value: object) -> str | None:
        """Say why `value` is not on this knob's menu, or None when it is."""
        try:
            canonical = self.coerce(value)
        except MenuError as error:
            return str(error)
        if self.choices:
            return None if canonical in self.choices else f"{canonical!r} is not one of {list(self.choices)}"
        assert self.low is not None
        assert self.high is not None
        assert not isinstance(canonical, str)
        if self.low <= canonical <= self.high:
            return None
        return f"{canonical!r} is outside {self.low:g}..{self.high:g}"

    def grid(self, refinement: int = 0) -> tuple[KnobValue, ...]:
        """Return the values that scoring and enumeration consider, ascending for a range.

        `refinement` halves the spacing of a range that many times. Endpoints are exact; inner points are rounded to
        three significant digits, so that a model can write them.
        """
        if self.choices:
            return self.choices
        assert self.low is not None
        assert self.high is not None
        points = (self.levels - 1) * 2**refinement + 1
        if self.type == "int":
            points = min(points, math.floor(self.high) - math.ceil(self.low) + 1)
        values = {self._grid_point(i / (points - 1)) for i in range(points)}
        return tuple(sorted(values, key=float))

    def beside(self, value: KnobValue) -> list[KnobValue]:
        """Return the next values below and above `value` on a range's once refined grid; nothing for choices."""
        if self.choices:
            return []
        grid = self.grid(1)
        below = [each for each in grid if float(each) < float(value)]
        above = [each for each in grid if float(each) > float(value)]
        return [*below[-1:], *above[:1]]

    def _grid_point(self, fraction: float) -> KnobValue:
        assert self.low is not None
        assert self.high is not None
        if self.scale == "log":
            raw = self.low * math.pow(self.high / self.low, fraction)
        else:
            raw = self.low + (self.high - self.low) * fraction
        if self.type == "int":
            return min(max(round(raw), math.ceil(self.low)), math.floor(self.high))
        if fraction in (0.0, 1.0):
            return float(self.low if fraction == 0.0 else self.high)
        return min(max(float(f"{raw:.3g}"), self.low), self.high)

    def describe(self) -> str:
        """Return the knob's values in words, for prompts and tables."""
        if self.choices:
            return "one of " + ", ".join(str(choice) for choice in self.choices)
        return f"{self.type} from {self.low:g} to {self.high:g}" + (", log scale" if self.scale == "log" else "")


@dataclass(frozen=True, slots=True)
class Change:
    """One knob set to one value."""

    knob: str
    value: KnobValue


@dataclass(frozen=True)
class Menu:
    """All knobs of a campaign, the constraints between them, and the trainer's numbers that constraints may use."""

    knobs: tuple[Knob, ...]
    constraints: tuple[Constraint, ...] = ()
    numbers: Mapping[str, float] | None = None

    def __post_init__(self) -> None:
        """Refuse a menu whose default configuration breaks its own constraints."""
        if not self.knobs:
            raise MenuError("the menu has no knobs")
        known = set(self.by_name) | set(self.numbers or {})
        for constraint in self.constraints:
            unknown = sorted(constraint.names - known)
            if unknown:
                raise MenuError(
                    f"constraint `{constraint.id}` uses `{unknown[0]}`, which is neither a knob nor a number"
                )
        broken = self.broken_constraint(self.default)
        if broken:
            raise MenuError(f"constraint `{broken.id}` ({broken.rule}) is broken by the default configuration")

    @cached_property
    def by_name(self) -> Mapping[str, Knob]:
        """The knobs by name, in the menu's order."""
        return {knob.name: knob for knob in self.knobs}

    @property
    def default(self) -> dict[str, KnobValue]:
        """The configuration that a campaign starts from."""
        return {knob.name: knob.coerce(knob.default) for knob in self.knobs}

    def broken_constraint(self, config: Config) -> Constraint | None:
        """Return the first constraint that `config` breaks, or None."""
        names = {**(self.numbers or {}), **config}
        return next((c for c in self.constraints if not c.holds(names)), None)

    def apply(self, config: Config, change: Change) -> dict[str, KnobValue]:
        """Return `config` with one knob changed, in the menu's order."""
        return {name: change.value if name == change.knob else config[name] for name in self.by_name}

    def moves(self, config: Config, *, refinement: int = 0, knobs: Iterable[str] | None = None) -> Iterator[Change]:
        """Yield the one-knob changes of `config` that keep every constraint and are not no-ops."""
        for name in self.by_name if knobs is None else knobs:
            for value in self.by_name[name].grid(refinement):
                change = Change(name, value)
                if value != config[name] and not self.broken_constraint(self.apply(config, change)):
                    yield change

    def neighbours(self, config: Config, knobs: Iterable[str]) -> Iterator[Change]:
        """Yield the changes of a ranged knob to the next value on either side that keep every constraint."""
        for name in knobs:
            for value in self.by_name[name].beside(config[name]):
                change = Change(name, value)
                if not self.broken_constraint(self.apply(config, change)):
                    yield change
