"""The model and text that a run begins with."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consa.config import RunConfig
from consa.data.sequences import load_sequences
from consa.model.load import load_model
from consa.runs import inputs


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def where(tiny_model_folder: Path, text_folder: Path) -> RunConfig:
    return RunConfig(model=str(tiny_model_folder), data=str(text_folder), num_heldout=4, device="cpu", dtype="float32")


def test_all_of_the_text_is_learned_on_only_if_other_text_is_measured_on(where: RunConfig):
    loaded = load_model(where.model, device="cpu")
    for heldout_data, split in ((None, "train"), (where.data, "all")):
        found = inputs.training_text(replace(where, heldout_data=heldout_data), 96, loaded)
        wanted = load_sequences(where.data, loaded.tokenizer, 96, split=split)
        assert np.array_equal(found.tokens, wanted.tokens)


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_model_computes_in_the_dtype_asked_for(dtype: Any, where: RunConfig):
    assert inputs.load(replace(where, dtype=dtype)).model.dtype == getattr(torch, dtype)


def test_one_document_is_named_in_the_singular(where: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    (tmp_path / "one.txt").write_text("a word and another one, " * 400)
    inputs.training_text(replace(where, data=str(tmp_path / "one.txt")), 96, load_model(where.model, device="cpu"))
    assert "tokens in 1 document\n" in capsys.readouterr().err
