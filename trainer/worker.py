"""WorkerTrainer: any installed trainer, hosted in a warm child process, behind the same protocol.

The control process stays without torch and survives whatever a trial does: a trial past its deadline is killed with
every descendant, a dead worker becomes a failed result of its class, and the next trial runs on a fresh worker. Relies
on `overnight.trainer.process` for starting and killing and on `overnight.trainer.wire` for what is said. It runs one
trial at a time; calls from several threads wait for each other.
"""

from __future__ import annotations

import signal
import sys
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from typing import Self

from overnight.store.errors import CampaignError, TrainerError
from overnight.store.records import Config, FailureClass, TrainerInfo, TrialRequest, TrialResult
from overnight.trainer.link import Died, Link, Overran
from overnight.trainer.memory import kernel_kills
from overnight.trainer.output import last_lines
from overnight.trainer.process import Ending
from overnight.trainer.protocol import Report, TrainerContext
from overnight.trainer.shipping import ShippedFunction
from overnight.trainer.wire import (
    ErrorFrame,
    Frame,
    InfoFrame,
    Operation,
    ProgressFrame,
    ResultFrame,
    ValueFrame,
    WireError,
    unpack,
)

GRACE_S = 1.0
"""A trainer that keeps deadlines itself may use this long past one to say what it was doing."""
START_S = 120.0
"""A worker that has not loaded its trainer by then is at fault: torch takes 3 s from a slow disk's cache, 30 s cold."""
_CLOSE_S = 5.0
_NOTHING: Mapping[str, object] = {}
_FRESH_AFTER: frozenset[FailureClass] = frozenset({"oom", "timeout", "crash", "harness"})
"""Failures after which nothing in the worker is trusted any more."""
_COMMAND = (sys.executable, "-u", "-P", "-m", "overnight.trainer.worker_main")
"""`-P`: a folder `overnight` in the current directory must not stand in for the installed package."""


class WorkerTrainer:
    """Hosts the trainer installed as `name` in a worker process.

    Args:
        name: an entry point of the group `overnight.trainers`.
        settings: the campaign's `[trainer]` table: plain data.
        context: what the campaign tells a trainer besides.
        idle: called about every second while waiting for the worker; what it raises ends the trial and is passed on.
        prepare_timeout_s: wall-clock limit of `prepare`, in seconds; None: as long as it takes (a first tokenization).
        function: host this function of the caller's instead of an installed trainer.
    """

    def __init__(
        self,
        name: str,
        settings: Mapping[str, object],
        context: TrainerContext,
        *,
        idle: Callable[[], None] = lambda: None,
        prepare_timeout_s: float | None = None,
        function: ShippedFunction | None = None,
    ) -> None:
        self._name = name
        self._function = function
        self._settings = dict(settings)
        self._context = context
        self._idle = idle
        self._prepare_timeout_s = prepare_timeout_s
        self._link: Link[Frame] | None = None
        self._info: TrainerInfo | None = None
        self._lock = threading.Lock()

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """Host the trainer that the key `trainer` names, with the other settings as its own.

        Raises:
            CampaignError: `trainer` is missing. The hosted trainer checks its settings when it is prepared.
        """
        own = dict(settings)
        name = own.pop("trainer", None)
        if not isinstance(name, str):
            raise CampaignError("a hosted trainer needs the key `trainer`, the name of an installed one")
        return cls(name, own, context)

    @property
    def worker_pid(self) -> int | None:
        """The id of the process that everything of the worker is below; None while none runs."""
        return None if self._link is None else self._link.process.pid

    def prepare(self) -> TrainerInfo:
        """Start the worker if none runs and prepare its trainer; see `Trainer.prepare`."""
        with self._lock:
            self._ready()
            if self._info is None:
                self._info = self._prepared()
            return self._info

    def run(self, request: TrialRequest, report: Report) -> TrialResult:
        """Run one trial in the worker; see `Trainer.run`.

        Raises:
            CampaignError: a fresh worker finds other data or another environment than the campaign began with.
        """
        with self._lock:
            started = time.monotonic()
            try:
                self._ready()
                result = self._trial(request, report)
            except TrainerError as error:
                result = TrialResult(None, "harness", last_lines(str(error)))
            if result.failure in _FRESH_AFTER:
                self._retire()
            return result if result.wall_s > 0 else replace(result, wall_s=time.monotonic() - started)

    def _trial(self, request: TrialRequest, report: Report) -> TrialResult:
        deadline = None if request.timeout_s is None else time.monotonic() + request.timeout_s + GRACE_S
        kills = kernel_kills()
        plain = {**asdict(replace(request, config={})), "config": dict(request.config)}
        try:
            frame = self._ask("run", {"request": plain}, deadline=deadline, report=report)
        except Died as died:
            return TrialResult(None, _class_of(died.ending, kills), last_lines(died.trace))
        except Overran:
            printed = "" if self._link is None else self._link.process.tail.text()
            trace = f"{printed}\nkilled: it was still running after {request.timeout_s:g} s".strip()
            return TrialResult(None, "timeout", last_lines(trace))
        except WireError as error:
            return TrialResult(None, "harness", last_lines(str(error)))
        match frame:
            case ResultFrame(result=result):
                return result
            case ErrorFrame(error=error_kind, trace=trace):
                classes: dict[str, FailureClass] = {"MemoryError": "oom", "TrainerError": "harness"}
                return TrialResult(None, classes.get(error_kind, "crash"), trace)
        return TrialResult(None, "harness", f"the worker answered a trial with `{frame.kind}`")

    def estimate_memory(self, config: Config) -> int | None:
        """See `Trainer.estimate_memory`; asked in the worker, which knows the device."""
        value = self._value("estimate_memory", {"config": dict(config)})
        if isinstance(value, str):
            raise TrainerError(f"the estimate of memory by trainer `{self._name}` is not a number: {value:.100}")
        return value

    def unsupported(self, config: Config) -> str | None:
        """See `Trainer.unsupported`; asked in the worker, which knows the device."""
        value = self._value("unsupported", {"config": dict(config)})
        return None if value is None else str(value)

    def free_memory(self) -> int:
        """Return the bytes that a trial may take now: free on the device, less a reserve, at most `memory_gib`."""
        value = self._value("free_memory")
        if not isinstance(value, int):
            raise TrainerError(f"the worker of trainer `{self._name}` does not know how much memory is free")
        return value

    def release(self) -> None:
        """Give back device memory; a worker that does not run holds none."""
        with self._lock:
            if self._link is not None:
                self._answer("release")

    def close(self) -> None:
        """Let the trainer close, then end the worker and everything below it; calling it again costs nothing."""
        with self._lock:
            try:
                if self._link is not None:
                    self._ask("close", deadline=time.monotonic() + _CLOSE_S)
            except (Died, Overran, WireError):
                pass  # it is killed in any case
            finally:
                self._retire()
                if self._function is not None:
                    self._function.close()

    def _ready(self) -> None:
        """Make sure that a worker runs, with its trainer prepared where it was prepared before."""
        if self._link is not None:
            return
        try:
            fds = [] if self._function is None else [self._function.descriptor]
            self._link = Link(_COMMAND, unpack, what="trial worker", idle=self._idle, pass_fds=fds)
        except OSError as error:
            raise TrainerError(f"the trial worker cannot be started: {error}; free processes or memory") from error
        fields = {field: getattr(self._context, field) for field in ("metric", "memory_gib")}
        context = {
            **fields,
            "campaign_dir": str(self._context.campaign_dir.absolute()),
            "cache_dir": str(self._context.cache_dir.absolute()),
            "knobs": dict(self._context.knobs),
        }
        function = None if self._function is None else self._function.message()
        load = {"name": self._name, "settings": self._settings, "context": context, "function": function}
        self._answer("load", load, deadline=time.monotonic() + START_S)
        if self._info is not None:
            self._check_unchanged(self._info, self._prepared())

    def _prepared(self) -> TrainerInfo:
        limit = self._prepare_timeout_s
        frame = self._answer("prepare", deadline=None if limit is None else time.monotonic() + limit)
        if isinstance(frame, InfoFrame):
            return frame.info
        raise self._fault(f"it answered `prepare` with `{frame.kind}`")

    def _check_unchanged(self, before: TrainerInfo, now: TrainerInfo) -> None:
        if now == before:
            return
        self._retire()
        what, remedy = "data", "start anew with `--fresh`"
        if now.data_hash == before.data_hash:
            what, remedy = "environment", "run again, which measures the baseline anew there"
        raise CampaignError(
            f"the {what} of trainer `{self._name}` changed while the campaign ran, so that its trials no longer "
            f"compare; put it back, or {remedy}"
        )

    def _value(self, operation: Operation, arguments: Mapping[str, object] = _NOTHING) -> int | str | None:
        with self._lock:
            self._ready()
            frame = self._answer(operation, arguments)
            if isinstance(frame, ValueFrame):
                return frame.value
            raise self._fault(f"it answered `{operation}` with `{frame.kind}`")

    def _answer(
        self, operation: Operation, arguments: Mapping[str, object] = _NOTHING, *, deadline: float | None = None
    ) -> Frame:
        """Ask what must not fail: every failure ends the worker and is raised."""
        try:
            frame = self._ask(operation, arguments, deadline=deadline)
        except Died as died:
            raise self._fault(f"it ended during `{operation}`: {died.trace}") from died
        except Overran:
            raise self._fault(f"it did not finish `{operation}` in time") from None
        except WireError as error:
            raise self._fault(str(error)) from error
        if not isinstance(frame, ErrorFrame):
            return frame
        self._retire()
        if frame.error == "CampaignError":
            raise CampaignError(frame.message)
        if frame.error == "TrainerError":
            raise TrainerError(frame.message)
        raise TrainerError(f"trainer `{self._name}` failed in `{operation}`: {frame.trace}")

    def _ask(
        self,
        operation: Operation,
        arguments: Mapping[str, object] = _NOTHING,
        *,
        deadline: float | None = None,
        report: Report | None = None,
    ) -> Frame:
        assert self._link is not None

        def progress(frame: Frame) -> bool:
            if report is None or not isinstance(frame, ProgressFrame):
                return False
            report(frame.progress)
            return True

        try:
            return self._link.ask(operation, arguments, deadline=deadline, progress=progress)
        except (Died, Overran, WireError):
            raise
        except BaseException:  # from `idle` or `report`, or Ctrl-C: the trial's answer will not be waited for
            self._retire()
            raise

    def _fault(self, what: str) -> TrainerError:
        self._retire()
        return TrainerError(f"the trial worker of trainer `{self._name}` is at fault: {what}")

    def _retire(self) -> None:
        if self._link is not None:
            self._link.close()
            self._link = None


def _class_of(ending: Ending, kernel_kills_before: int | None) -> FailureClass:
    """Return what a worker's end says: a kill that was not the kernel's, for want of memory, is not the candidate's."""
    if ending.signal == signal.SIGKILL and kernel_kills_before is not None and kernel_kills() == kernel_kills_before:
        return "harness"
    return ending.failure or "crash"
