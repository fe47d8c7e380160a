"""The model host: holds one base model in its own warm process and answers the control process' questions in turn.

    python -P -m overnight.distill.host_main SOCKET_FD

`overnight.distill.host` starts it, under a guard that ends it with its owner. Questions and answers are frames of
`overnight.distill.wire`; what libraries print goes to standard output, of which the control process keeps the tail.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import socket
import sys
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from overnight.distill.base import BaseModel
from overnight.distill.lora import News
from overnight.distill.resident import Resident
from overnight.distill.training import Order
from overnight.distill.wire import (
    ErrorKind,
    ErrorReply,
    HostReply,
    LoadedReply,
    MemoryReply,
    ScoredReply,
    TrainedReply,
    TrainingReply,
    WrittenReply,
)
from overnight.store.errors import CampaignError, ProposerError
from overnight.trainer.output import last_lines
from overnight.trainer.wire import Inbox, pack


class _Host:
    """One resident model behind one socket."""

    def __init__(self, sock: socket.socket) -> None:
        self._socket = sock
        self._base: BaseModel
        self._resident: Resident | None = None

    def answer(self, question: Mapping[str, Any]) -> None:
        """Answer one question, with an error if it must be."""
        call = int(question["call"])
        try:
            reply = self._answer(call, question)
        except Exception as error:  # noqa: BLE001 the process boundary: the other side decides what it means
            reply = _error(call, error)
        self._socket.sendall(pack(reply.model_dump()))

    def _answer(self, call: int, question: Mapping[str, Any]) -> HostReply:
        match question["op"]:
            case "load":
                return self._load(call, question)
            case "score":
                scores = self._model().score(question["prompt"], question["candidates"], question["adapter"])
                return ScoredReply(
                    call=call,
                    log_probs=scores.log_probs,
                    prompt_tokens=scores.prompt_tokens,
                    reused_tokens=scores.reused_tokens,
                    tree_tokens=scores.tree_tokens,
                )
            case "generate":
                how = {key: question[key] for key in ("temperature", "max_new_tokens", "seed")}
                text, given, written = self._model().generate(question["messages"], question["adapter"], **how)
                return WrittenReply(call=call, text=text, prompt_tokens=given, completion_tokens=written)
            case "train":
                return self._train(call, question)
            case "release":
                self._release()
        held = 0 if self._resident is None else self._resident.held_bytes()
        return MemoryReply(call=call, held_bytes=held)

    def _load(self, call: int, question: Mapping[str, Any]) -> LoadedReply:
        from overnight.distill.model import load_base, pick_device

        device = pick_device(question["device"])
        self._base = BaseModel(**question["base"])
        self._resident = Resident(load_base(self._base, cache_dir=Path(question["cache_dir"]), device=device))
        loaded = self._resident.loaded
        return LoadedReply(call=call, device=str(device), dtype=str(loaded.model.dtype), sha256=loaded.sha256)

    def _train(self, call: int, question: Mapping[str, Any]) -> TrainedReply:
        order = Order.parse(question)

        def tell(news: News) -> None:
            reply = TrainingReply(
                call=call,
                epoch=news.epoch,
                epochs=order.recipe.epochs,
                step=news.step,
                steps=news.steps,
                loss=news.loss,
                seconds_left=news.seconds_left,
            )
            self._socket.sendall(pack(reply.model_dump()))

        record = self._model().train(self._base, order, tell)
        same = {name: getattr(record, name) for name in TrainedReply.model_fields if name not in {"call", "kind"}}
        return TrainedReply(call=call, **same)

    def _model(self) -> Resident:
        if self._resident is None:
            raise RuntimeError("the host was asked before a model was loaded; this is a fault of `overnight`")
        return self._resident

    def _release(self) -> None:
        import torch

        self._resident = None
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _error(call: int, error: Exception) -> ErrorReply:
    kind: ErrorKind = "Exception"
    if isinstance(error, CampaignError):
        kind = "CampaignError"
    elif isinstance(error, ProposerError):
        kind = "ProposerError"
    elif isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":  # torch's own is no MemoryError
        kind = "MemoryError"
    trace = last_lines("".join(traceback.format_exception(error)))
    return ErrorReply(call=call, error=kind, message=last_lines(str(error) or type(error).__name__), trace=trace)


def main() -> None:
    """Answer until the other side closes the socket."""
    faulthandler.enable()  # a segmentation fault in a kernel leaves its Python stack in the trace
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")  # packs differ in length
    # Threads that wait must sleep: spinning ones starve whatever shares the cores (benchmarks/LOG.md).
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    sock = socket.socket(fileno=int(sys.argv[1]))
    sock.set_inheritable(False)
    host, inbox = _Host(sock), Inbox(sock)
    while inbox.fill():
        while (body := inbox.frame()) is not None:
            host.answer(json.loads(body))


if __name__ == "__main__":
    main()
