"""The benchmark measures the bytes of the cache, and dense and hybrid with the same weights."""

from __future__ import annotations

import importlib.metadata
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from consa import Allocation, ConsaError, convert, load
from consa.bench.measure import Measurement, _reset_peak, benchmark, dense_twin, peak_bytes, write
from consa.cache.layer import GROWTH
from consa.model.interface import allocation_of
from tests.models import allocate, tiny, tokens

HEAD_DIM, UNITS = 8, 12


@pytest.fixture(scope="module")
def dense():
    return tiny()


@pytest.fixture(scope="module")
def hybrid(dense, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "hybrid"
    convert(dense, allocate(dense), folder)
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def runs():
    return []


@pytest.fixture(scope="module")
def result(hybrid, runs):
    return benchmark(
        hybrid,
        contexts=[60, 200],
        batch_sizes=[1, 3],
        decode_tokens=5,
        repeats=2,
        on_run=lambda done, name: runs.append((done, name)),
    )


def test_cache_bytes_are_those_of_the_allocation_to_within_a_growth_chunk(dense, result):
    hybrid_allocation = allocate(dense)
    all_full = Allocation(full_attention=np.ones((4, 3), dtype=bool), window=1)
    for m in result.measurements:
        allocation = all_full if m.model == "dense" else hybrid_allocation
        options = {"head_dim": HEAD_DIM, "bytes_per_element": 4, "batch_size": m.batch_size}
        wanted = allocation.kv_cache_bytes(m.context + 5, **options)
        one_chunk = 2 * UNITS * GROWTH * HEAD_DIM * 4 * m.batch_size
        assert wanted <= m.cache_bytes < wanted + one_chunk, m
        assert m.model != "dense" or m.cache_bytes == wanted


def test_measurements_come_in_pairs(result, runs):
    assert [(m.context, m.batch_size, m.model) for m in result.measurements] == [
        (context, batch, model) for context in (60, 200) for batch in (1, 3) for model in ("dense", "hybrid")
    ]
    for pair in result.pairs():
        assert [m.model for m in pair] == ["dense", "hybrid"]
        assert pair[0].context == pair[1].context and pair[0].batch_size == pair[1].batch_size
    weights = sum(x.numel() * 4 for x in tiny().parameters())
    for m in result.measurements:
        assert 0 < m.prefill_seconds < 60 and m.decode_tokens_per_second > 0 and m.peak_bytes > weights
    # Dense and hybrid in turn, so that both meet the same machine.
    assert [done for done, _ in runs] == list(range(1, 17))
    assert [name for _, name in runs[:4]] == ["dense, 60 tokens, batch 1", "hybrid, 60 tokens, batch 1"] * 2


def test_the_table_and_the_files_say_the_same(result, tmp_path):
    columns, rows = result.table()
    assert len(rows) == 12 and all(len(row) == len(columns) == 7 for row in rows)
    assert columns[0] == "context" and [row[2] for row in rows] == ["dense", "hybrid", "ratio"] * 4
    for (dense, hybrid), ratio in zip(result.pairs(), rows[2::3], strict=True):
        assert ratio[5] == f"{hybrid.cache_bytes / dense.cache_bytes:.3f}"
        assert ratio[3] == f"{hybrid.prefill_seconds / dense.prefill_seconds:.3f}"
    json_path, figure_path = write(result, tmp_path / "new")
    record = json.loads(json_path.read_text())
    assert [Measurement(**m) for m in record["measurements"]] == list(result.measurements)
    assert record["sparsity"] == result.sparsity
    assert record["where"]["dtype"] == "float32" and record["where"]["repeats"] == 2
    assert record["where"]["versions"]["torch"] == importlib.metadata.version("torch")
    assert figure_path.read_bytes().startswith(b"\x89PNG")
    (tmp_path / "file").touch()
    with pytest.raises(ConsaError, match="cannot write"):
        write(result, tmp_path / "file")


def test_the_dense_twin_is_the_original_in_the_same_memory(dense, hybrid):
    ids = tokens(2, 60)
    before = {name: x.data_ptr() for name, x in hybrid.named_parameters()}
    with torch.no_grad():
        as_hybrid = hybrid(ids).logits
        twin = dense_twin(hybrid)
        assert {name: x.data_ptr() for name, x in twin.named_parameters()} == before
        torch.testing.assert_close(twin(ids).logits, dense(ids).logits, atol=1e-4, rtol=0)
        assert torch.equal(hybrid(ids).logits, as_hybrid)
    assert allocation_of(twin.config) is None and allocation_of(hybrid.config) is not None
    assert (as_hybrid - twin(ids).logits).abs().max() > 1e-2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"contexts": []}, "at least 1"),
        ({"contexts": [0]}, "at least 1"),
        ({"batch_sizes": [-1]}, "at least 1"),
        ({"decode_tokens": 0}, "at least 1"),
        ({"repeats": 0}, "at least 1"),
        ({"contexts": [5, 4090]}, "context 4090 and 32 decoded tokens exceed the 4096 positions"),
    ],
)
def test_bad_settings_are_refused_before_any_run(hybrid, changes, message):
    with pytest.raises(ConsaError, match=message):
        benchmark(hybrid, **{"contexts": [10], "batch_sizes": [1]} | changes, on_run=lambda *_: pytest.fail("measured"))


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="the mark cannot be reset")
def test_a_peak_is_that_of_one_run():
    """Memory freed before does not count, whether the allocator has returned it or keeps it."""
    cpu = torch.device("cpu")
    del [torch.ones(2**22)][0]  # 16 MB: from here on, glibc takes smaller blocks from its heap
    blocks = [torch.ones(2**18) for _ in range(256)]  # 1 MB each
    last = blocks[-1]  # above the others, so that their place stays with the heap
    del blocks
    before = peak_bytes(cpu)
    _reset_peak(cpu)
    rest = peak_bytes(cpu)
    assert rest < before - 200 * 2**20
    big = torch.ones(2**26)
    del big
    assert peak_bytes(cpu) > rest + 200 * 2**20  # freed again, but it was there
    assert last.sum() == 2**18


def test_without_an_allocation_there_is_nothing_to_compare(dense):
    with pytest.raises(ConsaError, match=r"not a hybrid.*--kind hybrid"):
        benchmark(dense, contexts=[10], batch_sizes=[1])
