"""Structured output: the JSON schema of the changes that are legal now, and the ways endpoints take a schema.

A schema makes a valid reply likely, never certain: whatever comes still goes through the rails. It allows any value of
a knob's range, not only the gridded ones; what cannot be said in a schema (constraints over a wide range) is left out.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Literal

from overnight.rails.menu import Change, Knob, Menu
from overnight.store.records import Config, KnobValue

StructuredMode = Literal["json_schema", "nvext", "json", "none"]
MODES: tuple[StructuredMode, ...] = ("json_schema", "nvext", "json", "none")
"""From the strictest down: OpenAI's `response_format`, older NIM's `nvext.guided_json`, JSON of any shape, nothing."""
MAX_LISTED = 64
"""Integer ranges of at most so many values are listed, which leaves out what is illegal or already measured."""
MAX_REASON_CHARS = 300
PROBE_SCHEMA: Mapping[str, Any] = {
    "type": "object",
    "properties": {"ready": {"type": "boolean"}},
    "required": ["ready"],
    "additionalProperties": False,
}
PROBE_PROMPT = "Say hello in one short sentence, in English. (JSON is fine too.)"
PROBE_TOKENS = 64


def moves_schema(menu: Menu, baseline: Config, moves: Iterable[Change]) -> dict[str, Any]:
    """Return the JSON schema of the replies that are legal now: for each knob that can move, its values.

    Args:
        menu: The campaign's knobs and constraints.
        baseline: The configuration that a change starts from.
        moves: The gridded changes that the rails would let through.
    """
    by_knob: dict[str, list[KnobValue]] = {}
    for move in moves:
        by_knob.setdefault(move.knob, []).append(move.value)
    return {
        "anyOf": [
            {
                "type": "object",
                "properties": {
                    "knob": {"type": "string", "enum": [name]},
                    "new_value": _values_schema(menu, baseline, menu.by_name[name], values),
                    "reason": {"type": "string", "maxLength": MAX_REASON_CHARS},
                },
                "required": ["knob", "new_value", "reason"],
                "additionalProperties": False,
            }
            for name, values in by_knob.items()
        ]
    }


def _values_schema(menu: Menu, baseline: Config, knob: Knob, legal: Sequence[KnobValue]) -> dict[str, Any]:
    if knob.choices:
        return {"type": "string" if knob.type == "str" else "number", "enum": list(legal)}
    assert knob.low is not None
    assert knob.high is not None
    if knob.type == "float":
        return {"type": "number", "minimum": knob.low, "maximum": knob.high}
    low, high = math.ceil(knob.low), math.floor(knob.high)
    if high - low >= MAX_LISTED:
        return {"type": "integer", "minimum": low, "maximum": high}
    coarse = set(knob.grid())  # a value of the finer grid among the legal ones says that the grid was refined
    measured = (coarse if coarse.issuperset(legal) else coarse | set(knob.grid(1))) - set(legal)
    open_values = [
        value
        for value in range(low, high + 1)
        if value not in measured
        and value != baseline[knob.name]
        and not menu.broken_constraint(menu.apply(baseline, Change(knob.name, value)))
    ]
    return {"type": "integer", "enum": sorted({*open_values, *map(int, legal)})}


def request_fields(mode: StructuredMode, schema: Mapping[str, Any]) -> dict[str, Any]:
    """Return the fields of a chat completion request that ask for `schema` in this mode."""
    if mode == "json_schema":
        named = {"name": "change", "schema": schema, "strict": True}
        return {"response_format": {"type": "json_schema", "json_schema": named}}
    if mode == "nvext":
        return {"nvext": {"guided_json": schema}}
    return {"response_format": {"type": "json_object"}} if mode == "json" else {}


def probe_passed(mode: StructuredMode, reply: str) -> bool:
    """Say whether `reply` to the probe shows that the endpoint enforces this mode, and does not merely ignore it."""
    if mode == "none":
        return True
    if mode == "json":
        return reply.lstrip().startswith("{")
    try:
        said = json.loads(reply)
    except (ValueError, RecursionError):
        return False
    return isinstance(said, dict) and set(said) == {"ready"} and isinstance(said["ready"], bool)
