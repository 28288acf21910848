"""The attention of one model in a forward pass: fixed by an allocation, or mixed by gates."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention.ops import hybrid_attention, sliding_attention
from consa.attention.rows import Rows
from consa.cache.attend import cached_attention
from consa.cache.layer import NewKeys
from consa.cache.split import HeadSplit, by_start
from consa.errors import ConsaError

Observer = Callable[[int, Tensor, Tensor, float, float | None], None]
"""Called by each layer before it attends, with the layer's index, its queries `(batch, q_heads, queries, head_dim)`,
its keys `(batch, kv_heads, keys, head_dim)`, the scaling of the scores, and their tanh bound or None."""


class Plan:
    """The attention of a model; each of its attention layers holds the plan and calls it.

    Attributes:
        allocation: determines window, sink tokens and native windows, and FA or SWA of each head unless gates are set.
    """

    def __init__(self, allocation: Allocation, observer: Observer | None = None) -> None:
        self.allocation, self._observer = allocation, observer
        full = torch.tensor(allocation.full_attention, dtype=torch.float32, device="cpu")
        self._fixed = full[:, None, :]  # (layers, 1, kv_heads): the same for every sequence
        self._gates: tuple[Tensor, Tensor] | None = None
        self._gated_rows: list[Rows] = []
        self._splits = [HeadSplit.of(allocation, layer) for layer in range(allocation.num_layers)]
        self._rows: dict[tuple[int, int, torch.device], Rows] = {}

    @contextmanager
    def gated(self, z: Tensor, device: torch.device) -> Iterator[Tensor]:
        """Within the block, row (layer, sequence, KV head) computes `z * FA + (1 - z) * SWA`.

        Args:
            z: `(layers, batch, kv_heads)` float32 on the CPU.
            device: where the model runs.

        Yields:
            A leaf tensor like `z` on `device`, whose `.grad` the backward pass fills. Run the backward pass within the
            block too: activation checkpointing recomputes the attention.
        """
        leaf = z.detach().to(device, copy=True).requires_grad_()
        self._gates = (z.detach(), leaf)
        self._gated_rows = Rows.sort_layers(*self._gates)
        try:
            yield leaf
        finally:
            self._gates, self._gated_rows = None, []

    def attend(
        self, layer: int, q: Tensor, k: Tensor, v: Tensor, first: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """Attention of one layer, as `ops.hybrid_attention`; zero for padding queries.

        `first`, `(batch,)` on the CPU, is the index of each sequence's first real key, or None without left padding.
        """
        if self._observer:
            self._observer(layer, q, k, scaling, softcap)
        scores = {"scaling": scaling, "softcap": softcap}
        if first is None:
            return self._attend(layer, None, q, k, v, **scores)
        # Padding is cut off, not masked: sequences of equal length are computed together.
        out = torch.zeros_like(q)
        for sequences, start in by_start(first):
            there = sequences.to(q.device)
            skipped = max(0, start - (k.shape[2] - q.shape[2]))  # number of padding queries
            if skipped >= q.shape[2]:
                continue
            real_kv = (x[there, :, start:] for x in (k, v))
            part = self._attend(layer, sequences, q[there, :, skipped:], *real_kv, **scores)
            out = out.index_put((there,), torch.nn.functional.pad(part, (0, 0, skipped, 0)))
        return out

    def attend_cached(
        self, layer: int, q: Tensor, new: NewKeys, first: Tensor | None, scaling: float, softcap: float | None
    ) -> Tensor:
        """Attention of one layer over a cache; arguments and result as in `attend`.

        Raises:
            ConsaError: the cache was made for another allocation, or gates are set.
        """
        if self._gates is not None:
            raise ConsaError("gates need every token of every head, which a hybrid's cache drops; pass use_cache=False")
        # torch.compile supports == of dataclasses, but not !=.
        if not new.cache.split == self._splits[layer]:
            raise ConsaError("the cache was made for another allocation; make one with the allocation of this model")
        if new.cache.is_empty:
            out = self.attend(layer, q, new.key, new.value, first, scaling, softcap)
            new.cache.write(new.key, new.value, first)
            return out
        return cached_attention(q, new, first, scaling=scaling, softcap=softcap)

    def _attend(self, layer: int, sequences: Tensor | None, q: Tensor, k: Tensor, v: Tensor, **scores: Any) -> Tensor:
        if native_window := self.allocation.native_windows.get(layer):
            return sliding_attention(q, k, v, window=native_window, num_sink_tokens=0, **scores)
        rows = self._sorted_rows(layer, sequences, q.shape[0], q.device)
        limits = {"window": self.allocation.window, "num_sink_tokens": self.allocation.num_sink_tokens}
        return hybrid_attention(q, k, v, rows, **limits, **scores)

    def _sorted_rows(self, layer: int, sequences: Tensor | None, batch: int, device: torch.device) -> Rows:
        if self._gates is not None:
            if sequences is None:
                return self._gated_rows[layer]
            values, gates = (z[layer] for z in self._gates)
            return Rows.sort(values[sequences], gates[sequences.to(device)])
        key = (layer, batch, device)
        if key not in self._rows:
            with torch.inference_mode(False):  # training may reuse the tensors
                values = self._fixed[layer].expand(batch, -1)
                self._rows[key] = Rows.sort(values, values.to(device))
        return self._rows[key]
