"""Registers consa's attention, mask and cache with transformers; importing it changes nothing for other models.

`consa.load` and `consa.attached` import it. Import it by hand to have
`AutoModelForCausalLM.from_pretrained` load a converted model: without it, transformers does not know the attention
"consa" and refuses.

Attention and mask are both needed: with an attention function alone, transformers makes no mask and padding would be
ignored in silence.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import AttentionInterface, AttentionMaskInterface, cache_utils
from transformers.cache_utils import CacheLayerMixin

from consa.allocation import Allocation
from consa.attention import interface
from consa.cache import dynamic_layer, static_layer
from consa.errors import ConsaError

_stock_layer_types = cache_utils.get_layer_types_and_kwargs


def layer_types_and_kwargs(config: Any) -> tuple[list[str], Any]:
    """transformers' `get_layer_types_and_kwargs`, with consa's layers for a config that holds an allocation.

    Raises:
        ConsaError: the model holds an allocation but was told to use another attention.
    """
    allocation = interface.allocation_of(config)
    stock = _stock_layer_types(config)
    if allocation is None:
        return stock
    if config._attn_implementation != interface.NAME:
        raise ConsaError(
            f"this model is a hybrid, but attn_implementation={config._attn_implementation!r} would run it as full"
            " attention; load it with consa.load, and pass no attn_implementation"
        )
    layers = range(allocation.num_layers)
    kwargs: Any = [{"allocation": allocation, "layers": iter([layer])} for layer in layers]
    if isinstance(stock[1], dict):  # older versions make all layers with the same arguments, in order
        kwargs = {"allocation": allocation, "layers": iter(layers)}
    return [interface.NAME] * len(layers), kwargs


def _dynamic(allocation: Allocation, layers: Iterator[int]) -> CacheLayerMixin:
    return dynamic_layer(allocation, next(layers))


def _static(allocation: Allocation, layers: Iterator[int], max_cache_len: int) -> CacheLayerMixin:
    return static_layer(allocation, next(layers), max_cache_len)


AttentionInterface.register(interface.NAME, interface.consa_attention)
AttentionMaskInterface.register(interface.NAME, interface.consa_mask)
AttentionInterface.register(interface.INSPECT_NAME, interface.record_call)
AttentionMaskInterface.register(interface.INSPECT_NAME, lambda *args, **kwargs: None)
cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[interface.NAME] = _dynamic
cache_utils.STATIC_LAYER_TYPE_MAPPING[interface.NAME] = _static
cache_utils.get_layer_types_and_kwargs = layer_types_and_kwargs
