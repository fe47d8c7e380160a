"""A local model that scores the menu instead of writing text: always legal, milliseconds, exact probabilities.

Every candidate's `{"knob": ..., "new_value": ...` gets its log-probability after the stored prompt, and one is drawn
from their softmax; each one's probability is kept as its propensity. `mode = "generate"` lets the model write freely
instead, and the rails judge that. The model lives in a process of its own (`overnight.distill.host`), shared by all
proposers of the same base model; nothing here loads torch.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Literal, Self

from pydantic import Field

from overnight.agent.proposers.candidates import (
    Scored,
    candidate_text,
    candidates,
    draw,
    probabilities,
    reason_from,
)
from overnight.agent.proposers.endpoint import chat_messages
from overnight.agent.proposers.protocol import Answer, Ask, ProposerContext, ProposerSettings, change_key, reply_text
from overnight.distill.adapter import read_record
from overnight.distill.base import BaseModel, find_base
from overnight.distill.host import ModelHost
from overnight.store.errors import CampaignError
from overnight.store.hashing import JsonValue


class StudentProposer:
    """Scores the open moves, and the neighbours of the current values, with a local model."""

    class Settings(ProposerSettings):
        """The keys of a `[proposers.<name>]` table of kind `student`."""

        base_model: str
        """`smollm2-135m` (bundled), a hub id, a folder of safetensors, or a `.gguf` file."""
        adapter: str | None = None
        """A folder with a LoRA adapter in peft's format; without it the base model answers as it is."""
        mode: Literal["score", "generate"] = "score"
        """`score` weighs every legal change in one pass; `generate` writes free text."""
        temperature: Annotated[float, Field(ge=0.0, le=10.0)] = 1.0
        """Of the draw: 1 takes the model's own odds, 0 always its first choice."""
        neighbours: bool = True
        """Whether the values next to the current one on the refined grid are scored too."""
        device: Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")] = "auto"
        """`cpu`, `cuda`, `cuda:1`; `auto`: a GPU where there is one."""
        deadline_s: Annotated[float, Field(gt=0.0, le=3600.0)] = 60.0
        """Seconds for one answer, once the model is loaded; past it the model host is killed and started anew."""
        max_new_tokens: Annotated[int, Field(ge=1, le=4096)] = 256
        """Of a reply, in the mode `generate`."""

    def __init__(
        self,
        name: str,
        settings: Settings,
        host: ModelHost,
        *,
        adapter: Path | None,
        version: Mapping[str, JsonValue] | None = None,
    ) -> None:
        self.name = name
        self.host = host
        """The process with the base model, which trains its adapters too."""
        self._settings = settings
        self.adapter = adapter
        """The folder of the adapter that it answers with; None: the base model as it is."""
        self._version = version

    @classmethod
    def from_settings(cls, name: str, settings: Mapping[str, object], context: ProposerContext) -> Self:
        """Build it from `[proposers.<name>]`; starts no process and reads no weights.

        Raises:
            CampaignError: a key of the table is missing, unknown or impossible, or the model or adapter is not there.
        """
        parsed = cls.Settings.parse(name, settings)
        try:
            base = find_base(parsed.base_model, context.campaign_dir)
        except CampaignError as error:
            raise CampaignError(f"`[proposers.{name}]`: {error}") from error
        host = context.hosts.setdefault(_host_key(base, parsed.device), _host(base, parsed.device, context))
        return cls(name, parsed, host, adapter=_adapter(name, parsed.adapter, context))

    def with_adapter(self, version: str, folder: Path) -> Self:
        """Return this student as it answers with an adapter that was trained for it, in the same process.

        Args:
            version: the name of the adapter in its campaign, such as `v3`.
            folder: where the adapter is.

        Raises:
            CampaignError: there is no whole adapter in `folder`.
        """
        description = {"version": version, "sha256": read_record(folder).sha256}
        return type(self)(self.name, self._settings, self.host, adapter=folder.absolute(), version=description)

    def propose(self, ask: Ask) -> Answer:
        """Answer with one change; the first call loads the model.

        Raises:
            ProposerError: `llm_timeout` past the deadline; `llm_error` when the model host fails. The next call finds
                a fresh host.
            CampaignError: the model or the adapter cannot be used.
        """
        loaded = self.host.load()
        started = time.perf_counter()
        answer = self._score(ask) if self._settings.mode == "score" else self._generate(ask)
        settings = {**answer.settings, "temperature": self._settings.temperature, "model_sha256": loaded.sha256}
        return Answer(
            reply=answer.reply,
            latency_s=time.perf_counter() - started,
            settings={**settings, "mode": self._settings.mode, "device": loaded.device, "seed": ask.seed},
            usage=answer.usage,
            probabilities=answer.probabilities,
        )

    def _score(self, ask: Ask) -> Answer:
        changes = candidates(ask, neighbours=self._settings.neighbours)
        texts = [candidate_text(change) for change in changes]
        found = self.host.score(ask.prompt, texts, deadline_s=self._settings.deadline_s, adapter=self.adapter)
        chances = probabilities(found.log_probs, self._settings.temperature)
        scored = [Scored(change, chance) for change, chance in zip(changes, chances, strict=True)]
        chosen = draw(scored, ask.seed)
        return Answer(
            reply=reply_text(chosen.change.knob, chosen.change.value, reason_from(chosen, scored)),
            latency_s=0.0,
            usage={
                "prompt_tokens": found.prompt_tokens,
                "cached_tokens": found.reused_tokens,
                "scored_tokens": found.tree_tokens,
            },
            probabilities={change_key(one.change): one.probability for one in scored},
        )

    def _generate(self, ask: Ask) -> Answer:
        found = self.host.generate(
            chat_messages(ask),
            temperature=self._settings.temperature,
            max_new_tokens=self._settings.max_new_tokens,
            seed=ask.seed,
            deadline_s=self._settings.deadline_s,
            adapter=self.adapter,
        )
        return Answer(
            reply=found.text,
            latency_s=0.0,
            settings={"max_new_tokens": self._settings.max_new_tokens},
            usage={"prompt_tokens": found.prompt_tokens, "completion_tokens": found.completion_tokens},
        )

    def describe(self) -> Mapping[str, JsonValue]:
        """Return kind, base model, adapter (its version and the hash of its weights) and how it answers."""
        said = self._settings
        return {
            "kind": "student",
            "base_model": said.base_model,
            "adapter": self._version or said.adapter,
            "mode": said.mode,
            "temperature": said.temperature,
            "neighbours": said.neighbours,
        }

    def close(self) -> None:
        """End the model host; another proposer that shares it would start it again."""
        self.host.close()


def _host_key(base: BaseModel, device: str) -> str:
    return f"{base.kind}:{base.where}:{device}"


def _host(base: BaseModel, device: str, context: ProposerContext) -> ModelHost:
    return ModelHost(base, context.cache_dir, device=device, idle=context.idle)


def _adapter(name: str, folder: str | None, context: ProposerContext) -> Path | None:
    if folder is None:
        return None
    path = (context.campaign_dir / Path(folder).expanduser()).absolute()
    if not (path / "adapter_model.safetensors").is_file():
        raise CampaignError(
            f"`[proposers.{name}]` key `adapter`: `{path}` has no `adapter_model.safetensors`; give the folder of an "
            "adapter in peft's format, or drop the key"
        )
    return path
