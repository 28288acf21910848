"""A layer of a hybrid's KV cache with storage of a fixed size, for torch.compile and CUDA graphs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from consa.cache.layer import STORAGE, HybridLayer
from consa.cache.split import Heads, HeadSplit, pick
from consa.errors import ConsaError


class StaticHybridLayer(HybridLayer):
    """A `HybridLayer` with a fixed capacity.

    In a recorded graph, decoding one token reads no number from the device: masks hide unwritten slots. Outside a
    graph, every layer waits for the device to read its length; a `HybridLayer` does not.

    Args:
        split: which heads keep which tokens.
        max_length: capacity in tokens, including padding.
    """

    is_compileable = True
    is_croppable = False

    def __init__(self, split: HeadSplit, max_length: int) -> None:
        self.max_length = max_length
        self.cumulative_length = torch.tensor(0)  # a tensor: a Python number would be compiled into the graph
        super().__init__(split)

    @property
    def length(self) -> int:
        """Tokens seen; waits for the device."""
        return int(self.cumulative_length)

    @length.setter
    def length(self, value: int) -> None:
        self.cumulative_length.fill_(value)

    def reset(self) -> None:
        """Forget everything, and keep the memory."""
        if not self.is_initialized:
            super().reset()
        self.length = 0
        self._begun = False  # whether every sequence is known to have started
        self._start(None)

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Allocate everything."""
        super().lazy_initialization(key_states, value_states)
        self.cumulative_length = self.cumulative_length.to(self.device)
        self._grow("full", len(self.split.full), key_states, self.max_length)
        self._grow("sliding", len(self.split.sliding), key_states, min(self.max_length, self.split.kept))
        if not torch.compiler.is_compiling():  # so that CUDA graphs may write to them
            for tensor in (self.cumulative_length, *(getattr(self, name) for name in STORAGE)):
                if tensor is not None:
                    torch._dynamo.mark_static_address(tensor)

    @property
    def is_empty(self) -> bool:
        """As `HybridLayer.is_empty`; recorded graphs only decode, after a prefill outside the graph."""
        return not _recording() and super().is_empty

    def can_append(self, key: Tensor, first: Tensor | None) -> bool:
        """As `HybridLayer.can_append`."""
        if _recording():
            return key.shape[2] == 1 and (first is None or self._begun)
        return super().can_append(key, first)

    def write(self, key: Tensor, value: Tensor, first: Tensor | None) -> list[Tensor]:
        """As `HybridLayer.write`."""
        full = super().write(key, value, first)
        self._begun = not _recording() and self._latest < self.length
        return full

    def append(self, key: Tensor, value: Tensor) -> list[tuple[Heads, Tensor, Tensor, Tensor | None]]:
        """As `HybridLayer.append`."""
        if not _recording():
            self._reserve(key, self.length + 1)
        column, parts = self.cumulative_length, []
        if self.split.full:
            for storage, new in ((self.full_keys, key), (self.full_values, value)):
                storage.index_copy_(2, column.view(1), pick(new, self.full_heads))
            there = torch.arange(self.max_length, device=self.device)
            visible = (there <= column).view(1, 1, 1, -1)
            if self._first_there is not None:
                visible = visible & (there >= self._first_there[:, None, None, None])
            parts.append((self.full_heads, self.full_keys, self.full_values, visible))
        if self.split.sliding:
            start = 0 if self._first_there is None else self._first_there
            position = (column - start).view(-1)  # (batch,), or (1,) if all are equal
            slot = self._slots_of(position)
            for storage, new in ((self.sliding_keys, key), (self.sliding_values, value)):
                new = pick(new, self.sliding_heads)
                if self._first_there is None:
                    storage.index_copy_(2, slot, new)
                else:
                    storage[torch.arange(len(new), device=self.device), :, slot] = new[:, :, 0]
            there = torch.arange(self.sliding_keys.shape[2], device=self.device)
            visible = there <= position[:, None, None, None]
            parts.append((self.sliding_heads, self.sliding_keys, self.sliding_values, visible))
        column.add_(1)
        self._waiting = False
        return parts

    def decode(self, q: Tensor, key: Tensor, value: Tensor, scaling: float) -> Tensor:
        """As `HybridLayer.decode`."""
        if not _recording():
            self._reserve(key, self.length + 1)
        out = self._decode(q, key, value, self.cumulative_length, scaling)
        self.cumulative_length.add_(1)
        self._waiting = False
        return out

    def _reserve(self, like: Tensor, tokens: int) -> None:
        if tokens > self.max_length:
            raise ConsaError(
                f"the cache has room for {self.max_length} tokens, but {tokens} are needed; raise its max_length"
            )

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Zeros: this layer needs no mask, and its length is a number on the device."""
        return 0, 0

    def get_seq_length(self) -> Any:
        """Tokens seen, as a scalar tensor."""
        return self.cumulative_length.clone() if self.is_initialized else 0

    def get_max_length(self) -> int:
        """Capacity in tokens."""
        return self.max_length


def _recording() -> bool:
    """Whether torch.compile or a CUDA graph records the current code, which must not read from the device then."""
    if torch.compiler.is_compiling():
        return True
    return torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()
