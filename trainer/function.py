"""FunctionTrainer: a Python function `fn(config, seed) -> float` is the trial.

It may take a third parameter called `split` (`val` or `holdout`), with which it can keep data aside; without one a
holdout trial differs by its seed alone, and everything that tells of it says so. What the function calls is not looked
into: give `version` another value when a result would change. A function that runs for ever is killed by the worker
process that hosts it, never from in here.
"""

from __future__ import annotations

import functools
import hashlib
import importlib
import inspect
import math
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from types import CodeType
from typing import Any, Self, SupportsFloat

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from overnight.store.errors import CampaignError, InputError
from overnight.store.hashing import JsonValue, digest
from overnight.store.records import Config, FailureClass, Split, TrainerInfo, TrialRequest, TrialResult
from overnight.trainer.machine import machine
from overnight.trainer.output import last_lines
from overnight.trainer.protocol import Report, TrainerContext

Objective = Callable[[dict[str, Any], int], SupportsFloat] | Callable[[dict[str, Any], int, Split], SupportsFloat]
"""Takes a configuration and a seed, and where it wants the split, and returns the metric."""
_SIMPLE = (bool, int, float, str, type(None))
"""Captured values that tell one version of a function from another."""


class FunctionSettings(BaseModel):
    """The `[trainer]` table of a campaign whose trainer is `function`."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)

    function: str = Field(pattern=r"^[A-Za-z_][\w.]*:[A-Za-z_][\w.]*$")
    """`package.module:name`; modules beside the campaign file are found."""
    version: str = ""
    """Change it when what the function calls changed so that old and new results do not compare."""


class FunctionTrainer:
    """Calls a function for each trial. See `overnight.trainer.protocol.Trainer` for what each method promises.

    Args:
        find: returns the function; called once, by `prepare`, because importing it may load torch.
        metric: the name of what it returns.
        version: tells apart what the function's own source does not.
        identity: what `identify` said where the function was defined; None: it is asked here.
    """

    def __init__(
        self,
        find: Callable[[], Objective],
        *,
        metric: str,
        version: str = "",
        identity: Mapping[str, JsonValue] | None = None,
    ) -> None:
        self._find = find
        self._metric = metric
        self._version = version
        self._identity = identity
        self._function: Objective | None = None
        self._takes_split = False

    @classmethod
    def from_settings(cls, settings: Mapping[str, object], context: TrainerContext) -> Self:
        """Validate the `[trainer]` table; the function is imported by `prepare`."""
        try:
            checked = FunctionSettings.model_validate(dict(settings))
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(map(str, first["loc"]))
            raise CampaignError(
                f"`trainer.{key}`: {first['msg']}; a function trainer takes `function`, a `package.module:name`, and "
                "`version`, or the function itself from Python (`build_graph(trainer=...)`, `optimize`)"
            ) from error
        find = functools.partial(import_function, checked.function, str(context.campaign_dir.absolute()))
        return cls(find, metric=context.metric, version=checked.version)

    def prepare(self) -> TrainerInfo:
        """Find the function; the hash of its source stands for it."""
        function = self._found()
        if self._identity is None:
            self._identity = identify(function)
        return TrainerInfo(
            trainer="function",
            metric=self._metric,
            data_hash=digest({"function": dict(self._identity), "version": self._version}),
            environment=machine(),
            has_holdout=True,
            holdout_data=self._takes_split,
        )

    def _found(self) -> Objective:
        if self._function is None:
            function = self._find()
            check_signature(function)
            self._function, self._takes_split = function, wants_split(function)
        return self._function

    def run(self, request: TrialRequest, report: Report) -> TrialResult:  # noqa: ARG002 the function has no steps
        """Call the function once; what it raises comes back as the result's failure."""
        function = self._found()
        started = time.monotonic()
        metric: float | None = None
        failure: FailureClass | None = None
        trace = ""
        try:
            metric = self._call(function, request)
        except MemoryError:
            failure, trace = "oom", traceback.format_exc()
        except (Exception, SystemExit) as error:  # noqa: BLE001 somebody's own code: whatever it raises is its crash
            # torch's own is no MemoryError.
            failure = "oom" if type(error).__name__ == "OutOfMemoryError" else "crash"
            trace = traceback.format_exc()
        if metric is not None and not math.isfinite(metric):
            metric, failure, trace = None, "nan", f"the function returned {metric}"
        wall_s = time.monotonic() - started
        return TrialResult(metric, failure, last_lines(trace), mode="python", wall_s=wall_s)

    def _call(self, function: Objective, request: TrialRequest) -> float:
        split = {"split": request.split} if self._takes_split else {}
        value: object = function(dict(request.config), request.seed, **split)  # type: ignore[call-arg]
        if isinstance(value, bool | str | bytes) or not isinstance(value, SupportsFloat):
            raise TypeError(f"the function returned {type(value).__name__}, not a number")
        return float(value)

    def estimate_memory(self, config: Config) -> int | None:  # noqa: ARG002 the protocol's
        """Return None: only the function knows."""
        return None

    def unsupported(self, config: Config) -> str | None:  # noqa: ARG002 the protocol's
        """Return None: only the function knows."""
        return None

    def release(self) -> None:
        """See `Trainer.release`; what the function keeps is its own."""

    def close(self) -> None:
        """See `Trainer.close`; nothing is kept here."""


def import_function(name: str, folder: str) -> Objective:
    """Import `package.module:name`, with `folder` searched first.

    Raises:
        CampaignError: it cannot be imported, or is nothing that can be called.
    """
    module, _, qualified = name.partition(":")
    if folder not in sys.path:
        sys.path.insert(0, folder)
    try:
        found = functools.reduce(getattr, qualified.split("."), importlib.import_module(module))
    except Exception as error:  # the module is somebody's own code and may raise anything
        raise CampaignError(
            f"`trainer.function`: `{name}` cannot be imported: {type(error).__name__}: {error}; put the module beside "
            "the campaign file or install its package"
        ) from error
    if not callable(found):
        raise CampaignError(f"`trainer.function`: `{name}` is a {type(found).__name__}, nothing that can be called")
    function: Objective = found
    return function


def check_signature(function: Objective) -> None:
    """Refuse a function that cannot be called with a configuration and a seed.

    Raises:
        InputError: it takes other arguments, or nothing can call it.
    """
    if not callable(function):
        raise InputError(f"a {type(function).__name__} is nothing that can be called; give a function fn(config, seed)")
    if inspect.iscoroutinefunction(function):
        raise InputError(f"`{name_of(function)}` is an async function; give an ordinary one, fn(config, seed) -> float")
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):
        return  # a built-in that does not say
    split = {"split": "val"} if wants_split(function) else {}
    try:
        signature.bind({}, 0, **split)
    except TypeError as error:
        raise InputError(
            f"`{name_of(function)}{signature}` cannot be called as fn(config, seed): {error}; give it those two "
            "parameters, and `split` if it keeps data aside"
        ) from error


def wants_split(function: Objective) -> bool:
    """Whether the function has a parameter called `split`."""
    try:
        return "split" in inspect.signature(function).parameters
    except (TypeError, ValueError):
        return False


def identify(function: Objective) -> dict[str, JsonValue]:
    """Return what tells this function from another: its name, its source, and the plain values that it captured."""
    inner: Any = function
    captured: list[JsonValue] = []
    while isinstance(inner, functools.partial):
        captured += [repr(value) for value in inner.args if isinstance(value, _SIMPLE)]
        captured += [f"{k}={v!r}" for k, v in sorted(inner.keywords.items()) if isinstance(v, _SIMPLE)]
        inner = inner.func
    inner = inspect.unwrap(inner)
    inner = getattr(inner, "__func__", inner)
    if not inspect.isroutine(inner):
        inner = type(inner)
    captured += [repr(value) for value in _captured(inner) if isinstance(value, _SIMPLE)]
    return {"name": name_of(function), "source": _source_hash(inner), "captured": captured}


def name_of(function: object) -> str:
    """Return the name of a function, or of what it wraps, or of its class."""
    inner = function
    while isinstance(inner, functools.partial):
        inner = inner.func
    return str(getattr(inner, "__name__", type(inner).__name__))


def _captured(function: Any) -> list[object]:
    values: list[object] = []
    for cell in getattr(function, "__closure__", None) or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not filled yet: a function that calls itself
            continue
    return [*values, *(getattr(function, "__defaults__", None) or ())]


def _source_hash(thing: Any) -> str:
    """Return the hash of its source; of its code too where the source is not its own (a lambda) or not there."""
    code = getattr(thing, "__code__", None)
    try:
        text = inspect.getsource(thing)
    except (OSError, TypeError):
        text = ""
    if code is not None and (not text or code.co_name == "<lambda>"):
        text += _code_text(code)
    return hashlib.sha256(text.encode()).hexdigest()


def _code_text(code: CodeType) -> str:
    constants = [
        _code_text(constant)
        if isinstance(constant, CodeType)
        else repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
        for constant in code.co_consts
    ]
    return f"{code.co_code.hex()} {constants!r} {code.co_names!r}"
