"""Rows of one layer, sorted by the kind of attention that each needs.

A *row* is one KV head of one sequence, with its query heads. Full attention runs on the rows with z > 0 and
sliding-window attention on those with z < 1, and on no others. That is exact: the hard-concrete gate clips z, and a z
of exactly 0 or 1 has no gradient.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """The rows of one layer in sorted order: FA only, then mixed, then SWA only."""

    order: Tensor  # (rows,) int64 on the model's device: sorted position -> row
    num_full: int
    num_mixed: int
    gates: Tensor  # (rows,) float32, unsorted, differentiable

    @classmethod
    def sort(cls, values: Tensor, gates: Tensor) -> Rows:
        """The rows of one layer, `(batch, kv_heads)`; see `sort_layers`."""
        return cls.sort_layers(values[None], gates[None])[0]

    @classmethod
    def sort_layers(cls, values: Tensor, gates: Tensor) -> list[Rows]:
        """Sort the rows of each layer by `values`, `(layers, batch, kv_heads)`.

        `values` is on the CPU, so that planning never waits for a device. `gates` are the same numbers on the model's
        device; gradients flow to them.
        """
        values = values.flatten(1)
        kind = (values < 1).int() + (values <= 0).int()  # 0 full, 1 mixed, 2 sliding
        order = torch.argsort(kind, dim=1, stable=True).to(gates.device, non_blocking=True)
        counts = zip((kind == 0).sum(1).tolist(), (kind == 1).sum(1).tolist(), strict=True)
        return [cls(order[layer], *number, gates[layer].flatten()) for layer, number in enumerate(counts)]
