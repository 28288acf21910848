"""The KV cache of a whole hybrid.

`generate()` of a model from `consa.load` makes one by itself. Make your own to keep it between calls, to preallocate
it, or for a model under `consa.attached`.
"""

from __future__ import annotations

import inspect

from torch import Tensor
from transformers import PreTrainedModel
from transformers.cache_utils import Cache, CacheLayerMixin

from consa.allocation import Allocation
from consa.cache.layer import HybridLayer
from consa.cache.split import HeadSplit
from consa.cache.static import StaticHybridLayer


def dynamic_layer(allocation: Allocation, layer: int) -> CacheLayerMixin:
    """A layer whose storage grows."""
    return HybridLayer(HeadSplit.of(allocation, layer))


def static_layer(allocation: Allocation, layer: int, max_cache_len: int) -> CacheLayerMixin:
    """A layer with room for `max_cache_len` tokens."""
    return StaticHybridLayer(HeadSplit.of(allocation, layer), max_cache_len)


class HybridCache(Cache):
    """The KV cache of a hybrid.

    Args:
        allocation: the allocation of the model.
        max_length: capacity in tokens, allocated at once, for torch.compile; None grows as needed.
    """

    def __init__(self, allocation: Allocation, *, max_length: int | None = None) -> None:
        layers = range(allocation.num_layers)
        if max_length is None:
            super().__init__(layers=[dynamic_layer(allocation, layer) for layer in layers])
        else:
            super().__init__(layers=[static_layer(allocation, layer, max_length) for layer in layers])


def cache_argument(model: PreTrainedModel | type[PreTrainedModel]) -> str:
    """The name of the cache argument of `model`: "cache", before transformers 5.24 "past_key_values"."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def allocated_bytes(cache: Cache) -> int:
    """Bytes of memory allocated for keys and values by a cache of any kind: measured, not computed."""
    storages = {}
    for layer in cache.layers:
        for value in vars(layer).values():
            if isinstance(value, Tensor) and value.is_floating_point():
                storage = value.untyped_storage()
                storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())
