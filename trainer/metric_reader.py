"""Reads a script's standard output as it comes: the metric, notes and progress, whatever else it prints.

Nothing is kept but what was looked for, so that output without end costs no memory. Of several lines with the metric
the last one counts: a script may print it after every evaluation. A line over 64 KiB is dropped.
"""

from __future__ import annotations

import json
import math
import re
import time
from collections import deque
from dataclasses import dataclass, field

from overnight.store.records import TrialProgress
from overnight.trainer.output import cut
from overnight.trainer.protocol import Report

MAX_LINE = 64 * 1024
_MAX_CANDIDATES = 64
"""Lines that name the metric, kept until the end: the last may turn out not to be JSON after all."""
_PROGRESS_S = 0.05


@dataclass(frozen=True, slots=True)
class Measured:
    """What a script said about its trial; `metric` may be NaN or an infinity."""

    metric: float
    metrics: dict[str, float] = field(default_factory=dict)
    notes: str = ""


class MetricReader:
    """Consumes standard output in chunks.

    Args:
        key: the metric's key in a JSON line; used where there is no `regex`.
        regex: a pattern with the group `metric`, searched in each line.
        notes_prefix: lines that start with it are notes.
        report: told when a JSON line has a whole number `step` (and, if it likes, `steps` and `loss`).
    """

    def __init__(self, key: str, regex: str | None, notes_prefix: str | None, report: Report) -> None:
        self._key = key
        self._quoted = json.dumps(key).encode()
        self._regex = None if regex is None else re.compile(regex)
        self._prefix = None if notes_prefix is None else notes_prefix.encode()
        self._report = report
        self._needles = [self._quoted, b'"step"', *([] if self._prefix is None else [self._prefix])]
        self._partial = b""
        self._dropping = False
        self._found: deque[bytes] = deque(maxlen=_MAX_CANDIDATES)
        self._notes: deque[bytes] = deque(maxlen=_MAX_CANDIDATES)
        self._progress_at = 0.0

    def add(self, chunk: bytes) -> None:
        """Take in the next piece of output; a carriage return ends a line, as a progress bar means it."""
        *lines, rest = self._lines(self._partial + chunk)
        for line in lines:
            if not self._dropping and len(line) <= MAX_LINE:
                self._line(line)
            self._dropping = False
        if len(rest) > MAX_LINE:
            self._dropping, rest = True, b""
        self._partial = rest

    def _lines(self, data: bytes) -> list[bytes]:
        """Split `data` into lines; one without anything looked for is not worth splitting, a flood is made of those."""
        data = data.replace(b"\r", b"\n")
        if self._regex is not None or any(needle in data for needle in self._needles):
            return data.split(b"\n")
        _, end, rest = data.rpartition(b"\n")
        return [b"", rest] if end else [rest]

    def _line(self, line: bytes) -> None:
        if self._prefix is not None and line.startswith(self._prefix):
            self._notes.append(line[len(self._prefix) :])
        if self._regex is not None:
            if self._regex.search(line.decode(errors="replace")):
                self._found.append(line)
        elif self._quoted in line and line.lstrip().startswith(b"{"):
            self._found.append(line)
        if b'"step"' in line and time.monotonic() - self._progress_at >= _PROGRESS_S:
            self._progress(line)

    def _progress(self, line: bytes) -> None:
        told = _json_object(line)
        step, steps = told.get("step"), told.get("steps")
        if isinstance(step, int) and not isinstance(step, bool):
            self._progress_at = time.monotonic()
            loss = _number(told.get("loss"))
            finite = loss if loss is not None and math.isfinite(loss) else None
            self._report(TrialProgress(step, steps if isinstance(steps, int) else None, finite))

    def measured(self) -> Measured | None:
        """Return what the whole output said, or None when no line had the metric."""
        if self._partial and not self._dropping:
            self._line(self._partial)
            self._partial = b""
        return self._from_regex(self._regex) if self._regex is not None else self._from_json()

    def _from_regex(self, regex: re.Pattern[str]) -> Measured | None:
        for line in reversed(self._found):
            *_, last = regex.finditer(line.decode(errors="replace"))
            try:
                return Measured(float(last["metric"]), notes=self._joined_notes())
            except (TypeError, ValueError, OverflowError):  # the group took no part, or is not a number
                continue
        return None

    def _from_json(self) -> Measured | None:
        for line in reversed(self._found):
            told = _json_object(line)
            value = told.get(self._key, "")
            metric = math.nan if value is None else _number(value)  # strict writers of JSON write NaN as null
            if metric is None:
                continue
            numbers = {key: _number(told[key]) for key in told if key != self._key}
            others = {key: number for key, number in numbers.items() if number is not None and math.isfinite(number)}
            notes = told.get("notes")
            return Measured(metric, others, self._joined_notes(notes if isinstance(notes, str) else ""))
        return None

    def _joined_notes(self, last: str = "") -> str:
        lines = [note.decode(errors="replace") for note in self._notes]
        return cut("\n".join([*lines, last]))


def _json_object(line: bytes) -> dict[str, object]:
    try:
        value = json.loads(line)
    except (ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _number(value: object) -> float | None:
    if isinstance(value, bool) or not isinstance(value, int | float):
        return None
    try:
        return float(value)
    except OverflowError:
        return math.inf
