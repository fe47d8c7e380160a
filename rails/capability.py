"""Rail `R7_capability`: blocks what this machine cannot run, before it costs a trial.

Pure: what the machine can do is asked of the three callables, which the trainer answers. An estimate that is exactly
what is free passes; a trainer that cannot estimate (`None`) is not held to a memory it never stated.
"""

from __future__ import annotations

from collections.abc import Callable

from overnight.rails.gate import Candidate
from overnight.store.records import Config

GIB = 1 << 30


class CapabilityRail:
    """`R7_capability`.

    Args:
        unsupported: why the machine cannot run a configuration whatever the memory, or None (`Trainer.unsupported`).
        estimate_memory: bytes that a trial needs at its peak, or None (`Trainer.estimate_memory`).
        free_memory: bytes that a trial may take now, or None where nobody can tell (`WorkerTrainer.free_memory`).
    """

    id = "R7_capability"

    def __init__(
        self,
        *,
        unsupported: Callable[[Config], str | None],
        estimate_memory: Callable[[Config], int | None],
        free_memory: Callable[[], int | None],
    ) -> None:
        self._unsupported = unsupported
        self._estimate_memory = estimate_memory
        self._free_memory = free_memory

    def check(self, candidate: Candidate) -> str | None:
        """Return why this machine cannot run the resulting configuration, or None when it can."""
        problem = self.problem(candidate.config)
        if problem is None:
            return None
        knob = candidate.proposal.knob
        return f"{knob} = {candidate.config[knob]}: {problem}"

    def problem(self, config: Config) -> str | None:
        """Return why this machine cannot run `config`, or None when it can: what a baseline is checked with."""
        reason = self._unsupported(config)
        if reason is not None:
            return f"this machine cannot run it: {reason}"
        needed = self._estimate_memory(config)
        if needed is None:
            return None
        free = self._free_memory()
        if free is None or needed <= free:
            return None
        return (
            f"a trial would need about {needed / GIB:.1f} GiB of memory and {max(0, free) / GIB:.1f} GiB are free; "
            "choose a smaller value"
        )
