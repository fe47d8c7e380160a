"""ModelHost: a base model in a warm process of its own, seen from the control process, which loads no torch.

The process is started at the first question and again after it died, overran a deadline or ran out of memory, so that
one bad turn costs one turn. Relies on `overnight.trainer.link` for talking and killing. One question at a time; calls
from several threads wait for each other.
"""

from __future__ import annotations

import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TypeVar

from overnight.distill.adapter import AdapterFacts, refuse_existing
from overnight.distill.base import BaseModel
from overnight.distill.recipe import LoraRecipe
from overnight.distill.rows import TrainingRow, write_rows
from overnight.distill.wire import (
    ErrorReply,
    HostReply,
    LoadedReply,
    MemoryReply,
    Operation,
    ScoredReply,
    TrainedReply,
    TrainingReply,
    WrittenReply,
    unpack,
)
from overnight.store.errors import CampaignError, ProposerError
from overnight.trainer.link import Died, Link, Overran
from overnight.trainer.output import last_lines
from overnight.trainer.wire import WireError

LOAD_S = 1800.0
"""Limit of starting the process and loading the model: a first download of 6 GB at 30 Mbit/s takes 27 minutes."""
MEMORY_S = 60.0
_COMMAND = (sys.executable, "-u", "-P", "-m", "overnight.distill.host_main")
"""`-P`: a folder `overnight` in the current directory must not stand in for the installed package."""
ReplyT = TypeVar("ReplyT", LoadedReply, ScoredReply, WrittenReply, TrainedReply, MemoryReply)


class ModelHost:
    """Holds one base model in a process.

    Args:
        base: the model, found by `find_base`.
        cache_dir: where a dequantized copy is kept.
        device: `auto`, `cpu`, `cuda` or `cuda:N`.
        idle: called about every second while waiting; what it raises ends the process and is passed on.
    """

    def __init__(
        self, base: BaseModel, cache_dir: Path, *, device: str = "auto", idle: Callable[[], None] = lambda: None
    ) -> None:
        self._base = base
        self._cache_dir = cache_dir
        self._device = device
        self._idle = idle
        self._link: Link[HostReply] | None = None
        self._loaded: LoadedReply | None = None
        self._lock = threading.Lock()

    @property
    def pid(self) -> int | None:
        """The id of the process that everything of the host is below; None while none runs."""
        return None if self._link is None else self._link.process.pid

    def load(self) -> LoadedReply:
        """Make sure that the model is loaded; return what it is.

        Raises:
            CampaignError: the model cannot be used, here or anywhere.
            ProposerError: it cannot be had now, or the host failed.
        """
        with self._lock:
            return self._ready()

    def score(
        self, prompt: str, candidates: Sequence[str], *, deadline_s: float, adapter: Path | None = None
    ) -> ScoredReply:
        """Return the log-probability of each candidate as the beginning of a reply to `prompt`.

        Args:
            prompt: the user's turn.
            candidates: texts; each is scored as if alone.
            deadline_s: seconds from the moment the model is loaded; past it the host is killed.
            adapter: a folder with a LoRA adapter in peft's format; None: the base model as it is.

        Raises:
            CampaignError, ProposerError: see `load`; `llm_timeout` at the deadline.
        """
        arguments = {"prompt": prompt, "candidates": list(candidates), "adapter": adapter and str(adapter)}
        with self._lock:
            self._ready()
            reply = self._ask(ScoredReply, "score", arguments, deadline_s)
            if len(reply.log_probs) != len(candidates):
                raise self._fault(f"it scored {len(reply.log_probs)} of {len(candidates)} candidates")
            return reply

    def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
        deadline_s: float,
        adapter: Path | None = None,
    ) -> WrittenReply:
        """Return a reply to a chat, written freely; arguments and errors as those of `score`."""
        arguments = {
            "messages": [dict(message) for message in messages],
            "temperature": temperature,
            "max_new_tokens": max_new_tokens,
            "seed": seed,
            "adapter": adapter and str(adapter),
        }
        with self._lock:
            self._ready()
            return self._ask(WrittenReply, "generate", arguments, deadline_s)

    def train(
        self,
        rows: Sequence[TrainingRow],
        *,
        recipe: LoraRecipe,
        facts: AdapterFacts,
        folder: Path,
        held_out: Sequence[TrainingRow] = (),
        memory_gib: float | None = None,
        progress: Callable[[TrainingReply], None] = lambda _news: None,
    ) -> TrainedReply:
        """Train an adapter of the base model on `rows`, write it to `folder`, and have it ready to answer.

        Whatever ends the training early (an exception of `progress` or `idle`, Ctrl-C, a kill) ends the process too
        and leaves no `folder`.

        Args:
            rows: the lessons; each is checked.
            recipe: how.
            facts: what the campaign says about the training, kept beside the weights.
            folder: must not exist yet; `adapters/<campaign>/v<n>`.
            held_out: rows whose loss is measured before and after.
            memory_gib: most memory of the device, weights included; None: what is free, less a reserve.
            progress: told after steps, at most every 0.2 s, and after the last one, in this thread.

        Raises:
            AssertionError: a row has no supervised token, or makes no sense.
            CampaignError: no row is short enough, the folder is there already, or the model cannot be used.
            ProposerError: the disk is full, memory does not suffice even for one row, or the host failed.
        """
        refuse_existing(folder)
        for row in (*rows, *held_out):
            row.check()

        def told(reply: HostReply) -> bool:
            if isinstance(reply, TrainingReply):
                progress(reply)
            return isinstance(reply, TrainingReply)

        with self._lock, _room_beside(folder) as place:
            files = {name: place / f"{name}.jsonl" for name in ("rows", "held_out")}
            for name, told_rows in (("rows", rows), ("held_out", held_out)):
                with _as_proposer_error(folder):
                    write_rows(told_rows, files[name])
            arguments = {
                "rows": str(files["rows"]),
                "held_out": str(files["held_out"]),
                "recipe": asdict(recipe),
                "facts": facts.plain(),
                "folder": str(folder.absolute()),
                "memory_gib": memory_gib,
            }
            self._ready()
            return self._ask(TrainedReply, "train", arguments, None, progress=told)

    def held_bytes(self) -> int:
        """Return the memory that the host holds for its model; none while it does not run."""
        with self._lock:
            return 0 if self._link is None else self._ask(MemoryReply, "memory", {}, MEMORY_S).held_bytes

    def release(self) -> None:
        """Give back the model's memory; the next question loads it again."""
        with self._lock:
            if self._link is not None:
                self._ask(MemoryReply, "release", {}, MEMORY_S)
                self._loaded = None

    def close(self) -> None:
        """End the process; calling it again costs nothing."""
        with self._lock:
            self._retire()

    def _ready(self) -> LoadedReply:
        if self._link is None:
            try:
                self._link = Link(_COMMAND, unpack, what="model host", idle=self._idle)
            except OSError as error:
                raise ProposerError(
                    f"the model host cannot be started: {error}; free processes or memory", failure="llm_error"
                ) from error
        if self._loaded is None:
            arguments = {"base": self._base.plain(), "cache_dir": str(self._cache_dir), "device": self._device}
            self._loaded = self._ask(LoadedReply, "load", arguments, LOAD_S)
        return self._loaded

    def _ask(
        self,
        kind: type[ReplyT],
        operation: Operation,
        arguments: Mapping[str, object],
        deadline_s: float | None,
        *,
        progress: Callable[[HostReply], bool] = lambda _reply: False,
    ) -> ReplyT:
        assert self._link is not None
        deadline = None if deadline_s is None else time.monotonic() + deadline_s
        try:
            reply = self._link.ask(operation, arguments, deadline=deadline, progress=progress)
        except Died as died:
            raise self._fault(f"it ended during `{operation}`: {died.trace}") from died
        except Overran:
            self._retire()
            raise ProposerError(
                f"base model `{self._base.where}` had not answered `{operation}` after {deadline_s:g} s and was "
                "killed; raise `deadline_s`, or choose a smaller model",
                failure="llm_timeout",
            ) from None
        except WireError as error:
            raise self._fault(str(error)) from error
        except BaseException:  # from `idle`, or Ctrl-C: the answer will not be waited for
            self._retire()
            raise
        if isinstance(reply, kind):
            return reply
        raise self._error(reply, operation)

    def _error(self, reply: HostReply, operation: Operation) -> CampaignError | ProposerError:
        """Return what an answer of another kind means; after a failure nothing in the host is trusted any more."""
        if not isinstance(reply, ErrorReply):
            return self._fault(f"it answered `{operation}` with `{reply.kind}`")
        if reply.error == "CampaignError":
            self._retire()
            return CampaignError(reply.message)
        if reply.error == "ProposerError":
            self._retire()
            return ProposerError(reply.message, failure="llm_error")
        if reply.error == "MemoryError":
            return self._fault(
                f"out of memory during `{operation}`: {reply.message}; free some, or choose a smaller model"
            )
        return self._fault(f"`{operation}` failed: {reply.trace or reply.message}")

    def _fault(self, what: str) -> ProposerError:
        self._retire()
        message = f"the model host of `{self._base.where}` is at fault: {what}"
        return ProposerError(last_lines(message), failure="llm_error")

    def _retire(self) -> None:
        self._loaded = None
        if self._link is not None:
            self._link.close()
            self._link = None


@contextmanager
def _room_beside(folder: Path) -> Iterator[Path]:
    """Return a folder for what a training reads, which a killed process leaves where `sweep_unfinished` finds it."""
    with _as_proposer_error(folder):
        folder.parent.mkdir(parents=True, exist_ok=True)
        place = tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name}-rows-")
    with place as path:
        yield Path(path)


@contextmanager
def _as_proposer_error(folder: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise ProposerError(
            f"adapter `{folder}` could not be written: {error.strerror or error}; free space there or mend its rights",
            failure="llm_error",
        ) from error
