"""vLLM's own model classes with each layer's attention split into full and sliding parts with caches of their own.

A class is made when it is asked for: `ConSALlamaForCausalLM` is vLLM's `LlamaForCausalLM` after `split_attention`.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from vllm import ModelRegistry
from vllm.distributed import get_tensor_model_parallel_rank
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.models.utils import extract_layer_index

from consa.model import interface
from consa.serving.plan import Module, plan
from consa.serving.plugin import ARCHITECTURES
from consa.serving.sinks import SinkAttention

SMALLEST_PAGE = 16  # tokens; where vLLM has not chosen one yet


def __getattr__(name: str) -> Any:
    if name not in ARCHITECTURES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    stock = ModelRegistry.models[ARCHITECTURES[name]].load_model_cls()
    made = type(name, (_Hybrid, stock), {"__module__": __name__})
    globals()[name] = made  # the next access does not come here
    return made


class _Hybrid(nn.Module):
    """Comes before a class of vLLM's."""

    def __init__(self, *, vllm_config: Any, prefix: str = "") -> None:
        super().__init__(vllm_config=vllm_config, prefix=prefix)  # pyright: ignore[reportCallIssue]
        split_attention(self, vllm_config)


def split_attention(model: nn.Module, vllm_config: Any) -> None:
    """Replace every `Attention` of a model by the parts that its allocation asks for.

    Args:
        model: as vLLM made it, without weights.
        vllm_config: the engine's settings; the model's config holds the allocation.
    """
    config = vllm_config.model_config
    allocation: Any = interface.allocation_of(config.hf_config)
    chosen = plan(
        allocation,
        context=config.max_model_len,
        head_dim=config.get_head_size(),
        bytes_per_element=config.dtype.itemsize,
        block_size=vllm_config.cache_config.block_size or SMALLEST_PAGE,
        tensor_parallel=vllm_config.parallel_config.tensor_parallel_size,
        rank=get_tensor_model_parallel_rank(),
    )
    for name, stock in list(model.named_modules()):
        if isinstance(stock, Attention):
            modules = chosen.modules[extract_layer_index(stock.layer_name)]
            parts = SplitAttention(stock, modules, allocation.num_sink_tokens, vllm_config)
            model.set_submodule(name, parts)


class SplitAttention(nn.Module):
    """Takes the place of one `Attention`: hands each part its heads, and puts the results together again."""

    def __init__(
        self, stock: Attention, modules: tuple[Module, ...], num_sink_tokens: int, vllm_config: Any
    ) -> None:
        super().__init__()
        del vllm_config.compilation_config.static_forward_context[stock.layer_name]
        self.num_kv_heads, self.head_size = stock.num_kv_heads, stock.head_size
        group = stock.num_heads // stock.num_kv_heads
        first = min(head for module in modules for head in module.heads)  # of this rank
        order = [head - first for module in modules for head in module.heads]
        self.sizes = [len(module.heads) for module in modules]
        self.sorted = order == list(range(len(order)))
        self.there: Tensor  # to where heads lie part by part
        self.back: Tensor
        self.register_buffer("there", torch.tensor(order), persistent=False)
        self.register_buffer("back", torch.tensor(order).argsort(), persistent=False)
        self.parts = nn.ModuleList()
        for index, module in enumerate(modules):
            kind, options = Attention, {}
            if module.window is not None and num_sink_tokens:
                kind, options = SinkAttention, {"num_sink_tokens": num_sink_tokens}
            part = kind(
                len(module.heads) * group,
                stock.head_size,
                stock.impl.scale,
                num_kv_heads=len(module.heads),
                cache_config=vllm_config.cache_config,
                quant_config=stock.quant_config,
                per_layer_sliding_window=module.window,
                prefix=f"{stock.layer_name}.part_{index}",  # no number by itself: that would be a second layer index
                **options,
            )
            assert part.sliding_window == module.window, (part.sliding_window, module.window)
            self.parts.append(part)

    def forward(self, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        """As `Attention.forward`: `(tokens, heads * head_dim)` each."""
        split = [self._by_part(x) for x in (query, key, value)]
        outputs = [part(*inputs) for part, *inputs in zip(self.parts, *split, strict=True)]
        if self.sorted:
            return torch.cat(outputs, dim=-1)
        heads = torch.cat(
            [out.unflatten(-1, (size, -1)) for out, size in zip(outputs, self.sizes, strict=True)], 1
        )
        return heads.index_select(1, self.back).flatten(1)

    def _by_part(self, x: Tensor) -> list[Tensor]:
        heads = x.unflatten(-1, (self.num_kv_heads, -1))  # a KV head's query heads lie side by side
        if not self.sorted:
            heads = heads.index_select(1, self.there)
        return [part.flatten(1).contiguous() for part in heads.split(self.sizes, dim=1)]
