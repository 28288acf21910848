"""Every recipe's settings are valid and fit 1 and 8 GPUs, and the page of their costs is what the command writes."""

from __future__ import annotations

from importlib import import_module

import pytest

from consa.config import AdaptConfig, LearnConfig, RunConfig
from consa.learning import target_units, units_of
from consa.model import attention_layout
from recipes import costs, run


def test_no_recipe_is_left_out():
    assert run.RECIPES == ["qwen3_0_6b", "qwen3_1_7b"]


@pytest.mark.parametrize("name", run.RECIPES)
def test_settings(name: str):
    recipe = import_module(f"recipes.{name}")
    assert isinstance(recipe.RUN, RunConfig)
    assert isinstance(recipe.LEARN, LearnConfig) and isinstance(recipe.ADAPT, AdaptConfig)
    assert recipe.RUN.start_for(recipe.LEARN) < recipe.LEARN.seq_len == recipe.ADAPT.seq_len
    for config in (recipe.LEARN, recipe.ADAPT):
        assert config.sequences_per_step % (8 * config.micro_batch) == 0
        assert config.activation_checkpointing, "the page counts on it"
    layout = attention_layout(costs.skeleton(recipe.SHAPE))
    units = units_of(layout, recipe.LEARN.granularity)
    assert target_units(layout, recipe.LEARN) == 56 and units.count == 224


def test_the_page_is_what_the_command_writes():
    assert costs.PAGE.read_text() == costs.page()


@pytest.mark.parametrize(("name", "millions"), [("qwen3_0_6b", 596.0), ("qwen3_1_7b", 1720.6)])
def test_the_shapes_have_the_published_sizes(name: str, millions: float):
    total, layers, embeddings = costs.parameters(costs.skeleton(import_module(f"recipes.{name}").SHAPE))
    assert total == pytest.approx(millions * 1e6, rel=1e-4)
    assert 0 < total - layers - embeddings < 1e4, "the last norm alone is in neither"


def test_sharding_divides_what_belongs_to_layers():
    recipe = import_module("recipes.qwen3_1_7b")
    model = costs.skeleton(recipe.SHAPE)
    _, layers, _ = costs.parameters(model)
    eight, sixteen = (costs.memory(model, recipe.ADAPT, gpus)["masters, gradients, Adam"] for gpus in (8, 16))
    assert eight - sixteen == layers * 16 / 16
