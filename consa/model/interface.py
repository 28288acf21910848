"""The attention and mask functions that transformers calls for "consa"; `consa.model.register` registers them."""

from __future__ import annotations

import functools
import json
from typing import Any

import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.cache.layer import NewKeys, as_computed
from consa.errors import ConsaError
from consa.model.plan import Plan

NAME = "consa"
INSPECT_NAME = "consa_inspect"  # used only on skeletons without weights


def consa_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, *args: Any, **options: Any
) -> tuple[Tensor, None]:
    """transformers' attention function: `(batch, heads, tokens, head_dim)` in, `(batch, tokens, heads, head_dim)` out.

    Further arguments have the order of transformers' flash attention: dropout, scaling, sliding_window, softcap.
    torch.compile compiles it only for attention over a cache. Elsewhere, the values of the gates decide at every draw
    which kernels run on which rows.

    Raises:
        ConsaError: the module has no plan, or asks for something that consa cannot compute exactly.
    """
    attend = _attend if isinstance(key, NewKeys) else _attend_uncompiled
    return attend(module, query, key, value, attention_mask, *args, **options)


def _attend(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,  # the allocation holds native windows
    softcap: float | None = None,
    **ignored: Any,
) -> tuple[Tensor, None]:
    plan = getattr(module, "consa_plan", None)
    if plan is None:
        plan = module.consa_plan = _plan_of(module, query, key)
    if "cache" in ignored:
        raise ConsaError("paged caches (generate_batch) are not supported; use generate")
    if dropout:
        raise ConsaError(f"attention dropout {dropout} is not supported; set the config's attention_dropout to 0")
    first = None
    if attention_mask is not None:
        if attention_mask.shape != (len(query), 1, 1, 1) or attention_mask.dtype != torch.long:
            raise ConsaError(
                f"an attention mask of shape {tuple(attention_mask.shape)} is not supported; pass (batch, tokens)"
            )
        first = attention_mask.flatten()
    if scaling is None:
        scaling = float(query.shape[-1] ** -0.5)
    if isinstance(key, NewKeys):
        (query,) = as_computed(query)
        out = plan.attend_cached(module.layer_idx, query, key, first, scaling, softcap)
    else:
        query, key, value = as_computed(query, key, value)
        out = plan.attend(module.layer_idx, query, key, value, first, scaling, softcap)
    return out.transpose(1, 2).contiguous(), None


_attend_uncompiled: Any = torch.compiler.disable(_attend)


def allocation_of(config: Any) -> Allocation | None:
    """The allocation that a converted model's config holds, or None."""
    record = getattr(config, "consa", None)
    return None if record is None else _parse(json.dumps(record))


_parse = functools.lru_cache(maxsize=16)(Allocation.from_json)


def _plan_of(module: Any, query: Tensor, key: Tensor | NewKeys) -> Plan:
    """The plan of a converted model that was not loaded by `consa.load`."""
    allocation = allocation_of(module.config)
    if allocation is None:
        raise ConsaError("this model has attn_implementation='consa' but no allocation; use consa.attached")
    heads = (key.key if isinstance(key, NewKeys) else key).shape[1]
    if (allocation.num_layers, allocation.num_kv_heads) != (module.config.num_hidden_layers, heads):
        raise ConsaError(
            f"the config's allocation is for {allocation.num_layers} layers x {allocation.num_kv_heads} KV heads, the"
            f" model has {module.config.num_hidden_layers} x {heads}; convert the model again"
        )
    return Plan(allocation)


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
    """transformers' mask function: the first real column of each sequence, `(batch, 1, 1, 1)` on the CPU, or None.

    Right padding needs no mask, because no real query follows it. The result has four dimensions because transformers
    passes on such masks unchanged.

    Raises:
        ConsaError: packed sequences, a StaticCache, or a mask with holes, which consa cannot compute exactly.
    """
    # Before torch 2.11, is_exporting() is true under torch.compile, too.
    if torch.compiler.is_exporting() and not torch.compiler.is_dynamo_compiling():
        raise ConsaError("torch.export of a hybrid is not supported; use torch.compile, or consa convert and a server")
    # StaticHybridLayer reports length 0, for which transformers never skips the mask.
    static = kv_length == 0
    if not allow_is_causal_skip and not static:
        raise ConsaError(
            "packed sequences and custom masks are not supported; give each document its own row, and pass"
            " attention_mask under torch.compile"
        )
    if not static and int(q_offset) + q_length != kv_offset + kv_length:
        raise ConsaError(
            f"keys end at {kv_offset + kv_length} but queries at {int(q_offset) + q_length}: a StaticCache of"
            " transformers is not supported, use HybridCache or the default; an attention mask must cover all keys"
        )
    if attention_mask is None:
        return None
    end = attention_mask.shape[-1] if static else kv_offset + kv_length
    if attention_mask.shape[-1] < end:
        raise ConsaError(f"the attention mask covers {attention_mask.shape[-1]} of {end} keys; it must cover all")
    real = attention_mask[:, kv_offset:end].bool().cpu()  # the mask may extend beyond the keys
    starts = torch.cat([real[:, :1], real[:, 1:] & ~real[:, :-1]], dim=1)
    if int(starts.sum(1).max()) > 1:
        raise ConsaError("the attention mask has holes; only padding before or after a sequence is supported")
    # A row of padding belongs to a sequence that starts later.
    first = torch.where(real.any(1), real.int().argmax(1), real.shape[1])
    return first[:, None, None, None] if bool(first.any()) else None


def is_attention(module: Any) -> bool:
    """Whether a module is an attention layer, as transformers writes them."""
    return hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")


def inspected_mask(*args: Any, allow_is_causal_skip: bool = True, **ignored: Any) -> None:
    """The mask function of a skeleton: None, unless `consa_mask` would refuse the masks of the family."""
    if not allow_is_causal_skip:
        raise ConsaError("its masks are not causal ones")


def record_call(
    module: Any, query: Tensor, key: Tensor | NewKeys, value: Tensor, attention_mask: Tensor | None, **keywords: Any
) -> tuple[Tensor, None]:
    """The attention function of a skeleton: stores its arguments on the module and returns an empty tensor."""
    if isinstance(key, NewKeys):
        _, key, value = key
    module.consa_call = (query, key, value, keywords)
    return query.new_empty((*query.shape[:3], value.shape[3])).transpose(1, 2), None
