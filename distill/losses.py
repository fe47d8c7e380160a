"""What a pack's lessons cost: log-probabilities where something is predicted, and the losses over them.

A reply costs its mean cross-entropy. A choice costs the cross-entropy between its target and the softmax over the
candidates' summed log-probabilities, which is what a proposal is drawn from (ListNet's top-one loss, Cao et al. 2007).
A pair costs the logistic loss of the difference of two such sums, which is the log-odds of drawing one over the other
(Bradley and Terry 1952; Burges et al. 2005, RankNet); there is no reference model, as the odds themselves are the aim.
Torch is imported here: for the model host only.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from overnight.distill.packing import Lessons, Pack

Tensor = torch.Tensor
LOGITS_AT_ONCE = 1 << 27
"""Elements: half a GiB in float32. More are computed piece by piece, and again in the backward pass."""


def pack_loss(hidden: Tensor, head: Tensor, pack: Pack) -> Tensor:
    """Return the summed loss of a pack's rows, in nats.

    Args:
        hidden: (tokens, width): the model's last hidden states.
        head: (vocabulary, width): the weights of the output layer.
        pack: what was fed, with its lessons.
    """
    log_probs = edge_log_probs(hidden[pack.sources], head, pack.edge_sources, pack.edge_tokens)
    return lesson_loss(log_probs, pack.lessons)


def lesson_loss(edges: Tensor, lessons: Lessons) -> Tensor:
    """Return the summed loss, given the log-probability of each edge (float32)."""
    totals = edges.new_zeros(lessons.paths).index_add(0, lessons.edge_paths, edges[lessons.path_edges])
    loss = -(totals[lessons.replies] * lessons.reply_weights).sum()
    if len(lessons.choices):
        scores = totals[lessons.choices].masked_fill(lessons.choice_filler, -torch.inf)
        chances = scores.log_softmax(-1).masked_fill(lessons.choice_filler, 0.0)
        loss -= ((chances * lessons.choice_targets).sum(-1) * lessons.choice_weights).sum()
    if lessons.pairs.numel():
        better, worse = lessons.pairs
        odds = totals[better] - totals[worse]
        losses = F.binary_cross_entropy_with_logits(odds, lessons.pair_targets, reduction="none")
        loss += (losses * lessons.pair_weights).sum()
    return loss


def edge_log_probs(hidden: Tensor, head: Tensor, sources: Tensor, tokens: Tensor) -> Tensor:
    """Return the log-probability (edges,) in float32 of each token after the hidden state that it starts from.

    Args:
        hidden: (states, width).
        head: (vocabulary, width), not trained.
        sources: (edges,): which hidden state.
        tokens: (edges,): which token.
    """
    log_probs: Tensor = _EdgeLogProbs.apply(hidden, head, sources, tokens)  # type: ignore[no-untyped-call]
    return log_probs


class _EdgeLogProbs(torch.autograd.Function):
    """Never holds all logits: they are computed piece by piece, and a second time for the gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, head: Tensor, sources: Tensor, tokens: Tensor) -> Tensor:
        ctx.dtype = hidden.dtype
        hidden = hidden.to(head.dtype)
        sums = torch.cat([(part @ head.T).float().logsumexp(-1) for part in torch.split(hidden, _at_once(head))])
        ctx.save_for_backward(hidden, head, sources, tokens, sums)
        logits = (hidden[sources].float() * head[tokens].float()).sum(-1).to(head.dtype).float()
        return logits - sums[sources]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        hidden, head, sources, tokens, sums = ctx.saved_tensors
        weights = torch.zeros_like(sums).index_add_(0, sources, grad)
        size = _at_once(head)
        pieces = []
        for part, total, weight in zip(*(torch.split(one, size) for one in (hidden, sums, weights)), strict=True):
            chances = (part @ head.T).float().sub_(total[:, None]).exp_().mul_(-weight[:, None])
            pieces.append((chances.to(head.dtype) @ head).float())
        result = torch.cat(pieces).index_add_(0, sources, head[tokens].float() * grad[:, None])
        return result.to(ctx.dtype), None, None, None


def _at_once(head: Tensor) -> int:
    return max(1, LOGITS_AT_ONCE // head.shape[0])
