"""vLLM's own planner, without an engine, on the caches that a hybrid asks for."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

import torch
from vllm.config import VllmConfig
from vllm.v1.kv_cache_interface import FullAttentionSpec

from consa import Allocation
from consa.serving.pages import SinkSpec
from consa.serving.plan import DECODING_TOKENS, plan, unused_places
from tests.test_serving_plan import CONTEXT, DENSE, HEADS, LAYERS, SHARES, drawn

try:
    from vllm.v1.core.kv_cache_planning import get_kv_cache_groups  # since vLLM 0.33
except ImportError:
    from vllm.v1.core.kv_cache_utils import get_kv_cache_groups

pytestmark = pytest.mark.vllm
HEAD: dict[str, Any] = {"block_size": 16, "num_kv_heads": 1, "head_size": 128, "dtype": torch.bfloat16}


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
def test_the_planner_does_what_plan_says(num_full: int, seed: int):
    allocation = drawn(num_full, seed)
    config = VllmConfig()
    config.cache_config.kv_cache_layout = "LBNHC"  # as vLLM chooses where no backend asks for another
    groups = get_kv_cache_groups(config, caches(allocation))
    wanted = plan(allocation, context=CONTEXT, head_dim=128)
    assert len(groups) == wanted.groups
    size = max(len(group.layer_names) for group in groups)
    pages = 0
    for group in groups:
        spec = group.kv_cache_spec
        cap = getattr(spec, "max_admission_blocks_per_request", None)
        pages += cap(DECODING_TOKENS, CONTEXT) if cap else CONTEXT // 16
    assert pages * size * 16 * 2 * 128 * 2 == wanted.planned_bytes
    if num_full in SHARES:
        assert round(wanted.planned_bytes / DENSE, 3) == SHARES[num_full]
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
