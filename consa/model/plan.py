"""What the attention layers of one model do in a forward pass: fixed by an allocation, or mixed by gates."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention.ops import hybrid_attention, sliding_attention
from consa.attention.rows import Rows
from consa.cache.attend import HeadSplit, NewKeys, by_start, cached_attention
from consa.errors import ConsaError


class Plan:
    """Carried by every attention layer of an attached model; `attend` is what each of them calls.

    Attributes:
        allocation: window, sink tokens and native windows come from it, and the heads' branches while no gates are set.
    """

    def __init__(self, allocation: Allocation) -> None:
        self.allocation = allocation
        full = torch.tensor(allocation.full_attention, dtype=torch.float32)
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
            A leaf tensor like `z` on `device`, whose `.grad` the backward pass fills; run that within the block too,
            since activation checkpointing computes the attention again.
        """
        leaf = z.detach().to(device, copy=True).requires_grad_()
        self._gates = (z.detach(), leaf)
        self._gated_rows = Rows.sort_layers(*self._gates)
        try:
            yield leaf
        finally:
            self._gates, self._gated_rows = None, []

    def attend(
        self,
        layer: int,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        first: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of one layer.

        Args:
            layer: index of the layer.
            q: `(batch, q_heads, queries, head_dim)`; the last query sits on the last key.
            k: `(batch, kv_heads, keys, head_dim)`.
            v: as `k`.
            first: `(batch,)` on the CPU, index of each sequence's first real key, or None without left padding.
            scaling: factor on the scores.
            softcap: bound on the scores by tanh, or None.

        Returns:
            As `q`; zero for queries that are padding.
        """
        if first is None:
            return self._attend(layer, None, q, k, v, scaling, softcap)
        # Without its padding, a sequence is an ordinary one: group those of equal length and shift each to its start.
        out = torch.zeros_like(q)
        for sequences, start in by_start(first):
            there = sequences.to(q.device)
            skipped = max(0, start - (k.shape[2] - q.shape[2]))  # queries that are padding
            if skipped >= q.shape[2]:
                continue
            part = self._attend(
                layer,
                sequences,
                q[there, :, skipped:],
                k[there, :, start:],
                v[there, :, start:],
                scaling,
                softcap,
            )
            out = out.index_put((there,), torch.nn.functional.pad(part, (0, 0, skipped, 0)))
        return out

    def attend_cached(
        self,
        layer: int,
        q: Tensor,
        new: NewKeys,
        first: Tensor | None,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        """Attention of one layer over a cache; arguments and result as in `attend`.

        Raises:
            ConsaError: the cache is of another allocation, or the plan asks for more than it keeps.
        """
        if self._gates is not None:
            raise ConsaError("a hybrid's cache does not keep what full attention needs; pass use_cache=False")
        # Of dataclasses, torch.compile can tell == and not !=.
        if not new.cache.split == self._splits[layer]:
            raise ConsaError("the cache was made for another allocation than the model's; make a new one")
        if new.cache.is_empty:
            out = self.attend(layer, q, new.key, new.value, first, scaling, softcap)
            new.cache.write(new.key, new.value, first)
            return out
        return cached_attention(q, new, first, scaling=scaling, softcap=softcap)

    def _attend(
        self,
        layer: int,
        sequences: Tensor | None,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scaling: float,
        softcap: float | None,
    ) -> Tensor:
        native_window = self.allocation.native_windows.get(layer)
        if native_window is not None:
            return sliding_attention(
                q, k, v, window=native_window, num_sink_tokens=0, scaling=scaling, softcap=softcap
            )
        return hybrid_attention(
            q,
            k,
            v,
            self._sorted_rows(layer, sequences, q.shape[0], q.device),
            window=self.allocation.window,
            num_sink_tokens=self.allocation.num_sink_tokens,
            scaling=scaling,
            softcap=softcap,
        )

    def _sorted_rows(self, layer: int, sequences: Tensor | None, batch: int, device: torch.device) -> Rows:
        if self._gates is not None:
            if sequences is None:
                return self._gated_rows[layer]
            values, gates = (z[layer] for z in self._gates)
            return Rows.sort(values[sequences], gates[sequences.to(device)])
        key = (layer, batch, device)
        if key not in self._rows:
            with torch.inference_mode(False):  # training may come later
                values = self._fixed[layer].expand(batch, -1)
                self._rows[key] = Rows.sort(values, values.to(device))
        return self._rows[key]
