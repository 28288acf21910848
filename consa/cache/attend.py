"""Attention of new queries over a hybrid's cache.

No later query sees a token that an SWA head has dropped. So the tokens that the head kept, in order, followed by the
new ones, form an ordinary short sequence for the new queries: sinks first, the window last. `attention.ops` computes
it without a special case.
"""

from __future__ import annotations

import torch
from torch import Tensor

from consa.attention.ops import full_attention, sliding_attention
from consa.attention.portable import attend
from consa.cache.layer import HybridLayer, NewKeys
from consa.cache.split import Heads, by_start, pick


def cached_attention(q: Tensor, new: NewKeys, first: Tensor | None, *, scaling: float, softcap: float | None) -> Tensor:
    """Attention of the newest tokens, `(batch, q_heads, tokens, head_dim)`, over the cache and themselves.

    It also writes them to the cache. `first` is as in `Plan.attend`; the result is as `q`, zero for padding queries.
    """
    cache, k, v = new
    if cache.can_append(k, first):
        return _decode(q, cache, k, v, scaling, softcap)
    # Padding is cut off, not masked: sequences of equal length are computed together.
    before, tokens = cache.length, q.shape[2]
    groups = [  # (sequences, their first column, number of padding queries)
        (rows, start, max(0, start - before)) for rows, start in by_start(first) if start - before < tokens
    ]
    sliding = []
    if cache.split.sliding:  # read before `write` drops some of it
        for rows, start, skipped in groups:
            new_kv = (pick(x, cache.sliding_heads)[rows, :, skipped:] for x in (k, v))
            old_kv = cache.read_sliding(rows, start)
            sliding.append([torch.cat(parts, dim=2) for parts in zip(old_kv, new_kv, strict=True)])
    full = cache.write(k, v, first)
    out = torch.zeros_like(q)
    limits = {"window": cache.split.window, "num_sink_tokens": cache.split.num_sink_tokens}
    for index, (rows, start, skipped) in enumerate(groups):
        heads = q[rows, :, skipped:].unflatten(1, (k.shape[1], -1))
        parts: list[tuple[Heads, Tensor]] = []
        if cache.split.full:
            keys, values = (x[rows, :, start:] for x in full)
            part = pick(heads, cache.full_heads).flatten(1, 2)
            part = full_attention(part, keys, values, scaling=scaling, softcap=softcap)
            parts.append((cache.full_heads, part))
        if cache.split.sliding:
            part = pick(heads, cache.sliding_heads).flatten(1, 2)
            part = sliding_attention(part, *sliding[index], **limits, scaling=scaling, softcap=softcap)
            parts.append((cache.sliding_heads, part))
        out[rows, :, skipped:] = _merge(heads, parts)
    return out


def _decode(q: Tensor, cache: HybridLayer, k: Tensor, v: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """One token per sequence sees everything in the cache, so order and window do not matter."""
    if cache.has_kernels(softcap):
        return cache.decode(q, k.detach(), v.detach(), scaling)
    heads = q.unflatten(1, (k.shape[1], -1))  # (batch, kv_heads, group, 1, head_dim)
    parts = []
    for selected, keys, values, visible in cache.append(k, v):
        part = pick(heads, selected).flatten(1, 2)
        if visible is None:
            part = full_attention(part, keys, values, scaling=scaling, softcap=softcap)
        else:  # the query heads of a group become rows of one product
            folded = part.reshape(len(part), keys.shape[1], -1, q.shape[3])
            part = attend(folded, keys, values, visible, scaling, softcap).reshape(part.shape)
        parts.append((selected, part))
    return _merge(heads, parts)


def _merge(heads: Tensor, parts: list[tuple[Heads, Tensor]]) -> Tensor:
    """Join outputs of FA and SWA heads, each `(batch, q_heads, tokens, head_dim)`, in the order of the heads."""
    if len(parts) == 1:
        return parts[0][1]
    out = torch.empty_like(heads)
    for selected, part in parts:
        out[:, selected] = part.unflatten(1, (-1, heads.shape[2]))
    return out.flatten(1, 2)
