"""What is measured in vLLM: steps of all requests, and more requests than fit."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

from consa import Allocation, ConsaError, convert
from consa.bench import vllm as bench
from tests.serving.engine import engine, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
CHUNK, CONTEXT, OUTPUT = 128, 200, 12
FIT = 5  # requests of CONTEXT + OUTPUT tokens


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """A hybrid whose pool holds `FIT` requests, each of 7 pages of FA heads and up to 4 of SWA heads."""
    folder = tmp_path_factory.mktemp("hybrid") / "hybrid"
    full = np.array([[1, 0], [0, 1], [1, 0], [0, 1]], dtype=bool)
    model = served("llama", num_key_value_heads=2, num_attention_heads=6)
    convert(model, Allocation(full_attention=full, window=40, num_sink_tokens=4), folder)
    options = {"block_size": 32, "max_num_batched_tokens": CHUNK, "max_model_len": 512, "max_num_seqs": 32}
    with engine(folder, **options, enable_prefix_caching=False, num_gpu_blocks_override=64) as llm:
        yield llm


def test_every_request_is_alive_in_the_steps_that_count(llm: Any):
    row = bench.generations(llm, context=CONTEXT, requests=3, decode_tokens=4, repeats=2)
    assert row["running_max"] == 3 and row["preemptions"] == 0
    assert len(row["prefill_seconds"]) == len(row["decode_seconds"]) == 2
    assert all(0 < seconds < 60 for seconds in row["prefill_seconds"] + row["decode_seconds"])
    page_bytes = row["pool_bytes"] / 64
    assert 3 * (7 + 3) <= row["kv_bytes"] / page_bytes <= 3 * (7 + 4)


def test_requests_that_do_not_fit_at_once_are_refused(llm: Any):
    with pytest.raises(ConsaError, match=r"only \d of 12 requests got a token in a decode step"):
        bench.generations(llm, context=CONTEXT, requests=12, decode_tokens=4, repeats=1)
    while llm.llm_engine.has_unfinished_requests():
        llm.llm_engine.step()


def test_a_saturated_pool(llm: Any):
    row = bench.saturate(llm, context=CONTEXT, output_tokens=OUTPUT)
    assert FIT <= row["fit"]["consa"] < FIT + 1 and row["requests"] == int(np.ceil(2 * row["fit"]["consa"]))
    assert row["running_median"] <= row["running_max"] <= FIT + 1
    assert row["tokens_per_second"] == pytest.approx(row["requests"] * OUTPUT / row["seconds"])
    assert 0.7 * row["pool_bytes"] < row["kv_bytes"] <= row["pool_bytes"]


def test_preemptions_are_counted(llm: Any):
    generation = bench.Generation(llm, context=20, requests=16, max_tokens=200)
    generation.finish()
    assert generation.preemptions > 0 and generation.finished[-1] == 16
    assert all(len(tokens) == 200 for tokens in generation.tokens.values())
