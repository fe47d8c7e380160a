"""Attention inside a pack, exact and without a mask over the whole sequence.

In bf16 on a CUDA device FlashAttention runs over sequences of different lengths (Dao 2023, FlashAttention-2): the
shared part and each row's own part as the ends of their keys, then the trees against what their rows see in full, and
against their own ancestors, chain by chain. The two parts of a tree's attention are joined by their log-sum-exps; the
backward pass of each part takes the joint output and log-sum-exp, by which its share of the gradient is exact.
Elsewhere each row is attended on its own, under a mask as large as that row. Torch is imported here: for the model
host only.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F

from overnight.distill.packing import Pack, Sequences
from overnight.store.errors import CampaignError

Tensor = torch.Tensor
NAME = "overnight_packed"
FLASH_WIDTHS = frozenset({64, 96, 128, 256})
"""Widths of a head for which FlashAttention's backward pass is certain to exist."""


def require_full_attention(model: Any, purpose: str) -> None:
    """Check that every layer attends to all that came before.

    Raises:
        CampaignError: one does not; the message says what `purpose` needs.
    """
    config = model.config.get_text_config()
    kinds = set(getattr(config, "layer_types", None) or ("full_attention",))
    if kinds != {"full_attention"}:
        raise CampaignError(
            f"base model `{config.model_type}` has layers of {', '.join(sorted(kinds))}; {purpose} needs "
            'full attention: choose another model, or set `mode = "generate"`'
        )


def masks_for(model: Any, dtype: torch.dtype) -> torch.dtype | None:
    """Return the precision of the masks that packs for `model` need, computed in `dtype`: FlashAttention needs none."""
    config = model.config.get_text_config()
    width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return None if _flashes(next(model.parameters()).device, dtype, width) else dtype


def _flashes(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    return device.type == "cuda" and dtype == torch.bfloat16 and width in FLASH_WIDTHS


@contextmanager
def packed_attention(model: Any) -> Iterator[None]:
    """Have `model` attend within packs, which it is given as the keyword `pack`, inside the block."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attend)
    before = model.config._attn_implementation  # the only name that `transformers` has for it
    model.set_attn_implementation(NAME)
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def attend(
    module: torch.nn.Module,  # noqa: ARG001 the signature of `transformers`
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,  # noqa: ARG001
    *,
    pack: Pack,
    scaling: float | None = None,
    **_: object,
) -> tuple[Tensor, None]:
    """Return attention's output (1, tokens, heads, width) for queries, keys and values (1, heads, tokens, width)."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if _flashes(query.device, query.dtype, query.shape[-1]):
        out: Tensor = _Flash.apply(*(part[0].transpose(0, 1) for part in (query, key, value)), pack, scale)  # type: ignore[no-untyped-call]
        return out[None], None
    return _by_row(query, key, value, pack, scale), None


def _by_row(query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float) -> Tensor:
    sizes = [pack.shared, *pack.own, *pack.trees]
    queries, keys, values = (torch.split(part, sizes, dim=2) for part in (query, key, value))
    rows = len(pack.own)
    outs: list[Tensor] = [queries[0]] * len(sizes)
    if pack.shared:
        outs[0] = _masked(queries[0], keys[0], values[0], None, scale)
    for row in range(1, rows + 1):
        tree = row + rows
        q, k, v = (
            torch.cat([part[place] for place in places], dim=2)
            for part, places in ((queries, (row, tree)), (keys, (0, row, tree)), (values, (0, row, tree)))
        )
        out = _masked(q, k, v, pack.masks[row - 1], scale)
        outs[row], outs[tree] = torch.split(out, [sizes[row], sizes[tree]], dim=2)
    return torch.cat(outs, dim=2).transpose(1, 2)


def _masked(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Return attention under a mask; None: causal."""
    if mask is not None and query.device.type == "cpu" and query.dtype == torch.bfloat16:
        out: Tensor = _Products.apply(query[0], key[0], value[0], mask, scale)  # type: ignore[no-untyped-call]
        return out[None]
    groups = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(groups, dim=1) if groups > 1 else part for part in (key, value))
    return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, is_causal=mask is None, scale=scale)


class _Products(torch.autograd.Function):
    """Attention under a mask by whole products: in bf16 on a CPU twice as fast as its fused kernel.

    Queries are (heads, tokens, width), keys and values (key heads, keys, width). Weights are computed again in the
    backward pass.
    """

    @staticmethod
    def forward(  # noqa: PLR0917 the signature of autograd
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float
    ) -> Tensor:
        query = query.reshape(key.shape[0], -1, query.shape[2])  # heads that share a key head stand one after another
        ctx.save_for_backward(query, key, value, mask)
        ctx.scale = scale
        return torch.bmm(_weights(query, key, mask, scale), value).view(-1, mask.shape[0], query.shape[2])

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, mask = ctx.saved_tensors
        grad = grad.reshape(query.shape)
        weights = _weights(query, key, mask, ctx.scale)
        of_value = torch.bmm(weights.transpose(1, 2), grad)
        of_weights = torch.bmm(grad, value.transpose(1, 2))
        of_scores = torch.ops.aten._softmax_backward_data(of_weights, weights, -1, weights.dtype).mul_(ctx.scale)
        of_query = torch.bmm(of_scores, key).view(-1, mask.shape[0], query.shape[2])
        return of_query, torch.bmm(of_scores.transpose(1, 2), query), of_value, None, None


def _weights(query: Tensor, key: Tensor, mask: Tensor, scale: float) -> Tensor:
    scores = torch.bmm(query, key.transpose(1, 2)).mul_(scale)
    scores.view(-1, *mask.shape).add_(mask)
    return scores.softmax(-1)


class _Flash(torch.autograd.Function):
    """Attention of a pack by FlashAttention; queries, keys and values are (tokens, heads, width)."""

    @staticmethod
    def forward(  # noqa: PLR0917 the signature of autograd
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, pack: Pack, scale: float
    ) -> Tensor:
        """Return (tokens, heads, width)."""
        ends = pack.shared + sum(pack.own)
        out, lse = _run(query[:ends], key, value, pack.causal, scale, causal=True)
        if pack.contexts is not None and pack.chains is not None:
            nodes = query[ends:]
            far, far_lse = _run(nodes, key, value, pack.contexts, scale, causal=False)
            near, near_lse = _run(nodes, key, value, pack.chains, scale, causal=True)
            tree_lse = torch.logaddexp(far_lse, near_lse)
            share = (far_lse - tree_lse).exp_().T[..., None].to(out.dtype)
            out = torch.cat([out, torch.lerp(near, far, share)])
            lse = torch.cat([lse, tree_lse], dim=1)
        ctx.save_for_backward(query, key, value, out, lse)
        ctx.pack, ctx.scale = pack, scale
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        """Return the gradients of queries, keys and values."""
        query, key, value, out, lse = ctx.saved_tensors
        pack, scale = ctx.pack, ctx.scale
        ends = pack.shared + sum(pack.own)
        sums = torch.zeros((2, *key.shape), dtype=torch.float32, device=key.device)
        parts = [(slice(None, ends), pack.causal, True)]
        if pack.contexts is not None:
            parts += [(slice(ends, None), pack.contexts, False), (slice(ends, None), pack.chains, True)]
        query_grad = torch.empty_like(query)
        no_dropout = _no_dropout(key.device)
        for number, (span, sequences, causal) in enumerate(parts):
            of_query, of_key, of_value = torch.ops.aten._flash_attention_backward(
                grad[span].contiguous(),
                query[span],
                key[sequences.keys],
                value[sequences.keys],
                out[span],
                lse[:, span].contiguous(),
                sequences.query_ends,
                sequences.key_ends,
                sequences.most_queries,
                sequences.most_keys,
                0.0,
                causal,
                no_dropout,
                no_dropout,
                scale=scale,
            )
            query_grad[span] = of_query if number < 2 else query_grad[span] + of_query
            sums[0].index_add_(0, sequences.keys, of_key.float())
            sums[1].index_add_(0, sequences.keys, of_value.float())
        key_grad, value_grad = sums.to(key.dtype)
        return query_grad, key_grad, value_grad, None, None


def _run(
    query: Tensor, key: Tensor, value: Tensor, sequences: Sequences, scale: float, *, causal: bool
) -> tuple[Tensor, Tensor]:
    """Return the output (queries, heads, width) and the log-sum-exp (heads, queries) of one part."""
    out, lse, *_ = torch.ops.aten._flash_attention_forward(
        query,
        key[sequences.keys],
        value[sequences.keys],
        sequences.query_ends,
        sequences.key_ends,
        sequences.most_queries,
        sequences.most_keys,
        0.0,
        causal,
        False,
        scale=scale,
    )
    return out, lse


@cache
def _no_dropout(device: torch.device) -> Tensor:
    """Return the state of a random generator that is not used."""
    return torch.zeros(2, dtype=torch.uint64, device=device)
