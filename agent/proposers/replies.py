"""What is read of the replies of an OpenAI-compatible endpoint; everything else in them is passed over."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field


class _Untrusted(BaseModel):
    model_config = ConfigDict(extra="ignore", strict=True)


class _Message(_Untrusted):
    content: str | None = None


class _Choice(_Untrusted):
    message: _Message


class Completion(_Untrusted):
    """What is read of a chat completion."""

    choices: Annotated[list[_Choice], Field(min_length=1)]
    usage: dict[str, Any] | None = None

    @property
    def text(self) -> str:
        """The reply's text; empty when the model said nothing."""
        return self.choices[0].message.content or ""

    @property
    def tokens(self) -> dict[str, int]:
        """Tokens in and out, as far as the endpoint tells."""
        counts = {name: (self.usage or {}).get(name) for name in ("prompt_tokens", "completion_tokens")}
        return {name: n for name, n in counts.items() if type(n) is int and 0 <= n < 2**31}


class ListedModel(_Untrusted):
    """A model that an endpoint lists."""

    id: str
    root: object = None
    """Where vLLM has it from."""
    parent: object = None
    """The base model's name, where this is an adapter in vLLM."""

    @property
    def is_adapter(self) -> bool:
        """Whether it is an adapter on another model of the list."""
        return isinstance(self.parent, str)


class ModelList(_Untrusted):
    """What is read of the list of models."""

    data: list[ListedModel]
