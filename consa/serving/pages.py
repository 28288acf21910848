"""How vLLM keeps the KV cache of a hybrid: one place per KV head, of which sliding-window heads keep sinks and window.

vLLM's own sliding window drops the sinks with the first page. Here their pages stay: a page table of such a group
begins with the sinks' pages, then come entries of pages given back, then the window's.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from vllm.v1.core.kv_cache_utils import resolve_block_hashes
from vllm.v1.core.single_type_kv_cache_manager import SlidingWindowManager
from vllm.v1.kv_cache_interface import SlidingWindowSpec
from vllm.v1.kv_cache_spec_registry import KVCacheSpecRegistry

EVERY_TOKEN = 2**30  # more than any request has, and an int32


@dataclass(frozen=True, kw_only=True)
class SinkSpec(SlidingWindowSpec):
    """The cache of a window, and the pages of the first tokens."""

    num_sink_tokens: int

    @property
    def sink_pages(self) -> int:
        """Pages that hold sinks."""
        return -(-self.num_sink_tokens // self.block_size)

    def max_admission_blocks_per_request(self, max_in_flight_tokens: int, max_model_len: int) -> int:
        """Pages that a request of `max_model_len` tokens holds at most, with so many of them not yet computed.

        vLLM compares it with the pages that are free when it admits a request, counting two steps' tokens in flight.
        That is a fair reserve, since all requests together have no more in flight. It is too large only as a share of
        the pool per request; `consa.serving.capacity` counts it once.
        """
        near = super().max_admission_blocks_per_request(max_in_flight_tokens, max_model_len)
        return min(near + self.sink_pages, -(-max_model_len // self.block_size))

    @property
    def num_retained_tokens(self) -> int:
        """Tokens before the first new one whose entries in a page table must stay; since vLLM 0.33.

        vLLM's number is the window's, and the sinks lie before it: all must stay then.
        """
        return EVERY_TOKEN if self.num_sink_tokens else super().num_retained_tokens

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
        if not new_computed_blocks:  # of every request in every decode step: the scheduler's time counts
            return needed
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
        mask = super().reachable_block_mask(start_block, end_block, alignment_tokens, kv_cache_spec, *args, **kwargs)
        if mask is not None:
            for page in range(start_block, min(end_block, kv_cache_spec.sink_pages)):
                mask[page - start_block] = True
        return mask


# Fills it, which vLLM leaves out once something is in it.
KVCacheSpecRegistry.check_kv_cache_spec_registry({})
KVCacheSpecRegistry.register(SinkSpec, SinkManager)
