"""The trial worker: hosts one trainer in its own warm process and answers the control process' questions in turn.

    python -P -m overnight.trainer.worker_main SOCKET_FD

`overnight.trainer.worker` starts it, under a guard that ends it with its owner. Questions and answers are frames of
`overnight.trainer.wire`; what the trainer prints goes to standard output, which the control process keeps the tail of.
"""

from __future__ import annotations

import faulthandler
import json
import os
import socket
import sys
import time
import traceback
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from overnight.store.errors import CampaignError, TrainerError
from overnight.store.records import TrialProgress, TrialRequest
from overnight.trainer.memory import free_memory
from overnight.trainer.output import clean, cut, last_lines
from overnight.trainer.protocol import Trainer, TrainerContext
from overnight.trainer.registry import build_trainer
from overnight.trainer.shipping import unpacked_trainer
from overnight.trainer.wire import (
    ErrorFrame,
    ErrorKind,
    Frame,
    Inbox,
    InfoFrame,
    ProgressFrame,
    ResultFrame,
    ValueFrame,
    pack_frame,
)

PROGRESS_S = 0.05
"""At most one step is reported in this time, and always the last: a person cannot read faster."""


class _Host:
    """One trainer behind one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._trainer: Trainer | None = None
        self._memory_gib: float | None = None
        self._reported = 0.0

    @property
    def trainer(self) -> Trainer:
        if self._trainer is None:
            raise TrainerError("the worker was asked before a trainer was loaded; this is a fault of `overnight`")
        return self._trainer

    def answer(self, question: Mapping[str, Any]) -> bool:
        """Answer one question; False when it was the last."""
        call = int(question["call"])
        try:
            frame = self._answer(call, question)
            packed = pack_frame(frame)
        except Exception as error:  # noqa: BLE001 the process boundary: the other side decides what it means
            packed = pack_frame(_error_frame(call, error))
        self._socket.sendall(packed)
        return bool(question["op"] != "close")

    def _answer(self, call: int, question: Mapping[str, Any]) -> Frame:
        match question["op"]:
            case "load":
                context = _context(question["context"])
                self._memory_gib = context.memory_gib
                function = question["function"]
                self._trainer = (
                    build_trainer(question["name"], question["settings"], context)
                    if function is None
                    else unpacked_trainer(function, context)
                )
                return ValueFrame(call=call, value=None)
            case "prepare":
                info = self.trainer.prepare()
                plain = replace(info, environment=dict(info.environment), numbers=dict(info.numbers))
                return InfoFrame.model_construct(call=call, info=plain)
            case "run":
                return self._run(call, TrialRequest(**question["request"]))
            case "estimate_memory":
                return ValueFrame(call=call, value=self.trainer.estimate_memory(question["config"]))
            case "unsupported":
                return ValueFrame(call=call, value=self.trainer.unsupported(question["config"]))
            case "free_memory":
                return ValueFrame(call=call, value=free_memory(self._memory_gib))
            case "release":
                self.trainer.release()
            case "close":
                self.trainer.close()
        return ValueFrame(call=call, value=None)

    def _run(self, call: int, request: TrialRequest) -> ResultFrame:
        def report(progress: TrialProgress) -> None:
            now = time.monotonic()
            if now - self._reported >= PROGRESS_S or progress.step == progress.steps:
                self._reported = now
                self._socket.sendall(pack_frame(ProgressFrame.model_construct(call=call, progress=progress)))

        result = self.trainer.run(request, report)
        plain = replace(
            result,
            metrics=dict(result.metrics),
            trace=last_lines(result.trace),
            notes=cut(result.notes),
            mode=clean(result.mode),
        )
        return ResultFrame.model_construct(call=call, result=plain)


def _context(fields: Mapping[str, Any]) -> TrainerContext:
    return TrainerContext(
        **{**fields, "campaign_dir": Path(fields["campaign_dir"]), "cache_dir": Path(fields["cache_dir"])}
    )


def _error_frame(call: int, error: Exception) -> ErrorFrame:
    kind: ErrorKind = "Exception"
    if isinstance(error, CampaignError):
        kind = "CampaignError"
    elif isinstance(error, TrainerError):
        kind = "TrainerError"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own is no MemoryError
        kind = "MemoryError"
    trace = last_lines("".join(traceback.format_exception(error)))
    message = last_lines(str(error) or type(error).__name__)
    return ErrorFrame(call=call, error=kind, message=message, trace=trace)


def main() -> None:
    """Answer until the other side closes the socket."""
    faulthandler.enable()  # a segmentation fault in a kernel leaves its Python stack in the trace
    # Threads that wait must sleep: spinning ones starve whatever shares the cores (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    host, inbox = _Host(sock), Inbox(sock)
    while inbox.fill():
        while (body := inbox.frame()) is not None:
            if not host.answer(json.loads(body)):
                return


if __name__ == "__main__":
    main()
