"""Which KV heads of a layer a hybrid's cache keeps whole, and how to pick heads and sequences out of tensors."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from consa.allocation import Allocation

Heads = slice | Tensor
"""KV heads of a tensor: a slice if they are contiguous, else their indices."""


@dataclass(frozen=True)
class HeadSplit:
    """What the cache of one layer keeps."""

    full: tuple[int, ...]  # KV heads that keep every token
    sliding: tuple[
        int, ...
    ]  # KV heads that keep the `num_sink_tokens` first tokens and the last `window` of the others
    window: int
    num_sink_tokens: int

    @classmethod
    def of(cls, allocation: Allocation, layer: int) -> HeadSplit:
        """The split of one layer. A layer with a native window is all SWA, without sinks."""
        full = tuple(allocation.full_attention[layer].nonzero()[0].tolist())
        sliding = tuple(head for head in range(allocation.num_kv_heads) if head not in full)
        if layer in allocation.native_windows:
            return cls(full, sliding, allocation.native_windows[layer], 0)
        return cls(full, sliding, allocation.window, allocation.num_sink_tokens)

    @property
    def kept(self) -> int:
        """The most tokens that an SWA head keeps."""
        return self.num_sink_tokens + self.window


def selector(heads: tuple[int, ...], device: torch.device) -> Heads:
    """The heads as a slice if they are contiguous, because slicing copies nothing; else as a tensor of indices."""
    if heads and heads == tuple(range(heads[0], heads[-1] + 1)):
        return slice(heads[0], heads[-1] + 1)
    return torch.tensor(heads, dtype=torch.long, device=device)


def pick(x: Tensor, heads: Heads) -> Tensor:
    """Some of the heads of `(batch, heads, ...)`."""
    return x[:, heads] if isinstance(heads, slice) else x.index_select(1, heads)


def by_start(first: Tensor | None) -> list[tuple[Any, int]]:
    """Group sequences by the column of their first real token, `(batch,)`: pairs of (sequences, column)."""
    if first is None:
        return [(slice(None), 0)]
    return [((first == start).nonzero()[:, 0], start) for start in first.unique().tolist()]
