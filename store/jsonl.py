"""Reading untrusted JSONL: objects by line number, and typed fields out of them.

A line that cannot be read is reported by its number and skipped. Numbers are finite, text is made storable, times
become UTC. It does not know what the fields mean.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

from overnight.store.hashing import JsonValue, canonical_json
from overnight.store.records import KnobValue
from overnight.store.writer import storable

MAX_LINE_BYTES = 16 * 2**20
MAX_DEPTH = 20


class LineError(ValueError):
    """What is wrong with one line, in words."""


@dataclass(frozen=True, slots=True)
class Skipped:
    """A line that was not taken."""

    line: int
    why: str


def objects(lines: Iterable[bytes], skipped: list[Skipped]) -> Iterator[tuple[int, Fields]]:
    """Yield (line number, object) of each readable line; say in `skipped` why the others are not."""
    for number, raw in enumerate(lines, 1):
        if not raw.strip():
            continue
        try:
            yield number, Fields(_object(raw))
        except LineError as error:
            skipped.append(Skipped(number, str(error)))


def _object(raw: bytes) -> Mapping[str, Any]:
    if len(raw) > MAX_LINE_BYTES:
        raise LineError(f"longer than {MAX_LINE_BYTES // 2**20} MiB")
    try:
        record = json.loads(raw.decode("utf-8-sig"), parse_constant=_refuse_constant)
    except UnicodeDecodeError as error:
        raise LineError("not UTF-8") from error
    except LineError:
        raise
    except (ValueError, RecursionError) as error:
        cut = "" if raw.endswith(b"\n") else " (the file ends here: it is cut)"
        raise LineError(f"not JSON: {error}{cut}") from error
    if not isinstance(record, dict):
        raise LineError("not a JSON object")
    return record


def _refuse_constant(name: str) -> float:
    raise LineError(f"{name} is not a number that JSON knows")


class Fields:
    """Typed fields of one object; a field that is not there is None, one of a wrong type is a LineError."""

    def __init__(self, record: Mapping[str, Any]) -> None:
        self.record = record

    def __contains__(self, key: str) -> bool:
        return key in self.record

    def text(self, key: str, limit: int = 4_000) -> str | None:
        """Return a text, cut to `limit` characters."""
        return storable(self._of(key, str, "a text"), limit)

    def number(self, key: str) -> float | None:
        """Return a finite number."""
        value = self._of(key, int | float, "a number")
        try:
            if value is None or math.isfinite(value):
                return None if value is None else float(value)
        except OverflowError:
            pass
        raise LineError(f"`{key}` is not a number that a double holds")

    def whole(self, key: str) -> int | None:
        """Return a whole number of at most 31 bits."""
        value: int | None = self._of(key, int, "a whole number")
        if value is not None and abs(value) >= 2**31:
            raise LineError(f"`{key}` is out of range")
        return value

    def flag(self, key: str) -> bool | None:
        """Return true or false."""
        value: bool | None = self.record.get(key)
        if value is not None and not isinstance(value, bool):
            raise LineError(f"`{key}` is neither true nor false")
        return value

    def time(self, key: str) -> datetime | None:
        """Return a time in UTC; one without a zone is taken as UTC."""
        value = self._of(key, str, "a time")
        if value is None:
            return None
        try:
            found = datetime.fromisoformat(value)
            return found.replace(tzinfo=UTC) if found.tzinfo is None else found.astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise LineError(f"`{key}` is not a time: {value[:40]!r}") from error

    def inner(self, key: str) -> Fields:
        """Return an object inside this one; empty where there is none."""
        return Fields(self._of(key, dict, "an object") or {})

    def each(self, key: str) -> list[Fields]:
        """Return a list of objects; empty where there is none."""
        items = self._of(key, list, "a list") or []
        if not all(isinstance(item, dict) for item in items):
            raise LineError(f"`{key}` is not a list of objects")
        return [Fields(item) for item in items]

    def plain(self, key: str) -> Mapping[str, JsonValue]:
        """Return an object as data that can be stored."""
        value: Mapping[str, JsonValue] = storable_json(self._of(key, dict, "an object") or {})
        return value

    def json(self, key: str) -> str | None:
        """Return an object as the canonical JSON text that is stored."""
        return canonical_json(self.plain(key)) if self.record.get(key) is not None else None

    def config(self, key: str) -> dict[str, KnobValue] | None:
        """Return a configuration: names with numbers or words."""
        value = self._of(key, dict, "an object")
        return None if value is None else {name: knob_value(item, f"{key}.{name}") for name, item in value.items()}

    def _of(self, key: str, kind: Any, words: str) -> Any:
        value = self.record.get(key)
        if value is not None and (not isinstance(value, kind) or isinstance(value, bool)):
            raise LineError(f"`{key}` is not {words}")
        return value


def knob_value(value: object, name: str) -> KnobValue:
    """Return a knob's value.

    Raises:
        LineError: it is neither a finite number nor a text.
    """
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise LineError(f"`{name}` is neither a number nor a text")
    if isinstance(value, str):
        return storable(value, 2_000) or ""
    if (isinstance(value, float) and not math.isfinite(value)) or abs(value) > 1e300:
        raise LineError(f"`{name}` is not a number that a double holds")
    return value


def storable_json(value: Any, depth: int = 0) -> Any:
    """Return data with every text made storable and every number finite.

    Raises:
        LineError: it is nested too deep, or holds a number that is not one.
    """
    if depth > MAX_DEPTH:
        raise LineError(f"nested deeper than {MAX_DEPTH}")
    if isinstance(value, str):
        return storable(value, MAX_LINE_BYTES)
    if isinstance(value, dict):
        return {storable(key, 2_000): storable_json(item, depth + 1) for key, item in value.items()}
    if isinstance(value, list):
        return [storable_json(item, depth + 1) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        raise LineError("a number that a double does not hold")
    return value
