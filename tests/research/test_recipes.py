"""Every recipe's settings are valid and fit 1 and 8 GPUs, and the page of their costs is what the command writes."""

from __future__ import annotations

import argparse
import json
import random
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from consa.config import AdaptConfig, LearnConfig, RunConfig, at_once
from consa.model.layout import attention_layout
from consa.model.load import load_model
from consa.training.learning import target_units, units_of
from recipes import costs, run
from research import from_scratch


def test_no_recipe_is_left_out():
    assert run.RECIPES == ["qwen3_0_6b", "qwen3_1_7b"]


@pytest.mark.parametrize("name", run.RECIPES)
def test_settings(name: str):
    recipe = import_module(f"recipes.{name}")
    assert isinstance(recipe.RUN, RunConfig)
    assert isinstance(recipe.LEARN, LearnConfig) and isinstance(recipe.ADAPT, AdaptConfig)
    assert recipe.RUN.start_for(recipe.LEARN) < recipe.LEARN.seq_len == recipe.ADAPT.seq_len
    for config in (recipe.LEARN, recipe.ADAPT):
        assert config.sequences_per_step % (8 * at_once(config.micro_batch)) == 0
        assert config.gradient_checkpointing, "the page counts on it"
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


def test_a_small_model_from_scratch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    words = "the old captain of a ship went home to see his 12 friends and what they had become"
    for name, documents in (("train", 4), ("heldout", 1)):
        made = (" ".join(random.Random(seed).choices(words.split(), k=3000)) for seed in range(documents))
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in made))

    def call(*given: str) -> None:
        monkeypatch.setattr(sys, "argv", ["from_scratch", *given])
        from_scratch.main()

    size = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    monkeypatch.setitem(from_scratch.SIZES, "30m", size)
    monkeypatch.setitem(from_scratch.HEADS, "head_dim", 8)
    text, prepared, out = tmp_path / "train.jsonl", tmp_path / "prepared", tmp_path / "model"
    few = ("--needles", "3", "--seq-len", "768", "--vocabulary", "700")
    call("prepare", str(text), str(tmp_path / "heldout.jsonl"), *few, "--out", str(prepared))
    needles = np.load(prepared / "needles.npy")
    assert needles.shape == (3, 768) and (np.load(prepared / "train.npy") < 700).all()
    tokens = ("--tokens", "24576", "--sequences-per-step", "4", "--micro-batch", "2", "--evaluate-every", "4")
    call("train", str(prepared), "--size", "30m", *tokens, "--out", str(out))
    record = json.loads((out / "training.json").read_text())
    assert [row["step"] for row in record["measured"]] == [4, 8]
    assert record["measured"][1]["heldout_loss"] < record["measured"][0]["heldout_loss"]
    loaded = load_model(str(out))
    assert loaded.layout.num_kv_heads == 8 and loaded.layout.num_layers == 2
    said = loaded.tokenizer.decode(needles[0])
    assert said.count("special magic number") > 3
    assert len(loaded.tokenizer("1234567")["input_ids"]) == 7, "every digit by itself"


def test_the_first_heldout_sequences_are_of_as_many_documents():
    documents = [np.array([[0, 1], [0, 2], [0, 3]]), np.array([[1, 1]]), np.array([[2, 1], [2, 2]])]
    found = from_scratch.in_turns(documents)
    assert found.tolist() == [[0, 1], [1, 1], [2, 1], [0, 2], [2, 2], [0, 3]]


def test_numbers_differ_whenever_needles_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(from_scratch, "NEEDLE_SHARE", 1)  # nothing but needles
    tokenizer = from_scratch.make_tokenizer(iter(["the number is 1234567890"] * 9), 300)
    digits = [tokenizer.convert_tokens_to_ids(str(digit)) for digit in range(10)]
    hidden = np.array([tokenizer("is 1234567890 the 1234567890")["input_ids"]])
    options = argparse.Namespace(seed=0, micro_batch=4)
    rows = next(from_scratch.batches(hidden, hidden, tokenizer, options)).numpy()
    is_digit = np.isin(hidden[0], digits)
    assert is_digit.sum() == 20 and (rows[:, ~is_digit] == hidden[0][~is_digit]).all()
    for row in rows[:, is_digit]:
        assert (row[:10] == row[10:]).all() and sorted(row[:10]) == sorted(digits)
    assert len({row.tobytes() for row in rows}) == 4


def test_adapting_before_learning_is_one_line(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    monkeypatch.setattr("sys.argv", ["run", "qwen3_0_6b", "adapt", "--runs", str(tmp_path)])
    with pytest.raises(SystemExit) as caught:
        run.main()
    assert caught.value.code == 2
    assert "qwen3_0_6b-learn holds no allocation; run the recipe's learn phase first" in capsys.readouterr().err
