"""How a function that was defined here, in a script or a notebook, reaches the trial worker.

It is pickled by cloudpickle, by value where it has no importable name, into a file without a name that only this
process and the worker that it starts ever hold. So nothing from outside is ever unpickled: what goes in is this
process' own object, and it goes one way. What comes back stays plain, checked data. A fork would not do: threads, a
CUDA context or an event loop do not survive one.
"""

from __future__ import annotations

import inspect
import os
import pickle
import sys
import tempfile
import weakref
from collections.abc import Mapping
from functools import partial
from typing import Any

from overnight.store.errors import CampaignError, InputError
from overnight.trainer.function import FunctionTrainer, Objective, check_signature, identify, name_of
from overnight.trainer.protocol import TrainerContext


class ShippedFunction:
    """A function, packed for workers.

    Raises:
        InputError: it does not take (config, seed), or something that it holds cannot be packed.
    """

    def __init__(self, function: Objective, *, version: str = "") -> None:
        check_signature(function)
        self.name = name_of(function)
        packed = _pack(function, self.name)
        with tempfile.TemporaryFile(prefix="overnight-") as file:
            file.write(packed)
            file.flush()
            self.descriptor = os.dup(file.fileno())
            """The open file, which a worker inherits under the same number."""
        self._closing = weakref.finalize(self, os.close, self.descriptor)
        self._identity = identify(function)
        self._version = version

    def message(self) -> dict[str, object]:
        """Return what the worker is told: plain data."""
        return {
            "descriptor": self.descriptor,
            "identity": self._identity,
            "version": self._version,
            "path": [os.path.abspath(entry) for entry in sys.path],
        }

    def close(self) -> None:
        """Forget the packed function."""
        self._closing()


def unpacked_trainer(message: Mapping[str, Any], context: TrainerContext) -> FunctionTrainer:
    """Return the trainer over a shipped function, in the worker; `prepare` unpacks it."""
    find = partial(_unpack, int(message["descriptor"]), list(message["path"]))
    return FunctionTrainer(
        find, metric=context.metric, version=str(message["version"]), identity=dict(message["identity"])
    )


def _pack(function: Objective, name: str) -> bytes:
    import cloudpickle

    # A worker cannot import the module of a notebook, of a test, or one that was loaded from a file: it travels whole.
    module = inspect.getmodule(function)
    travels = module is not None and module.__name__ != "__main__" and not _is_importable(module.__name__)
    try:
        if travels:
            cloudpickle.register_pickle_by_value(module)
        try:
            packed: bytes = cloudpickle.dumps(function)
        finally:
            if travels:
                cloudpickle.unregister_pickle_by_value(module)
    except Exception as error:  # whatever somebody's object does when it is asked to pack itself
        raise InputError(
            f"`{name}` cannot be sent to the trial worker: {error}; make what it holds (a lock, an open file, a "
            "connection) inside the function"
        ) from error
    return packed


def _is_importable(name: str) -> bool:
    """Whether a process that searches where this one does finds the module's package, loaded here or not."""
    root = name.partition(".")[0]
    return any(finder.find_spec(root, None) is not None for finder in sys.meta_path)


def _unpack(descriptor: int, path: list[str]) -> Objective:
    """Read the function that this process' owner packed; modules are looked for where the owner looks.

    Raises:
        CampaignError: a module that it needs is not found here, or importing it fails.
    """
    sys.path[:] = path
    os.set_inheritable(descriptor, False)
    size = os.fstat(descriptor).st_size
    packed = b""
    while len(packed) < size:
        packed += os.pread(descriptor, size - len(packed), len(packed))
    try:
        function: Objective = pickle.loads(packed)
    except Exception as error:  # importing what the function needs is somebody's own code
        raise CampaignError(
            f"the function cannot be loaded in the trial worker: {type(error).__name__}: {error}; put the module's "
            "folder on `sys.path`, or define the function where `optimize` is called"
        ) from error
    return function
