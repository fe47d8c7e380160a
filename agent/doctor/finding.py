"""What a look found: fine, amiss with its remedy, or worth knowing."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

State = Literal["ok", "note", "NO"]
"""`note`: the campaign starts all the same, and somebody may want to know."""


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at."""

    what: str
    state: State
    found: str
    remedy: str = ""


def ok(what: str, found: str) -> Finding:
    """Return that something works."""
    return Finding(what, "ok", found)


def note(what: str, found: str, remedy: str = "") -> Finding:
    """Return something that stops nobody."""
    return Finding(what, "note", found, remedy)


def amiss(what: str, found: object, remedy: str = "") -> Finding:
    """Return that something does not work; an error's own message ends with its remedy after the last semicolon."""
    text = " ".join(str(found).split())
    if remedy:
        return Finding(what, "NO", text, remedy)
    said, semicolon, last = text.rpartition("; ")
    return Finding(what, "NO", said, last) if semicolon else Finding(what, "NO", text, "see the message")
