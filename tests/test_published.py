"""Published allocations load by name and match their name."""

from __future__ import annotations

import re
from importlib.util import find_spec
from pathlib import Path

import pytest
from transformers import LlamaConfig

from consa import published
from consa.allocation import Allocation
from consa.errors import ConsaError
from tests import models
from tests.cli.test_cli import apart, refused  # noqa: F401 (apart is a fixture, for every test)


@pytest.mark.parametrize("name", published.names())
def test_each_is_what_its_name_says(name: str):
    allocation = Allocation.load(name)
    match = re.fullmatch(r"(.+)/(\w+)-([\d.]+)(?:-window(\d+))?", name)
    assert match
    model, granularity, sparsity, window = match.groups()
    assert allocation.granularity == granularity
    units = allocation.num_layers * (1 if granularity == "layer" else allocation.num_kv_heads)
    assert abs(allocation.sparsity - float(sparsity)) <= 0.5 / units + 1e-9
    assert allocation.provenance["model"] == model
    assert allocation.full_attention.shape == published.MODELS[model][1]
    assert allocation.window == int(window or 128)
    match = re.match(r"python -m (research\.\w+) ", allocation.provenance["command"])
    assert match and find_spec(match[1]), "a command that exists"
    assert isinstance(allocation.provenance["config"]["seed"], int)


def test_those_that_fit_a_model_have_its_type_and_shape(tmp_path: Path):
    assert published.fitting("llama", (30, 3)) == [
        name for name in published.names() if name.startswith("smollm2-135m/")
    ]
    assert published.fitting("qwen2", (30, 3)) == published.fitting("llama", (30, 2)) == []
    LlamaConfig(hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3).save_pretrained(
        tmp_path / "alike"
    )
    models.save_tiny(tmp_path / "tiny")
    for given in ([], ["--allocation", "nowhere"]):
        for model, fits in (("alike", True), ("tiny", False)):
            line = refused("convert", tmp_path / model, "--out", tmp_path / "out", *given)
            assert ("smollm2-135m/kv_head-0.75" in line) == fits and "all_swa, interleaved" in line


def test_both_granularities_are_there():
    assert {name.partition("/")[2].partition("-")[0] for name in published.names()} == {"kv_head", "layer"}


def test_a_file_of_that_name_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    name = published.names()[0]
    own = Allocation.load(published.names()[-1])
    monkeypatch.chdir(tmp_path)
    own.save(tmp_path / name)
    assert Allocation.load(name) == own


@pytest.mark.parametrize("name", ["smollm2-135m/kv_head-0.1", "../allocations/smollm2-135m/kv_head-0.733", "x" * 5000])
def test_an_unknown_name_lists_those_there_are(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    there = "smollm2-135m/kv_head-0.25, " if name.startswith("smollm2") else "qwen2.5-coder-0.5b/..., "
    with pytest.raises(ConsaError, match=f"nor a published allocation: {re.escape(there)}"):
        Allocation.load(name)
