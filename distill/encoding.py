"""Training rows as tokens: the prompt, and one token tree of everything that a row teaches about what follows it.

Whole replies and candidates of the menu begin alike, so that they share a tree (`overnight.distill.trie`), and what
they share is computed once. Texts are tokenized as they are for scoring. Plain data; nothing here needs torch.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from overnight.distill.chat import ChatEncoder
from overnight.distill.rows import TrainingRow
from overnight.distill.trie import ROOT, TokenTree, build_tree


@dataclass(frozen=True, slots=True)
class PairLesson:
    """Two paths of a row's tree, and how surely the first is better."""

    better: int
    worse: int
    probability: float
    weight: float


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedRow:
    """One row in tokens; its lessons point at paths of its tree, and carry the row's weight in theirs."""

    id: str
    prompt: tuple[int, ...]
    tree: TokenTree
    replies: tuple[tuple[int, float], ...]
    """A path and what its summed log-probability is multiplied with: the weight over the number of its tokens."""
    choice: tuple[tuple[int, float], ...]
    """A path and the probability that it should have."""
    choice_weight: float
    pairs: tuple[PairLesson, ...]
    epoch: int | None
    """The one epoch that it belongs to; None: all."""

    @property
    def length(self) -> int:
        """Tokens of the prompt and of the longest path."""
        return len(self.prompt) + max(map(len, self.tree.paths))

    @property
    def is_chain(self) -> bool:
        """Whether nothing branches: a tree of one reply."""
        return all(parent == node - 1 for node, parent in enumerate(self.tree.parents))

    def tokens(self, shared: int) -> int:
        """Return the tokens that go through the model behind `shared` ones of the prompt."""
        return len(self.prompt) - shared + len(self.tree.tokens)

    def chains(self) -> list[tuple[int, int]]:
        """Return the tree cut into runs (first node, end) in which each node follows the one before it."""
        nodes = len(self.tree.parents)
        starts = [node for node, parent in enumerate(self.tree.parents) if parent != node - 1 or node == 0]
        return list(zip(starts, [*starts[1:], nodes][: len(starts)], strict=True))

    def ancestors(self, node: int) -> list[int]:
        """Return the nodes from the root's child down to the parent of `node`."""
        line = []
        while (node := self.tree.parents[node]) != ROOT:
            line.append(node)
        return line[::-1]


def encode_row(row: TrainingRow, encoder: ChatEncoder) -> EncodedRow:
    """Return a row in tokens.

    Raises:
        AssertionError: it has no supervised token, or makes no sense; the message names the row.
    """
    row.check()
    replies = [reply for reply in row.replies if reply.text and reply.weight > 0]
    paired = sorted({index for pair in row.pairs for index in (pair.better, pair.worse)})
    used = list(range(len(row.candidates))) if row.choice else paired
    written = [(*tokens, *encoder.ending()) for tokens in encoder.candidates([reply.text for reply in replies])]
    offered = encoder.candidates([row.candidates[index] for index in used])
    assert all(offered), f"training row `{row.id}` has a candidate without a token"
    tree = build_tree([*written, *offered])
    path_of = {index: len(written) + number for number, index in enumerate(used)}
    return EncodedRow(
        id=row.id,
        prompt=tuple(encoder.prompt([{"role": "user", "content": row.prompt}])),
        tree=tree,
        replies=tuple(
            (path, row.weight * reply.weight / len(tokens))
            for path, (reply, tokens) in enumerate(zip(replies, written, strict=True))
        ),
        choice=tuple((path_of[index], probability) for index, probability in enumerate(row.choice)),
        choice_weight=row.weight * row.choice_weight,
        pairs=tuple(
            PairLesson(path_of[pair.better], path_of[pair.worse], pair.probability, row.weight * pair.weight)
            for pair in row.pairs
        ),
        epoch=row.epoch,
    )


def shared_prefix(prompts: Sequence[tuple[int, ...]]) -> int:
    """Return how many tokens all prompts share from their start, leaving each at least one of its own."""
    first, last = min(prompts), max(prompts)  # in lexicographic order; what these two share, all share
    most = min(map(len, prompts)) - 1
    return next((place for place in range(most) if first[place] != last[place]), most)
