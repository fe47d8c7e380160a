"""The machine that GPT trials run on: which device, engine and precision, how much memory, and what to record of it.

Everything here is a function of settings, hardware and configuration. Memory estimates count what an engine
allocates, tensor by tensor; `benchmarks/trial.py` checks them against measured peaks.
"""

from __future__ import annotations

import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Literal

import psutil
import torch

from overnight.store.errors import TrainerError
from overnight.trainer.gpt_loop import EagerEngine, Engine
from overnight.trainer.gpt_model import Shape, buffer_size
from overnight.trainer.gpt_settings import EngineName, GptConfig

GIB = 2**30
SLACK = 0.9
"""Share of the memory that a trial may plan to fill; the rest is for fragments and for the library's own buffers."""


class Machine(ABC):
    """A device with a way to run trials on it."""

    environment: Mapping[str, str]
    """What a result depends on besides settings, configuration and seed."""
    gpu: str | None
    """UUID of the GPU; None on a CPU."""

    @abstractmethod
    def mode(self, config: GptConfig) -> str:
        """Return the execution mode of `config`: a function of the machine and the configuration alone."""

    @abstractmethod
    def problem(self, config: GptConfig) -> str | None:
        """Say why this machine cannot run `config`, or None."""

    @abstractmethod
    def shape(self, config: GptConfig, vocab: int) -> Shape:
        """Return the model's shape, padded as this machine likes it."""

    @abstractmethod
    def budget(self) -> float:
        """Return the bytes that a trial may take."""

    @abstractmethod
    def estimate(self, config: GptConfig, vocab: int, micro_batch: int) -> int:
        """Return the bytes that training or validation takes at its peak with `micro_batch` sequences at once."""

    @abstractmethod
    def engine(self, config: GptConfig, vocab: int, *, seed: int, micro_batch: int) -> Engine:
        """Return an engine with its weights initialised."""

    @abstractmethod
    def reset_peak(self) -> None:
        """Begin to look for the peak of a trial."""

    @abstractmethod
    def peak_gib(self) -> float | None:
        """Return the peak since `reset_peak`, or None when it is not known."""

    @abstractmethod
    def empty_cache(self) -> None:
        """Give cached memory back."""

    def micro_batch(self, config: GptConfig, vocab: int, wanted: int | Literal["auto"]) -> int:
        """Return how many sequences to hold at once: what was asked for, or as many as fit; it divides the batch."""
        sizes = [size for size in range(config.batch_size, 0, -1) if config.batch_size % size == 0]
        if wanted != "auto":
            return next(size for size in sizes if size <= wanted)
        fitting = (size for size in sizes if self.estimate(config, vocab, size) <= SLACK * self.budget())
        return next(fitting, 1)


def find_machine(
    device: Literal["auto", "cpu", "cuda"], *, engine: EngineName, threads: int, memory_gib: float | None
) -> Machine:
    """Return the machine that `device` names.

    Raises:
        TrainerError: there is no such device.
    """
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu":
        if engine == "fused":
            raise TrainerError('`trainer.engine` = "fused" needs a CUDA device; set `engine = "auto"`')
        return CpuMachine(threads=threads, memory_gib=memory_gib)
    raise TrainerError('`trainer.device` = "cuda": no CUDA device is here; set `device = "cpu"` or mend the driver')


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


class CpuMachine(Machine):
    """Trials in float32 with plain PyTorch on a fixed number of threads, whatever `precision` says (fp8 is refused)."""

    def __init__(self, *, threads: int, memory_gib: float | None) -> None:
        self.gpu = None
        torch.set_num_threads(threads)
        self._threads = threads
        # All memory rather than the free, so that the same trial is cut into the same pieces every time.
        self._budget = memory_gib * GIB if memory_gib is not None else psutil.virtual_memory().total
        self.environment = {
            "device": "cpu",
            "processor": torch.backends.cpu.get_cpu_capability(),
            "machine": platform.machine(),
            "threads": str(threads),
            "torch": torch.__version__,
        }

    def mode(self, config: GptConfig) -> str:  # noqa: ARG002
        """Always `eager`."""
        return "eager"

    def problem(self, config: GptConfig) -> str | None:
        """Why this CPU cannot run `config`, or None."""
        if config.precision == "fp8":
            return '`precision` "fp8" needs a GPU of compute capability 8.9 or more; trials here run on the CPU'
        return None

    def shape(self, config: GptConfig, vocab: int) -> Shape:
        """Return the model's shape; nothing is padded here."""
        return Shape(
            n_layer=config.n_layer,
            n_head=config.n_head,
            d_model=config.d_model,
            d_ff=config.d_ff,
            seq_len=config.seq_len,
            vocab=vocab,
            padded_vocab=vocab,
        )

    def budget(self) -> float:
        """Return the bytes that a trial may take."""
        return self._budget

    def estimate(self, config: GptConfig, vocab: int, micro_batch: int) -> int:
        """Return the bytes that training or validation takes at its peak."""
        shape = self.shape(config, vocab)
        tokens = micro_batch * config.seq_len
        state = 6 * 4 * buffer_size(shape)[0]  # weights, gradient, two moments, AdamW's two temporaries
        saved = config.n_layer * tokens * (9 * config.d_model + 2 * config.d_ff) * 4
        logits = 3 * tokens * vocab * 4  # logits, their log-softmax, their gradient
        return state + saved + logits

    def engine(self, config: GptConfig, vocab: int, *, seed: int, micro_batch: int) -> Engine:
        """Return plain PyTorch, with its weights initialised."""
        torch.set_num_threads(self._threads)
        device = torch.device("cpu")
        shape = self.shape(config, vocab)
        return EagerEngine(shape, config, seed=seed, device=device, micro_batch=micro_batch, bf16=False)

    def reset_peak(self) -> None:
        """Nothing to reset: a CPU's peak is the whole process's."""

    def peak_gib(self) -> float | None:
        """Return the memory that this process holds now, since a peak of one trial is not known."""
        return psutil.Process(os.getpid()).memory_info().rss / GIB

    def empty_cache(self) -> None:
        """Nothing is cached."""
