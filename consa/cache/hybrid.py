"""The KV cache of a hybrid: each layer keeps what its heads need.

A model from `consa.load` makes its own in `generate()`; make one to keep it between calls, to preallocate it, or for a
model under `consa.attached`.
"""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from consa.allocation import Allocation
from consa.cache.attend import HeadSplit
from consa.cache.layer import HybridLayer
from consa.cache.static import StaticHybridLayer


def dynamic_layer(allocation: Allocation, layer: int) -> CacheLayerMixin:
    """A layer that grows."""
    return HybridLayer(HeadSplit.of(allocation, layer))


def static_layer(allocation: Allocation, layer: int, max_cache_len: int) -> CacheLayerMixin:
    """A layer with room for `max_cache_len` tokens."""
    return StaticHybridLayer(HeadSplit.of(allocation, layer), max_cache_len)


class HybridCache(Cache):
    """The cache of a whole model.

    Args:
        allocation: the one attached to the model.
        max_length: tokens to allocate room for at once, for torch.compile; grows as needed unless given.
    """

    def __init__(self, allocation: Allocation, *, max_length: int | None = None) -> None:
        layers = range(allocation.num_layers)
        if max_length is None:
            super().__init__(layers=[dynamic_layer(allocation, layer) for layer in layers])
        else:
            super().__init__(layers=[static_layer(allocation, layer, max_length) for layer in layers])


def cache_argument(model: PreTrainedModel | type[PreTrainedModel]) -> str:
    """The name under which `model` takes a cache: "cache", before transformers 5.24 "past_key_values"."""
    known = inspect.signature(model.forward).parameters
    return "cache" if "cache" in known else "past_key_values"


def allocated_bytes(cache: Cache) -> int:
    """Bytes of memory that a cache of any kind holds on to for keys and values: measured, not computed."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
