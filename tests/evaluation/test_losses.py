"""Held-out losses under gates that are drawn."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consa import rules
from consa.evaluation.losses import recovered, sampled_losses
from consa.model.load import load_model
from consa.training import gates


def test_each_sequence_has_gates_of_its_own_however_many_are_computed_at_once(tiny_model_folder: Path):
    loaded = load_model(str(tiny_model_folder), device="cpu")
    tokens = np.random.default_rng(0).integers(0, 256, (5, 40))
    undecided = replace(rules.random_units(4, 3, sparsity=0.5, window=4), scores=np.zeros((4, 3)))
    alone, together = (sampled_losses(loaded.model, tokens, undecided, batch_size=size) for size in (1, 5))
    np.testing.assert_allclose(alone, together, atol=1e-4)


@pytest.mark.parametrize(("granularity", "kinds"), [("layer", 1), ("kv_head", 3)])
def test_a_layer_decided_as_one_has_one_gate(
    granularity: Any, kinds: int, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    drawn, sample = [], gates.sample
    monkeypatch.setattr(gates, "sample", lambda *given: drawn.append(sample(*given)) or drawn[-1])
    loaded = load_model(str(tiny_model_folder), device="cpu")
    undecided = rules.random_units(4, 3, sparsity=0.5, granularity=granularity, window=4)
    undecided = replace(undecided, scores=np.zeros((4, 3)))
    sampled_losses(loaded.model, np.zeros((2, 20), int), undecided)
    (z,) = drawn
    assert z.shape == (4, 2, 3) and max(len(heads.unique()) for row in z for heads in row) == kinds


def test_nothing_is_recovered_of_a_gap_that_rounding_makes():
    assert np.isnan(recovered(2.0, dense=2.0, floor=2.00002))
    assert recovered(2.1, dense=2.0, floor=2.2) == pytest.approx(0.5)
