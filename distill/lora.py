"""Trains one LoRA adapter of a loaded base model on packed rows (Hu et al. 2021).

A step of the optimizer is the mean over the rows of a batch, whatever packs they went through the model in: packs are
as large as memory allows, become smaller when it runs out, and at one row each the layers are computed again in the
backward pass. Gradients are those of training row by row, up to rounding. Torch is imported here: for the model host
only.
"""

from __future__ import annotations

import gc
import math
import random
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from overnight.distill.encoding import EncodedRow
from overnight.distill.fused_blocks import fused_blocks
from overnight.distill.fused_lora import FusedLora, fastest_products
from overnight.distill.losses import pack_loss
from overnight.distill.packed_attention import masks_for, packed_attention, require_full_attention
from overnight.distill.packing import Pack, build_pack, pack_tokens, split
from overnight.distill.recipe import LoraRecipe
from overnight.store.errors import CampaignError, ProposerError

Tensor = torch.Tensor
SHRINK = 0.6
"""Of the largest pack that ran out of memory, the next is at most this."""


@dataclass(frozen=True, slots=True)
class News:
    """How far a training is."""

    epoch: int
    """From 1."""
    step: int
    steps: int
    loss: float
    seconds_left: float


@dataclass(frozen=True, slots=True)
class Trained:
    """What a training did."""

    steps: int
    losses: list[float]
    """Mean over the rows of each epoch."""
    wall_s: float


class LoraTraining:
    """One training; call `run` once.

    Args:
        model: a causal language model of `transformers` with peft's layers in it, `adapter` being active.
        adapter: its name.
        recipe: how.
        most_tokens: of a pack.
        product_dtype: precision of the products; None: the fastest here.

    Raises:
        CampaignError: the model's architecture cannot be trained here.
    """

    def __init__(
        self,
        model: Any,
        adapter: str,
        recipe: LoraRecipe,
        *,
        most_tokens: int,
        product_dtype: torch.dtype | None = None,
    ) -> None:
        require_full_attention(model, "distilling")
        self._model = model
        self._recipe = recipe
        self._device = next(model.parameters()).device
        self._most_tokens = most_tokens
        self._checkpointing = False
        self._dtype = product_dtype or fastest_products(model)
        self._masks = masks_for(model, self._dtype)
        self._fused = FusedLora(model, adapter, dropout=recipe.dropout, dtype=self._dtype)
        self._head = _head(model).to(self._dtype)
        vector = self._fused.vector
        self._optimizer = torch.optim.AdamW(
            [vector], lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True
        )

    @property
    def most_tokens(self) -> int:
        """Of a pack, now: less than at first once memory ran out."""
        return self._most_tokens

    def run(self, rows: Sequence[EncodedRow], progress: Callable[[News], None] = lambda _news: None) -> Trained:
        """Train on `rows`.

        Raises:
            ProposerError: memory does not suffice for one row, or the loss is not finite.
        """
        plan = batches(rows, self._recipe)
        steps = sum(map(len, plan))
        started, done = time.perf_counter(), 0
        losses: list[float] = []
        with self._training():
            for epoch, epoch_batches in enumerate(plan):
                sums: list[Tensor] = []
                for batch in epoch_batches:
                    self._set_rate(done, steps)
                    sums.append(self._step(batch, done) * len(batch))
                    done += 1
                    # The step before this one: reading this one's loss would leave the device without work.
                    at = max(0, len(sums) - 2)
                    loss = float(sums[at]) / len(epoch_batches[at])
                    _check(loss, done)
                    left = (time.perf_counter() - started) / done * (steps - done)
                    progress(News(epoch + 1, done, steps, loss, left))
                total = float(torch.stack(sums).sum()) if sums else 0.0
                _check(total, done)
                losses.append(total / max(1, sum(map(len, epoch_batches))))
        return Trained(steps, losses, time.perf_counter() - started)

    @torch.no_grad()
    def evaluate(self, rows: Sequence[EncodedRow]) -> float:
        """Return the mean loss over `rows` with the adapter as it is now, without dropout."""
        with self._training():
            total = sum(float(self._loss(pack)) for pack in self._packs(rows))
        return total / len(rows)

    def _step(self, batch: Sequence[EncodedRow], number: int) -> Tensor:
        """Take one step; return the mean loss over the batch, on the device."""
        while True:
            try:
                loss = self._gradients(batch, number)
                break
            except torch.OutOfMemoryError as error:
                message = str(error)  # the error itself holds the frames, and these the memory
            self._optimizer.zero_grad(set_to_none=False)
            self._shrink(batch, message)
        torch.nn.utils.clip_grad_norm_(self._fused.vector, self._recipe.max_grad_norm)
        self._optimizer.step()
        self._optimizer.zero_grad(set_to_none=False)  # the gradients of the layers are views of this one
        self._fused.refresh()
        return loss

    def _gradients(self, batch: Sequence[EncodedRow], number: int) -> Tensor:
        total = torch.zeros((), device=self._device)
        for place, pack in enumerate(self._packs(batch)):
            self._fused.seed = (self._recipe.seed << 40) + (number << 16) + place
            loss = self._loss(pack) / len(batch)
            loss.backward()  # type: ignore[no-untyped-call]
            total += loss.detach()
        return total

    def _loss(self, pack: Pack) -> Tensor:
        """Return the summed loss of a pack's rows."""
        embedded = self._model.get_input_embeddings()(pack.ids).to(self._dtype)
        decoder = self._model.get_decoder()
        with twice_computed(decoder) if self._checkpointing else nullcontext():
            output = decoder(inputs_embeds=embedded, position_ids=pack.positions, use_cache=False, pack=pack)
        return pack_loss(output.last_hidden_state[0], self._head, pack)

    def _packs(self, rows: Sequence[EncodedRow]) -> Iterator[Pack]:
        for some in split(rows, self._most_tokens):
            yield build_pack(some, masks=self._masks).to(self._device)

    def _shrink(self, batch: Sequence[EncodedRow], message: str) -> None:
        """Make packs smaller after memory ran out, or compute layers twice where they cannot be smaller."""
        gc.collect()
        torch.cuda.empty_cache()
        packs = list(split(batch, self._most_tokens))
        if max(map(len, packs)) > 1:
            self._most_tokens = int(SHRINK * max(map(pack_tokens, packs)))
        elif not self._checkpointing:
            self._checkpointing = True
        else:
            raise ProposerError(
                f"training ran out of memory on a single row ({message}); raise `memory_gib`, lower `max_length`, or "
                "choose a smaller base model",
                failure="llm_error",
            )

    def _set_rate(self, step: int, steps: int) -> None:
        rate = self._recipe.learning_rate * schedule(step, steps, self._recipe.warmup)
        for group in self._optimizer.param_groups:
            group["lr"] = rate

    @contextmanager
    def _training(self) -> Iterator[None]:
        with packed_attention(self._model), fused_blocks(self._model), self._fused.installed():
            yield


@contextmanager
def twice_computed(decoder: Any) -> Iterator[None]:
    """Have the layers keep only their inputs inside the block, and compute the rest again in the backward pass."""
    for layer in decoder.layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False, preserve_rng_state=False)
    try:
        yield
    finally:
        for layer in decoder.layers:
            del layer.forward


def batches(rows: Sequence[EncodedRow], recipe: LoraRecipe) -> list[list[list[EncodedRow]]]:
    """Return the batches of each epoch, its rows in an order drawn from the recipe's seed."""
    draw = random.Random(recipe.seed)
    plan = []
    for epoch in range(recipe.epochs):
        order = [row for row in rows if row.epoch in {None, epoch}]
        draw.shuffle(order)
        plan.append([order[at : at + recipe.batch] for at in range(0, len(order), recipe.batch)])
    return plan


def schedule(step: int, steps: int, warmup: float) -> float:
    """Return the share of the peak learning rate at a step from 0: linear up, then a cosine down towards 0."""
    rising = math.ceil(warmup * steps)
    if step < rising:
        return (step + 1) / rising
    return 0.5 * (1 + math.cos(math.pi * (step - rising) / max(1, steps - rising)))


def _head(model: Any) -> Tensor:
    """Return the weights of the output layer, having checked that logits are its plain product."""
    head = model.get_output_embeddings()
    ids = torch.arange(4, device=head.weight.device)[None]
    with torch.no_grad():
        wanted = model(ids, use_cache=False).logits
        found = model.get_decoder()(ids, use_cache=False).last_hidden_state @ head.weight.T
    if head.bias is not None or not torch.allclose(wanted, found, rtol=0.05, atol=0.05):
        raise CampaignError(
            f"base model `{model.config.model_type}` scales, caps or shifts its logits, which distilling does not "
            "know; choose another model"
        )
    weight: Tensor = head.weight.detach()
    return weight


def _check(loss: float, step: int) -> None:
    if not math.isfinite(loss):
        raise ProposerError(
            f"the loss is {loss} by step {step} of training; lower `learning_rate`, or look at the corpus",
            failure="llm_error",
        )
