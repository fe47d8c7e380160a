"""The control that every other proposer must beat: a uniform draw from the legal, untried changes."""

from __future__ import annotations

import random
import time
from collections.abc import Mapping
from typing import Self

from overnight.agent.proposers.protocol import (
    Answer,
    Ask,
    ProposerContext,
    ProposerSettings,
    change_key,
    reply_text,
)
from overnight.store.hashing import JsonValue


class RandomProposer:
    """Draws one of `ask.moves` with equal chances, from a generator seeded by `ask.seed` alone."""

    class Settings(ProposerSettings):
        """A uniform draw has nothing to set."""

    def __init__(self, name: str) -> None:
        self.name = name

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:  # noqa: ARG003
        """Build it from `[proposers.<name>]`.

        Raises:
            CampaignError: the table has a key besides `kind`.
        """
        cls.Settings.parse(name, settings)
        return cls(name)

    def propose(self, ask: Ask) -> Answer:
        """Answer with one legal change; cannot fail."""
        started = time.perf_counter()
        change = random.Random(ask.seed).choice(ask.moves)
        reply = reply_text(change.knob, change.value, f"drawn uniformly from {len(ask.moves)} legal changes")
        chance = 1.0 / len(ask.moves)
        return Answer(
            reply=reply,
            latency_s=time.perf_counter() - started,
            settings={"seed": ask.seed},
            probabilities={change_key(move): chance for move in ask.moves},
        )

    def describe(self) -> Mapping[str, JsonValue]:
        """Return the kind: all uniform draws are one proposer."""
        return {"kind": "random"}

    def close(self) -> None:
        """Hold nothing, release nothing."""
