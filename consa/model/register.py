"""Registers consa's attention, mask, cache and config with transformers; importing it changes nothing for other models.

`consa.load` and `consa.attached` import it. In memory, a hybrid's config is the config of its family, with the
allocation in the field "consa". In config.json it has the model type "consa", and no number in `num_hidden_layers`: so
without this module neither an Auto class nor a class of the family reads a hybrid as a full-attention model.

The mask function is required: with an attention function alone, transformers would create no mask and silently ignore
padding.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AttentionInterface,
    AttentionMaskInterface,
    AutoConfig,
    GenerationMixin,
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
from consa.model.plan import Plan

ARCHITECTURE_PREFIX = "ConSA"  # prefix of the class name in a hybrid's config.json
# A hybrid's config.json keeps the original values of these fields under prefixed names. A nested object would not work:
# transformers reads an object with a model_type as a whole config.
PREFIX = "consa_"
TAKEN = ("model_type", "layer_types", "num_hidden_layers")
NO_NUMBER = "this is a hybrid of consa: pip install consa, and import consa.register before loading it"
INTERNAL = "_attn_implementation_internal"  # where a config stores its attention implementation

_stock_layer_types = cache_utils.get_layer_types_and_kwargs
_stock_read: Any = PreTrainedConfig._dict_from_json_file.__func__  # pyright: ignore[reportFunctionMemberAccess]
_stock_write = PreTrainedConfig.to_json_file
_stock_post_init = PreTrainedModel.post_init
_stock_prepare_mask = GenerationMixin._prepare_attention_mask_for_generation


class HybridConfig(PreTrainedConfig):
    """The config class of a hybrid's config.json. Reading one returns the config of its family, with the allocation."""

    model_type = interface.NAME

    @classmethod
    def from_dict(cls, config_dict: JsonObject, **kwargs: Any) -> Any:
        """The config of the family, with unused `kwargs` if requested; no attention implementation but consa's."""
        asked = kwargs.pop("attn_implementation", None)
        if asked not in (None, interface.NAME):
            raise ConsaError(_another_attention(asked))
        own = family_config(config_dict)
        return CONFIG_MAPPING[own["model_type"]].from_dict(own, **kwargs)


def family_config(config_dict: JsonObject) -> JsonObject:
    """A hybrid's config.json with the original fields of its family; allocation and architecture stay."""
    own = {name: x for name, x in config_dict.items() if name not in ("model_type", "layer_types")}
    return {name: x for name, x in own.items() if not name.startswith(PREFIX)} | {
        name.removeprefix(PREFIX): x for name, x in own.items() if name.startswith(PREFIX)
    }


def hybrid_config(written: JsonObject, allocation: Allocation) -> JsonObject:
    """A config as its family writes it, changed so that only `HybridConfig` can read it."""
    own = {PREFIX + name if name in TAKEN else name: x for name, x in written.items()}
    names = [name.removeprefix(ARCHITECTURE_PREFIX) for name in written.get("architectures") or ()]
    own |= {
        "model_type": interface.NAME,  # read by Auto classes
        "num_hidden_layers": NO_NUMBER,  # read by the classes of all families
        "architectures": [ARCHITECTURE_PREFIX + name for name in names],  # read by vLLM and others
        "auto_map": {},  # read by trainers that do not know the architecture, which then take the Auto class
        "consa": config_record(allocation),
    }
    return dict(sorted(own.items()))


def config_record(allocation: Allocation) -> JsonObject:
    """The allocation as a config holds it."""
    return json.loads(allocation.to_json()) | {"scores": None, "provenance": {}}


def read_config(cls: type[PreTrainedConfig], json_file: Any) -> JsonObject:
    """transformers' `_dict_from_json_file`; the config class of a family reads a hybrid as its own."""
    config = _stock_read(cls, json_file)
    return family_config(config) if cls.model_type and config.get("model_type") == interface.NAME else config


def write_config(config: PreTrainedConfig, json_file_path: Any, *args: Any, **kwargs: Any) -> None:
    """transformers' `to_json_file`, which `save_pretrained` calls, writing hybrids as hybrids."""
    _stock_write(config, json_file_path, *args, **kwargs)
    if (allocation := interface.allocation_of(config)) is not None:
        path = Path(json_file_path)
        text = json.dumps(hybrid_config(json.loads(path.read_text("utf-8")), allocation), indent=2, ensure_ascii=False)
        path.write_text(text + "\n", encoding="utf-8")


def _is_hybrid(config: PreTrainedConfig) -> bool:
    return config.__dict__.get("consa") is not None


def get_attention(config: PreTrainedConfig) -> Any:
    """The attention implementation of a config: consa's if it holds an allocation, whatever was stored before."""
    return interface.NAME if _is_hybrid(config) else config.__dict__.get(INTERNAL)


def set_attention(config: PreTrainedConfig, value: Any) -> None:
    """Store an attention implementation, but refuse to replace consa's; `attached` and `make_dense` do."""
    hybrid = _is_hybrid(config) or config.__dict__.get(INTERNAL) == interface.NAME
    if hybrid and value not in (None, interface.NAME):
        raise ConsaError(_another_attention(value))
    config.__dict__[INTERNAL] = interface.NAME if hybrid else value


def post_init(model: PreTrainedModel) -> None:
    """transformers' `post_init`, at the end of construction: a hybrid's attention layers receive their plan."""
    _stock_post_init(model)
    if _is_hybrid(model.config):
        plan = Plan(interface.allocation_of(model.config))  # pyright: ignore[reportArgumentType]
        modules: Any = model.modules()
        for module in modules:
            if interface.is_attention(module):
                module.consa_plan = plan


def prepare_mask(model: Any, *args: Any, **kwargs: Any) -> Any:
    """transformers' mask for prompts without one; in a hybrid, a padding token after the first other one is content."""
    mask = _stock_prepare_mask(model, *args, **kwargs)
    return mask.cummax(-1).values if model.config._attn_implementation == interface.NAME else mask


def layer_types_and_kwargs(config: Any) -> tuple[list[str], Any]:
    """transformers' `get_layer_types_and_kwargs`, with consa's layers for a config that holds an allocation."""
    allocation = interface.allocation_of(config)
    stock = _stock_layer_types(config)
    if allocation is None:
        return stock
    layers = range(allocation.num_layers)
    kwargs: Any = [{"allocation": allocation, "layers": iter([layer])} for layer in layers]
    if isinstance(stock[1], dict):  # older versions create all layers, in order, with the same arguments
        kwargs = {"allocation": allocation, "layers": iter(layers)}
    return [interface.NAME] * len(layers), kwargs


def _another_attention(name: Any) -> str:
    return (
        f"this model is a hybrid, but attn_implementation={name!r} would run it as full attention; pass no"
        " attn_implementation, or leave the `with consa.attached` block first"
    )


def _cache_layer(allocation: Allocation, layers: Iterator[int], max_cache_len: int | None = None) -> CacheLayerMixin:
    return hybrid_layer(allocation, next(layers), max_cache_len)


AttentionInterface.register(interface.NAME, interface.consa_attention)
AttentionMaskInterface.register(interface.NAME, interface.consa_mask)
AttentionInterface.register(interface.INSPECT_NAME, interface.record_call)
AttentionMaskInterface.register(interface.INSPECT_NAME, interface.inspected_mask)
cache_utils.DYNAMIC_LAYER_TYPE_MAPPING[interface.NAME] = _cache_layer
cache_utils.STATIC_LAYER_TYPE_MAPPING[interface.NAME] = _cache_layer
cache_utils.get_layer_types_and_kwargs = layer_types_and_kwargs
AutoConfig.register(interface.NAME, HybridConfig)
# pyright: reportAttributeAccessIssue=false
PreTrainedConfig._dict_from_json_file = classmethod(read_config)
PreTrainedConfig.to_json_file = write_config
PreTrainedConfig._attn_implementation_internal = property(get_attention, set_attention)
PreTrainedModel.post_init = post_init
GenerationMixin._prepare_attention_mask_for_generation = prepare_mask
