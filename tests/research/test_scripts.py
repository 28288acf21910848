"""Every script of research/ can be called, and the objects that variants hand to learning do what they say."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consa import rules
from consa.allocation import Allocation
from consa.config import LearnConfig
from consa.evaluation.losses import heldout_losses
from research import variants
from tests.models import tiny, tokens
from tests.test_security import faults

FOLDER = Path(__file__).parents[2] / "research"
LIBRARIES = ("__init__", "analysis", "records", "variants")
SCRIPTS = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem not in LIBRARIES)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help(name: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]):
    if name == "screenshot":
        pytest.importorskip("playwright", reason="consa[browser] is not installed")
    module = import_module(f"research.{name}")
    monkeypatch.setattr(sys, "argv", [name, "--help"])
    with pytest.raises(SystemExit) as caught:
        module.main()
    assert caught.value.code == 0
    shown = capsys.readouterr().out
    assert f"python -m research.{name}" in shown and module.__doc__.splitlines()[0] in shown


def test_the_map_names_every_script():
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [name for name in SCRIPTS if f"`{name}`" not in text] == []


@pytest.mark.parametrize("path", sorted(FOLDER.glob("*.py")), ids=lambda path: path.stem)
def test_nothing_that_is_read_can_run(path: Path):
    allowed = " a shell" if path.stem == "campaign" else "nothing"  # its commands are its own
    assert [fault for fault in faults(path.read_text(encoding="utf-8")) if not fault.endswith(allowed)] == []


def test_two_multipliers_rise_with_the_violation():
    constraint, log_alpha = variants.TwoMultipliers(), torch.full((4,), 9.0)  # all open, so sparsity is 0
    is_open = constraint.is_open(log_alpha)
    assert float(constraint.loss(is_open, 0.5)) == 0
    assert constraint.update(log_alpha, 0.5) == pytest.approx(0, abs=1e-3)
    linear, quadratic = constraint.multipliers.tolist()
    assert constraint.multiplier == linear and linear > 0 and quadratic > 0
    assert float(constraint.loss(is_open, 0.5)) == pytest.approx(linear * 0.5 + quadratic * 0.25, rel=1e-2)


def test_sampled_sparsity_is_a_mean_of_draws_that_differ():
    constraint, log_alpha = variants.SampledSparsity(LearnConfig(sparsity=0.5)), torch.zeros(50)
    first, second = (constraint.is_open(log_alpha) for _ in range(2))
    assert not torch.equal(first, second) and 0.2 < float(first.mean()) < 0.8


def test_candidates_by_all_steps_are_those_whose_gates_stayed_open(monkeypatch: pytest.MonkeyPatch):
    ordered: list[Any] = []

    def refine(model: Any, allocation: Allocation, *_: Any, **__: Any) -> Allocation:
        ordered.append(allocation.scores)
        return allocation

    monkeypatch.setattr(variants, "refine", refine)
    recording = variants.Recording(LearnConfig(sparsity=0.5))
    for step in range(3):
        recording.update(torch.tensor([3.0, -7.0, 2.0 - step, -7.0]), 0.5)
    recording.refine(None, Allocation(full_attention=np.eye(2, dtype=bool), window=4, scores=np.zeros((2, 2))))
    np.testing.assert_allclose(ordered[0], [[3, -7], [1, -7]])


def test_tokens_weigh_as_much_as_all_swa_raises_their_loss(monkeypatch: pytest.MonkeyPatch):
    config = LearnConfig(
        sparsity=0.5, window=3, num_sink_tokens=1, num_steps=2, sequences_per_step=2, refine_sequences=2
    )
    model, sequences = tiny(), tokens(7, 16).numpy()
    given: list[Any] = []
    monkeypatch.setattr(variants, "learn", lambda *run, objective: given.append(objective))
    variants.distant_tokens(model, sequences, config)
    batch = given[0].drawn(sequences, config.seed, range(1, 6))
    swa = rules.all_swa(4, 3, window=3, num_sink_tokens=1)
    rise = heldout_losses(model, batch.tokens.numpy(), swa) - heldout_losses(model, batch.tokens.numpy())
    assert torch.allclose(batch.weights.mean(1), torch.ones(5)) and (batch.weights > 0).all()
    expected = torch.from_numpy(rise.clip(min=0) + 1e-3)
    assert torch.allclose(batch.weights, expected / expected.mean(1, keepdim=True), rtol=1e-3)
