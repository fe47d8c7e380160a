"""The machine that GPT trials run on: which device, engine and precision, how much memory, and what to record of it.

Everything here is a function of settings, hardware and configuration. Memory estimates count what an engine
allocates, tensor by tensor; `benchmarks/trial.py` checks them against measured peaks.
"""

from __future__ import annotations

import importlib
import os
import platform
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from typing import Literal

import numpy as np
import psutil
import torch

from overnight.store.errors import TrainerError
from overnight.trainer.gpt_attention import find_attention
from overnight.trainer.gpt_loop import EagerEngine, Engine
from overnight.trainer.gpt_model import Shape, buffer_size
from overnight.trainer.gpt_settings import EngineName, GptConfig, GptSettings, Precision

GIB = 2**30
VOCAB_MULTIPLE = 128
"""The fused mode pads the vocabulary to it, for the tensor cores."""
LOGIT_ROWS = 16384
"""Rows of logits that the fused mode holds at once."""
VAL_BATCH_TOKENS = 16384
"""Tokens in one validation batch, whatever `batch_size` is."""
FIXED_BYTES = GIB // 2
"""cuBLAS workspaces, sort buffers, statistics."""
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
    if not torch.cuda.is_available():
        raise TrainerError('`trainer.device` = "cuda": no CUDA device is here; set `device = "cpu"` or mend the driver')
    return CudaMachine(engine, memory_gib=memory_gib)


def is_out_of_memory(error: BaseException) -> bool:
    """Say whether `error` means that memory ran out, on a device or on the host."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and (
        "can't allocate memory" in str(error) or "not enough memory" in str(error)
    )


def is_device_fault(error: BaseException) -> bool:
    """Say whether `error` is the GPU's own: after one, nothing runs in this process any more, whatever it is given."""
    return isinstance(error, RuntimeError) and not is_out_of_memory(error) and "CUDA error: " in str(error)


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


class CudaMachine(Machine):
    """Trials on the first CUDA device: hand-fused steps where Triton and the widths allow, else plain PyTorch."""

    def __init__(self, engine: EngineName, *, memory_gib: float | None) -> None:
        self._device = torch.device("cuda", torch.cuda.current_device())
        properties = torch.cuda.get_device_properties(self._device)
        self._capability = torch.cuda.get_device_capability(self._device)
        self._triton = _triton_version()
        if engine == "fused" and self._triton is None:
            raise TrainerError(
                '`trainer.engine` = "fused" needs Triton; `pip install triton` or set `engine = "eager"`'
            )
        self._engine = "eager" if engine == "eager" or self._triton is None else "fused"
        self._attention = find_attention(self._device) if self._engine == "fused" else "sdpa"
        self.gpu = str(properties.uuid)
        self._budget = (
            memory_gib * GIB if memory_gib is not None else self._free(unified=bool(properties.is_integrated))
        )
        if self._engine == "fused":
            self._warm_up()
        self.environment = {
            "device": properties.name,
            "capability": ".".join(str(part) for part in self._capability),
            "engine": self._engine,
            "attention": self._attention,
            "torch": torch.__version__,
            "cuda": str(torch.version.cuda),
            "triton": str(self._triton),
        }

    def _warm_up(self) -> None:
        """Load and compile what every trial uses, so that the first one does not wait for it."""
        from overnight.trainer.gpt_fused import FusedEngine

        config = GptSettings(steps=1, n_layer=1, batch_size=1, seq_len=128).complete({})
        shape = Shape(
            n_layer=1, n_head=16, d_model=1024, d_ff=4096, seq_len=128, vocab=1000, padded_vocab=1024
        )  # fmt: skip
        precisions: tuple[Precision, ...] = ("bf16", "fp8") if self._capability >= (8, 9) else ("bf16",)
        for precision in precisions:
            engine = FusedEngine(
                shape, replace(config, precision=precision), seed=0, device=self._device, micro_batch=1,
                attention=self._attention,
            )  # fmt: skip
            ids = np.zeros((1, 129), dtype=np.int64)
            engine.train_step(ids, lr=1e-3, count=1)
            engine.token_losses(ids)
        del engine
        self.empty_cache()

    def _free(self, *, unified: bool) -> float:
        if unified:  # the driver of a machine whose memory is shared reports none, or counts caches as taken
            return float(psutil.virtual_memory().available)
        return float(torch.cuda.mem_get_info(self._device)[0])

    def mode(self, config: GptConfig) -> str:
        """`fused`, or `eager` for float32 and for widths that its kernels cannot take."""
        even = config.d_model % 16 == 0 and config.d_ff % 16 == 0 and (config.d_model // config.n_head) % 8 == 0
        return "fused" if self._engine == "fused" and even and config.precision != "float32" else "eager"

    def problem(self, config: GptConfig) -> str | None:
        """Why this GPU cannot run `config`, or None."""
        if config.precision == "fp8":
            if self._capability < (8, 9):
                return f'`precision` "fp8" needs compute capability 8.9 or more; {self.environment["device"]} has less'
            if self.mode(config) != "fused":
                return '`precision` "fp8" needs Triton, and widths that are multiples of 16'
        elif config.precision != "float32" and self._capability < (8, 0):
            return '`precision` "bf16" needs compute capability 8.0 or more; use "float32"'
        return None

    def shape(self, config: GptConfig, vocab: int) -> Shape:
        """Return the model's shape; the fused mode pads the vocabulary for the tensor cores."""
        multiple = VOCAB_MULTIPLE if self.mode(config) == "fused" else 1
        return Shape(
            n_layer=config.n_layer,
            n_head=config.n_head,
            d_model=config.d_model,
            d_ff=config.d_ff,
            seq_len=config.seq_len,
            vocab=vocab,
            padded_vocab=-(-vocab // multiple) * multiple,
        )

    def budget(self) -> float:
        """Return the bytes that a trial may take."""
        return self._budget

    def estimate(self, config: GptConfig, vocab: int, micro_batch: int) -> int:
        """Return the bytes that training or validation takes at its peak."""
        shape = self.shape(config, vocab)
        size = buffer_size(shape)[0]
        width, inner = config.d_model, config.d_ff
        tokens = micro_batch * config.seq_len
        accumulates = micro_batch < config.batch_size
        if self.mode(config) == "eager":
            layer = 30 * width + 4 * inner + 8 * config.n_head
            train = size * 18 + tokens * (config.n_layer * layer + 14 * shape.padded_vocab + 16 * width)
            return train + FIXED_BYTES
        state = size * (20 if accumulates else 16)  # weights, two moments, bf16 copy and gradient
        if config.precision == "fp8":
            state += config.n_layer * (4 * width + 2 * inner) * width * 2  # weights, as they are and transposed
        layer = 16 * width + 4 * inner + 4 * config.n_head + 16
        logits = min(tokens, LOGIT_ROWS) * shape.padded_vocab * 2
        backward = tokens * (16 * width + 4 * inner)
        train = tokens * (config.n_layer * layer + 8 * width) + max(logits, backward, shape.padded_vocab * width * 2)
        check = VAL_BATCH_TOKENS * (16 * width + 4 * inner + shape.padded_vocab * 2)
        return state + max(train, check) + FIXED_BYTES

    def engine(self, config: GptConfig, vocab: int, *, seed: int, micro_batch: int) -> Engine:
        """Return the engine of this configuration's mode, with its weights initialised."""
        shape = self.shape(config, vocab)
        if self.mode(config) == "fused":
            from overnight.trainer.gpt_fused import FusedEngine

            return FusedEngine(
                shape, config, seed=seed, device=self._device, micro_batch=micro_batch, attention=self._attention
            )
        bf16 = config.precision != "float32"
        return EagerEngine(shape, config, seed=seed, device=self._device, micro_batch=micro_batch, bf16=bf16)

    def reset_peak(self) -> None:
        """Begin to look for the peak of a trial."""
        torch.cuda.reset_peak_memory_stats(self._device)

    def peak_gib(self) -> float | None:
        """Return the most memory that was reserved on the device since `reset_peak`."""
        return torch.cuda.max_memory_reserved(self._device) / GIB

    def empty_cache(self) -> None:
        """Give cached memory back to the device."""
        torch.cuda.empty_cache()


def _triton_version() -> str | None:
    try:
        return str(importlib.import_module("triton").__version__)
    except ImportError:
        return None
