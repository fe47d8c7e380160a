"""A base model in memory with the adapters that were asked for: scores menus, writes replies, trains adapters.

Runs in the model host only, so torch is imported here. Each adapter has keys and values of its own, since they depend
on its weights; only the base model's and the last two adapters' are kept.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence

import torch

from overnight.distill.adapter import AdapterRecord
from overnight.distill.base import BaseModel
from overnight.distill.chat import ChatEncoder
from overnight.distill.lora import News
from overnight.distill.model import Loaded
from overnight.distill.scoring import MenuScorer, Scores
from overnight.distill.shelf import AdapterShelf
from overnight.distill.training import Order, train_adapter

KEPT_SCORERS = 3
"""A champion, a challenger, and the base model."""


class Resident:
    """One base model, ready to answer with or without an adapter."""

    def __init__(self, loaded: Loaded) -> None:
        self.loaded = loaded
        self._model = loaded.model
        self._encoder = ChatEncoder(loaded.tokenizer)
        self._scorers: OrderedDict[str | None, MenuScorer] = OrderedDict()
        self._shelf = AdapterShelf(loaded, dropped=lambda folder: self._scorers.pop(folder, None))

    def score(self, prompt: str, candidates: Sequence[str], adapter: str | None) -> Scores:
        """Score each candidate as the beginning of the assistant's turn after `prompt`.

        Raises:
            CampaignError: the adapter cannot be loaded.
        """
        with self._shelf.using(adapter):
            if adapter not in self._scorers:
                self._scorers[adapter] = MenuScorer(self._model)
            self._scorers.move_to_end(adapter)
            if len(self._scorers) > KEPT_SCORERS:
                self._scorers.popitem(last=False)
            ids = self._encoder.prompt([{"role": "user", "content": prompt}])
            return self._scorers[adapter].score(ids, self._encoder.candidates(candidates))

    @torch.inference_mode()
    def generate(
        self,
        messages: Sequence[Mapping[str, str]],
        adapter: str | None,
        *,
        temperature: float,
        max_new_tokens: int,
        seed: int,
    ) -> tuple[str, int, int]:
        """Write a reply.

        Returns:
            The text, and the number of tokens of prompt and reply.
        """
        ids = self._encoder.prompt(messages)
        inputs = torch.tensor([ids], device=self.loaded.device)
        torch.manual_seed(seed)
        drawn = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
        how = drawn if temperature > 0 else {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
        tokenizer = self.loaded.tokenizer
        filler = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
        with self._shelf.using(adapter):
            output = self._model.generate(
                inputs,
                attention_mask=torch.ones_like(inputs),
                max_new_tokens=max_new_tokens,
                pad_token_id=filler,
                eos_token_id=self._encoder.stops() or None,
                **how,
            )
        reply = output[0, len(ids) :].tolist()
        return self._encoder.decode(reply), len(ids), len(reply)

    def held_bytes(self) -> int:
        """Return the memory held for the model: on a CUDA device all that the allocator keeps from others."""
        if self.loaded.device.type == "cuda":
            return int(torch.cuda.memory_reserved(self.loaded.device))
        weights = sum(parameter.nbytes for parameter in self._model.parameters())
        return int(weights) + sum(scorer.held_bytes() for scorer in self._scorers.values())

    def train(self, base: BaseModel, order: Order, tell: Callable[[News], None]) -> AdapterRecord:
        """Train an adapter, write it, and have it answer for its folder; see `overnight.distill.training`.

        Scorers are dropped before: their caches and graphs are memory that the training may need.
        """
        self._scorers.clear()
        return train_adapter(base, self.loaded, self._shelf, order, tell)
