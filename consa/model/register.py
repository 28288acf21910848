"""Registers consa's attention, mask, cache and config with transformers; importing it changes nothing for other models.

`consa.load` and `consa.attached` import it. Without it, `AutoModelForCausalLM.from_pretrained` refuses hybrids, because
transformers does not know the model type "consa". A specific class such as `LlamaForCausalLM` always refuses them: its
config does not allow layers of the type "consa".

The mask function is required: with an attention function alone, transformers would create no mask and silently ignore
padding.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    PreTrainedConfig,
    PreTrainedModel,
    cache_utils,
)
from transformers.cache_utils import CacheLayerMixin

from consa.allocation import Allocation
from consa.cache.hybrid import hybrid_layer
from consa.errors import ConsaError
from consa.files import JsonObject
from consa.model import interface

# A hybrid's config.json replaces these fields and keeps the original values under prefixed names. A nested object would
# not work: transformers reads an object with a model_type as a whole config.
TAKEN = ("model_type", "layer_types")
PREFIX = "consa_"
ARCHITECTURE_PREFIX = "ConSA"  # prefix of the class name in a hybrid's config.json

_stock_layer_types = cache_utils.get_layer_types_and_kwargs
_stock_save = PreTrainedConfig.save_pretrained
_stock_set_attention = PreTrainedModel.set_attn_implementation


class HybridConfig(PreTrainedConfig):
    """The config class of a hybrid's config.json. Reading one returns the config of its family, with the allocation."""

    model_type = interface.NAME

    @classmethod
    def from_dict(cls, config_dict: JsonObject, **kwargs: Any) -> Any:
        """The config of the family, with unused `kwargs` if requested; no attention implementation but consa's."""
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, interface.NAME):
            raise ConsaError(_another_attention(asked))
        own = family_config(config_dict) | {"attn_implementation": interface.NAME}
        return CONFIG_MAPPING[own["model_type"]].from_dict(own, **kwargs)


def family_config(config_dict: JsonObject) -> JsonObject:
    """A hybrid's config.json with the original fields of its family; allocation and architecture stay."""
    return {name.removeprefix(PREFIX): x for name, x in config_dict.items() if name not in TAKEN}


def save_config(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, refusing hybrids: it would silently write them as full-attention models."""
    if interface.allocation_of(config) is not None:
        raise ConsaError("save_pretrained cannot write a hybrid; use consa.convert(model, allocation, folder)")
    _stock_save(config, *args, **kwargs)


def set_attention(model: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `set_attn_implementation`, refusing what would silently make a hybrid a full-attention model."""
    if attn_implementation != interface.NAME and interface.allocation_of(model.config) is not None:
        raise ConsaError(_another_attention(attn_implementation))
    _stock_set_attention(model, attn_implementation, *args, **kwargs)


def layer_types_and_kwargs(config: Any) -> tuple[list[str], Any]:
    """transformers' `get_layer_types_and_kwargs`, with consa's layers for a config that holds an allocation."""
    allocation = interface.allocation_of(config)
    stock = _stock_layer_types(config)
    if allocation is None:
        return stock
    if config._attn_implementation != interface.NAME:
        raise ConsaError(_another_attention(config._attn_implementation))
    layers = range(allocation.num_layers)
    kwargs: Any = [{"allocation": allocation, "layers": iter([layer])} for layer in layers]
    if isinstance(stock[1], dict):  # older versions create all layers, in order, with the same arguments
        kwargs = {"allocation": allocation, "layers": iter(layers)}
    return [interface.NAME] * len(layers), kwargs


def _another_attention(name: Any) -> str:
    return (
        f"this model is a hybrid, but attn_implementation={name!r} would run it as full attention; load it with"
        " consa.load, and pass no attn_implementation"
    )


def _cache_layer(allocation: Allocation, layers: Iterator[int], max_cache_len: int | None = None) -> CacheLayerMixin:
    return hybrid_layer(allocation, next(layers), max_cache_len)


AttentionInterface.register(interface.NAME, interface.consa_attention)
AttentionMaskInterface.register(interface.NAME, interface.consa_mask)
AttentionInterface.register(interface.INSPECT_NAME, interface.record_call)
AttentionMaskInterface.register(interface.INSPECT_NAME, lambda *args, **kwargs: None)
cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[interface.NAME] = _cache_layer
cache_utils.STATIC_LAYER_TYPE_MAPPING[interface.NAME] = _cache_layer
cache_utils.get_layer_types_and_kwargs = layer_types_and_kwargs
AutoConfig.register(interface.NAME, HybridConfig)
PreTrainedConfig.save_pretrained = save_config  # pyright: ignore[reportAttributeAccessIssue]
PreTrainedModel.set_attn_implementation = set_attention  # pyright: ignore[reportAttributeAccessIssue]
