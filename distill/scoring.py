"""Scores a whole menu in one forward pass: the log-probability of every candidate, exact as if scored alone.

One sequence goes through the model: what is new of the prompt, then the candidates as a token tree under a mask by
which a token sees the prompt and its own ancestors, at the position it would have alone. Keys and values of the prompt
stay, so that the next prompt pays only for what follows their longest common beginning: the constant part of a
campaign's prompts, and more. Logits are computed only where a candidate goes on. On a GPU the pass is a CUDA graph for
each bucket of lengths.

It works for decoders of `transformers` whose layers attend to everything before them, and says so of others. Runs in
the model host only, so torch is imported here. Tree attention: Miao et al. 2023 (SpecInfer), section 4.2.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from overnight.distill.packed_attention import require_full_attention
from overnight.distill.trie import TokenTree, build_tree

Tensor = torch.Tensor
GROWTH = 1024
"""Positions by which the cache grows."""
QUERY_BUCKET = 64
ROW_BUCKET = 128
KEY_BUCKET = 512
"""Lengths are rounded up to these on a GPU: each new bucket costs one capture (0.1 s), padding costs time each turn."""
KEPT_GRAPHS = 16


@dataclass(frozen=True, slots=True)
class Scores:
    """What one pass found."""

    log_probs: list[float]
    """Of each candidate: the sum of its tokens' log-probabilities, in nats."""
    prompt_tokens: int
    reused_tokens: int
    """Of the prompt: those whose keys and values were there already."""
    tree_tokens: int
    """All nodes of the tree, leaves included."""


class _Slots:
    """Keys and values of every layer, written at given positions; what `transformers` asks of a cache, no more."""

    def __init__(self) -> None:
        self.capacity = 0
        self.length = 0
        self.slots = torch.empty(0, dtype=torch.long)
        self._keys: list[Tensor] = []
        self._values: list[Tensor] = []

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *_: object, **__: object) -> tuple[Tensor, Tensor]:
        """Write what is new of one layer (1, heads, new, width); return all of it up to `length`."""
        if layer_idx == len(self._keys):
            self._keys.append(key.new_zeros((1, key.shape[1], self.capacity, key.shape[3])))
            self._values.append(value.new_zeros((1, value.shape[1], self.capacity, value.shape[3])))
        keys, values = self._keys[layer_idx], self._values[layer_idx]
        keys.index_copy_(2, self.slots, key)
        values.index_copy_(2, self.slots, value)
        return keys[:, :, : self.length], values[:, :, : self.length]

    def get_seq_length(self, layer_idx: int = 0) -> int:  # noqa: ARG002
        """Return 0: positions are given with every call."""
        return 0

    def grow(self, capacity: int) -> None:
        """Make room for `capacity` positions, keeping what is there."""
        extra = capacity - self.capacity
        self._keys = [torch.nn.functional.pad(k, (0, 0, 0, extra)) for k in self._keys]
        self._values = [torch.nn.functional.pad(v, (0, 0, 0, extra)) for v in self._values]
        self.capacity = capacity

    def bytes(self) -> int:
        """Return the memory that the cache holds."""
        return sum(tensor.nbytes for tensor in (*self._keys, *self._values))


@dataclass(frozen=True, slots=True)
class _Pass:
    """The inputs of one forward pass, on the model's device."""

    ids: Tensor
    """(1, queries)"""
    positions: Tensor
    """(1, queries)"""
    slots: Tensor
    """(queries,): where each token's key and value go."""
    mask: Tensor
    """(1, 1, queries, keys): 0 where a token may look, the smallest number elsewhere."""
    rows: Tensor
    """(rows,): the queries whose logits are wanted."""
    edge_rows: Tensor
    """(edges,): for each edge of the tree, which of `rows` it starts from."""
    edge_tokens: Tensor
    """(edges,): and the token that it leads to."""


class _Graph:
    """One captured pass; its inputs are copied in, its outputs stay in place."""

    def __init__(self, scorer: MenuScorer, example: _Pass, pool: Any) -> None:
        self._inputs = _Pass(*(getattr(example, name).clone() for name in _Pass.__slots__))
        stream: Any = torch.cuda.Stream(scorer.device)  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            scorer.forward(self._inputs)  # libraries set themselves up outside the capture
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph, pool=pool):
            self._output = scorer.forward(self._inputs)

    def replay(self, inputs: _Pass) -> Tensor:
        """Return what the captured pass gives for `inputs`, valid until the next replay."""
        for name in _Pass.__slots__:
            getattr(self._inputs, name).copy_(getattr(inputs, name))
        self._graph.replay()
        return self._output


class MenuScorer:
    """Scores candidates after prompts with one model, remembering the last prompt's keys and values.

    Args:
        model: a causal language model of `transformers`, in evaluation mode.

    Raises:
        CampaignError: the model has layers that do not attend to all that came before.
    """

    def __init__(self, model: Any) -> None:
        require_full_attention(model, "scoring")
        self._model = model
        self.device = next(model.parameters()).device
        self._cache = _Slots()
        self._prompt: tuple[int, ...] = ()
        self._graphs: OrderedDict[tuple[int, ...], _Graph] = OrderedDict()
        self._pool: Any = None

    @torch.inference_mode()
    def score(self, prompt: Sequence[int], candidates: Sequence[Sequence[int]]) -> Scores:
        """Return the log-probability of each candidate given `prompt`.

        Args:
            prompt: token ids, at least one.
            candidates: token ids of each, at least one.
        """
        tree = build_tree(candidates)
        reused = min(common_prefix(self._prompt, prompt), len(prompt) - 1)
        inputs = self._inputs(prompt, reused, tree)
        self._prompt = ()  # until the pass is over, the cache is neither the old prompt's nor the new one's
        log_probs = tree.totals(self._run(inputs).tolist())
        self._prompt = tuple(prompt)
        leaves = len(tree.edges) - len(tree.tokens)
        return Scores(log_probs, len(prompt), reused, len(tree.tokens) + leaves)

    def forward(self, inputs: _Pass) -> Tensor:
        """Return the log-probability of each edge (edges,) in float32, from logits in the model's precision."""
        self._cache.slots, self._cache.length = inputs.slots, inputs.mask.shape[-1]
        output = self._model(
            input_ids=inputs.ids,
            position_ids=inputs.positions,
            attention_mask=inputs.mask,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=inputs.rows,
        )
        logits: Tensor = output.logits[0].float()
        return logits[inputs.edge_rows, inputs.edge_tokens] - logits.logsumexp(-1)[inputs.edge_rows]

    def held_bytes(self) -> int:
        """Return the memory of the cached keys and values."""
        return self._cache.bytes()

    def _run(self, inputs: _Pass) -> Tensor:
        if self.device.type != "cuda":
            return self.forward(inputs)
        key = tuple(getattr(inputs, name).shape[-1] for name in _Pass.__slots__)
        if key not in self._graphs:
            self._pool = self._pool or torch.cuda.graph_pool_handle()
            self._graphs[key] = _Graph(self, inputs, self._pool)
            if len(self._graphs) > KEPT_GRAPHS:
                self._graphs.popitem(last=False)
        self._graphs.move_to_end(key)
        return self._graphs[key].replay(inputs)

    def _inputs(self, prompt: Sequence[int], reused: int, tree: TokenTree) -> _Pass:
        new, nodes = len(prompt) - reused, len(tree.tokens)
        queries = self._bucket(new + nodes, QUERY_BUCKET)
        keys = self._bucket(reused + queries, KEY_BUCKET)
        self._make_room(keys)
        pad = queries - new - nodes
        ids = [*prompt[reused:], *tree.tokens, *([0] * pad)]
        positions = [*range(reused, len(prompt)), *(len(prompt) + depth for depth in tree.depths), *([0] * pad)]
        rows = [new - 1, *range(new, new + nodes)]
        rows += [0] * (self._bucket(len(rows), ROW_BUCKET) - len(rows))
        edges = [(node + 1, token) for node, token in tree.edges]
        edges += [(0, 0)] * (self._bucket(len(edges), ROW_BUCKET) - len(edges))
        return _Pass(
            ids=torch.tensor([ids], device=self.device),
            positions=torch.tensor([positions], device=self.device),
            slots=torch.arange(reused, reused + queries, device=self.device),
            mask=self._mask(len(prompt), reused, queries, keys, tree),
            rows=torch.tensor(rows, device=self.device),
            edge_rows=torch.tensor([row for row, _ in edges], device=self.device),
            edge_tokens=torch.tensor([token for _, token in edges], device=self.device),
        )

    def _mask(self, prompt: int, reused: int, queries: int, keys: int, tree: TokenTree) -> Tensor:
        """Return the mask: prompt tokens see what is before them, nodes the prompt and their ancestors."""
        new, nodes = prompt - reused, len(tree.tokens)
        query = torch.arange(reused, reused + queries, device=self.device).clamp_(max=prompt - 1)
        key = torch.arange(keys, device=self.device)
        visible = key[None, :] <= query[:, None]
        if nodes:
            ancestors = torch.from_numpy(tree.visible()).to(self.device)
            visible[new : new + nodes, prompt : prompt + nodes] = ancestors
        dtype = self._model.dtype
        hidden = torch.finfo(dtype).min
        return torch.zeros_like(visible, dtype=dtype).masked_fill_(~visible, hidden)[None, None]

    def _make_room(self, keys: int) -> None:
        if keys > self._cache.capacity:
            self._graphs.clear()  # they write where the cache was
            self._pool = None  # a pool that no graph holds cannot be captured into again
            self._cache.grow(-(-keys // GROWTH) * GROWTH)

    def _bucket(self, length: int, size: int) -> int:
        return -(-length // size) * size if self.device.type == "cuda" else length


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Return how many tokens two sequences share from their start."""
    for number, (a, b) in enumerate(zip(one, other, strict=False)):
        if a != b:
            return number
    return min(len(one), len(other))
