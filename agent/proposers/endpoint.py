"""A language model behind an OpenAI-compatible endpoint: NIM, vLLM, `transformers serve`, or a hosted one.

The stored prompt is sent as it is; replies of this turn that the rails blocked follow with the reason. What comes back
is handed on unchanged: prose stays prose, and the rails judge it. It promises an end within the deadline, no answer.
Before its first answer it finds out which model and structured output there are, within a deadline of that length too.
With `adapter` a vLLM answers with an adapter of the campaign, which is loaded into it while it runs.
"""

from __future__ import annotations

import copy
import os
import time
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from overnight.agent.proposers.breaker import Breaker
from overnight.agent.proposers.chat import ChatEndpoint, ChatSession, Refused
from overnight.agent.proposers.protocol import Answer, Ask, ProposerContext, ProposerSettings
from overnight.agent.proposers.replies import Completion, ListedModel
from overnight.agent.proposers.served import ServedAdapter, unload
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
UNLOAD_S = 5.0
"""Most time for unloading adapters, after the answer."""


@dataclass(slots=True)
class _Found:
    """What was found out about an endpoint; shared by a proposer's versions."""

    model: str | None
    mode: StructuredMode
    """The strictest way to ask for JSON that is not ruled out."""
    settled: bool
    """Whether it is known to be enforced, or is all that is left."""
    heard: bool = False
    """Whether the endpoint has completed any chat."""

    @property
    def whole(self) -> bool:
        """Whether there is nothing left to find out before a question."""
        return self.model is not None and self.settled

    def rule_out(self) -> None:
        """Go on to the next weaker mode."""
        self.mode = MODES[MODES.index(self.mode) + 1]

    def doubt(self) -> None:
        """Take every mode for possible again if plain chats are refused too: what was refused was not the mode."""
        if not self.heard and self.mode == MODES[-1]:
            self.mode, self.settled = MODES[0], False


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
        """Seconds for everything: connecting, retries, the whole reply; as much again to find out what it can."""
        max_tokens: Annotated[int, Field(ge=1, le=65536)] = 512
        """Of a reply."""
        seed: int | None = None
        """A fixed sampling seed; by default one derived from the campaign's seed for each try."""
        structured: Literal["auto", "json_schema", "nvext", "json", "none"] = "auto"
        """How to ask for JSON; `auto` probes once what the endpoint enforces."""
        adapter: Annotated[str, Field(pattern=r"^(promoted|v[1-9]\d*)$")] | None = None
        """`promoted`, or a version such as `v3`: the campaign's adapter that a vLLM loads and answers with
        (docs/serving.md); with none promoted, the base model answers."""
        adapter_root: Annotated[str, Field(pattern=r"^/")] | None = None
        """Where that server sees the folder `adapters` beside the database, if elsewhere, as in a container."""

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

        @model_validator(mode="after")
        def _root_is_of_adapters(self) -> Self:
            if self.adapter_root is not None and self.adapter is None:
                raise ValueError("`adapter_root` says nothing without `adapter`; add `adapter` or remove it")
            return self

    def __init__(
        self,
        name: str,
        settings: Settings,
        *,
        breaker: Breaker | None = None,
        in_use: MutableMapping[str, str] | None = None,
        idle: Callable[[], None] = lambda: None,
    ) -> None:
        """Hold what is needed to ask; opens no connection.

        Args:
            name: of the campaign file's table.
            settings: the table.
            breaker: the endpoint's failure counter, shared by its proposers.
            in_use: which adapter each proposer of the endpoint answers with, shared by them.
            idle: called about every second while an answer is waited for.

        Raises:
            CampaignError: the variable that `api_key_env` names is not set.
        """
        self.name = name
        self._settings = settings
        self._breaker = breaker or Breaker(settings.base_url)
        self._endpoint = ChatEndpoint(settings.base_url, _read_key(name, settings.api_key_env), idle=idle)
        chosen = settings.structured
        self._found = _Found(settings.model, MODES[0] if chosen == "auto" else chosen, settled=chosen != "auto")
        self._in_use = {} if in_use is None else in_use
        self._served: ServedAdapter | None = None

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:
        """Build it from `[proposers.<name>]`; proposers of one endpoint share its failure counter.

        Raises:
            CampaignError: a key of the table is missing, unknown or impossible, or its key variable is not set.
        """
        parsed = cls.Settings.parse(name, settings)
        breaker = context.breakers.setdefault(parsed.base_url, Breaker(parsed.base_url))
        in_use = context.served.setdefault(parsed.base_url, {})
        return cls(name, parsed, breaker=breaker, in_use=in_use, idle=context.idle)

    @property
    def wanted(self) -> str | None:
        """Which adapter the table asks for: `promoted`, a version, or none."""
        return self._settings.adapter

    @property
    def adapter(self) -> Path | None:
        """The folder of the adapter that it answers with; None: the base model as it is."""
        return None if self._served is None else self._served.folder

    def with_adapter(self, version: str, folder: Path) -> Self:
        """Return this proposer as it answers with an adapter, which its server loads at the first question.

        Args:
            version: the name of the adapter in its campaign, such as `v3`.
            folder: where the adapter is.

        Raises:
            CampaignError: there is no whole adapter in `folder`.
        """
        twin = copy.copy(self)
        twin._served = ServedAdapter.of(version, folder, root=self._settings.adapter_root)
        return twin

    def prepare(self) -> StructuredMode:
        """Find out which model there is and which structured output it enforces, once; `propose` does so by itself.

        What a deadline cuts off goes on at the next call: no mode that failed is tried again, unless plain chats are
        refused too.

        Raises:
            ProposerError: no answer within the deadline.
            CampaignError: there are several models, or none, and `model` names none of them.
        """
        if not self._found.whole:
            self._endpoint.call(self._set_up, self._settings.deadline_s)
        return self._found.mode

    def propose(self, ask: Ask) -> Answer:
        """Answer with what the model says; the first time, `prepare` has a deadline of its own before.

        Raises:
            ProposerError: `llm_timeout` at the deadline; `llm_error` for any other failure, or at once while the
                endpoint is skipped after failures in a row.
            CampaignError: see `prepare`.
        """
        self._breaker.check()
        try:
            self.prepare()
            ends = time.monotonic() + self._settings.deadline_s
            answer, replaced = self._endpoint.call(lambda session: self._ask(session, ask), self._settings.deadline_s)
        except ProposerError as error:
            if error.failure == "llm_error" and self._settings.structured == "auto":
                self._found.doubt()
            self._breaker.record_failure(str(error))
            raise
        self._breaker.record_success()
        self._unload(replaced, ends - time.monotonic())
        return answer

    def _unload(self, names: Sequence[str], left_s: float) -> None:
        """Take the adapters that this one replaced out of the server; what stays is tried at the next answer."""
        if names and left_s > 0:
            with suppress(ProposerError):
                self._endpoint.call(lambda session: unload(session, names), min(left_s, UNLOAD_S))

    async def _ask(self, session: ChatSession, ask: Ask) -> tuple[Answer, Sequence[str]]:
        """Return the answer, and the names of adapters that the server need not hold any more."""
        replaced = [] if self._served is None else await self._load(session, self._served)
        started = time.perf_counter()
        seed = ask.seed % 2**31 if self._settings.seed is None else self._settings.seed
        completion, mode = await self._complete(session, ask, seed)
        base = {} if self._served is None else {"base_model": self._found.model}
        answer = Answer(
            reply=self._endpoint.scrub(completion.text),
            latency_s=time.perf_counter() - started,
            settings={
                "model": self._asked_model,
                **base,
                "temperature": self._settings.temperature,
                "seed": seed,
                "max_tokens": self._settings.max_tokens,
                "structured": mode,
            },
            usage=completion.tokens,
        )
        return answer, replaced

    async def _load(self, session: ChatSession, served: ServedAdapter) -> Sequence[str]:
        """Have the server hold the adapter; return the names of those that it takes the place of."""
        listed = await session.models()
        bases = [model for model in listed if not model.is_adapter]
        if all(model.id != self._found.model for model in bases):
            raise CampaignError(
                f"`[proposers.{self.name}]`: endpoint `{self._settings.base_url}` lists no model "
                f"`{self._found.model}` but {_shown(bases)}; name the base model of the adapter with `model`"
            )
        await served.load(session, listed)
        self._in_use[self.name] = served.name
        return served.replaced(listed, self._in_use.values())

    async def _complete(self, session: ChatSession, ask: Ask, seed: int) -> tuple[Completion, StructuredMode]:
        """Ask in the mode that was found, or in the first weaker one that is not refused; remember what worked."""
        schema = moves_schema(ask.menu, ask.baseline, ask.moves)
        common = self._request(self._asked_model, chat_messages(ask), self._settings.max_tokens) | {
            "temperature": self._settings.temperature,
            "seed": seed,
        }
        weaker = MODES[MODES.index(self._found.mode) :] if self._settings.structured == "auto" else (self._found.mode,)
        for candidate in weaker:
            try:
                completion = await session.complete(common | request_fields(candidate, schema))
            except Refused:
                if candidate == weaker[-1]:
                    raise
                continue
            self._found.mode, self._found.heard = candidate, True
            return completion, candidate
        raise AssertionError("the last mode returns or raises")

    async def _set_up(self, session: ChatSession) -> None:
        """Find out what is not known yet; each finding is kept at once, whatever cuts the next one off."""
        found = self._found
        if found.model is None:
            found.model = self._only_model(await session.models())
        while not found.settled:
            if found.mode == MODES[-1] or await self._enforces(session, found.mode):
                found.settled = True
            else:
                found.rule_out()

    async def _enforces(self, session: ChatSession, mode: StructuredMode) -> bool:
        """Say whether the endpoint holds its model to a schema in this mode."""
        common = self._request(self._found.model, [{"role": "user", "content": PROBE_PROMPT}], PROBE_TOKENS)
        common["temperature"] = 0.0
        try:
            completion = await session.complete(common | request_fields(mode, PROBE_SCHEMA), probing=True)
        except Refused:
            return False
        self._found.heard = True
        return probe_passed(mode, completion.text)

    @property
    def _asked_model(self) -> str | None:
        return self._found.model if self._served is None else self._served.name

    def _request(self, model: str | None, messages: list[dict[str, str]], max_tokens: int) -> dict[str, Any]:
        return {"model": model, "messages": messages, "max_tokens": max_tokens}

    def _only_model(self, listed: Sequence[ListedModel]) -> str:
        """Return the one model that is no adapter on another."""
        models = [model for model in listed if not model.is_adapter]
        if len(models) == 1:
            return models[0].id
        raise CampaignError(
            f"`[proposers.{self.name}]`: endpoint `{self._settings.base_url}` lists {len(models)} models "
            f"({_shown(models)}); name one with `model`"
        )

    def describe(self) -> Mapping[str, JsonValue]:
        """Return kind, endpoint, model, adapter (its version and the hash of its weights) and sampling settings.

        A model of None is the endpoint's only one.
        """
        said, served = self._settings, self._served
        return {
            "kind": "openai",
            "base_url": said.base_url,
            "model": said.model,
            "adapter": None if served is None else {"version": served.version, "sha256": served.sha256},
            "temperature": said.temperature,
            "max_tokens": said.max_tokens,
            "seed": said.seed,
            "structured": said.structured,
        }

    def close(self) -> None:
        """Hold no connection between turns, so close none."""


def _shown(models: Sequence[ListedModel]) -> str:
    return ", ".join(f"`{model.id[:80]!s}`" for model in models[:8]) or "none"


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
