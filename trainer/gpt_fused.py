"""The GPT's training step written out by hand for a GPU: bf16 or fp8 matrix products, fused kernels between them.

Forward and backward are the same arithmetic as `gpt_model`, without autograd but for attention: every weight gradient
is written straight into one flat buffer, the loss and its gradient share one pass over the logits, and AdamW with
clipping is one kernel. Nothing is compiled for a shape, so a configuration that was never seen runs at once, in the
same mode as one seen a hundred times. Weights and moments are float32, activations, the residual stream and gradients
bf16. It needs Triton and widths that are multiples of 16.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from overnight.trainer import gpt_kernels as kernels
from overnight.trainer import gpt_model
from overnight.trainer.gpt_attention import Attended, AttentionName, attend
from overnight.trainer.gpt_fp8 import Fp8Products
from overnight.trainer.gpt_settings import GptConfig

LOGIT_ROWS = 16384
"""Rows of logits that exist at once; `gpt_device` counts on it."""
LAG = 2


@dataclass(slots=True)
class _Saved:
    """What one block keeps for its backward pass."""

    x: Tensor
    statistics1: tuple[Tensor, Tensor]
    normed1: Tensor
    attended: Attended
    mixed: Tensor
    x2: Tensor
    statistics2: tuple[Tensor, Tensor]
    normed2: Tensor
    up: Tensor
    inner: Tensor


class FusedEngine:
    """One trial on a GPU with hand-fused steps."""

    def __init__(
        self,
        shape: gpt_model.Shape,
        config: GptConfig,
        *,
        seed: int,
        device: torch.device,
        micro_batch: int,
        attention: AttentionName,
    ) -> None:
        self._attention = attention
        self.mode = "fused"
        self.lag = LAG
        self._shape, self._config, self._device, self._micro_batch = shape, config, device, micro_batch
        size, self._decayed = gpt_model.buffer_size(shape)
        self._master = torch.empty(size, device=device)
        gpt_model.initialise(shape, self._master, seed)
        self._copy = self._master.bfloat16()
        self._mean = torch.zeros(size, device=device)
        self._square = torch.zeros(size, device=device)
        self._gradient = torch.empty(size, device=device, dtype=torch.bfloat16)
        pieces = config.batch_size // micro_batch
        self._sum = torch.empty(size, device=device) if pieces > 1 else None
        self._weights = gpt_model.views(shape, self._copy)
        self._grads = gpt_model.views(shape, self._gradient)
        self._norms = {
            name: kernels.Norm(self._weights[f"{name}.gain"], self._weights[f"{name}.bias"], gpt_model.EPS_NORM)
            for name in (*(f"{i}.{norm}" for i in range(shape.n_layer) for norm in ("norm1", "norm2")), "norm")
        }
        tokens = config.batch_size * config.seq_len
        self._fp8 = Fp8Products(self._weights, shape.n_layer, tokens) if config.precision == "fp8" else None
        self._host_losses = torch.empty(LAG + 2, pin_memory=True)

    @torch.no_grad()
    def train_step(self, batch: NDArray[np.int64], *, lr: float, count: int) -> Callable[[], float]:
        """Queue one optimizer step, in as many pieces as memory asks for."""
        config = self._config
        ids = torch.from_numpy(batch).pin_memory().to(self._device, non_blocking=True)
        scale = 1.0 / (ids.shape[0] * (ids.shape[1] - 1))
        total = torch.zeros((), device=self._device)
        for number, piece in enumerate(torch.split(ids, self._micro_batch)):
            total += self._piece(piece, scale)
            if self._sum is not None:
                self._sum.copy_(self._gradient) if number == 0 else self._sum.add_(self._gradient)
        kernels.adamw(
            self._master, self._copy, self._gradient if self._sum is None else self._sum, self._mean, self._square,
            lr=lr, beta1=config.beta1, beta2=config.beta2, weight_decay=config.weight_decay, clip=config.grad_clip,
            decayed=self._decayed, count=count, eps=gpt_model.EPS_ADAM,
        )  # fmt: skip
        if self._fp8 is not None:
            self._fp8.refresh()
        slot = self._host_losses[count % len(self._host_losses)]
        slot.copy_(total, non_blocking=True)
        ready = torch.Event(self._device)
        ready.record()

        def read() -> float:
            ready.synchronize()
            return float(slot)

        return read

    def _piece(self, ids: Tensor, scale: float) -> Tensor:
        """Fill the gradient buffer from one piece of the batch; return its share of the mean loss."""
        inputs, targets = ids[:, :-1], ids[:, 1:].reshape(-1)
        saved: list[_Saved] = []
        x, last, statistics = self._forward(inputs, saved)
        weight, grads = self._weights["tok"], self._grads
        loss = torch.zeros((), device=self._device)
        grad_last = torch.empty_like(last)
        for first in range(0, len(last), LOGIT_ROWS):
            rows = slice(first, first + LOGIT_ROWS)
            logits = last[rows] @ weight.t()
            losses = kernels.cross_entropy(logits, targets[rows], vocab=self._shape.vocab, scale=scale)
            loss += losses.sum() * scale
            torch.mm(logits, weight, out=grad_last[rows])
            if first == 0:
                torch.mm(logits.t(), last[rows], out=grads["tok"])
            else:
                grads["tok"].addmm_(logits.t(), last[rows])
            del logits
        scale8 = None if self._fp8 is None else self._fp8.gradient
        dx, dx8 = self._norms["norm"].backward(grad_last, x, statistics, None, self._norm_grads("norm"), small=scale8)
        for i in reversed(range(self._shape.n_layer)):
            dx8 = self._block_backward(i, dx, dx8, saved.pop(), inputs.shape)
        self._embedding_backward(dx, inputs)
        return loss

    def _forward(self, inputs: Tensor, saved: list[_Saved] | None) -> tuple[Tensor, Tensor, tuple[Tensor, Tensor]]:
        """Return (residual stream, its last norm, that norm's statistics); fill `saved` for a backward pass."""
        weights, batch, heads = self._weights, inputs.shape, self._shape.n_head
        training = saved is not None
        scale8 = self._fp8.activation if training and self._fp8 is not None else None
        x = (F.embedding(inputs, weights["tok"]) + weights["pos"][: batch[1]]).flatten(0, 1)
        delta: Tensor | None = None
        for i in range(self._shape.n_layer):
            x, normed1, small, statistics1 = self._norms[f"{i}.norm1"].forward(x, delta, small=scale8)
            qkv = self._product(f"{i}.qkv", normed1, small)
            attended = attend(qkv.view(*batch, 3, heads, -1), self._attention, training=training)
            mixed = attended.out.detach().reshape(x.shape)
            delta = mixed @ weights[f"{i}.out"].t()
            x2, normed2, small, statistics2 = self._norms[f"{i}.norm2"].forward(x, delta, small=scale8)
            up = self._product(f"{i}.up", normed2, small)
            inner, small = kernels.gelu(up, small=scale8)
            delta = self._product(f"{i}.down", inner, small)
            if saved is not None:
                saved.append(_Saved(x, statistics1, normed1, attended, mixed, x2, statistics2, normed2, up, inner))
            x = x2
        x, last, _, statistics = self._norms["norm"].forward(x, delta)
        return x, last, statistics

    def _product(self, name: str, x: Tensor, small: Tensor | None) -> Tensor:
        if small is None:
            return x @ self._weights[name].t()
        assert self._fp8 is not None
        return self._fp8.forward(name, small)

    def _gradient_product(self, name: str, grad: Tensor, small: Tensor | None) -> Tensor:
        if small is None:
            return grad @ self._weights[name]
        assert self._fp8 is not None
        return self._fp8.backward(name, small)

    def _block_backward(
        self, i: int, dx: Tensor, dx8: Tensor | None, saved: _Saved, batch: torch.Size
    ) -> Tensor | None:
        """Turn `dx`, the gradient of block `i`'s output, into that of its input, in place; return that in fp8."""
        grads = self._grads
        scale8 = None if self._fp8 is None else self._fp8.gradient
        inner = self._gradient_product(f"{i}.down", dx, dx8)
        torch.mm(dx.t(), saved.inner, out=grads[f"{i}.down"])
        inner, small = kernels.gelu_backward(saved.up, inner, small=scale8)
        torch.mm(inner.t(), saved.normed2, out=grads[f"{i}.up"])
        normed = self._gradient_product(f"{i}.up", inner, small)
        del inner, small
        _, dx8 = self._norms[f"{i}.norm2"].backward(
            normed, saved.x2, saved.statistics2, dx, self._norm_grads(f"{i}.norm2"), small=scale8
        )
        mixed = self._gradient_product(f"{i}.out", dx, dx8)
        torch.mm(dx.t(), saved.mixed, out=grads[f"{i}.out"])
        qkv = saved.attended.backward(mixed.view(*batch, self._shape.n_head, -1)).flatten(2).flatten(0, 1)
        torch.mm(qkv.t(), saved.normed1, out=grads[f"{i}.qkv"])
        normed = self._gradient_product(f"{i}.qkv", qkv, None)
        _, dx8 = self._norms[f"{i}.norm1"].backward(
            normed, saved.x, saved.statistics1, dx, self._norm_grads(f"{i}.norm1"), small=scale8
        )
        return dx8

    def _norm_grads(self, name: str) -> Tensor:
        """Return gain's and bias' gradients, which are neighbours in the buffer, as (2, width)."""
        gain = self._grads[f"{name}.gain"]
        return torch.as_strided(gain, (2, gain.numel()), (gain.numel(), 1))

    def _embedding_backward(self, dx: Tensor, inputs: Tensor) -> None:
        batch, time = inputs.shape
        torch.sum(dx.view(batch, time, -1), dim=0, out=self._grads["pos"][:time])
        rows = self._shape.padded_vocab
        self._grads["tok"].add_(
            torch.ops.aten.embedding_dense_backward(dx.view(batch, time, -1), inputs, rows, -1, False)
        )

    @torch.no_grad()
    def token_losses(self, batch: NDArray[np.int64]) -> NDArray[np.float64]:
        """Return the losses of a batch in nats, in bf16 whatever training used."""
        ids = torch.from_numpy(batch).to(self._device)
        _, last, _ = self._forward(ids[:, :-1].clamp(min=0), None)
        targets = ids[:, 1:].reshape(-1)
        losses = [
            kernels.cross_entropy(
                last[first : first + LOGIT_ROWS] @ self._weights["tok"].t(),
                targets[first : first + LOGIT_ROWS],
                vocab=self._shape.vocab,
                scale=None,
            )
            for first in range(0, len(last), LOGIT_ROWS)
        ]
        result: NDArray[np.float64] = torch.cat(losses).double().cpu().numpy()
        return result

    def wait(self) -> None:
        """Return when everything queued is done."""
        torch.cuda.synchronize(self._device)
