"""A second opinion on replies: what rails R1 to R6 forbid, written from the design without the gate's code.

The grammar of a legal reply is so small that one regular expression holds it: three members, each with a plain text or
a number, since nothing else could be a knob's value. Everything that does not match is forbidden by some rail.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass

WS = r"[ \t\n\r]*"
TEXT = r'"(?:[^"\\\x00-\x1f]|\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4}))*"'
NUMBER = r"-?(?:0|[1-9][0-9]*)(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?"
MEMBER = rf"{WS}({TEXT}){WS}:{WS}({TEXT}|{NUMBER}){WS}"
REPLY = re.compile(rf"{WS}\{{{MEMBER},{MEMBER},{MEMBER}\}}{WS}", re.ASCII)
ESCAPE = re.compile(r"\\(?:u([0-9a-fA-F]{4})(?:\\u([dD][c-fC-F][0-9a-fA-F]{2}))?|(.))")
PLAIN = {"b": "\b", "f": "\f", "n": "\n", "r": "\r", "t": "\t"}


@dataclass(frozen=True)
class KnobRule:
    """What R2 and R3 say of one knob."""

    kind: str
    choices: tuple[object, ...] = ()
    low: float = 0.0
    high: float = 0.0

    def takes(self, value: object) -> bool:
        if self.kind == "str":
            return isinstance(value, str) and value in self.choices
        if isinstance(value, str) or (self.kind == "int" and value != int(value)):  # type: ignore[call-overload]
            return False
        return value in self.choices if self.choices else self.low <= value <= self.high  # type: ignore[operator]


@dataclass(frozen=True)
class Rules:
    """A campaign as the oracle knows it."""

    knobs: Mapping[str, KnobRule]
    baseline: Mapping[str, object]
    done: Collection[tuple[str, object]]
    """Changes of the baseline that the decision rule is done with."""

    def allows(self, reply: str) -> bool:
        """Say whether no rail from R1 to R6 forbids `reply`."""
        change = read(reply)
        if change is None:
            return False
        knob, value = change
        rule = self.knobs.get(knob)
        if rule is None or value in (math.inf, -math.inf) or not rule.takes(value):
            return False
        config = {**self.baseline, knob: value}
        if config["d_model"] % config["n_head"] != 0:  # type: ignore[operator]
            return False
        return value != self.baseline[knob] and (knob, value) not in self.done


def read(reply: str) -> tuple[str, object] | None:
    """Return the change that a reply asks for, or None where R1 forbids it or its value is no text and no number."""
    if len(reply.encode("utf-8", "surrogatepass")) > 64 * 1024:
        return None
    match = REPLY.fullmatch(reply)
    if match is None:
        return None
    names = [unescaped(match[i]) for i in (1, 3, 5)]
    if sorted(names) != ["knob", "new_value", "reason"]:
        return None
    members = dict(zip(names, (match[i] for i in (2, 4, 6)), strict=True))
    if members["knob"][0] != '"' or members["reason"][0] != '"':
        return None
    knob, reason = unescaped(members["knob"]), unescaped(members["reason"])
    odd = [char for char in knob + reason if char == "\0" or 0xD800 <= ord(char) < 0xE000]
    if odd or len(reason) > 500:
        return None
    value = members["new_value"]
    return knob, (unescaped(value) if value[0] == '"' else float(value))


def unescaped(token: str) -> str:
    return ESCAPE.sub(_one, token[1:-1])


def _one(match: re.Match[str]) -> str:
    unit, low, plain = match.groups()
    if plain is not None:
        return PLAIN.get(plain, plain)
    code = int(unit, 16)
    if low is None:
        return chr(code)
    if 0xD800 <= code < 0xDC00:
        return chr(0x10000 + ((code - 0xD800) << 10) + (int(low, 16) - 0xDC00))
    return chr(code) + chr(int(low, 16))
