"""One trial of the GPT: initialise, train to its bound, validate. The engine decides how a step is computed.

The loop knows budget, schedule, data order and when to stop; an engine knows devices and kernels. Losses are read a
few steps late on a GPU, so that the device never waits for Python; a NaN still stops the trial within those steps.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from overnight.store.records import TrialProgress
from overnight.trainer import gpt_model
from overnight.trainer.data import BatchStream, Corpus, Shard, windows
from overnight.trainer.gpt_settings import GptConfig
from overnight.trainer.protocol import Report


class Diverged(Exception):
    """The loss became NaN or infinite; the message says where."""


class Engine(Protocol):
    """Computes steps and losses of one trial on one device; made for a trial, closed after it."""

    mode: str
    lag: int
    """Steps after which a loss is read: 0 where reading costs nothing."""

    def train_step(self, batch: NDArray[np.int64], *, lr: float, count: int) -> Callable[[], float]:
        """Queue one optimizer step on (batch, time + 1) ids; the returned call waits for its mean loss in nats."""
        ...

    def token_losses(self, batch: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the losses, in nats, of (batch, time + 1) ids, flattened; 0 where the target is -1."""
        ...

    def wait(self) -> None:
        """Return when everything queued is done."""
        ...


@dataclass(frozen=True, slots=True)
class Bound:
    """When a trial ends: after `steps`, or after `seconds`; never after more than `max_steps`."""

    steps: int | None
    seconds: float | None
    max_steps: int | None

    def reached(self, step: int, elapsed: float) -> bool:
        """Say whether training is over before step `step` (from 0)."""
        if self.max_steps is not None and step >= self.max_steps:
            return True
        if self.steps is not None:
            return step >= self.steps
        assert self.seconds is not None
        return elapsed >= self.seconds

    def done(self, step: int, elapsed: float, warmup: int) -> float:
        """Return the share of the trial after warm-up that is over."""
        if self.steps is not None:
            return (step - warmup) / max(self.steps - warmup, 1)
        assert self.seconds is not None
        return elapsed / self.seconds


@dataclass(frozen=True, slots=True)
class Trained:
    """What training gave."""

    losses: list[float]
    seconds: float


@dataclass(frozen=True, slots=True)
class Text:
    """A shard of a corpus."""

    corpus: Corpus
    shard: Shard


def train(engine: Engine, config: GptConfig, bound: Bound, text: Text, *, seed: int, report: Report) -> Trained:
    """Run the optimizer steps.

    Raises:
        Diverged: a loss is NaN or infinite.
    """
    stream = BatchStream(
        text.corpus.tokens, text.shard, seed=seed, batch_size=config.batch_size, seq_len=config.seq_len
    )
    losses: list[float] = []
    pending: deque[Callable[[], float]] = deque()
    started = time.perf_counter()

    def read_one() -> None:
        loss = pending.popleft()()
        losses.append(loss)
        report(TrialProgress(len(losses), bound.steps, loss))
        if not math.isfinite(loss):
            raise Diverged(f"training loss is {loss} at step {len(losses)}")

    step = 0
    while not bound.reached(step, elapsed := time.perf_counter() - started):
        lr = gpt_model.learning_rate(
            config.lr, step=step, warmup=config.lr_warmup, done=bound.done(step, elapsed, config.lr_warmup)
        )
        pending.append(engine.train_step(stream.next(), lr=lr, count=step + 1))
        step += 1
        while len(pending) > engine.lag:
            read_one()
    while pending:
        read_one()
    engine.wait()
    return Trained(losses, time.perf_counter() - started)


def bits_per_byte(engine: Engine, text: Text, *, targets: int, seq_len: int, rows: int) -> float:
    """Return the bits that the model needs for each byte of a shard's first `targets` tokens, `rows` windows at a time.

    Separators stand for no bytes and are left out of both sums.

    Raises:
        Diverged: the result is NaN or infinite.
    """
    nats = 0.0
    size = 0
    table = windows(text.corpus.tokens, text.shard, targets=targets, seq_len=seq_len)
    for first in range(0, len(table), rows):
        batch = table[first : first + rows]
        losses = engine.token_losses(batch)
        wanted = batch[:, 1:].ravel()
        lengths = np.where(wanted >= 0, text.corpus.lengths[wanted], 0)
        nats += float(losses[lengths > 0].sum())
        size += int(lengths.sum())
    result = nats / math.log(2) / max(size, 1)
    if not math.isfinite(result):
        raise Diverged(f"validation is {result} after training")
    return result


class EagerEngine:
    """Plain PyTorch, one operation at a time: float32 on a CPU; on a GPU, bf16 under autocast."""

    def __init__(
        self,
        shape: gpt_model.Shape,
        config: GptConfig,
        *,
        seed: int,
        device: torch.device,
        micro_batch: int,
        bf16: bool,
    ) -> None:
        self.mode = "eager"
        self.lag = 0 if device.type == "cpu" else 2
        self._shape = shape
        self._device = device
        self._bf16 = bf16
        self._micro_batch = micro_batch
        size, decayed = gpt_model.buffer_size(shape)
        self._flat = torch.empty(size, device=device)
        gpt_model.initialise(shape, self._flat, seed)
        self._gradient = torch.zeros(size, device=device)
        self._mean = torch.zeros(size, device=device)
        self._square = torch.zeros(size, device=device)
        self._weights = {
            name: view.detach().requires_grad_() for name, view in gpt_model.views(shape, self._flat).items()
        }
        for name, view in gpt_model.views(shape, self._gradient).items():
            self._weights[name].grad = view
        self._optimizer = gpt_model.AdamW(config.beta1, config.beta2, config.weight_decay, config.grad_clip, decayed)

    def train_step(self, batch: NDArray[np.int64], *, lr: float, count: int) -> Callable[[], float]:
        """Queue one optimizer step, in as many pieces as memory asks for."""
        ids = torch.from_numpy(batch).to(self._device, non_blocking=True)
        self._gradient.zero_()
        total = torch.zeros((), device=self._device)
        for piece in torch.split(ids, self._micro_batch):
            loss = self._losses(piece).sum() / (ids.shape[0] * (ids.shape[1] - 1))
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        with torch.no_grad():
            self._optimizer.step(self._flat, self._gradient, self._mean, self._square, lr=lr, count=count)
        return lambda: float(total)

    @torch.no_grad()
    def token_losses(self, batch: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the losses of a batch, in nats."""
        losses: NDArray[np.float64] = self._losses(torch.from_numpy(batch).to(self._device)).double().cpu().numpy()
        return losses

    def _losses(self, ids: Tensor) -> Tensor:
        with torch.autocast(self._device.type, dtype=torch.bfloat16, enabled=self._bf16):
            return gpt_model.token_losses(self._shape, self._weights, ids[:, :-1].clamp(min=0), ids[:, 1:])

    def wait(self) -> None:
        """Return when everything queued is done."""
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
