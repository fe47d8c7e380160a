"""A language model behind an OpenAI-compatible endpoint: NIM, vLLM, `transformers serve`, or a hosted one.

The stored prompt is sent as it is; replies of this turn that the rails blocked follow with the reason. What comes back
is handed on unchanged: prose stays prose, and the rails judge it. It promises an end within the deadline, no answer.
"""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator

from overnight.agent.proposers.breaker import Breaker
from overnight.agent.proposers.chat import ChatEndpoint, ChatSession, Completion, Refused
from overnight.agent.proposers.protocol import Answer, Ask, ProposerContext, ProposerSettings
from overnight.agent.proposers.structured import (
    MODES,
    PROBE_PROMPT,
    PROBE_SCHEMA,
    PROBE_TOKENS,
    StructuredMode,
    moves_schema,
    probe_passed,
    request_fields,
)
from overnight.store.errors import CampaignError, ProposerError
from overnight.store.hashing import JsonValue

MAX_REPLY_SHOWN = 2_000
MAX_REASON_SHOWN = 1_000
"""Characters of a blocked reply, and of why it was blocked, that go back to the model."""


class OpenAIProposer:
    """Asks a chat model, within one wall-clock deadline, for one change in JSON."""

    class Settings(ProposerSettings):
        """The keys of a `[proposers.<name>]` table of kind `openai`."""

        base_url: str
        """Where `/chat/completions` and `/models` are, mostly ending in `/v1`."""
        model: str | None = None
        """The model's name there; by default the endpoint's only one."""
        api_key_env: str | None = None
        """The name of an environment variable that holds the key; never the key."""
        temperature: Annotated[float, Field(ge=0.0, le=2.0)] = 0.5
        """Of the sampling; 0 takes the likeliest token."""
        deadline_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 60.0
        """Seconds for everything: connecting, retries, the whole reply."""
        max_tokens: Annotated[int, Field(ge=1, le=65536)] = 512
        """Of a reply."""
        seed: int | None = None
        """A fixed sampling seed; by default one derived from the campaign's seed for each try."""
        structured: Literal["auto", "json_schema", "nvext", "json", "none"] = "auto"
        """How to ask for JSON; `auto` probes once what the endpoint enforces."""

        @field_validator("base_url")
        @classmethod
        def _is_plain_url(cls, value: str) -> str:
            parts = urlsplit(value)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("give a URL such as `http://localhost:8000/v1`")
            if parts.username or parts.password or parts.query or parts.fragment:
                raise ValueError(
                    "a URL with a user, password, query or fragment is refused; a key belongs in the variable that "
                    "`api_key_env` names"
                )
            return value.rstrip("/")

    def __init__(self, name: str, settings: Settings, *, breaker: Breaker | None = None) -> None:
        """Hold what is needed to ask; opens no connection.

        Raises:
            CampaignError: the variable that `api_key_env` names is not set.
        """
        self.name = name
        self._settings = settings
        self._breaker = breaker or Breaker(settings.base_url)
        self._endpoint = ChatEndpoint(settings.base_url, _read_key(name, settings.api_key_env))
        self._model = settings.model
        self._mode: StructuredMode | None = None if settings.structured == "auto" else settings.structured

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:
        """Build it from `[proposers.<name>]`; proposers of one endpoint share its failure counter.

        Raises:
            CampaignError: a key of the table is missing, unknown or impossible, or its key variable is not set.
        """
        parsed = cls.Settings.parse(name, settings)
        breaker = context.breakers.setdefault(parsed.base_url, Breaker(parsed.base_url))
        return cls(name, parsed, breaker=breaker)

    def prepare(self) -> StructuredMode:
        """Find out now, not at the first turn, which model there is and which structured output it enforces.

        Raises:
            ProposerError: no answer within the deadline.
            CampaignError: there are several models, or none, and `model` names none.
        """
        return self._endpoint.call(self._set_up, self._settings.deadline_s)

    def propose(self, ask: Ask) -> Answer:
        """Answer with what the model says.

        Raises:
            ProposerError: `llm_timeout` at the deadline; `llm_error` for any other failure, or at once while the
                endpoint is skipped after failures in a row.
            CampaignError: see `prepare`.
        """
        self._breaker.check()
        try:
            answer = self._endpoint.call(lambda session: self._ask(session, ask), self._settings.deadline_s)
        except ProposerError as error:
            self._breaker.record_failure(str(error))
            raise
        self._breaker.record_success()
        return answer

    async def _ask(self, session: ChatSession, ask: Ask) -> Answer:
        mode = await self._set_up(session)
        started = time.perf_counter()
        seed = ask.seed % 2**31 if self._settings.seed is None else self._settings.seed
        completion, mode = await self._complete(session, ask, mode, seed)
        return Answer(
            reply=self._endpoint.scrub(completion.text),
            latency_s=time.perf_counter() - started,
            settings={
                "model": self._model,
                "temperature": self._settings.temperature,
                "seed": seed,
                "max_tokens": self._settings.max_tokens,
                "structured": mode,
            },
            usage=completion.tokens,
        )

    async def _complete(
        self, session: ChatSession, ask: Ask, mode: StructuredMode, seed: int
    ) -> tuple[Completion, StructuredMode]:
        """Ask in `mode`, or in the first weaker one that is not refused; remember what worked."""
        schema = moves_schema(ask.menu, ask.baseline, ask.moves)
        common = self._request(chat_messages(ask), self._settings.max_tokens) | {
            "temperature": self._settings.temperature,
            "seed": seed,
        }
        weaker = MODES[MODES.index(mode) :] if self._settings.structured == "auto" else (mode,)
        for candidate in weaker:
            try:
                completion = await session.complete(common | request_fields(candidate, schema))
            except Refused:
                if candidate == weaker[-1]:
                    raise
                continue
            self._mode = candidate
            return completion, candidate
        raise AssertionError("the last mode returns or raises")

    async def _set_up(self, session: ChatSession) -> StructuredMode:
        if self._model is None:
            self._model = self._only_model(await session.models())
        return self._mode or await self._probe(session)

    async def _probe(self, session: ChatSession) -> StructuredMode:
        """Return the strictest mode that the endpoint enforces; remembered once an answer came through it."""
        common = self._request([{"role": "user", "content": PROBE_PROMPT}], PROBE_TOKENS) | {"temperature": 0.0}
        for mode in MODES[:-1]:
            try:
                completion = await session.complete(common | request_fields(mode, PROBE_SCHEMA), probing=True)
            except Refused:
                continue
            if probe_passed(mode, completion.text):
                return mode
        return "none"

    def _request(self, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        return {"model": self._model, "messages": messages, "max_tokens": max_tokens}

    def _only_model(self, models: list[str]) -> str:
        if len(models) == 1:
            return models[0]
        shown = ", ".join(f"`{model[:80]!s}`" for model in models[:8]) or "none"
        raise CampaignError(
            f"`[proposers.{self.name}]`: endpoint `{self._settings.base_url}` lists {len(models)} models ({shown}); "
            "name one with `model`"
        )

    def describe(self) -> Mapping[str, JsonValue]:
        """Return kind, endpoint, model and sampling settings; a model of None is the endpoint's only one."""
        said = self._settings
        return {
            "kind": "openai",
            "base_url": said.base_url,
            "model": said.model,
            "temperature": said.temperature,
            "max_tokens": said.max_tokens,
            "seed": said.seed,
            "structured": said.structured,
        }

    def close(self) -> None:
        """Hold no connection between turns, so close none."""


def _read_key(name: str, variable: str | None) -> str | None:
    if variable is None:
        return None
    key = os.environ.get(variable, "").strip()
    if not key:
        raise CampaignError(
            f"`[proposers.{name}]` key `api_key_env`: the environment variable `{variable}` is not set; "
            f"set it with `export {variable}=...`, or remove the key for an endpoint that needs none"
        )
    return key


def chat_messages(ask: Ask) -> list[dict[str, str]]:
    """Return the chat: the prompt, then each blocked reply of this turn with the reason."""
    messages = [{"role": "user", "content": ask.prompt}]
    for rejection in ask.rejections:
        blocked = f"Blocked by {rejection.rail}: {rejection.reason[:MAX_REASON_SHOWN]}"
        messages += [
            {"role": "assistant", "content": rejection.reply[:MAX_REPLY_SHOWN] or "(nothing)"},
            {"role": "user", "content": f"{blocked}\nPropose another change, as one JSON object and nothing else."},
        ]
    return messages
