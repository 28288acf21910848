"""How vLLM is to hold a hybrid's KV cache: which attention modules a layer is split into, and what that takes.

vLLM gives every attention module one window and a cache of its own, so a layer with FA and SWA heads becomes several
modules. What their caches take depends on how the modules fit vLLM's pool of equal pages, which `planned_bytes` models.
Nothing here imports vLLM.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from consa.allocation import Allocation
from consa.constraints import Constraint, violation
from consa.errors import ConsaError

Grouping = Literal["two", "pairs", "heads"]
"""One module for all FA heads of a layer and one for its SWA heads; modules of two heads; a module per head."""

TOLERANCE = 1.05  # planned over ideal bytes, up to which fewer modules are better than less memory


@dataclass(frozen=True)
class Module:
    """Attention of some KV heads of a layer: full if `window` is None, else sliding by so many tokens."""

    heads: tuple[int, ...]
    window: int | None


@dataclass(frozen=True, kw_only=True)
class ServingPlan:
    """What `plan` returns, for one rank; the other ranks take as much.

    Attributes:
        grouping: how the heads of a layer share modules.
        modules: of each layer, FA before SWA; heads are numbered as in the whole model.
        planned_bytes: what vLLM's pool takes for one sequence of the context.
        ideal_bytes: what the allocation itself says, without pages.
    """

    grouping: Grouping
    modules: tuple[tuple[Module, ...], ...]
    planned_bytes: int
    ideal_bytes: int


def plan(
    allocation: Allocation,
    *,
    context: int,
    head_dim: int,
    bytes_per_element: int = 2,
    block_size: int = 16,
    tensor_parallel: int = 1,
    rank: int = 0,
    grouping: Grouping | None = None,
) -> ServingPlan:
    """The grouping of fewest modules whose memory is within 5 % of ideal; if there is none, that of least memory.

    Args:
        allocation: which heads are FA.
        context: tokens of the sequence that memory is planned for.
        head_dim: elements of one head's key.
        bytes_per_element: 2 for bf16.
        block_size: tokens of vLLM's smallest page.
        tensor_parallel: ranks over which the KV heads of a layer are split, in contiguous groups of equal size.
        rank: whose modules these are.
        grouping: this one, whatever it takes.

    Raises:
        ConsaError: the ranks' FA heads differ in number, the allocation does not allow the grouping asked for, or a
            size below 1; the message says what lacks.
    """
    sizes = {"context": context, "head_dim": head_dim, "bytes_per_element": bytes_per_element}
    for name, value in (sizes | {"block_size": block_size}).items():
        if value < 1:
            raise ConsaError(f"{name} must be an integer >= 1, got {value!r}")
    if grouping not in (None, *get_args(Grouping)):
        raise ConsaError(f"grouping must be one of {', '.join(get_args(Grouping))}, got {grouping!r}")
    split = Constraint(tensor_parallel=tensor_parallel)
    split.step(allocation.num_layers, allocation.num_kv_heads)  # finds ranks that do not divide the KV heads
    if lacking := violation(allocation, split):
        raise ConsaError(f"{lacking}; learn with tensor_parallel={tensor_parallel}, or serve on fewer ranks")
    if not 0 <= rank < tensor_parallel:
        raise ConsaError(f"rank must be in 0..{tensor_parallel - 1}, got {rank!r}")
    even = Constraint(full_heads_per_layer="even", tensor_parallel=tensor_parallel)
    lacking = violation(allocation, even)
    if grouping == "pairs" and lacking:
        raise ConsaError(f"grouping 'pairs' is impossible: {lacking}; 'heads' takes any number")
    head_bytes = 2 * head_dim * bytes_per_element  # of one token; 2: keys and values
    ideal = allocation.kv_cache_bytes(context, head_dim=head_dim, bytes_per_element=bytes_per_element)

    def planned(grouping: Grouping) -> ServingPlan:
        modules = _modules(allocation, grouping, tensor_parallel, rank)
        shapes = [(len(module.heads), module.window) for layer in modules for module in layer]
        return ServingPlan(
            grouping=grouping,
            modules=modules,
            planned_bytes=head_bytes
            * planned_head_tokens(
                shapes, context=context, num_sink_tokens=allocation.num_sink_tokens, block_size=block_size
            ),
            ideal_bytes=ideal // tensor_parallel,
        )

    if grouping:
        return planned(grouping)
    plans = [planned(name) for name in get_args(Grouping) if name != "pairs" or not lacking]
    good = (found for found in plans if found.planned_bytes <= TOLERANCE * found.ideal_bytes)
    return next(good, min(plans, key=lambda found: found.planned_bytes))


def planned_head_tokens(
    shapes: list[tuple[int, int | None]], *, context: int, num_sink_tokens: int, block_size: int
) -> int:
    """What vLLM's pool takes for one sequence, in tokens of one KV head.

    A model of the hybrid KV cache manager of vLLM 0.32 (`vllm/v1/core/kv_cache_utils.py`). All modules get pages of the
    largest module's bytes: one whose own page divides that holds more tokens a page, another is padded. Modules of the
    same heads, window and tokens a page are alike. Groups hold as many modules as the rarest kind has, or as the most
    frequent has if that is fewer than 1.5 times as many; the last group of a kind is padded to it. A page of a group is
    one page of each of its places. Of sliding windows only the pages in use are counted, not those that a long prefill
    chunk holds on top.

    Args:
        shapes: KV heads and window (None for full) of every module.
        context: tokens of the sequence.
        num_sink_tokens: kept by SWA modules in pages on top of the window.
        block_size: tokens of the largest module's page.
    """
    largest = max(heads for heads, _ in shapes)
    kinds = Counter(shapes)
    fewest, most = min(kinds.values()), max(kinds.values())
    group = most if most < 1.5 * fewest else fewest
    pages = 0
    for (heads, window), count in kinds.items():
        tokens = block_size * (largest // heads if largest % heads == 0 else 1)
        held = -(-context // tokens)
        if window is not None:  # a window begins anywhere in its first page
            held = min(held, -(-(window - 1) // tokens) + 1 + -(-num_sink_tokens // tokens))
        pages += -(-count // group) * held
    return pages * group * largest * block_size


def _modules(
    allocation: Allocation, grouping: Grouping, tensor_parallel: int, rank: int
) -> tuple[tuple[Module, ...], ...]:
    """The modules of every layer on one rank."""
    per_rank = allocation.num_kv_heads // tensor_parallel
    mine = np.arange(rank * per_rank, (rank + 1) * per_rank)
    layers: list[tuple[Module, ...]] = []
    for layer, row in enumerate(allocation.full_attention[:, mine]):
        window = allocation.native_windows.get(layer, allocation.window)
        found: list[Module] = []
        for heads, kind in ((mine[row].tolist(), None), (mine[~row].tolist(), window)):
            size = {"two": len(heads), "pairs": 2, "heads": 1}[grouping]
            found += [Module(tuple(heads[i : i + size]), kind) for i in range(0, len(heads), max(size, 1))]
        layers.append(tuple(found))
    return tuple(layers)
