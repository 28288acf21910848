"""vLLM's own model classes with each layer's attention made hybrid.

A class is made when it is asked for: `ConSALlamaForCausalLM` is vLLM's `LlamaForCausalLM` after `_Hybrid`.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from typing import Any

from torch import nn
from vllm import ModelRegistry
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from consa.model import interface
from consa.serving.attention import HeadPlace, HybridAttention, LayerHeads
from consa.serving.plan import unused_places
from consa.serving.plugin import ARCHITECTURES


def __getattr__(name: str) -> Any:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = ModelRegistry.models[ARCHITECTURES[name]].load_model_cls()
    made = type(name, (_Hybrid, stock), {"__module__": __name__})
    globals()[name] = made  # the next access does not come here
    return made


class _Hybrid(nn.Module):
    """Comes before a class of vLLM's: each `Attention` becomes a `HybridAttention` with the heads of the allocation."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        allocation: Any = interface.allocation_of(vllm_config.model_config.hf_config)
        per_rank = allocation.num_kv_heads // vllm_config.parallel_config.tensor_parallel_size
        first = get_tensor_model_parallel_rank() * per_rank
        rows = allocation.full_attention[:, first : first + per_rank]
        for name, stock in list(self.named_modules()):
            if not isinstance(stock, Attention):
                continue
            layer = extract_layer_index(stock.layer_name)
            full, sliding = (tuple(part.nonzero()[0].tolist()) for part in (rows[layer], ~rows[layer]))
            heads = LayerHeads(full, sliding, allocation.window, allocation.num_sink_tokens)
            attention = HybridAttention(stock, heads, vllm_config)
            self.set_submodule(name, attention)
            if layer == len(rows) - 1:
                for unused in range(unused_places(int(rows.sum()), int((~rows).sum()))):
                    place = f"{stock.layer_name}.unused_{unused}"
                    attention.places.append(HeadPlace(attention, place, sliding=True, vllm_config=vllm_config))
