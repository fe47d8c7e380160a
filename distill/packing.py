"""Packs rows behind ONE copy of what their prompts share, as one sequence that goes through the model once.

The order of a pack is: the shared tokens, then each row's own (the rest of its prompt, with its reply where it teaches
one reply alone), then the trees of the rows that have one. Each token stands at the position that it would have alone,
and sees what it would see alone: `overnight.distill.packed_attention` does that without a mask of the whole sequence.
Torch is imported here: for the model host only.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields
from itertools import accumulate
from typing import Any, Self, cast

import torch

from overnight.distill.encoding import EncodedRow, shared_prefix
from overnight.distill.trie import ROOT

Tensor = torch.Tensor


@dataclass(frozen=True, slots=True)
class Sequences:
    """Runs of queries and the keys that each run sees, for attention over sequences of different lengths."""

    query_ends: Tensor
    """(runs + 1,) int32: where each run of queries begins; the last is the end."""
    key_ends: Tensor
    """(runs + 1,) int32: the same for keys."""
    keys: Tensor
    """(all keys,): which tokens of the pack they are."""
    most_queries: int
    most_keys: int


@dataclass(frozen=True, slots=True)
class Lessons:
    """What a pack teaches, as tensors over all its paths."""

    paths: int
    path_edges: Tensor
    """The edges of all paths, one after another,"""
    edge_paths: Tensor
    """and the path that each belongs to."""
    replies: Tensor
    """(replies,): paths;"""
    reply_weights: Tensor
    """and what each one's log-probability is multiplied with."""
    choices: Tensor
    """(rows that choose, most candidates): paths, filled up with the first."""
    choice_targets: Tensor
    """The same shape: probabilities, 0 where filled up."""
    choice_filler: Tensor
    """The same shape: True where filled up."""
    choice_weights: Tensor
    """(rows that choose,)"""
    pairs: Tensor
    """(2, pairs): the paths of better and worse;"""
    pair_targets: Tensor
    pair_weights: Tensor


@dataclass(frozen=True, slots=True)
class Pack:
    """Rows in one sequence, on a device."""

    rows: int
    shared: int
    """Tokens of the shared part."""
    own: tuple[int, ...]
    """Tokens of each row's own part."""
    trees: tuple[int, ...]
    """Nodes of each row's tree; 0 where the reply stands in the own part."""
    ids: Tensor
    """(1, tokens)"""
    positions: Tensor
    """(1, tokens)"""
    sources: Tensor
    """The tokens from which something is predicted,"""
    edge_sources: Tensor
    """(edges,): for each edge, which of them it starts from,"""
    edge_tokens: Tensor
    """(edges,): and the token that it leads to."""
    lessons: Lessons
    causal: Sequences
    """Shared and own parts: each run is the end of its keys, and sees those up to itself."""
    contexts: Sequences | None
    """Trees: each node sees all of what is shared and its row's own; None without trees."""
    chains: Sequences | None
    """Trees: each run of nodes is the end of its keys, which are its ancestors and itself."""
    masks: tuple[Tensor, ...]
    """For each row (own + tree, shared + own + tree): 0 where a token (row) sees another (column), else -infinity;
    empty where attention does without."""

    @property
    def tokens(self) -> int:
        """All tokens of the sequence."""
        return int(self.ids.shape[1])

    def to(self, device: torch.device) -> Self:
        """Return the pack on another device."""
        return cast("Self", _moved(self, device))


def _moved(value: Any, device: torch.device) -> Any:
    match value:
        case torch.Tensor():
            return value.to(device, non_blocking=True)
        case Sequences() | Lessons() | Pack():
            return type(value)(**{f.name: _moved(getattr(value, f.name), device) for f in fields(value)})
        case tuple():
            return tuple(_moved(one, device) for one in value)
    return value


def split(rows: Sequence[EncodedRow], most_tokens: int) -> Iterator[list[EncodedRow]]:
    """Cut rows into packs of at most `most_tokens`, but of at least one row each, and of about as many rows."""
    packs = list(_filled(rows, most_tokens, len(rows)))
    # As few packs again, none fuller than need be: a last pack of one row would cost a shared part of its own.
    evenly = list(_filled(rows, most_tokens, -(-len(rows) // max(1, len(packs)))))
    yield from evenly if len(evenly) == len(packs) else packs


def _filled(rows: Sequence[EncodedRow], most_tokens: int, most_rows: int) -> Iterator[list[EncodedRow]]:
    taken: list[EncodedRow] = []
    for row in rows:
        if taken and (len(taken) == most_rows or pack_tokens([*taken, row]) > most_tokens):
            yield taken
            taken = []
        taken.append(row)
    if taken:
        yield taken


def pack_tokens(rows: Sequence[EncodedRow]) -> int:
    """Return how many tokens a pack of `rows` has."""
    shared = shared_prefix([row.prompt for row in rows])
    return shared + sum(row.tokens(shared) for row in rows)


def build_pack(rows: Sequence[EncodedRow], *, masks: torch.dtype | None) -> Pack:
    """Return the pack of at least one row, on the CPU, with each row's mask if a precision is given for it."""
    shared = shared_prefix([row.prompt for row in rows])
    chained = [row.is_chain for row in rows]
    rests = [len(row.prompt) - shared for row in rows]
    own = [rest + len(row.tree.tokens) * chain for row, rest, chain in zip(rows, rests, chained, strict=True)]
    trees = [0 if chain else len(row.tree.tokens) for row, chain in zip(rows, chained, strict=True)]
    own_starts = list(accumulate(own, initial=shared))
    tree_starts = list(accumulate(trees, initial=own_starts[-1]))
    # Where node 0 of each row stands: behind its prompt, or among the trees.
    nodes = [
        start + rest if chain else tree_start
        for start, rest, chain, tree_start in zip(own_starts, rests, chained, tree_starts, strict=False)
    ]
    ids, positions = list(rows[0].prompt[:shared]), list(range(shared))
    for row, chain in zip(rows, chained, strict=True):
        ids += [*row.prompt[shared:], *(row.tree.tokens if chain else ())]
        positions += range(shared, len(row.prompt) + len(row.tree.tokens) * chain)
    for row, chain in zip(rows, chained, strict=True):
        if not chain:
            ids += row.tree.tokens
            positions += [len(row.prompt) + depth for depth in row.tree.depths]
    sources: dict[int, int] = {}
    edge_sources, edge_tokens = [], []
    for row, start, rest, first in zip(rows, own_starts, rests, nodes, strict=False):
        for node, token in row.tree.edges:
            place = start + rest - 1 if node == ROOT else first + node
            edge_sources.append(sources.setdefault(place, len(sources)))
            edge_tokens.append(token)
    return Pack(
        rows=len(rows),
        shared=shared,
        own=tuple(own),
        trees=tuple(trees),
        ids=torch.tensor([ids]),
        positions=torch.tensor([positions]),
        sources=torch.tensor(list(sources)),
        edge_sources=torch.tensor(edge_sources),
        edge_tokens=torch.tensor(edge_tokens),
        lessons=_lessons(rows),
        causal=_causal(shared, own, own_starts),
        contexts=_contexts(shared, own, own_starts, trees) if any(trees) else None,
        chains=_chains(rows, trees, tree_starts) if any(trees) else None,
        masks=tuple(_mask(row, shared, own, nodes, masks) for row, own, nodes in zip(rows, own, trees, strict=True))
        if masks
        else (),
    )


def _lessons(rows: Sequence[EncodedRow]) -> Lessons:
    path_edges: list[int] = []
    edge_paths: list[int] = []
    replies: list[tuple[int, float]] = []
    choices: list[tuple[list[int], list[float], float]] = []
    pairs: list[tuple[int, int, float, float]] = []
    paths = edges = 0
    for row in rows:
        for number, path in enumerate(row.tree.paths):
            path_edges += [edges + edge for edge in path]
            edge_paths += [paths + number] * len(path)
        replies += [(paths + path, weight) for path, weight in row.replies]
        if row.choice:
            chosen, targets = zip(*row.choice, strict=True)
            choices.append(([paths + path for path in chosen], list(targets), row.choice_weight))
        pairs += [(paths + p.better, paths + p.worse, p.probability, p.weight) for p in row.pairs]
        paths += len(row.tree.paths)
        edges += len(row.tree.edges)
    widest = max((len(chosen) for chosen, _, _ in choices), default=0)
    fillers = [widest - len(chosen) for chosen, _, _ in choices]
    return Lessons(
        paths=paths,
        path_edges=torch.tensor(path_edges),
        edge_paths=torch.tensor(edge_paths),
        replies=torch.tensor([path for path, _ in replies], dtype=torch.long),
        reply_weights=torch.tensor([weight for _, weight in replies]),
        choices=_rectangle([c + c[:1] * f for (c, _, _), f in zip(choices, fillers, strict=True)], torch.long),
        choice_targets=_rectangle([t + [0.0] * f for (_, t, _), f in zip(choices, fillers, strict=True)], torch.float),
        choice_filler=_rectangle([[False] * (widest - f) + [True] * f for f in fillers], torch.bool),
        choice_weights=torch.tensor([weight for _, _, weight in choices]),
        pairs=torch.tensor([pair[:2] for pair in pairs], dtype=torch.long).view(-1, 2).T,
        pair_targets=torch.tensor([target for _, _, target, _ in pairs]),
        pair_weights=torch.tensor([weight for _, _, _, weight in pairs]),
    )


def _rectangle(values: Sequence[Sequence[float]], dtype: torch.dtype) -> Tensor:
    return torch.tensor(values, dtype=dtype).view(len(values), -1) if values else torch.empty((0, 1), dtype=dtype)


def _mask(row: EncodedRow, shared: int, own: int, nodes: int, dtype: torch.dtype) -> Tensor:
    visible = torch.ones(own + nodes, shared + own + nodes, dtype=torch.bool)
    visible[:own, shared:].tril_()
    if nodes:
        visible[own:, shared + own :] = torch.from_numpy(row.tree.visible())
    return torch.zeros(visible.shape, dtype=dtype).masked_fill_(~visible, -torch.inf)


def _causal(shared: int, own: Sequence[int], starts: Sequence[int]) -> Sequences:
    front = torch.arange(shared)
    keys = [torch.cat([front, torch.arange(start, start + length)]) for start, length in zip(starts, own, strict=False)]
    queries = list(own)
    if shared:
        keys, queries = [front, *keys], [shared, *queries]
    return _sequences(queries, keys)


def _contexts(shared: int, own: Sequence[int], starts: Sequence[int], trees: Sequence[int]) -> Sequences:
    front = torch.arange(shared)
    seen = [
        (nodes, torch.cat([front, torch.arange(start, start + length)]))
        for start, length, nodes in zip(starts, own, trees, strict=False)
        if nodes
    ]
    return _sequences([nodes for nodes, _ in seen], [keys for _, keys in seen])


def _chains(rows: Sequence[EncodedRow], trees: Sequence[int], starts: Sequence[int]) -> Sequences:
    queries, keys = [], []
    for row, nodes, first in zip(rows, trees, starts, strict=False):
        for start, end in row.chains() if nodes else ():
            queries.append(end - start)
            keys.append(first + torch.tensor([*row.ancestors(start), *range(start, end)]))
    return _sequences(queries, keys)


def _sequences(queries: Sequence[int], keys: Sequence[Tensor]) -> Sequences:
    lengths = [len(one) for one in keys]
    return Sequences(
        query_ends=torch.tensor(list(accumulate(queries, initial=0)), dtype=torch.int32),
        key_ends=torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32),
        keys=torch.cat(list(keys)),
        most_queries=max(queries),
        most_keys=max(lengths),
    )
