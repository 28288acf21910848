"""The hybrid: each KV head of each sequence takes one branch, or both mixed by its gate.

A *row* is one KV head of one sequence, with its query heads. Rows are sorted by what they need, so that full
attention runs on the rows with z > 0 and sliding-window attention on those with z < 1, and on nothing else: under the
clip of the hard-concrete gate a z of exactly 0 or 1 has no gradient, so leaving the other branch out is exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consa.attention.branches import full_attention, fused_for, sliding_attention


@dataclass(frozen=True)
class Rows:
    """The rows of one layer, sorted: first those on FA alone, then the mixed ones, then those on SWA alone."""

    order: Tensor  # (rows,) int64 on the model's device: sorted place -> row
    num_full: int
    num_mixed: int
    gates: Tensor  # (rows,) float32 of all of them, unsorted, differentiable

    @classmethod
    def sort(cls, values: Tensor, gates: Tensor) -> Rows:
        """The rows of one layer, `(batch, kv_heads)`; see `sort_layers`."""
        return cls.sort_layers(values[None], gates[None])[0]

    @classmethod
    def sort_layers(cls, values: Tensor, gates: Tensor) -> list[Rows]:
        """Sort each layer's by `values`, `(layers, batch, kv_heads)` on the CPU: planning never waits for a device.

        `gates` are the same numbers on the model's device, and what gradients flow to.
        """
        values = values.flatten(1)
        kind = (values < 1).int() + (values <= 0).int()  # 0 full, 1 mixed, 2 sliding
        order = torch.argsort(kind, dim=1, stable=True).to(gates.device, non_blocking=True)
        counts = zip((kind == 0).sum(1).tolist(), (kind == 1).sum(1).tolist(), strict=True)
        return [cls(order[layer], *number, gates[layer].flatten()) for layer, number in enumerate(counts)]


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    *,
    window: int,
    num_sink_tokens: int,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """`z * FA + (1 - z) * SWA` per row (ConSA, arXiv 2606.18056), computing only what each row needs.

    Args:
        q: `(batch, q_heads, queries, head_dim)`; the last query sits on the last key.
        k: `(batch, kv_heads, keys, head_dim)`, no padding.
        v: as `k`.
        rows: the sorted `batch * kv_heads` rows.
        window: tokens an SWA query sees, itself included.
        num_sink_tokens: first tokens that stay visible to SWA.
        scaling: factor on the scores.
        softcap: bound on the scores by tanh, or None.

    Returns:
        As `q`.
    """
    sliding_options = {
        "window": window,
        "num_sink_tokens": num_sink_tokens,
        "scaling": scaling,
        "softcap": softcap,
    }
    total = len(rows.order)
    if rows.num_full == total:
        return full_attention(q, k, v, scaling=scaling, softcap=softcap)
    if rows.num_full + rows.num_mixed == 0:
        return sliding_attention(q, k, v, **sliding_options)
    if fused := fused_for(q, k, v, softcap):
        return fused.hybrid_attention(
            q, k, v, rows, window=window, num_sink_tokens=num_sink_tokens, scaling=scaling
        )

    inverse = torch.argsort(rows.order)

    def by_row(x: Tensor) -> Tensor:  # (batch, heads, ...) -> (rows, heads per row, ...)
        return _Permute.apply(x.reshape(total, -1, *x.shape[2:]), rows.order, inverse)

    shape = q.shape
    q, k, v = by_row(q), by_row(k), by_row(v)
    num_fa, first_swa = rows.num_full + rows.num_mixed, rows.num_full
    full = full_attention(q[:num_fa], k[:num_fa], v[:num_fa], scaling=scaling, softcap=softcap)
    sliding = sliding_attention(q[first_swa:], k[first_swa:], v[first_swa:], **sliding_options)
    parts = [full[:first_swa]]
    if rows.num_mixed:
        near = sliding[: rows.num_mixed].float()  # float32: the gate's gradient is a sum over a whole row
        z = rows.gates[rows.order[first_swa:num_fa], None, None, None]
        parts.append((near + z * (full[first_swa:].float() - near)).to(sliding.dtype))
    parts.append(sliding[rows.num_mixed :])
    return _Permute.apply(torch.cat(parts), inverse, rows.order).reshape(shape)


class _Permute(torch.autograd.Function):
    """Reorder the first dimension; the gradient is the inverse gather, where autograd would scatter with atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
