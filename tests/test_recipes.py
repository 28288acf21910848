"""Every recipe's settings are valid, fit 1 and 8 GPUs, and its docstring counts what the model has."""

from __future__ import annotations

import re
from importlib import import_module
from typing import Any

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from consa import rules
from consa.config import AdaptConfig, LearnConfig, RunConfig
from consa.learning import target_units, units_of
from consa.model import attention_layout
from recipes import run

SHAPES = {"qwen3_0_6b": (1024, 3072), "qwen3_1_7b": (2048, 6144)}


def model(name: str) -> Any:
    """The architecture, without weights."""
    hidden_size, intermediate_size = SHAPES[name]
    config = Qwen3Config(
        vocab_size=151936,
        hidden_size=hidden_size,
        intermediate_size=intermediate_size,
        num_hidden_layers=28,
        num_attention_heads=16,
        num_key_value_heads=8,
        head_dim=128,
        tie_word_embeddings=True,
    )
    with torch.device("meta"):
        return Qwen3ForCausalLM(config)


def test_no_recipe_is_left_out():
    assert set(run.RECIPES) == SHAPES.keys()


@pytest.mark.parametrize("name", run.RECIPES)
def test_settings(name: str):
    recipe = import_module(f"recipes.{name}")
    assert isinstance(recipe.RUN, RunConfig)
    assert isinstance(recipe.LEARN, LearnConfig) and isinstance(recipe.ADAPT, AdaptConfig)
    assert recipe.RUN.start_for(recipe.LEARN) < recipe.LEARN.seq_len == recipe.ADAPT.seq_len
    for config in (recipe.LEARN, recipe.ADAPT):
        assert config.sequences_per_step % (8 * config.micro_batch) == 0
    layout = attention_layout(model(name))
    units = units_of(layout, recipe.LEARN.granularity)
    assert target_units(layout, recipe.LEARN) == 56 and units.count == 224


@pytest.mark.parametrize("name", run.RECIPES)
def test_the_docstring_counts_right(name: str):
    recipe = import_module(f"recipes.{name}")
    text = " ".join((recipe.__doc__ or "").split())
    skeleton = model(name)
    total = sum(p.numel() for p in skeleton.parameters())
    embeddings = skeleton.get_input_embeddings().weight.numel()
    layer = sum(p.numel() for p in skeleton.model.layers[0].parameters())
    assert f"{embeddings / 1e6:.1f} M (embeddings) + 28 x {layer / 1e6:.2f} M" in text
    assert f"= {total / 1e6:,.1f} M parameters" in text
    assert re.search(
        rf"Adam {total / 1e6:,.1f} M x \(2 \+ 4 \+ 4 \+ 8\) bytes {total * 18 / 1e9:.1f} GB", text
    )
    assert f"x (4 + 8) bytes = {total * 12 / 1e9:.1f} GB" in text
    for sums in re.findall(r"in all ([\d. +]+) ([\d.]+) GB", text):
        assert sum(map(float, sums[0].split("+"))) == pytest.approx(float(sums[1]), abs=0.05)
    hybrid = rules.interleaved(28, 8, sparsity=0.75, window=128, num_sink_tokens=4)
    assert f"{hybrid.kv_cache_bytes(32768, head_dim=128) / 1e9:.2f} GB." in text
    for config in (recipe.LEARN, recipe.ADAPT):
        tokens = config.num_steps * config.sequences_per_step * config.seq_len / 1e6
        assert (
            f"{config.num_steps:,} x {config.sequences_per_step} x 8,192 = {tokens:.{1 if tokens < 100 else 0}f} M"
            in text
        )
    weights, attention = total / 1e9, 4.5 * 2 * 8192 * 2048 * 28 / 1e9
    for flop in (6 * weights + attention, 8 * weights + attention / 4):
        assert f"= {flop:.1f} GFLOP" in text
