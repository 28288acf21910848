"""Planning vLLM's KV cache: memory, unused places, ranks. tests/serving compares it with the engine's own planner."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consa import Allocation, rules
from consa.constraints import Constraint, choose
from consa.errors import ConsaError
from consa.serving.plan import plan, unused_places, window_pages

LAYERS, HEADS, CONTEXT = 28, 8, 32_768
BASE = rules.uniform_heads(LAYERS, HEADS, sparsity=0.75, window=512, num_sink_tokens=4)
DENSE = LAYERS * HEADS * CONTEXT * 2 * 128 * 2  # bytes
# Share of the dense model's memory by the number of FA heads of 224, worked out apart from this code.
SHARES = {22: 0.115, 45: 0.215, 56: 0.263, 75: 0.346, 90: 0.416, 112: 0.509, 150: 0.681, 168: 0.763}


def drawn(num_full: int, seed: int = 0) -> Allocation:
    """A random allocation."""
    scores = np.random.default_rng(seed).normal(size=(LAYERS, HEADS))
    return replace(BASE, full_attention=choose(scores, num_full, Constraint()))


@pytest.mark.parametrize(("num_full", "share"), SHARES.items())
def test_memory_is_near_ideal_for_any_number_of_full_heads(num_full: int, share: float):
    found = plan(drawn(num_full), context=CONTEXT, head_dim=128)
    assert round(found.planned_bytes / DENSE, 3) == share
    assert 1 <= found.planned_bytes / found.ideal_bytes < 1.03


@pytest.mark.parametrize(
    ("window", "sinks", "tokens", "pages"),
    [
        (512, 0, 32_768, 34),  # 513 tokens touch 33 pages, or 34 from the middle of one
        (512, 4, 32_768, 35),
        (512, 17, 32_768, 36),
        (512, 4, 100, 7),  # all of a short request's
        (1, 0, 100, 2),  # the new token and the one in flight
        (16, 16, 64, 4),
    ],
)
def test_pages_of_a_window(window: int, sinks: int, tokens: int, pages: int):
    assert window_pages(window, sinks, num_tokens=tokens, block_size=16) == pages


@given(st.integers(0, 300), st.integers(0, 300))
def test_unused_places_make_full_heads_the_size_of_a_group(num_full: int, num_sliding: int):
    unused = unused_places(num_full, num_sliding)
    assert 0 <= unused < max(num_full, 1)
    if num_full:
        assert (num_sliding + unused) % num_full == 0


@pytest.mark.parametrize(("full", "groups"), [(0, 1), (224, 1), (56, 4), (112, 2), (150, 2)])
def test_groups(full: int, groups: int):
    assert plan(drawn(full), context=CONTEXT, head_dim=128).groups == groups


@st.composite
def allocations(draw: Any) -> tuple[Allocation, int, int]:
    layers, heads = draw(st.integers(1, 4)), draw(st.sampled_from([1, 2, 3, 4, 6]))
    ranks = draw(st.sampled_from([n for n in (1, 2, 3) if heads % n == 0]))
    num_full = ranks * draw(st.integers(0, layers * heads // ranks))
    scores = np.random.default_rng(draw(st.integers(0, 2**31))).normal(size=(layers, heads))
    mask = choose(scores, num_full, Constraint(tensor_parallel=ranks))
    sinks = draw(st.integers(0, 40))
    return Allocation(full_attention=mask, window=9, num_sink_tokens=sinks), ranks, draw(st.integers(1, 200))


@given(allocations())
@settings(max_examples=150, deadline=None)
def test_ranks_share_the_memory(drawn: tuple[Allocation, int, int]):
    allocation, ranks, context = drawn
    one = plan(allocation, context=context, head_dim=8)
    each = plan(allocation, context=context, head_dim=8, tensor_parallel=ranks)
    assert each.planned_bytes * ranks == one.planned_bytes and each.groups == one.groups
    assert each.ideal_bytes * ranks == one.ideal_bytes == allocation.kv_cache_bytes(context, head_dim=8)
    assert one.planned_bytes >= one.ideal_bytes


MIXED = Allocation(full_attention=np.array([[True, False, False, False], [True, True, True, False]]), window=4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel": 2}, "layer 0 has 1, 0; learn with tensor_parallel=2, or serve on fewer ranks"),
        ({"tensor_parallel": 3}, "tensor_parallel must divide the 4 KV heads of a layer, got 3$"),
        ({"context": 0}, "context must be an integer >= 1, got 0"),
        ({"block_size": 0}, "block_size must be an integer >= 1, got 0"),
    ],
)
def test_what_cannot_be_served_is_refused(options: dict[str, Any], message: str):
    defaults: dict[str, Any] = {"context": 64, "head_dim": 8}
    with pytest.raises(ConsaError, match=message):
        plan(MIXED, **defaults | options)
