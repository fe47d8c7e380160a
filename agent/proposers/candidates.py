"""What a scoring proposer chooses from, and how: candidates as text, their probabilities, one draw.

The rails' open moves come with the ask, and so do the neighbours of the current value: for a range, the next values on
the once refined grid, so that a good value can be approached before the grid as a whole is refined.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from overnight.agent.proposers.protocol import Ask
from overnight.rails.gate import MAX_REASON_CHARS
from overnight.rails.menu import Change
from overnight.rails.reply import candidate_text, change_key

__all__ = ["Scored", "candidate_text", "candidates", "draw", "probabilities", "reason_from"]


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its chance of being drawn."""

    change: Change
    probability: float


def candidates(ask: Ask, *, neighbours: bool = True) -> list[Change]:
    """Return the changes to score: the open moves and, where asked for, the neighbours.

    What was blocked earlier in this turn is left out, unless nothing else is there.
    """
    open_now = list(dict.fromkeys((*ask.moves, *(ask.neighbours if neighbours else ()))))
    blocked = {_said(rejection.reply) for rejection in ask.rejections}
    return [change for change in open_now if change_key(change) not in blocked] or open_now


def probabilities(log_probs: Sequence[float], temperature: float) -> list[float]:
    """Return the softmax at a temperature; at 0 the best candidate has all of it."""
    best = max(log_probs)
    if temperature == 0.0:
        return [1.0 if number == log_probs.index(best) else 0.0 for number in range(len(log_probs))]
    weights = [math.exp((score - best) / temperature) for score in log_probs]
    total = math.fsum(weights)
    return [weight / total for weight in weights]


def draw(scored: Sequence[Scored], seed: int) -> Scored:
    """Return one candidate, drawn by its probability from a generator seeded by `seed` alone."""
    return random.Random(seed).choices(scored, weights=[one.probability for one in scored])[0]


def reason_from(chosen: Scored, scored: Sequence[Scored]) -> str:
    """Return what the scores say for the change, and what came next, in one line."""
    said = f"scored {chosen.probability:.0%} of {len(scored)} candidates"
    others = [one for one in scored if one is not chosen]
    if not others:
        return said
    best = max(others, key=lambda one: one.probability)
    return f"{said}; next: {best.change.knob} = {best.change.value} ({best.probability:.0%})"[:MAX_REASON_CHARS]


def _said(reply: str) -> str | None:
    """Return the `change_key` of what a blocked reply proposed, as far as it can be read."""
    try:
        said = json.loads(reply)
        return f"{said['knob']}={json.dumps(said['new_value'])}"
    except (ValueError, KeyError, TypeError, RecursionError):
        return None
