"""What the control process and the trial worker say to each other: frames of JSON on a socket pair, checked on arrival.

Never pickle: the worker runs other people's code, so what comes out of it is untrusted. A frame is four bytes of length
and one JSON object. What does not fit the models below is a `WireError`, which the control process treats as the
harness' own fault.
"""

from __future__ import annotations

import json
import math
import socket
import struct
from collections.abc import Mapping
from dataclasses import asdict, replace
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from overnight.store.records import TrainerInfo, TrialProgress, TrialResult
from overnight.trainer.output import NOTES_CHARS, clean, cut, last_lines

MAX_FRAME = 1 << 20
"""A result is a few kilobytes; a larger frame is a fault."""
_MAX_METRICS = 256
_LENGTH = struct.Struct("!I")

Operation = Literal["load", "prepare", "run", "estimate_memory", "unsupported", "free_memory", "release", "close"]
ErrorKind = Literal["CampaignError", "TrainerError", "MemoryError", "Exception"]


class WireError(Exception):
    """The other side said something that is not in the protocol."""


class _Frame(BaseModel):
    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    call: int
    """Which question this answers; an answer to another one is a fault."""


class ProgressFrame(_Frame):
    """A running trial's step."""

    kind: Literal["progress"] = "progress"
    progress: TrialProgress


class ResultFrame(_Frame):
    """The answer to `run`."""

    kind: Literal["result"] = "result"
    result: TrialResult


class InfoFrame(_Frame):
    """The answer to `prepare`."""

    kind: Literal["info"] = "info"
    info: TrainerInfo


class ValueFrame(_Frame):
    """The answer to everything else."""

    kind: Literal["value"] = "value"
    value: int | str | None


class ErrorFrame(_Frame):
    """The trainer raised."""

    kind: Literal["error"] = "error"
    error: ErrorKind
    message: str
    trace: str = ""


Frame = ProgressFrame | ResultFrame | InfoFrame | ValueFrame | ErrorFrame
_FRAME: TypeAdapter[Frame] = TypeAdapter(Annotated[Frame, Field(discriminator="kind")])


def pack(message: Mapping[str, object]) -> bytes:
    """Return the frame of a question."""
    body = json.dumps(message).encode()
    return _LENGTH.pack(len(body)) + body


def pack_frame(frame: Frame) -> bytes:
    """Return the frame of an answer."""
    fields = {name: getattr(frame, name) for name in type(frame).model_fields}
    plain = {k: asdict(v) if isinstance(v, TrialProgress | TrialResult | TrainerInfo) else v for k, v in fields.items()}
    return pack(plain)


def unpack(body: bytes) -> Frame:
    """Check an answer and return it, its numbers finite and its text clean.

    Raises:
        WireError: it is not one of the frames above, or it contradicts itself.
    """
    try:
        frame = _FRAME.validate_json(body)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        where = ".".join(map(str, first["loc"]))
        raise WireError(f"a reply of the worker is not in the protocol: {first['msg']} at `{where}`") from error
    match frame:
        case ResultFrame(result=result):
            return frame.model_copy(update={"result": checked(result)})
        case ProgressFrame(progress=progress):
            return frame.model_copy(update={"progress": replace(progress, loss=_finite(progress.loss))})
    return frame


def checked(result: TrialResult) -> TrialResult:
    """Return `result` as it may be stored: no metric that is not finite, no number that is not, text clean and cut.

    Raises:
        WireError: it has both a metric and a failure, or neither.
    """
    if result.metric is not None and result.failure is None and not math.isfinite(result.metric):
        result = replace(result, metric=None, failure="nan", trace=result.trace or f"the metric is {result.metric}")
    if (result.metric is None) == (result.failure is None):
        raise WireError("a trial's result must have either a metric or a failure")
    finite = {clean(k)[:100]: float(v) for k, v in result.metrics.items() if math.isfinite(v)}
    return replace(
        result,
        trace=last_lines(result.trace),
        mode=clean(result.mode)[:100],
        wall_s=_finite(result.wall_s) or 0.0,
        train_s=_finite(result.train_s),
        val_s=_finite(result.val_s),
        peak_memory_gib=_finite(result.peak_memory_gib),
        energy_j=_finite(result.energy_j),
        metrics=dict(list(finite.items())[:_MAX_METRICS]),
        notes=cut(result.notes, NOTES_CHARS),
    )


def _finite(value: float | None) -> float | None:
    return value if value is not None and math.isfinite(value) else None


class Inbox:
    """Turns what arrives on a socket into whole frames."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._bytes = bytearray()

    def frame(self) -> bytes | None:
        """Return the next whole frame that has arrived, or None.

        Raises:
            WireError: its length is above `MAX_FRAME`.
        """
        if len(self._bytes) < _LENGTH.size:
            return None
        (length,) = _LENGTH.unpack_from(self._bytes)
        if length > MAX_FRAME:
            raise WireError(f"a frame of {length} bytes is above the limit of {MAX_FRAME}")
        end = _LENGTH.size + length
        if len(self._bytes) < end:
            return None
        body = bytes(self._bytes[_LENGTH.size : end])
        del self._bytes[:end]
        return body

    def fill(self) -> bool:
        """Read what is there, waiting for the first byte; False at the end of the stream."""
        try:
            chunk = self._socket.recv(1 << 16)
        except ConnectionError:
            return False
        self._bytes += chunk
        return bool(chunk)
