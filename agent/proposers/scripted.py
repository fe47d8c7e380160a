"""A proposer that says what it is told to: for tests, benchmarks and plugin authors, through the product's own door."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Annotated, Literal, Self

from pydantic import Field

from overnight.agent.proposers.protocol import Answer, Ask, ProposerContext, ProposerSettings
from overnight.store.errors import ProposerError
from overnight.store.hashing import JsonValue

Reply = str | ProposerError
"""What it answers with, or the error that it raises instead."""
Script = Sequence[Reply] | Callable[[Ask], Reply]


class ScriptedProposer:
    """Answers from a list, over and over from its start, or with whatever a function makes of the ask.

    Its place in the list lives in memory: a new instance begins at the first reply, unless replies are drawn.
    """

    class Settings(ProposerSettings):
        """The keys of a `[proposers.<name>]` table of kind `scripted`."""

        replies: Annotated[list[str], Field(min_length=1)]
        """The replies, in order; after the last comes the first again."""
        order: Literal["listed", "drawn"] = "listed"
        """`drawn`: the turn picks the reply, so that a resumed campaign hears what an undisturbed one would."""

    def __init__(self, name: str, script: Script) -> None:
        self.name = name
        self.asks: deque[Ask] = deque(maxlen=100)
        """The last asks, for a test to look at."""
        self.calls = 0
        self.closed = False
        self._script = script

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:  # noqa: ARG003
        """Build it from `[proposers.<name>]`.

        Raises:
            CampaignError: `replies` is missing or empty, or a key is unknown.
        """
        parsed = cls.Settings.parse(name, settings)
        replies = parsed.replies
        return cls(name, replies if parsed.order == "listed" else lambda ask: replies[ask.seed % len(replies)])

    def propose(self, ask: Ask) -> Answer:
        """Answer with the script's next reply.

        Raises:
            ProposerError: the script says so.
        """
        started = time.perf_counter()
        self.asks.append(ask)
        script = self._script
        reply = script(ask) if callable(script) else script[self.calls % len(script)]
        self.calls += 1
        if isinstance(reply, ProposerError):
            raise reply
        return Answer(reply=reply, latency_s=time.perf_counter() - started)

    def describe(self) -> Mapping[str, JsonValue]:
        """Return the kind: a script has no settings worth telling apart."""
        return {"kind": "scripted"}

    def close(self) -> None:
        """Note that it was closed, for a test to look at."""
        self.closed = True
