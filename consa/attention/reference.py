"""The ground truth that every other path is tested against: dense masks, float32 or better."""

from __future__ import annotations

import torch
from torch import Tensor

from consa.attention import masks


def reference_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    z: Tensor,
    *,
    window: int,
    num_sink_tokens: int,
    scaling: float,
    softcap: float | None = None,
    first: Tensor | None = None,
) -> Tensor:
    """`z * FA(q, k, v) + (1 - z) * SWA(q, k, v)`, in float32 or better, with dense masks of queries x keys.

    Args:
        q: `(batch, q_heads, queries, head_dim)`; the last query sits on the last key.
        k: `(batch, kv_heads, keys, head_dim)`.
        v: as `k`.
        z: `(batch or 1, kv_heads)`, 1 for full attention, 0 for sliding-window attention.
        window: tokens an SWA query sees, itself included.
        num_sink_tokens: first tokens of each sequence that stay visible.
        scaling: factor on the scores before the softmax.
        softcap: if not None, scores become `softcap * tanh(score / softcap)`.
        first: `(batch,)` index of each sequence's first real key; keys before it are padding.

    Returns:
        `(batch, q_heads, queries, head_dim)`; zero for padding queries.
    """
    dtype = torch.promote_types(q.dtype, torch.float32)
    group = q.shape[1] // k.shape[1]
    q, k, v, z = (tensor.to(dtype) for tensor in (q, k, v, z))
    k, v, z = (tensor.repeat_interleave(group, dim=1) for tensor in (k, v, z))
    first = torch.zeros(len(q), dtype=torch.long) if first is None else first
    key = torch.arange(k.shape[2], device=q.device) - first.to(q.device)[:, None, None, None]
    query = key[..., -q.shape[2] :].transpose(2, 3)
    scores = q @ k.transpose(2, 3) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)

    def attend(visible: Tensor) -> Tensor:
        visible = visible & (key >= 0)
        weights = scores.masked_fill(~visible, float("-inf")).softmax(-1)
        return torch.where(query >= 0, weights.nan_to_num() @ v, 0)

    full = attend(masks.causal(query, key))
    sliding = attend(masks.sliding(query, key, window, num_sink_tokens))
    z = z[:, :, None, None]
    return z * full + (1 - z) * sliding
