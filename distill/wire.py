"""What the control process and the model host say to each other, checked on arrival.

Frames are those of `overnight.trainer.wire`: four bytes of length and one JSON object. The host runs no stranger's
code, but it reads their weights, so what it says is checked like anybody's.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, FiniteFloat, TypeAdapter, ValidationError

from overnight.trainer.wire import WireError

Operation = Literal["load", "score", "generate", "train", "memory", "release"]
ErrorKind = Literal["CampaignError", "ProposerError", "MemoryError", "Exception"]


class Reply(BaseModel):
    """What every answer has."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    call: int
    """Which question this answers."""


class LoadedReply(Reply):
    """The answer to `load`: what the host holds now."""

    kind: Literal["loaded"] = "loaded"
    device: str
    dtype: str
    sha256: str
    """Content address of the base model's weights."""


class ScoredReply(Reply):
    """The answer to `score`."""

    kind: Literal["scored"] = "scored"
    log_probs: list[FiniteFloat]
    prompt_tokens: int
    reused_tokens: int
    tree_tokens: int


class WrittenReply(Reply):
    """The answer to `generate`."""

    kind: Literal["written"] = "written"
    text: str
    prompt_tokens: int
    completion_tokens: int


class TrainingReply(Reply):
    """News of a training that goes on."""

    kind: Literal["training"] = "training"
    epoch: int
    """From 1."""
    epochs: int
    step: int
    """Steps done, of all epochs together."""
    steps: int
    loss: FiniteFloat
    """Of the step before: reading the last one's would leave the device without work."""
    seconds_left: FiniteFloat


class TrainedReply(Reply):
    """The answer to `train`: the adapter is in its folder, and answers already."""

    kind: Literal["trained"] = "trained"
    sha256: str
    """Of the adapter's weights."""
    rows: int
    """Trained on; what was too long is not counted."""
    too_long: list[str]
    """Ids of the rows above `max_length`."""
    steps: int
    losses: list[FiniteFloat]
    """Mean over each epoch."""
    held_out_before: FiniteFloat | None
    """Mean loss of the held-out rows with the base model as it is; None without any."""
    held_out_after: FiniteFloat | None
    wall_s: FiniteFloat
    """Training alone: without loading, held-out rows and writing."""
    energy_j: FiniteFloat | None
    peak_memory_gib: FiniteFloat | None
    """Of the device, weights included; None on a CPU."""


class MemoryReply(Reply):
    """The answer to `memory` and `release`."""

    kind: Literal["memory"] = "memory"
    held_bytes: int
    """On the device: weights, caches, and what the allocator keeps; on a CPU: weights and caches."""


class ErrorReply(Reply):
    """The host could not."""

    kind: Literal["error"] = "error"
    error: ErrorKind
    message: str
    trace: str = ""


HostReply = LoadedReply | ScoredReply | WrittenReply | TrainingReply | TrainedReply | MemoryReply | ErrorReply
_REPLY: TypeAdapter[HostReply] = TypeAdapter(Annotated[HostReply, Field(discriminator="kind")])


def unpack(body: bytes) -> HostReply:
    """Check an answer and return it.

    Raises:
        WireError: it is not one of the replies above.
    """
    try:
        return _REPLY.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"a reply of the model host is not in the protocol: {first['msg']} at `{where}`") from error
