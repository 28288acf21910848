"""How vLLM is to hold a hybrid's KV cache, and what that takes. Nothing here imports vLLM.

vLLM plans a cache per window and shares out pages of equal size. Every KV head has a place of its own, which keeps all
tokens (FA) or sinks and window (SWA). vLLM puts places that keep the same into groups of equal size, and a request
holds pages of a group, each a page of every place in it. So that all FA heads are one group, unused places are added
until the number of SWA places is a multiple of the number of FA heads: the FA heads then fill one group, and the SWA
places one or more.
"""

from __future__ import annotations

from dataclasses import dataclass

from consa.allocation import Allocation
from consa.constraints import Constraint, violation
from consa.errors import ConsaError

DECODING_TOKENS = 2  # of a decoding request in flight: vLLM schedules a step while the one before runs


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What `plan` returns, for one rank; the other ranks take as much.

    Attributes:
        planned_bytes: what vLLM's pool takes for one sequence of the context while it decodes.
        ideal_bytes: what the allocation itself says, without pages.
        unused_places: SWA places of no head.
        groups: cache groups, and so page tables.
    """

    planned_bytes: int
    ideal_bytes: int
    unused_places: int
    groups: int


def plan(
    allocation: Allocation,
    *,
    context: int,
    head_dim: int,
    bytes_per_element: int = 2,
    block_size: int = 16,
    tensor_parallel: int = 1,
) -> ServingPlan:
    """What a sequence of a hybrid takes in vLLM.

    Args:
        allocation: which heads are FA.
        context: tokens of the sequence that memory is planned for.
        head_dim: elements of one head's key.
        bytes_per_element: 2 for bf16.
        block_size: tokens of a page.
        tensor_parallel: ranks over which the KV heads of a layer are split, in contiguous groups of equal size.

    Raises:
        ConsaError: the ranks' FA heads differ in number, or a size is below 1; the message names it.
    """
    sizes = {"context": context, "head_dim": head_dim, "bytes_per_element": bytes_per_element}
    for name, value in (sizes | {"block_size": block_size}).items():
        if value < 1:
            raise ConsaError(f"{name} must be an integer >= 1, got {value!r}")
    split = Constraint(tensor_parallel=tensor_parallel)
    split.step(allocation.num_layers, allocation.num_kv_heads)  # raises where ranks do not divide the KV heads
    if lacking := violation(allocation, split):
        raise ConsaError(f"{lacking}; learn with tensor_parallel={tensor_parallel}, or serve on fewer ranks")
    num_full = int(allocation.full_attention.sum()) // tensor_parallel
    num_sliding = allocation.full_attention.size // tensor_parallel - num_full
    unused = unused_places(num_full, num_sliding)
    held = window_pages(allocation.window, allocation.num_sink_tokens, num_tokens=context, block_size=block_size)
    all_pages = -(-context // block_size)
    if num_full:
        size, groups = num_full, 1 + (num_sliding + unused) // num_full
        pages = all_pages + (groups - 1) * held
    else:
        size, groups, pages = num_sliding, 1, held
    ideal = allocation.kv_cache_bytes(context, head_dim=head_dim, bytes_per_element=bytes_per_element)
    return ServingPlan(
        planned_bytes=pages * size * block_size * 2 * head_dim * bytes_per_element,  # 2: keys and values
        ideal_bytes=ideal // tensor_parallel,
        unused_places=unused,
        groups=groups,
    )


def unused_places(num_full: int, num_sliding: int) -> int:
    """SWA places to add, so that their number is a multiple of the number of FA heads."""
    return -num_sliding % num_full if num_full else 0


def window_pages(window: int, num_sink_tokens: int, *, num_tokens: int, block_size: int) -> int:
    """Pages of a decoding request of `num_tokens` in a group of SWA places; a window begins anywhere in a page."""
    near = min(window - 1 + DECODING_TOKENS, num_tokens)
    most = -(-near // block_size) + 1 + -(-num_sink_tokens // block_size)
    return min(most, -(-num_tokens // block_size))
