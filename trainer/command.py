"""The command trainer: anyone's own script is the trial.

A trial is one process, started without a shell from the campaign's template, with an environment of allowed variables
only. The metric is read from its standard output. When it ends, however it ends, nothing of it is left running. What
the script imports is not looked into: list it in `data_files` if a result depends on it. `TrialRequest.max_steps` is
not passed on: only the script knows its steps.
"""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import replace
from glob import glob
from pathlib import Path
from typing import Self

from overnight.store.errors import CampaignError, TrainerError
from overnight.store.hashing import digest, file_digest
from overnight.store.records import Config, FailureClass, TrainerInfo, TrialRequest, TrialResult
from overnight.trainer.command_settings import CommandSettings, fields, fill
from overnight.trainer.machine import machine
from overnight.trainer.memory import GIB, system_free
from overnight.trainer.metric_reader import MetricReader
from overnight.trainer.output import last_lines
from overnight.trainer.process import Ending, GuardedProcess
from overnight.trainer.protocol import Report, TrainerContext

BASIC_ENV = (
    "PATH",
    "HOME",
    "USER",
    "LANG",
    "LC_ALL",
    "LC_CTYPE",
    "TZ",
    "TMPDIR",
    "VIRTUAL_ENV",
    "LD_LIBRARY_PATH",
    "CUDA_VISIBLE_DEVICES",
)
"""What a program needs to start, and to keep to the GPU it was given; no tokens, no keys."""
MEMORY_S = 0.2
"""How often the memory of a trial is looked at: the look costs about 3 ms on a machine with 200 processes."""
_OUT_OF_MEMORY = re.compile(
    r"^(\S+\.)?(MemoryError|OutOfMemoryError)\b|CUDA out of memory|std::bad_alloc", re.MULTILINE
)


class CommandTrainer:
    """Runs a command for each trial. See `overnight.trainer.protocol.Trainer` for what each method promises."""

    def __init__(self, settings: CommandSettings, context: TrainerContext) -> None:
        self._settings = settings
        self._context = context
        self._cwd = settings.folder(context)
        self._info: TrainerInfo | None = None

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """Validate the `[trainer]` table and that the command passes on every knob of the menu."""
        return cls(CommandSettings.parse(settings, context), context)

    def prepare(self) -> TrainerInfo:
        """Check that the command can be started, and hash its script and its data files."""
        if self._info is None:
            if not self._cwd.is_dir():
                raise CampaignError(f"`trainer.cwd`: `{self._cwd}` is not a folder; correct the path")
            for key, words in (
                ("command", self._settings.command),
                ("holdout_command", self._settings.holdout_command),
            ):
                if words is not None:
                    self._check_program(key, words[0])
            self._info = TrainerInfo(
                trainer="command",
                metric=self._context.metric,
                data_hash=digest({"settings": self._settings.model_dump(), "files": self._hash_files()}),
                environment=machine(),
                has_holdout=self._settings.words("holdout") is not None,
            )
        return self._info

    def _check_program(self, key: str, word: str) -> None:
        if fields(word, key):
            return  # `{python}`, or a program that a knob chooses
        program = str(self._cwd / word) if os.sep in word else word
        if shutil.which(program) is None:
            raise CampaignError(f"`trainer.{key}`: `{word}` is not a program that can be run; correct it or install it")

    def _hash_files(self) -> dict[str, str]:
        found: dict[str, Path] = {}
        for word in (*self._settings.command, *(self._settings.holdout_command or [])):
            if not fields(word, "command") and (self._cwd / word).is_file():
                found[word] = self._cwd / word
        for pattern in self._settings.data_files:
            names = sorted(glob(pattern, root_dir=self._context.campaign_dir, recursive=True))
            files = {name: path for name in names if (path := self._context.campaign_dir / name).is_file()}
            if not files:
                raise CampaignError(
                    f"`trainer.data_files`: `{pattern}` matches no file in `{self._context.campaign_dir}`; correct it"
                )
            found |= files
        try:
            return {name: file_digest(path) for name, path in sorted(found.items())}
        except OSError as error:
            raise TrainerError(
                f"a file of the command trainer cannot be read: {error}; check its permissions"
            ) from error

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        """Run the command once; what goes wrong with it comes back as the result's failure."""
        started = time.monotonic()
        words = self._settings.words(request.split)
        if words is None:
            return TrialResult(None, "unsupported", "the campaign has neither `holdout_command` nor `{split}`")
        with ExitStack() as stack:
            try:
                command = fill(words, self._values(words, request, stack))
                process = GuardedProcess(command, cwd=self._cwd, env=self._env(), split_output=True)
            except OSError as error:
                return TrialResult(None, "harness", f"the command cannot be started: {error}")
            stack.callback(process.kill)
            result = self._trial(process, request, report)
        return replace(result, wall_s=time.monotonic() - started)

    def _values(self, words: list[str], request: TrialRequest, stack: ExitStack) -> dict[str, str]:
        values = {knob: str(value) for knob, value in request.config.items()}
        values |= {"seed": str(request.seed), "split": request.split, "python": sys.executable}
        if any("config" in fields(word, "command") for word in words):
            folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="overnight-"))
            path = Path(folder) / "config.json"
            path.write_text(json.dumps(dict(request.config)))
            values["config"] = str(path)
        return values

    def _env(self) -> dict[str, str]:
        names = (*BASIC_ENV, *self._settings.env)
        return {
            "PYTHONUNBUFFERED": "1",  # so that progress is seen, and the last words of a crash
            **{name: os.environ[name] for name in names if name in os.environ},
        }

    def _trial(self, process: GuardedProcess, request: TrialRequest, report: Report) -> TrialResult:
        settings = self._settings
        key = settings.metric_from or self._context.metric
        reader = MetricReader(key, settings.metric_regex, settings.notes_prefix, report)
        stopped = self._watch(process, reader, request.timeout_s)
        ending = process.kill()
        if stopped is not None:
            failure, reason = stopped
            return _failed(failure, process, reason)
        if ending.failure is not None:
            return _failed(_ended_as(ending, process), process, ending.words())
        measured = reader.measured()
        if measured is None:
            return _failed("crash", process, f"exit 0, but no line of standard output had the metric `{key}`")
        if not math.isfinite(measured.metric):
            return _failed("nan", process, f"`{key}` is {measured.metric}")
        return TrialResult(measured.metric, mode="command", metrics=measured.metrics, notes=measured.notes)

    def _watch(
        self, process: GuardedProcess, reader: MetricReader, timeout_s: float | None
    ) -> tuple[FailureClass, str] | None:
        """Read until the command ends; return why it has to be stopped when it does not."""
        limit_gib = self._context.memory_gib
        limit = system_free() if limit_gib is None else int(limit_gib * GIB)
        now = time.monotonic()
        deadline = math.inf if timeout_s is None else now + timeout_s
        look_at = now + MEMORY_S
        while process.ending is None:
            now = time.monotonic()
            if now >= deadline:
                return "timeout", f"killed: it was still running after {timeout_s:g} s"
            if now >= look_at:
                used = process.memory_bytes(limit)
                if used > limit:
                    return "oom", f"killed: it took {used / GIB:.2f} GiB of memory, above {limit / GIB:.2f} GiB"
                look_at = time.monotonic() + MEMORY_S
            _, chunks = process.feed(min(deadline, look_at) - now)
            for stream, chunk in chunks:
                if stream == "out":
                    reader.add(chunk)
        return None

    def estimate_memory(self, config: Config) -> int | None:  # noqa: ARG002 the protocol's
        """Return None: only the script knows; the limit is enforced while it runs."""
        return None

    def unsupported(self, config: Config) -> str | None:  # noqa: ARG002 the protocol's
        """Return None: only the script knows."""
        return None

    def release(self) -> None:
        """See `Trainer.release`; nothing is kept between trials."""

    def close(self) -> None:
        """See `Trainer.close`; nothing is kept between trials."""


def _failed(failure: FailureClass, process: GuardedProcess, reason: str) -> TrialResult:
    return TrialResult(None, failure, last_lines(f"{process.tail.text()}\n{reason}".strip()), mode="command")


def _ended_as(ending: Ending, process: GuardedProcess) -> FailureClass:
    """Return the class of a bad ending; a script that Python or CUDA refused memory says so in its last words."""
    last_words = "\n".join(process.tail.text().splitlines()[-20:])
    if ending.failure == "crash" and _OUT_OF_MEMORY.search(last_words):
        return "oom"
    return ending.failure or "crash"
