"""Registers consa's attention and mask with transformers, under the name "consa"; importing it changes no other model.

Both are needed: with an attention function alone, transformers makes no mask and padding would be ignored in silence.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface

from consa.errors import ConsaError

NAME = "consa"
INSPECT_NAME = "consa_inspect"  # only ever set on skeletons without weights


def consa_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    """transformers' attention function: `(batch, heads, tokens, head_dim)` in, `(batch, tokens, heads, head_dim)` out.

    Raises:
        ConsaError: the module belongs to no attached model, or asks for something that would not be exact.
    """
    plan = getattr(module, "consa_plan", None)
    if plan is None:
        raise ConsaError(
            "this model says attn_implementation='consa' but has no allocation; use consa.attached"
        )
    if dropout:
        raise ConsaError(
            f"attention dropout {dropout} is not supported; set the config's attention_dropout to 0"
        )
    if attention_mask is not None and attention_mask.ndim != 1:
        raise ConsaError(
            f"an attention mask of shape {tuple(attention_mask.shape)} cannot be honoured; pass (batch, tokens)"
        )
    if scaling is None:
        scaling = query.shape[-1] ** -0.5
    out = plan.attend(module.layer_idx, query, key, value, attention_mask, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


def consa_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int = 0,
    kv_offset: int = 0,
    attention_mask: Tensor | None = None,
    allow_is_causal_skip: bool = True,
    **ignored: Any,
) -> Tensor | None:
    """transformers' mask function: where each sequence's first real key lies, `(batch,)` on the CPU, or None.

    Padding on the right needs no mask, since no real query comes after it.

    Raises:
        ConsaError: packed sequences, a static cache, or a mask with holes, none of which would be exact.
    """
    if not allow_is_causal_skip:
        raise ConsaError(
            "packed sequences and custom masks are not supported; give each document its own row"
        )
    if int(q_offset) + q_length != kv_offset + kv_length:
        raise ConsaError(
            f"keys end at {kv_offset + kv_length} but queries at {int(q_offset) + q_length}: a static cache is not"
            " supported; use the default dynamic one"
        )
    if attention_mask is None:
        return None
    if attention_mask.shape[-1] < kv_length:
        raise ConsaError(
            f"the attention mask covers {attention_mask.shape[-1]} of {kv_length} keys; cover all"
        )
    real = attention_mask[:, -kv_length:].bool().cpu()
    starts = torch.cat([real[:, :1], real[:, 1:] & ~real[:, :-1]], dim=1)
    if int(starts.sum(1).max()) > 1:
        raise ConsaError("the attention mask has holes; only padding before or after a sequence is supported")
    first = real.int().argmax(1)
    return first if bool(first.any()) else None


def record_call(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **keywords: Any,
) -> tuple[Tensor, None]:
    """Stands in for attention in a skeleton: leaves what was asked for on the module, and returns the right shape."""
    module.consa_call = (query, key, value, keywords)
    return torch.empty_like(query).transpose(1, 2), None


AttentionInterface.register(NAME, consa_attention)
AttentionMaskInterface.register(NAME, consa_mask)
AttentionInterface.register(INSPECT_NAME, record_call)
AttentionMaskInterface.register(INSPECT_NAME, lambda *args, **kwargs: None)
