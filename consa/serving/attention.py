"""Attention of a hybrid's layer in vLLM: one module per layer, and a place in the KV cache per KV head.

vLLM gives every cache one window, so a layer of full (FA) and sliding-window (SWA) heads needs several. A cache per KV
head packs best, whatever the numbers of FA heads, but an attention module per head would launch hundreds of kernels a
step. So heads are separate for vLLM's planner only: a layer is one module, which writes all heads in one launch,
computes the FA heads by one call of FlashAttention and the SWA heads by one launch of `consa.serving.kernels`.

All FA heads of a model are in one cache group, and those of a layer are adjacent in it (`consa.serving.plan`). So their
places, of one head each, are also one cache of several heads, as a view with a large stride from head to head.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from vllm.forward_context import get_forward_context
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.attention_layer_base import AttentionLayerBase
from vllm.platforms import current_platform
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionCGSupport,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
    MultipleOf,
)
from vllm.v1.kv_cache_interface import FullAttentionSpec

from consa.attention.portable import full_attention, sliding_attention
from consa.serving.pages import SinkSpec

PAGE_TOKENS = 16  # what FlashAttention's pages are a multiple of


@dataclass(frozen=True)
class LayerHeads:
    """KV heads of a layer, numbered as on this rank: those of full attention, and the others with what these see."""

    full: tuple[int, ...]
    sliding: tuple[int, ...]
    window: int  # tokens, the query included
    num_sink_tokens: int

    @property
    def order(self) -> tuple[int, ...]:
        """The heads in the order of their places."""
        return self.full + self.sliding

    def place_names(self, layer_name: str) -> list[str]:
        """Names of the places, of which the first is the layer itself.

        No part of a name is a number by itself: vLLM would take that for a second layer index.
        """
        return [layer_name, *(f"{layer_name}.place_{index}" for index in range(1, len(self.order)))]


@dataclass
class HybridMetadata(AttentionMetadata):
    """What a layer has to know of a batch, for one cache group. Tensors are vLLM's own: CUDA graphs can hold them."""

    query_starts: Tensor  # int32 (requests + 1,): rows at which requests begin; the last is their number
    seq_lens: Tensor  # int32 (requests,): tokens of each request, new ones included
    table: Tensor  # int32 (requests, pages)
    slots: Tensor  # int64 (tokens,): where new tokens go, counted through all pages; negative for padding
    num_tokens: int  # new tokens, padding included
    max_query_len: int  # the most new tokens of a request
    max_seq_len: int  # the most tokens of a request, or more
    num_splits: int  # chunks of keys that FlashAttention may divide a request into; 0 lets it choose


class HybridBuilder(AttentionMetadataBuilder[HybridMetadata]):
    """Collects what vLLM says of a batch, without a single operation on a tensor."""

    _cudagraph_support = AttentionCGSupport.UNIFORM_BATCH

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device) -> None:
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)
        compilation = vllm_config.compilation_config
        # A graph holds the memory of all splits, so only batches that a graph may serve have them.
        self.graph_tokens = 0
        if compilation.cudagraph_mode.has_full_cudagraphs():
            self.graph_tokens = compilation.max_cudagraph_capture_size or 0
        self.graph_splits = vllm_config.attention_config.flash_attn_max_num_splits_for_cuda_graph

    def build(self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False) -> HybridMetadata:
        common = common_attn_metadata
        return HybridMetadata(
            query_starts=common.query_start_loc,
            seq_lens=common.seq_lens,
            table=common.block_table_tensor,
            slots=common.slot_mapping,
            num_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            max_seq_len=common.max_seq_len,
            num_splits=self.graph_splits if common.num_actual_tokens <= self.graph_tokens else 0,
        )


class HybridBackend(AttentionBackend):
    """vLLM's way to ask for `HybridImpl`."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]  # noqa: RUF012
    forward_includes_kv_cache_update = True

    @staticmethod
    def get_name() -> str:
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[HybridImpl]:
        return HybridImpl

    @staticmethod
    def get_builder_cls() -> type[HybridBuilder]:
        return HybridBuilder

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec: Any = None) -> list[Any]:
        return [MultipleOf(PAGE_TOKENS)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True


class Place(NamedTuple):
    """Where one KV head lies: its pages `(pages, 1, page tokens, 2 * head_dim)`, page table and slots of new tokens."""

    cache: Tensor
    table: Tensor
    slots: Tensor


class HybridImpl(AttentionImpl[HybridMetadata]):
    """Writes new tokens of all KV heads of a layer and computes their attention."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: list[float] | None,
        sliding_window: int | None,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: str | None = None,
        *,
        heads: LayerHeads,
        layer_name: str,
    ) -> None:
        assert not alibi_slopes and not logits_soft_cap and attn_type == "decoder"
        self.num_heads, self.head_size, self.scale = num_heads, head_size, scale
        self.num_kv_heads, self.kv_cache_dtype = num_kv_heads, kv_cache_dtype
        self.heads, self.group = heads, num_heads // num_kv_heads
        self.place_names = heads.place_names(layer_name)
        self.flash_version = _flash_version(head_size)
        # Query heads of the FA heads: a slice where they are adjacent, since that needs no copy.
        self.full_queries: slice | Tensor
        queries = [head * self.group + member for head in heads.full for member in range(self.group)]
        if queries and queries[-1] - queries[0] == len(queries) - 1:
            self.full_queries = slice(queries[0], queries[-1] + 1)
        else:
            self.full_queries = torch.tensor(queries, device=current_platform.device_type)
        self._addresses: dict[Any, Tensor] = {}

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: HybridMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write `key` and `value`, `(tokens, kv_heads, head_dim)`, to their pages and attention of `query` to `output`.

        The pages and metadata given are those of the layer's first place; vLLM gives no metadata while it measures
        memory.
        """
        if attn_metadata is None:
            return output.fill_(0)
        context: Any = get_forward_context()
        batch = context.attn_metadata
        batch = batch[0] if isinstance(batch, list) else batch
        places = [
            Place(context.no_compile_layers[name].kv_cache, batch[name].table, batch[name].slots)
            for name in self.place_names
        ]
        compute = self._by_kernels if query.is_cuda else self._by_torch
        compute(query, key, value, places, attn_metadata, output)
        return output

    def _by_kernels(
        self, query: Tensor, key: Tensor, value: Tensor, places: list[Place], batch: HybridMetadata, output: Tensor
    ) -> None:
        from consa.serving import kernels

        first, heads = places[0], self.heads
        addresses = self._address_table(places)
        kernels.write(key, value, first.cache, addresses, first.slots, num_tokens=batch.num_tokens)

        num_full = len(heads.full)
        full, sliding = addresses[:num_full], addresses[num_full:]
        if heads.full and self.flash_version:
            self._by_flash_attention(query, places[:num_full], batch, output)
            full = full[:0]
        for rows, window, sinks in (full, kernels.FULL_WINDOW, 0), (sliding, heads.window, heads.num_sink_tokens):
            if not len(rows):
                continue
            kernels.attention(
                query,
                output,
                first.cache,
                rows,
                first.table,
                group=self.group,
                seq_lens=batch.seq_lens,
                query_starts=batch.query_starts,
                num_tokens=batch.num_tokens,
                decoding=batch.max_query_len == 1,
                window=window,
                num_sink_tokens=sinks,
                scaling=self.scale,
            )

    def _address_table(self, places: list[Place]) -> Tensor:
        """Where the kernels find the heads; made again when vLLM has other buffers, for instance to measure memory.

        Tables stay in memory, since CUDA graphs may hold their addresses; they are small, and so is their number.
        """
        from consa.serving import kernels

        shape = places[0].cache.shape
        key = (shape, *(x.data_ptr() for place in places for x in place))
        if key not in self._addresses:
            capturing = places[0].cache.is_cuda and torch.cuda.is_current_stream_capturing()
            assert not capturing, "no warm-up with these buffers before a graph"
            caches, tables, slots = map(list, zip(*places, strict=True))
            assert all(x.shape == shape and x.stride() == caches[0].stride() for x in caches)
            if self.heads.full:
                _merged(caches[: len(self.heads.full)])  # asserts that they are adjacent
            self._addresses[key] = kernels.address_table(list(self.heads.order), caches, tables, slots)
        return self._addresses[key]

    def _by_flash_attention(self, query: Tensor, places: list[Place], batch: HybridMetadata, output: Tensor) -> None:
        """The FA heads by one call."""
        from vllm.v1.attention.backends.fa_utils import flash_attn_varlen_func

        keys, values = _merged([place.cache for place in places]).transpose(1, 2).chunk(2, dim=-1)
        query, output = query[: batch.num_tokens], output[: batch.num_tokens]
        # Version 3 writes between other heads' results; of the other versions that was not measured.
        in_place = self.flash_version == 3 and isinstance(self.full_queries, slice)
        result = flash_attn_varlen_func(
            q=query[:, self.full_queries],
            k=keys,
            v=values,
            out=output[:, self.full_queries] if in_place else None,
            cu_seqlens_q=batch.query_starts,
            max_seqlen_q=batch.max_query_len,
            seqused_k=batch.seq_lens,
            max_seqlen_k=batch.max_seq_len,
            softmax_scale=self.scale,
            causal=True,
            block_table=places[0].table,
            num_splits=batch.num_splits if self.flash_version == 3 else 0,
            fa_version=self.flash_version,
        )
        if not in_place:
            output[:, self.full_queries] = result

    def _by_torch(
        self, query: Tensor, key: Tensor, value: Tensor, places: list[Place], batch: HybridMetadata, output: Tensor
    ) -> None:
        """The same on any device, in torch, request by request."""
        page = places[0].cache.shape[2]
        for head, place in zip(self.heads.order, places, strict=True):
            slots = place.slots[: batch.num_tokens]
            there = slots >= 0
            new = torch.cat([key[: len(slots), head], value[: len(slots), head]], dim=-1)[there]
            place.cache[slots[there] // page, 0, slots[there] % page] = new
        heads, num_full = self.heads, len(self.heads.full)
        starts = batch.query_starts.tolist()
        for request, length in enumerate(batch.seq_lens.tolist()):
            begin, end = starts[request : request + 2]
            if begin == end:
                continue
            sinks = min(heads.num_sink_tokens, length)
            near = max(sinks, length - (end - begin) - heads.window + 1)
            kept = torch.cat([torch.arange(sinks), torch.arange(near, length)])
            # To SWA heads, sinks and window are an ordinary short sequence: what lies between, no new query sees.
            sliding = {"window": heads.window, "num_sink_tokens": heads.num_sink_tokens}
            for members, positions, attend, options in (
                (slice(num_full), torch.arange(length), full_attention, {}),
                (slice(num_full, None), kept, sliding_attention, sliding),
            ):
                chosen = list(heads.order[members])
                if not chosen:
                    continue
                positions = positions.to(query.device)
                read = [
                    place.cache[place.table[request, positions // page].long(), 0, positions % page]
                    for place in places[members]
                ]
                k, v = torch.stack(read)[None].chunk(2, dim=-1)
                q = query[begin:end].unflatten(1, (self.num_kv_heads, self.group))[:, chosen]
                out = attend(q.flatten(1, 2).transpose(0, 1)[None], k, v, scaling=self.scale, **options)
                out = out[0].transpose(0, 1).unflatten(1, (len(chosen), self.group))
                output[begin:end].unflatten(1, (self.num_kv_heads, self.group))[:, chosen] = out


def _merged(caches: list[Tensor]) -> Tensor:
    """Adjacent places of one head each as one cache of several heads, `(pages, heads, page tokens, 2 * head_dim)`."""
    steps = {b.data_ptr() - a.data_ptr() for a, b in pairwise(caches)}
    assert len(steps) < 2, f"the places of a layer's FA heads are not adjacent: steps of {sorted(steps)} bytes"
    cache = caches[0]
    step = steps.pop() // cache.element_size() if steps else cache.stride(0)
    pages, _, *tokens = cache.shape
    return cache.as_strided((pages, len(caches), *tokens), (cache.stride(0), step, *cache.stride()[2:]))


def _flash_version(head_size: int) -> int | None:
    """The version of FlashAttention that vLLM has here for the model's dtype; None without one."""
    if not current_platform.is_cuda():
        return None
    from vllm.v1.attention.backends.fa_utils import get_flash_attn_version
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    taken = FlashAttentionBackend.supports_head_size(head_size)
    if not taken or not FlashAttentionBackend.supports_dtype(torch.get_default_dtype()):
        return None
    return get_flash_attn_version(head_size=head_size)


class HybridAttention(Attention):
    """Takes the place of a layer's `Attention`; it is itself the place of the layer's first head in `heads.order`."""

    def __init__(self, stock: Attention, heads: LayerHeads, vllm_config: Any) -> None:
        del vllm_config.compilation_config.static_forward_context[stock.layer_name]
        super().__init__(
            stock.num_heads,
            stock.head_size,
            stock.impl.scale,
            num_kv_heads=stock.num_kv_heads,
            cache_config=vllm_config.cache_config,
            quant_config=stock.quant_config,
            prefix=stock.layer_name,
            attn_backend=HybridBackend,
            heads=heads,
            layer_name=stock.layer_name,
        )
        self.heads = heads
        _, *names = heads.place_names(stock.layer_name)
        self.places = nn.ModuleList(
            HeadPlace(self, name, sliding=index >= len(heads.full), vllm_config=vllm_config)
            for index, name in enumerate(names, start=1)
        )

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec | SinkSpec:
        return self.head_spec(vllm_config, sliding=not self.heads.full)

    def head_spec(self, vllm_config: Any, *, sliding: bool) -> FullAttentionSpec | SinkSpec:
        """What one head keeps."""
        known: dict[str, Any] = {"block_size": vllm_config.cache_config.block_size, "num_kv_heads": 1}
        known |= {"head_size": self.head_size, "dtype": self.kv_cache_torch_dtype}
        if not sliding:
            return FullAttentionSpec(**known)
        return SinkSpec(**known, sliding_window=self.heads.window, num_sink_tokens=self.heads.num_sink_tokens)


class HeadPlace(nn.Module, AttentionLayerBase):
    """The KV cache of one head of a layer, and nothing else."""

    def __init__(self, layer: HybridAttention, name: str, *, sliding: bool, vllm_config: Any) -> None:
        super().__init__()
        self.kv_cache = torch.tensor([])  # until vLLM binds it
        self.num_heads = layer.num_heads  # places that differ in it would be described by several builders
        self.sliding = sliding
        self.head_spec = layer.head_spec
        names = vllm_config.compilation_config.static_forward_context
        assert name not in names, name
        names[name] = self

    def get_attn_backend(self) -> type[AttentionBackend]:
        return HybridBackend

    def get_kv_cache_spec(self, vllm_config: Any) -> FullAttentionSpec | SinkSpec:
        return self.head_spec(vllm_config, sliding=self.sliding)
