"""vLLM's own planner, without an engine, on the caches that a hybrid asks for."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from consa import Allocation, rules
from consa.constraints import Constraint, choose
from consa.serving.pages import SinkSpec
from consa.serving.plan import DECODING_TOKENS, unused_places

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups  # since vLLM 0.33
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

pytestmark = pytest.mark.vllm
LAYERS, HEADS, CONTEXT = 28, 8, 32_768
BASE = rules.uniform_heads(LAYERS, HEADS, sparsity=0.75, window=512, num_sink_tokens=4)
DENSE = LAYERS * HEADS * CONTEXT * 2 * 128 * 2  # bytes
# Share of the dense model's memory by the number of FA heads of 224, worked out apart from this code.
SHARES = {22: 0.115, 45: 0.215, 56: 0.263, 75: 0.346, 90: 0.416, 112: 0.509, 150: 0.681, 168: 0.763}
HEAD: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 128, "dtype": torch.bfloat16}


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
    spec = SinkSpec(**HEAD, sliding_window=window, num_sink_tokens=sinks)
    assert spec.max_admission_blocks_per_request(DECODING_TOKENS, tokens) == pages


def drawn(num_full: int, seed: int) -> Allocation:
    """A random allocation."""
    scores = np.random.default_rng(seed).normal(size=(LAYERS, HEADS))
    return replace(BASE, full_attention=choose(scores, num_full, Constraint()))


def caches(allocation: Allocation) -> dict[str, Any]:
    """Of all places, in the order in which layers register them."""
    sliding = SinkSpec(**HEAD, sliding_window=512, num_sink_tokens=4)
    found: dict[str, Any] = {}
    for layer, row in enumerate(allocation.full_attention):
        for index, full in enumerate(sorted(row, reverse=True)):
            found[f"layers.{layer}.place_{index}"] = FullAttentionSpec(**HEAD) if full else sliding
    num_full = int(allocation.full_attention.sum())
    for unused in range(unused_places(num_full, LAYERS * HEADS - num_full)):
        found[f"layers.{LAYERS - 1}.unused_{unused}"] = sliding
    return found


@pytest.mark.parametrize("num_full", [0, *SHARES, LAYERS * HEADS])
@pytest.mark.parametrize("seed", range(3))
def test_all_full_heads_are_one_group_and_memory_is_near_ideal(num_full: int, seed: int):
    allocation = drawn(num_full, seed)
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LBNHC"  # as vLLM chooses where no backend asks for another
    groups = get_kv_cache_groups(config, caches(allocation))
    assert len(groups) == (-(-LAYERS * HEADS // num_full) if num_full else 1)
    size = max(len(group.layer_names) for group in groups)
    pages = 0
    for group in groups:
        spec = group.kv_cache_spec
        cap = getattr(spec, "max_admission_blocks_per_request", None)
        pages += cap(DECODING_TOKENS, CONTEXT) if cap else CONTEXT // 16
    planned = pages * size * 16 * 2 * 128 * 2
    assert 1 <= planned / allocation.kv_cache_bytes(CONTEXT, head_dim=128) < (1.03 if num_full else 1.09)
    if num_full in SHARES:
        assert round(planned / DENSE, 3) == SHARES[num_full]
    full = [group for group in groups if isinstance(group.kv_cache_spec, FullAttentionSpec)]
    if num_full:
        (group,) = full
        assert len(group.layer_names) == num_full == size
        for layer in range(LAYERS):  # those of a layer lie next to each other, and it counts on their order
            count = int(allocation.full_attention[layer].sum())
            names = [name for name in group.layer_names if name.startswith(f"layers.{layer}.")]
            assert names == [f"layers.{layer}.place_{index}" for index in range(count)]
            indices = [group.layer_names.index(name) for name in names]
            assert np.all(np.diff(indices) == 1)
