"""How many requests fit into vLLM's KV cache, and how much of it is in use; of hybrids and of dense models.

vLLM logs a number of its own, which keeps room for two steps' tokens in every request. Only the requests whose prompts
are being read hold that much, and all of them together have no more than two steps' tokens in flight.
"""

# pyright: reportMissingImports=false
# vLLM has an environment of its own.

from __future__ import annotations

from typing import Any

from consa.serving.plan import DECODING_TOKENS


def requests_that_fit(kv_cache_config: Any, vllm_config: Any, num_tokens: int) -> float:
    """Requests of `num_tokens` that decode at once, next to prompts that are being read.

    Args:
        kv_cache_config: what vLLM planned, of one rank.
        vllm_config: the engine's settings.
        num_tokens: of each request, prompt and answer.
    """
    groups = kv_cache_config.kv_cache_groups
    reserve = sum(
        -(-vllm_config.max_in_flight_tokens // group.kv_cache_spec.block_size)
        for group in groups
        if hasattr(group.kv_cache_spec, "max_admission_blocks_per_request")  # it gives pages back
    )
    return (kv_cache_config.num_blocks - reserve) / _pages(kv_cache_config, num_tokens)


def bytes_of_request(kv_cache_config: Any, num_tokens: int) -> int:
    """Bytes that a decoding request of `num_tokens` holds."""
    return _pages(kv_cache_config, num_tokens) * _page_bytes(kv_cache_config)


def bytes_in_use(kv_cache_manager: Any) -> int:
    """Bytes that requests hold now; prefixes that are only kept for later requests are not counted.

    Args:
        kv_cache_manager: that of the engine's scheduler.
    """
    config, pool = kv_cache_manager.kv_cache_config, kv_cache_manager.block_pool
    used = pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()  # page 0 belongs to nobody
    return used * _page_bytes(config)


def _pages(kv_cache_config: Any, num_tokens: int) -> int:
    """Pages that a decoding request holds in all groups."""
    pages = 0
    for group in kv_cache_config.kv_cache_groups:
        spec = group.kv_cache_spec
        held = -(-num_tokens // spec.block_size)
        if cap := getattr(spec, "max_admission_blocks_per_request", None):
            held = min(held, cap(max_in_flight_tokens=DECODING_TOKENS, max_model_len=num_tokens))
        pages += held
    return pages


def _page_bytes(kv_cache_config: Any) -> int:
    """Bytes of a page in all places of a group; groups lie over each other in one buffer."""
    return kv_cache_config.kv_cache_tensors[0].size // kv_cache_config.num_blocks
