"""Sliding-window attention with sink tokens in vLLM, whose own attention drops them with the first page.

The sinks' pages stay where they are: a page table of such a group begins with them, then come dropped pages, then the
window's. What an SWA head has dropped no later query sees, so the sinks and the window are to it an ordinary short
sequence, which `consa.attention.portable` computes. It is torch on any device, and reads no page of the gap.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, NamedTuple

import torch
from torch import Tensor
from vllm.model_executor.layers.attention import Attention
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionMetadata,
    AttentionMetadataBuilder,
)
from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

from consa.attention.ops import sliding_attention
from consa.attention.portable import attend


@dataclass(frozen=True, kw_only=True)
class SinkSpec(SlidingWindowSpec):
    """A window's cache, and the pages of the first tokens."""

    num_sink_tokens: int

    @property
    def sink_pages(self) -> int:
        """Pages that hold sinks."""
        return -(-self.num_sink_tokens // self.block_size)

    def max_admission_blocks_per_request(self, *args: Any, **kwargs: Any) -> int:
        """Pages that a request holds at most."""
        return super().max_admission_blocks_per_request(*args, **kwargs) + self.sink_pages

    def is_uniform_with_collection(self, kv_cache_specs: dict[str, Any]) -> bool:
        """Whether all of them keep the same tokens."""
        return super().is_uniform_with_collection(kv_cache_specs) and all(
            isinstance(spec, SinkSpec) and spec.num_sink_tokens == self.num_sink_tokens
            for spec in kv_cache_specs.values()
        )


class SinkManager(SlidingWindowManager):
    """vLLM's management of a window's pages, except that those of the sinks stay."""

    def remove_skipped_blocks(
        self, request_id: str, processed_computed_tokens: int, num_prompt_tokens: int | None = None
    ) -> None:
        """Give back the pages between the sinks and the window."""
        skipped = self.get_num_skipped_tokens(processed_computed_tokens) // self.block_size
        self._remove_blocks_in_range(request_id, self.kv_cache_spec.sink_pages, skipped)

    def get_num_blocks_to_allocate(
        self,
        request_id: str,
        num_tokens: int,
        new_computed_blocks: Sequence[Any],
        total_computed_tokens: int,
        *args: Any,
        **kwargs: Any,
    ) -> int:
        """vLLM's number, and the sinks' pages that are taken over from the prefix cache though nobody holds them."""
        needed = super().get_num_blocks_to_allocate(
            request_id, num_tokens, new_computed_blocks, total_computed_tokens, *args, **kwargs
        )
        sinks = new_computed_blocks[: self._skipped_sink_pages(total_computed_tokens)]
        return needed + self._get_num_evictable_blocks(sinks)

    def add_local_computed_blocks(
        self,
        request_id: str,
        new_computed_blocks: Sequence[Any],
        num_local_computed_tokens: int,
        num_external_computed_tokens: int,
    ) -> None:
        """Take pages over from the prefix cache, the sinks' too."""
        super().add_local_computed_blocks(
            request_id, new_computed_blocks, num_local_computed_tokens, num_external_computed_tokens
        )
        computed = num_local_computed_tokens + num_external_computed_tokens
        sinks = new_computed_blocks[: self._skipped_sink_pages(computed)]
        self.block_pool.touch(sinks)
        self.req_to_blocks[request_id][: len(sinks)] = sinks

    def _skipped_sink_pages(self, computed_tokens: int) -> int:
        """Pages of sinks that vLLM would leave out, since the window has passed them."""
        skipped = self.get_num_skipped_tokens(computed_tokens) // self.block_size
        return min(self.kv_cache_spec.sink_pages, skipped)

    @classmethod
    def find_longest_cache_hit(
        cls,
        block_hashes: Any,
        max_length: int,
        kv_cache_group_ids: list[int],
        block_pool: Any,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[tuple[list[Any], ...], int]:
        """vLLM's prefix of which the window's pages are there, if those of the sinks are too."""
        found, length = super().find_longest_cache_hit(
            block_hashes, max_length, kv_cache_group_ids, block_pool, kv_cache_spec, *args, **kwargs
        )
        hashes = resolve_block_hashes(block_hashes, block_pool.hash_block_size, kv_cache_spec.block_size)
        for page in range(min(kv_cache_spec.sink_pages, len(found[0]))):
            cached = block_pool.get_cached_block(hashes[page], kv_cache_group_ids)
            if not cached:
                return tuple([] for _ in found), 0
            for pages, block in zip(found, cached, strict=True):
                pages[page] = block
        return found, length

    @classmethod
    def reachable_block_mask(
        cls,
        start_block: int,
        end_block: int,
        alignment_tokens: int | None,
        kv_cache_spec: Any,
        *args: Any,
        **kwargs: Any,
    ) -> list[bool] | None:
        """vLLM's choice of pages that a later request may take over, and the sinks'."""
        mask = super().reachable_block_mask(
            start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs
        )
        if mask is not None:
            for page in range(start_block, min(end_block, kv_cache_spec.sink_pages)):
                mask[page - start_block] = True
        return mask


# Fills it, which vLLM leaves out once something is in it.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(SinkSpec, SinkManager)


class Places(NamedTuple):
    """Where tokens lie in a group's pages, `(sequences, tokens)` each."""

    pages: Tensor
    offsets: Tensor


@dataclass
class SinkMetadata(AttentionMetadata):
    """What the new tokens of a batch attend to; the same for all layers.

    Attributes:
        decoding: rows of sequences with one new token, `(sequences,)`; where sinks and window lie; and what of that is
            there, bool `(sequences, sinks + window)`.
        prefills: of each other sequence its rows, and where the sinks, the window and the new tokens lie, in order.
    """

    decoding: tuple[Tensor, Places, Tensor] | None
    prefills: list[tuple[slice, Places]]


class SinkMetadataBuilder(AttentionMetadataBuilder[SinkMetadata]):
    """Makes it from what vLLM says of a batch."""

    kv_cache_spec: SinkSpec

    def __init__(self, kv_cache_spec: Any, layer_names: list[str], vllm_config: Any, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: Any, fast_build: bool = False
    ) -> SinkMetadata:
        """See `SinkMetadata`."""
        starts, lengths = common_attn_metadata.query_start_loc_cpu, common_attn_metadata.seq_lens
        tables = common_attn_metadata.block_table_tensor
        window, num_sinks = self.kv_cache_spec.sliding_window, self.kv_cache_spec.num_sink_tokens
        new, decoding, prefills = starts.diff(), None, []
        ones = (new == 1).nonzero()[:, 0]
        if len(ones):
            sequences = ones.to(tables.device)
            newest = lengths[sequences, None].long() - 1
            sinks = torch.arange(num_sinks, device=tables.device).expand(len(ones), -1)
            near = newest - torch.arange(window, device=tables.device)
            visible = torch.cat([sinks <= newest, near >= num_sinks], dim=1)
            places = self._places(tables[sequences], torch.cat([sinks, near], dim=1) * visible)
            decoding = starts[ones].to(tables.device), places, visible
        for sequence in (new > 1).nonzero()[:, 0].tolist():
            length = int(lengths[sequence])
            sinks = min(num_sinks, length)
            near = max(sinks, length - int(new[sequence]) - window + 1)
            kept = torch.cat([torch.arange(sinks), torch.arange(near, length)]).to(tables.device)
            rows = slice(int(starts[sequence]), int(starts[sequence + 1]))
            prefills.append((rows, self._places(tables[sequence, None], kept[None])))
        return SinkMetadata(decoding, prefills)

    def _places(self, tables: Tensor, positions: Tensor) -> Places:
        """Of positions in sequences, by their page tables `(sequences, pages)`."""
        size = self.kv_cache_spec.block_size
        return Places(tables.gather(1, positions // size).long(), positions % size)


class SinkBackend(AttentionBackend):
    """vLLM's way to ask for `SinkImpl`."""

    supported_dtypes = [torch.float32, torch.float16, torch.bfloat16]  # noqa: RUF012
    forward_includes_kv_cache_update = False

    @staticmethod
    def get_name() -> str:
        """One of vLLM's names."""
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type[SinkImpl]:
        """What computes."""
        return SinkImpl

    @staticmethod
    def get_builder_cls() -> type[SinkMetadataBuilder]:
        """What describes a batch."""
        return SinkMetadataBuilder

    @classmethod
    def supports_sliding_window(cls) -> bool:
        """It does nothing else."""
        return True


class SinkImpl(AttentionImpl[SinkMetadata]):
    """Attention of new tokens over the sinks and the window of their sequences."""

    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int,
        alibi_slopes: None,
        sliding_window: int,
        kv_cache_dtype: str,
        logits_soft_cap: float | None = None,
        attn_type: str = "decoder",
        kv_sharing_target_layer_name: None = None,
        *,
        num_sink_tokens: int,
    ) -> None:
        self.num_heads, self.head_size, self.scale, self.num_kv_heads = (
            num_heads,
            head_size,
            scale,
            num_kv_heads,
        )
        self.window, self.num_sink_tokens = sliding_window, num_sink_tokens
        self.kv_cache_dtype = kv_cache_dtype

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Write new tokens into their pages.

        Args:
            layer: the attention module.
            key: `(tokens, kv_heads, head_dim)`.
            value: as `key`.
            kv_cache: `(pages, kv_heads, page tokens, 2 * head_dim)`.
            slot_mapping: `(tokens,)` place of each token, counted through all pages; negative for padding.
        """
        slots = slot_mapping.clamp(min=0)  # page 0 belongs to nobody
        size = kv_cache.shape[2]
        kv_cache[slots // size, :, slots % size] = torch.cat([key, value], -1)[: len(slots)].to(
            kv_cache.dtype
        )

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: SinkMetadata | None,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Write attention of `query`, `(tokens, heads, head_dim)`, to `output`."""
        if attn_metadata is None:  # vLLM warms up
            return output
        if attn_metadata.decoding is not None:
            rows, places, visible = attn_metadata.decoding
            # A KV head's queries are rows of one product.
            heads = query[rows].unflatten(1, (self.num_kv_heads, -1))
            k, v = _read(kv_cache, places)
            output[rows] = attend(heads, k, v, visible[:, None, None], self.scale, None).flatten(1, 2)
        for rows, places in attn_metadata.prefills:
            k, v = _read(kv_cache, places)
            found = sliding_attention(
                query[rows].transpose(0, 1)[None],
                k,
                v,
                window=self.window,
                num_sink_tokens=self.num_sink_tokens,
                scaling=self.scale,
            )
            output[rows] = found[0].transpose(0, 1)
        return output


def _read(kv_cache: Tensor, places: Places) -> tuple[Tensor, Tensor]:
    """Keys and values, `(sequences, kv_heads, tokens, head_dim)` each."""
    found = kv_cache[places.pages, :, places.offsets].transpose(1, 2)
    k, v = found.chunk(2, dim=-1)
    return k, v


class SinkAttention(Attention):
    """vLLM's attention module with sinks; further arguments are those of `Attention`."""

    def __init__(self, *args: Any, num_sink_tokens: int, **kwargs: Any) -> None:
        super().__init__(*args, attn_backend=SinkBackend, num_sink_tokens=num_sink_tokens, **kwargs)
        self.num_sink_tokens = num_sink_tokens

    def get_kv_cache_spec(self, vllm_config: Any) -> SinkSpec:
        """What it keeps."""
        window = super().get_kv_cache_spec(vllm_config)
        known = {field.name: getattr(window, field.name) for field in fields(window) if field.init}
        return SinkSpec(**known, num_sink_tokens=self.num_sink_tokens)
