"""What a scoring proposer chooses from, and how: candidates as text, their probabilities, one draw.

The rails' open moves come with the ask. Beside them stand the neighbours of the current value: for a range, the next
values on the once refined grid, so that a good value can be approached before the grid as a whole is refined.
"""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from overnight.agent.proposers.protocol import Ask, History
from overnight.rails.gate import MAX_REASON_CHARS
from overnight.rails.menu import Change, Menu
from overnight.rails.reply import candidate_text, change_key
from overnight.store.hashing import digest
from overnight.store.records import Config

__all__ = ["Scored", "SeenConfigs", "candidate_text", "candidates", "draw", "probabilities", "reason_from"]


@dataclass(frozen=True, slots=True)
class Scored:
    """A candidate with its chance of being drawn."""

    change: Change
    probability: float


class SeenConfigs:
    """The configurations that the decision rule is done with, read from the history as it grows."""

    def __init__(self, menu: Menu) -> None:
        self._seen = {digest(menu.default)}
        self._last_id = 0

    def update(self, history: History) -> None:
        """Take in what was decided since the last call."""
        for observation in history.since(self._last_id):
            self._seen.add(digest(observation.config))
            self._last_id = max(self._last_id, observation.attempt_id)

    def __contains__(self, config: Config) -> bool:
        return digest(config) in self._seen


def candidates(ask: Ask, seen: SeenConfigs | None) -> list[Change]:
    """Return the changes to score: the open moves and, given `seen`, untried legal neighbours of their knobs.

    What was blocked earlier in this turn is left out, unless nothing else is there.
    """
    open_now = list(dict.fromkeys(ask.moves))
    if seen is not None:
        seen.update(ask.history)
        known = set(open_now)
        beside = ask.menu.neighbours(ask.baseline, dict.fromkeys(move.knob for move in ask.moves))
        untried = (change for change in beside if ask.menu.apply(ask.baseline, change) not in seen)
        open_now += [change for change in untried if change not in known]
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
