"""Published allocations load by name and match their name."""

from __future__ import annotations

from pathlib import Path

import pytest

from consa import published
from consa.allocation import Allocation
from consa.errors import ConsaError


@pytest.mark.parametrize("name", published.names())
def test_each_is_what_its_name_says(name: str):
    allocation = Allocation.load(name)
    model, _, said = name.partition("/")
    granularity, _, sparsity = said.rpartition("-")
    assert allocation.granularity == granularity
    units = allocation.num_layers * (1 if granularity == "layer" else allocation.num_kv_heads)
    assert abs(allocation.sparsity - float(sparsity)) <= 0.5 / units + 1e-9
    assert allocation.provenance["model"] == model == "smollm2-135m"
    assert allocation.full_attention.shape == (30, 3)
    assert allocation.provenance["command"].startswith("python benchmarks/")
    assert isinstance(allocation.provenance["config"]["seed"], int)


def test_both_granularities_are_there():
    assert {name.partition("-")[2].partition("/")[2].rpartition("-")[0] for name in published.names()} == {
        "kv_head",
        "layer",
    }


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = published.names()[0]
    own = Allocation.load(published.names()[-1])
    monkeypatch.chdir(tmp_path)
    own.save(tmp_path / name)
    assert Allocation.load(name) == own


@pytest.mark.parametrize("name", ["smollm2-135m/kv_head-0.1", "../allocations/smollm2-135m/kv_head-0.733", "x" * 5000])
def test_an_unknown_name_lists_those_there_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ConsaError, match=r"nor a published allocation: smollm2-135m/"):
        Allocation.load(name)
