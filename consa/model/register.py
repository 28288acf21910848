"""Registers consa's attention, mask, cache and config with transformers; importing it changes nothing for other models.

`consa.load` and `consa.attached` import it. Import it by hand to have `AutoModelForCausalLM.from_pretrained` load a
hybrid: without it, transformers does not know the model type "consa" and refuses. A class of a family, such as
`LlamaForCausalLM`, refuses with and without it: its config knows no layers of the type "consa".

Attention and mask are both needed: with an attention function alone, transformers makes no mask and padding would be
ignored in silence.
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
from consa.cache.hybrid import dynamic_layer, static_layer
from consa.errors import ConsaError
from consa.model import interface

# A hybrid's config.json keeps its family's own of these under names with the prefix, and not in an object: transformers
# takes one with a model_type for a whole config.
TAKEN = ("model_type", "layer_types")
PREFIX = "consa_"
ARCHITECTURE_PREFIX = "ConSA"  # of the family's class, in a hybrid's config.json

_stock_layer_types = cache_utils.get_layer_types_and_kwargs
_stock_save = PreTrainedConfig.save_pretrained
_stock_set_attention = PreTrainedModel.set_attn_implementation


class HybridConfig(PreTrainedConfig):
    """What a hybrid's config.json says it is. Reading it gives a config of the family, with the allocation in it."""

    model_type = interface.NAME

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """The family's config, and unused `kwargs` where they are asked for.

        Raises:
            ConsaError: another attention is asked for.
        """
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, interface.NAME):
            raise ConsaError(_another_attention(asked))
        own = family_config(config_dict) | {"attn_implementation": interface.NAME}
        return CONFIG_MAPPING[own["model_type"]].from_dict(own, **kwargs)


def family_config(config_dict: dict[str, Any]) -> dict[str, Any]:
    """A hybrid's config.json in the words of its family; the allocation and the architecture's name stay."""
    return {name.removeprefix(PREFIX): x for name, x in config_dict.items() if name not in TAKEN}


def save_config(config: PreTrainedConfig, *args: Any, **kwargs: Any) -> None:
    """transformers' `save_pretrained`, which would write a hybrid as a model of its family: full attention in silence.

    Raises:
        ConsaError: the config holds an allocation.
    """
    if interface.allocation_of(config) is not None:
        raise ConsaError(
            "save_pretrained cannot write a hybrid; use consa.convert(model, allocation, folder)"
        )
    _stock_save(config, *args, **kwargs)


def set_attention(model: PreTrainedModel, attn_implementation: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `set_attn_implementation`, which would have a hybrid run as full attention in silence.

    Raises:
        ConsaError: the model's config holds an allocation, and another attention is asked for.
    """
    if attn_implementation != interface.NAME and interface.allocation_of(model.config) is not None:
        raise ConsaError(_another_attention(attn_implementation))
    _stock_set_attention(model, attn_implementation, *args, **kwargs)


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
        raise ConsaError(_another_attention(config._attn_implementation))
    layers = range(allocation.num_layers)
    kwargs: Any = [{"allocation": allocation, "layers": iter([layer])} for layer in layers]
    if isinstance(stock[1], dict):  # older versions make all layers with the same arguments, in order
        kwargs = {"allocation": allocation, "layers": iter(layers)}
    return [interface.NAME] * len(layers), kwargs


def _another_attention(name: Any) -> str:
    return (
        f"this model is a hybrid, but attn_implementation={name!r} would run it as full attention; load it with"
        " consa.load, and pass no attn_implementation"
    )


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
AutoConfig.register(interface.NAME, HybridConfig)
PreTrainedConfig.save_pretrained = save_config  # pyright: ignore[reportAttributeAccessIssue]
PreTrainedModel.set_attn_implementation = set_attention  # pyright: ignore[reportAttributeAccessIssue]
