"""A proposal as text: the whole reply, how it begins, and the name of a change; what `overnight.rails.gate` reads back.

One place writes replies, so that what proposers answer, what a model scores and what a student learns are the same
bytes.
"""

from __future__ import annotations

import json

from overnight.rails.menu import Change
from overnight.store.records import KnobValue


def change_key(change: Change) -> str:
    """Return the text that names a change in stored propensities: `knob=value`, the value as JSON."""
    return f"{change.knob}={json.dumps(change.value)}"


def reply_text(knob: str, value: KnobValue, reason: str) -> str:
    """Return the JSON reply for one change, in the key order that every proposer and corpus uses."""
    return json.dumps({"knob": knob, "new_value": value, "reason": reason}, ensure_ascii=False)


def candidate_text(change: Change) -> str:
    """Return how a reply that proposes `change` begins, up to the comma after the value.

    The comma ends the value: without it `2` would be credited with all that `2048` gets.
    """
    return json.dumps({"knob": change.knob, "new_value": change.value}, ensure_ascii=False)[:-1] + ","
