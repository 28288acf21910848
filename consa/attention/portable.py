"""Full, sliding-window and gated attention in plain PyTorch, on any device.

Sliding-window attention costs O(queries * window). `consa.attention.ops` chooses between this and the Triton kernels.

Shape suffixes: B rows, H KV heads, G query heads per KV head, T queries, S keys, N query blocks, C columns, D head_dim.
"""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from consa.attention import masks
from consa.attention.rows import Rows

QUERY_BLOCK = 512  # queries that share one mask; bounds peak memory
MIN_SLIDING_BLOCK = 64  # smaller blocks make the matrix products inefficient


def must_repeat(*inputs: Tensor) -> bool:
    """Whether the gradients must be deterministic, which PyTorch's CUDA attention kernels do not guarantee."""
    needs_gradients = torch.is_grad_enabled() and any(x.requires_grad for x in inputs)
    return needs_gradients and torch.are_deterministic_algorithms_enabled()


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, scaling: float, softcap: float | None = None) -> Tensor:
    """Causal attention. The last query has the position of the last key.

    Args:
        q: `(batch, q_heads, queries, head_dim)`.
        k: `(batch, kv_heads, keys, head_dim)`, keys >= queries.
        v: as `k`.
        scaling: factor on the scores.
        softcap: tanh bound on the scores, or None.

    Returns:
        As `q`.
    """
    queries, keys = q.shape[2], k.shape[2]
    if softcap is None and (queries == keys or queries == 1):
        return F.scaled_dot_product_attention(
            q, k, v, is_causal=queries > 1, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
    blocks = []
    for start in range(0, queries, QUERY_BLOCK):  # a mask covers one block of queries, never all of them
        block = q[:, :, start : start + QUERY_BLOCK]
        seen = keys - queries + start + block.shape[2]
        query = torch.arange(seen - block.shape[2], seen, device=q.device).repeat(q.shape[1] // k.shape[1])
        visible = masks.causal(query[:, None], torch.arange(seen, device=q.device))
        folded = block.reshape(len(q), k.shape[1], -1, q.shape[3])  # the query heads of a KV head become rows
        out = attend(folded, k[:, :, :seen], v[:, :, :seen], visible, scaling, softcap)
        blocks.append(out.reshape(block.shape))
    return torch.cat(blocks, dim=2)


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, num_sink_tokens: int, scaling: float, softcap: float | None = None
) -> Tensor:
    """Sliding-window attention with sink tokens; arguments and result as in `full_attention`.

    An SWA query sees `window` tokens, itself included, and the first `num_sink_tokens`. Queries are processed in
    blocks: a block sees its own keys, the `window - 1` keys before them, and the sinks, so the work per query depends
    on the window and not on the number of keys.
    """
    (B, HG, T, D), (_, H, S, _) = q.shape, k.shape
    if window + num_sink_tokens >= S:  # every query sees every earlier key
        return full_attention(q, k, v, scaling=scaling, softcap=softcap)
    block = min(max(window, MIN_SLIDING_BLOCK), QUERY_BLOCK, T)
    N, reach, offset = -(-T // block), window - 1, S - T
    first = max(0, offset - reach)

    def key_blocks(x: Tensor) -> Tensor:  # (B,H,S,D) -> (N, B*H, C, D)
        near = F.pad(x[:, :, first:], (0, 0, max(0, reach - offset), N * block - T)).flatten(0, 1)
        near = near.unfold(1, block + reach, block).permute(1, 0, 3, 2)
        sinks = x[:, :, :num_sink_tokens].flatten(0, 1).expand(N, -1, -1, -1)
        return torch.cat([near, sinks], dim=2)

    # The query heads of a KV head become rows of one product, so its keys are read once for all of them.
    q_blocks = F.pad(q, (0, 0, 0, N * block - T)).reshape(B * H, HG // H, N, block, D)
    q_blocks = q_blocks.permute(2, 0, 1, 3, 4).reshape(N, B * H, -1, D)
    visible = _sliding_mask(N, block, HG // H, offset, window, num_sink_tokens, q.device)
    out = attend(q_blocks, key_blocks(k), key_blocks(v), visible, scaling, softcap)
    out = out.reshape(N, B * H, HG // H, block, D).permute(1, 2, 0, 3, 4)
    return out.reshape(B, HG, N * block, D)[:, :, :T]


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

    Of the sorted `batch * kv_heads` rows, some need FA and some SWA. Other arguments are as in `sliding_attention`.
    """
    sliding_options = {"window": window, "num_sink_tokens": num_sink_tokens, "scaling": scaling, "softcap": softcap}
    total = len(rows.order)
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
        near = sliding[: rows.num_mixed].float()  # float32: the gate's gradient sums over a whole row
        z = rows.gates[rows.order[first_swa:num_fa], None, None, None]
        parts.append((near + z * (full[first_swa:].float() - near)).to(sliding.dtype))
    parts.append(sliding[rows.num_mixed :])
    return _Permute.apply(torch.cat(parts), inverse, rows.order).reshape(shape)


@lru_cache(maxsize=16)  # all layers of a model use the same mask
def _sliding_mask(
    num_blocks: int, block: int, group: int, offset: int, window: int, num_sink_tokens: int, device: torch.device
) -> Tensor:
    """bool `(blocks, 1, group * block, block + window - 1 + sinks)`: the columns that each query sees."""
    start = offset + block * torch.arange(num_blocks, device=device)[:, None, None, None]
    query = start + torch.arange(block, device=device).repeat(group)[:, None]
    near = start - (window - 1) + torch.arange(block + window - 1, device=device)
    sink = torch.arange(num_sink_tokens, device=device)
    in_window = masks.in_window(query, near, window) & (near >= 0)
    return torch.cat([in_window, masks.beyond_window_sink(query, sink, window, num_sink_tokens)], dim=-1)


def attend(q: Tensor, k: Tensor, v: Tensor, visible: Tensor, scaling: float, softcap: float | None) -> Tensor:
    """Attention with one query head per KV head, under a bool mask that broadcasts to `(..., queries, keys)`."""
    if softcap is None:
        return F.scaled_dot_product_attention(q, k, v, attn_mask=visible, scale=scaling)

    def capped(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        scores = softcap * torch.tanh((q @ k.transpose(-1, -2)).float() * (scaling / softcap))
        return scores.masked_fill(~visible, float("-inf")).softmax(-1).to(v.dtype) @ v

    # Recomputed in the backward pass: the scores of all blocks together take queries x keys.
    return checkpoint(capped, q, k, v, use_reentrant=False) if torch.is_grad_enabled() else capped(q, k, v)


class _Permute(torch.autograd.Function):
    """Reorder the first dimension. The gradient is the inverse gather; autograd's own scatter would use atomics."""

    @staticmethod
    def forward(ctx, x: Tensor, order: Tensor, inverse: Tensor) -> Tensor:
        ctx.save_for_backward(inverse)
        return x.index_select(0, order)

    @staticmethod
    def backward(ctx, grad: Tensor):
        (inverse,) = ctx.saved_tensors
        return grad.index_select(0, inverse), None, None
