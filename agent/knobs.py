"""Knobs as Python says them: `Float(1e-5, 1e-2, log=True)`, `Int(1, 12)`, `Choice(["relu", "gelu"])`, or short forms.

They stand for the `[knobs.<name>]` tables of a campaign file; what a knob may be is decided there (`rails/menu.py`).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from overnight.rails.menu import Knob, KnobType, Scale
from overnight.store.errors import MenuError
from overnight.store.records import KnobValue

DEFAULT_LEVELS = 9


@dataclass(frozen=True, slots=True)
class Float:
    """A range of numbers, both ends included.

    Without a `default`, where the campaign starts, it is the middle of the range (of its exponents with `log`).
    `levels` is how many values of it are looked at, finer once all were tried; `doc` is what a model is told of it.
    """

    low: float
    high: float
    log: bool = False
    default: float | None = None
    levels: int = DEFAULT_LEVELS
    doc: str = ""

    def table(self, name: str) -> dict[str, Any]:
        """Return the `[knobs.<name>]` table."""
        return _range(name, "float", self)


@dataclass(frozen=True, slots=True)
class Int:
    """A range of whole numbers, both ends included; see `Float`."""

    low: int
    high: int
    log: bool = False
    default: int | None = None
    levels: int = DEFAULT_LEVELS
    doc: str = ""

    def table(self, name: str) -> dict[str, Any]:
        """Return the `[knobs.<name>]` table."""
        return _range(name, "int", self)


@dataclass(frozen=True, slots=True)
class Choice:
    """Some values of one type: numbers, or words. Without a `default` the campaign starts at the first."""

    values: Sequence[KnobValue]
    default: KnobValue | None = None
    doc: str = ""

    def table(self, name: str) -> dict[str, Any]:
        """Return the `[knobs.<name>]` table.

        Raises:
            MenuError: there are no values, or they are of several types or of one that a knob cannot have.
        """
        values = list(self.values)
        kinds = {type(value) for value in values}
        kind = next((name for of, name in _TYPES if kinds and kinds <= of), None)
        if kind is None:
            found = " and ".join(sorted(kind.__name__ for kind in kinds)) or "nothing"
            hint = '; say "on" and "off", or 0 and 1' if bool in kinds else ""
            raise MenuError(f"knob `{name}`: choices are numbers or words, all alike, not {found}{hint}")
        default = values[0] if self.default is None else self.default
        return {"type": kind, "choices": values, "default": default, "doc": self.doc}


KnobSpec = Float | Int | Choice | tuple[float, float] | tuple[float, float, str] | Sequence[KnobValue]
"""A knob, or short: `(low, high)`, `(low, high, "log")`, or a list of values."""
_TYPES: Sequence[tuple[set[type], KnobType]] = (({int}, "int"), ({int, float}, "float"), ({str}, "str"))


def knob_table(name: str, spec: KnobSpec | Mapping[str, object]) -> dict[str, Any]:
    """Return the `[knobs.<name>]` table of a knob in any form; a table stays as it is.

    Raises:
        MenuError: it is none of the forms, or offers no choice.
    """
    if isinstance(spec, Mapping):
        return dict(spec)
    if isinstance(spec, Float | Int | Choice):
        return spec.table(name)
    if isinstance(spec, tuple):
        return _short_range(name, spec).table(name)
    if isinstance(spec, Sequence) and not isinstance(spec, str | bytes):
        return Choice(spec).table(name)
    raise MenuError(f"knob `{name}`: {spec!r:.60} is no knob; {_FORMS}")


_FORMS = 'give (low, high), (low, high, "log"), a list of values, or `Float`, `Int` or `Choice`'


def _short_range(name: str, spec: tuple[Any, ...]) -> Float | Int:
    low, high, *scale = (*spec, None, None)[: max(len(spec), 2)]
    numbers = all(isinstance(end, int | float) and not isinstance(end, bool) for end in (low, high))
    if not numbers or scale not in ([], ["log"]):
        raise MenuError(f"knob `{name}`: {spec!r:.60} is no range; {_FORMS}")
    whole = isinstance(low, int) and isinstance(high, int)
    return Int(low, high, log=bool(scale)) if whole else Float(low, high, log=bool(scale))


def _range(name: str, kind: KnobType, spec: Float | Int) -> dict[str, Any]:
    scale: Scale = "log" if spec.log else "linear"
    default: KnobValue | None = spec.default
    if default is None:
        any_default = spec.low if kind == "float" else int(spec.low)
        knob = Knob(
            name=name, type=kind, default=any_default, low=spec.low, high=spec.high, scale=scale, levels=spec.levels
        )
        grid = knob.grid()
        default = grid[(len(grid) - 1) // 2]
    return {
        "type": kind,
        "range": [spec.low, spec.high],
        "scale": scale,
        "levels": spec.levels,
        "default": default,
        "doc": spec.doc,
    }
