"""Attention of new queries over a cache that keeps all of some KV heads, and sinks and a window of the others.

What an SWA head has dropped, no later query sees. So the tokens it kept, in order, followed by the new ones, are to
those queries an ordinary short sequence: sinks first, the window last. `branches` computes it; no other rule is needed.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention.ops import full_attention, sliding_attention
from consa.attention.portable import attend

if TYPE_CHECKING:
    from consa.cache.layer import HybridLayer


@dataclass(frozen=True)
class HeadSplit:
    """What a layer's cache keeps.

    Attributes:
        full: KV heads that keep every token.
        sliding: KV heads that keep `num_sink_tokens` first tokens and the last `window` of the others.
        window: tokens.
        num_sink_tokens: tokens.
    """

    full: tuple[int, ...]
    sliding: tuple[int, ...]
    window: int
    num_sink_tokens: int

    @classmethod
    def of(cls, allocation: Allocation, layer: int) -> HeadSplit:
        """The split of one layer; a layer that the model slides itself is all-SWA, without sinks."""
        full = tuple(int(head) for head in allocation.full_attention[layer].nonzero()[0])
        sliding = tuple(head for head in range(allocation.num_kv_heads) if head not in full)
        native_window = allocation.native_windows.get(layer)
        if native_window is not None:
            return cls(full, sliding, native_window, 0)
        return cls(full, sliding, allocation.window, allocation.num_sink_tokens)

    @property
    def kept(self) -> int:
        """Tokens that an SWA head keeps at most."""
        return self.num_sink_tokens + self.window


class NewKeys(NamedTuple):
    """What `HybridLayer.update` hands to the attention function in place of keys: the cache, and what goes into it.

    The tokens are written by the attention function, since it alone knows about padding, and the first real tokens of
    a sequence are its sinks.
    """

    cache: HybridLayer
    key: Tensor  # (batch, kv_heads, tokens, head_dim)
    value: Tensor

    def __getattr__(self, name: str) -> Any:  # what other attention asks of keys
        raise AttributeError(
            f"no {name}: a HybridCache is for hybrids alone; use consa.load or consa.attached, or another cache"
        )


def as_computed(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Queries, keys or values in the dtype that attention computes in: autocast's, where that is on.

    Rotated queries and keys come in float32 then, beside values of lower precision.
    """
    device = tensors[0].device.type
    if not torch.is_autocast_enabled(device) or tensors[0].dtype == torch.float64:
        return tensors
    return tuple(x.to(torch.get_autocast_dtype(device)) for x in tensors)


def cached_attention(
    q: Tensor, new: NewKeys, first: Tensor | None, *, scaling: float, softcap: float | None
) -> Tensor:
    """Attention of the newest tokens over the cache and themselves; writes them to the cache.

    Args:
        q: `(batch, q_heads, tokens, head_dim)`.
        new: the cache, and the same tokens' keys and values.
        first: `(batch,)` on the CPU, column of each sequence's first real token, or None without left padding.
        scaling: factor on the scores.
        softcap: bound on the scores by tanh, or None.

    Returns:
        As `q`; zero for queries that are padding.
    """
    cache, k, v = new
    if cache.can_append(k, first):
        return _decode(q, cache, k, v, scaling, softcap)
    # Without its padding, a sequence is an ordinary one: those of equal length go together.
    before, tokens = cache.length, q.shape[2]
    groups = [  # the sequences, their first column, and how many of their queries are padding
        (rows, start, max(0, start - before)) for rows, start in by_start(first) if start - before < tokens
    ]
    sliding = []
    if cache.split.sliding:  # to be read before writing drops some of it
        for rows, start, skipped in groups:
            new_kv = (pick(x, cache.sliding_heads)[rows, :, skipped:] for x in (k, v))
            old_kv = cache.read_sliding(rows, start)
            sliding.append([torch.cat(parts, dim=2) for parts in zip(old_kv, new_kv, strict=True)])
    full = cache.write(k, v, first)
    out = torch.zeros_like(q)
    for index, (rows, start, skipped) in enumerate(groups):
        heads = q[rows, :, skipped:].unflatten(1, (k.shape[1], -1))
        parts: list[tuple[Heads, Tensor]] = []
        if cache.split.full:
            keys, values = (x[rows, :, start:] for x in full)
            part = pick(heads, cache.full_heads).flatten(1, 2)
            part = full_attention(part, keys, values, scaling=scaling, softcap=softcap)
            parts.append((cache.full_heads, part))
        if cache.split.sliding:
            part = sliding_attention(
                pick(heads, cache.sliding_heads).flatten(1, 2),
                *sliding[index],
                window=cache.split.window,
                num_sink_tokens=cache.split.num_sink_tokens,
                scaling=scaling,
                softcap=softcap,
            )
            parts.append((cache.sliding_heads, part))
        out[rows, :, skipped:] = _merge(heads, parts)
    return out


def _decode(
    q: Tensor, cache: HybridLayer, k: Tensor, v: Tensor, scaling: float, softcap: float | None
) -> Tensor:
    """One token per sequence: whatever the cache then holds is visible to it, so order and window do not matter."""
    if cache.has_kernels(softcap):
        return cache.decode(q, k.detach(), v.detach(), scaling)
    heads = q.unflatten(1, (k.shape[1], -1))  # (batch, kv_heads, group, 1, head_dim)
    parts = []
    for selected, keys, values, visible in cache.append(k, v):
        part = pick(heads, selected).flatten(1, 2)
        if visible is None:
            part = full_attention(part, keys, values, scaling=scaling, softcap=softcap)
        else:  # a group's query heads are rows of one product
            folded = part.reshape(len(part), keys.shape[1], -1, q.shape[3])
            part = attend(folded, keys, values, visible, scaling, softcap).reshape(part.shape)
        parts.append((selected, part))
    return _merge(heads, parts)


def _merge(heads: Tensor, parts: list[tuple[Heads, Tensor]]) -> Tensor:
    """Outputs of some KV heads each, `(batch, q_heads of those, tokens, head_dim)`, as one of all heads in order."""
    if len(parts) == 1:
        return parts[0][1]
    out = torch.empty_like(heads)
    for selected, part in parts:
        out[:, selected] = part.unflatten(1, (-1, heads.shape[2]))
    return out.flatten(1, 2)


Heads = slice | Tensor  # KV heads side by side, or their indices


def selector(heads: tuple[int, ...], device: torch.device) -> Heads:
    """A slice where the heads lie side by side, since that takes a view and no copy, else their indices."""
    if heads and heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, dtype=torch.long, device=device)


def pick(x: Tensor, heads: Heads) -> Tensor:
    """Some of the heads of `(batch, heads, ...)`."""
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, heads)


def by_start(first: Tensor | None) -> list[tuple[Any, int]]:
    """Sequences that start at the same column, as (which, column)."""
    if first is None:
        return [(slice(None), 0)]
    return [((first == start).nonzero()[:, 0], start) for start in first.unique().tolist()]
