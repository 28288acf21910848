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


def hybrid_layer(allocation: Allocation, layer: int, max_length: int | None) -> CacheLayerMixin:
    """One layer, with room for `max_length` tokens or growing storage."""
    split = HeadSplit.of(allocation, layer)
    return HybridLayer(split) if max_length is None else StaticHybridLayer(split, max_length)


class HybridCache(Cache):
    """The KV cache of a hybrid.

    Args:
        allocation: the allocation of the model.
        max_length: capacity in tokens, allocated at once, for torch.compile; None grows as needed.
    """

    def __init__(self, allocation: Allocation, *, max_length: int | None = None) -> None:
        layers = range(allocation.num_layers)
        super().__init__(layers=[hybrid_layer(allocation, layer, max_length) for layer in layers])


def cache_argument(model: PreTrainedModel | type[PreTrainedModel]) -> str:
    """The name of the cache argument of `model`: "cache", before transformers 5.24 "past_key_values"."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


def allocated_bytes(cache: Cache) -> int:
    """Bytes of memory allocated for keys and values by a cache of any kind: measured, not computed."""
    values = [value for layer in cache.layers for value in vars(layer).values()]
    storages = [x.untyped_storage() for x in values if isinstance(x, Tensor) and x.is_floating_point()]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())
