"""A token tree over the candidates of one turn: what they share is computed once.

Plain data and numpy. The root is the last token of the prompt; a node is one token after its parent. Only tokens that
something follows are fed to a model: a candidate's last token is read off the distribution at its parent.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

ROOT = -1


@dataclass(frozen=True, slots=True)
class TokenTree:
    """The candidates of one turn as a tree of tokens, parents before children."""

    tokens: tuple[int, ...]
    """Tokens of the inner nodes: those that a model is fed."""
    parents: tuple[int, ...]
    """Index of each inner node's parent, or ROOT."""
    depths: tuple[int, ...]
    """Tokens between the prompt's end and each inner node, 0 for a child of the root."""
    edges: tuple[tuple[int, int], ...]
    """Each (inner node or ROOT, next token) whose log-probability is wanted."""
    paths: tuple[tuple[int, ...], ...]
    """For each candidate, its edges from the root on."""

    def visible(self) -> NDArray[np.bool_]:
        """Return which inner node (row) attends to which (column): itself and its ancestors."""
        seen = np.zeros((len(self.tokens), len(self.tokens)), dtype=np.bool_)
        for node, parent in enumerate(self.parents):
            if parent != ROOT:
                seen[node] = seen[parent]
            seen[node, node] = True
        return seen

    def totals(self, edge_log_probs: Sequence[float]) -> list[float]:
        """Return each candidate's log-probability: the sum over its edges."""
        return [sum(edge_log_probs[edge] for edge in path) for path in self.paths]


def build_tree(candidates: Sequence[Sequence[int]]) -> TokenTree:
    """Return the tree of `candidates`, each a sequence of token ids.

    Raises:
        ValueError: there is no candidate, or one has no token.
    """
    if not candidates or not all(candidates):
        raise ValueError("a tree needs at least one candidate, and each at least one token")
    inner: dict[tuple[int, int], int] = {}
    edges: dict[tuple[int, int], int] = {}
    tokens: list[int] = []
    depths: list[int] = []
    paths = []
    for candidate in candidates:
        node, path = ROOT, []
        for token in candidate[:-1]:
            step = (node, token)
            path.append(edges.setdefault(step, len(edges)))
            if step not in inner:
                inner[step] = len(tokens)
                tokens.append(token)
                depths.append(0 if node == ROOT else depths[node] + 1)
            node = inner[step]
        path.append(edges.setdefault((node, candidate[-1]), len(edges)))
        paths.append(tuple(path))
    parents = tuple(parent for parent, _ in inner)
    return TokenTree(tuple(tokens), parents, tuple(depths), tuple(edges), tuple(paths))
