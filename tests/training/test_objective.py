"""Objectives and constraints that are handed in: what an experiment replaces, without changing consa."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from consa import Allocation, ConsaError
from consa.model import loss
from consa.training import gates, refinement
from consa.training.adaptation import adapt
from consa.training.lagrangian import AugmentedLagrangian
from consa.training.learning import learn
from consa.training.objective import Batch, Dense, Mixture, Objective
from tests.models import exact, tiny, tokens
from tests.training import adaptation_case
from tests.training.adaptation_case import allocation
from tests.training.learning_case import Interrupted, at_step, changed, interrupt, text

OWN = '''
import torch
from consa.training.objective import Batch, Objective

class HalfAnswers(Objective):
    """Every second sequence is a question, of which the last four tokens, the answer, count alone."""

    def __init__(self, questions):
        self.questions = torch.from_numpy(questions)

    def batches(self, sequences, config, step):
        batches = super().batches(sequences, config, step)
        return [batch if place % 2 else self.question(step, place) for place, batch in enumerate(batches)]

    def question(self, step, place):
        tokens = self.questions[(step + place) % len(self.questions)][None]
        weights = torch.zeros(1, tokens.shape[1] - 1)
        weights[:, -4:] = (tokens.shape[1] - 1) / 4
        return Batch(tokens, weights)
'''
assert len(OWN.strip().splitlines()) <= 20
QUESTIONS = tokens(3, 9).numpy()


def own() -> Any:
    names: dict[str, Any] = {}
    exec(OWN, names)
    return names["HalfAnswers"](QUESTIONS)


def plain_loss(model: Any, kept: Allocation, batches: list[Batch]) -> Tensor:
    """The loss of a step by transformers' own forward pass, all at once."""
    total, count = torch.zeros(()), 0
    for batch in batches:
        with exact(model, kept):
            logits = model(batch.tokens, use_cache=False).logits
        found = torch.nn.functional.cross_entropy(
            logits[:, :-1].flatten(0, 1), batch.tokens[:, 1:].flatten(), reduction="none"
        )
        weights = 1 if batch.weights is None else batch.weights.flatten()
        total, count = total + (found * weights).sum(), count + len(found)
    return total / count


@pytest.mark.parametrize("chunk", [3, 2048])
def test_a_users_objective_of_weighted_tokens_and_own_batches(chunk: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    config = adaptation_case.changed(num_steps=1, warmup=0.0, sequences_per_step=4)
    (record,) = adapt(tiny(), adaptation_case.text(), allocation(), config, objective=own())
    other = tiny()
    batches = own().batches(adaptation_case.text(), config, 0)
    assert [batch.tokens.shape[1] for batch in batches] == [9, 24, 9, 24]
    value = plain_loss(other, allocation(), batches)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    assert record["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)


def test_learning_takes_a_users_objective_and_resumes_with_it(tmp_path: Path):
    config = changed(sequences_per_step=4)
    wanted = learn(tiny(), text(), config, objective=own())
    assert wanted.history != learn(tiny(), text(), config).history
    with pytest.raises(Interrupted):
        learn(tiny(), text(), config, objective=own(), run_dir=tmp_path, on_step=at_step(3, interrupt))
    with pytest.raises(ConsaError, match=r"replaced was \['HalfAnswers\(cross_entropy=1.0\)'\], now None"):
        learn(tiny(), text(), config, run_dir=tmp_path)
    got = learn(tiny(), text(), config, objective=own(), run_dir=tmp_path)
    assert got.history == wanted.history and got.allocation.to_json() == wanted.allocation.to_json()
    assert got.allocation.provenance["replaced"] == ["HalfAnswers(cross_entropy=1.0)"]


def test_weights_of_one_change_nothing():
    class Ones(Objective):
        def batches(self, *given: Any) -> list[Batch]:
            return [Batch(b.tokens, torch.ones(b.tokens[:, 1:].shape)) for b in super().batches(*given)]

    class OnesOfMixture(Ones, Mixture):
        pass

    wanted, got = (learn(tiny(), text(), changed(), objective=o).history for o in (None, Ones()))
    assert [r["loss"] for r in got] == pytest.approx([r["loss"] for r in wanted], rel=1e-6)
    factors = {"cross_entropy": 0.3, "distillation": 0.5, "hidden_loss": 2.0}
    config = adaptation_case.changed(**factors, num_steps=2)
    histories = [
        adapt(tiny(), adaptation_case.text(), allocation(), config, objective=kind(**factors))
        for kind in (Mixture, OnesOfMixture)
    ]
    for record, other in zip(*histories, strict=True):
        assert record == pytest.approx(other, rel=1e-5) and record.keys() > factors.keys()


def test_learning_by_distillation_follows_the_dense_model():
    objective = Mixture(cross_entropy=0.0, distillation=1.0)
    model, before = tiny(), {name: p.clone() for name, p in tiny().state_dict().items()}
    everything_open = changed(initial_log_alpha=100.0, log_alpha_max=101.0, gate_lr=1e-9, num_steps=2)
    history = learn(model, text(), everything_open, objective=objective).history
    assert all(record["loss"] == pytest.approx(0, abs=1e-6) for record in history)
    closed = learn(model, text(), changed(initial_log_alpha=-1.0), objective=objective).history
    assert closed[0]["loss"] > 1e-3
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())


def test_a_mixture_in_learning_records_its_parts():
    history = learn(tiny(), text(), changed(), objective=Mixture(cross_entropy=0.5, hidden_loss=2.0)).history
    for record in history:
        wanted = 0.5 * record["cross_entropy"] + 2.0 * record["hidden_loss"]
        assert record["loss"] == pytest.approx(wanted, rel=1e-5)


def test_in_joint_mode_the_dense_model_stays_as_it_was():
    """With every gate open the hybrid is the model itself: only a copy can differ from it."""
    config = changed(mode="joint", weight_lr=1e-2, initial_log_alpha=100.0, log_alpha_max=101.0, gate_lr=1e-9)
    history = learn(tiny(), text(), config, objective=Mixture(distillation=1e-3)).history
    assert history[0]["distillation"] == pytest.approx(0, abs=1e-6) and history[1]["distillation"] > 1e-3


def test_the_dense_model_by_the_trained_models_own_weights():
    from consa.model.attach import attached

    model, ids = tiny(), tokens(2, 20)
    wanted = model.base_model(ids).last_hidden_state
    with attached(model, allocation()) as plan:
        found = Dense(model, plan).hidden_states(ids)
        assert not torch.allclose(model.base_model(ids).last_hidden_state, wanted, atol=1e-3)
    torch.testing.assert_close(found, wanted, atol=1e-5, rtol=0)


class TwoMultipliers(AugmentedLagrangian):
    """`l1 * h + l2 * h^2`, both raised by plain ascent."""

    def __init__(self) -> None:
        super().__init__(penalty=0.0, step_size=1.0)
        self.quadratic = 0.0

    def loss(self, is_open: Tensor, target: float, growth: float = 1.0) -> Tensor:
        h = target - (1 - is_open.mean())
        return self.multiplier * h + self.quadratic * h**2

    def update(self, log_alpha: Tensor, target: float, growth: float = 1.0) -> float:
        expected = super().update(log_alpha, target)
        self.quadratic += 300 * (target - expected) ** 2
        return expected

    def tensors(self) -> dict[str, Tensor]:
        return super().tensors() | {"quadratic": torch.tensor(self.quadratic, dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        super().restore(tensors)
        self.quadratic = float(tensors["quadratic"])


def test_another_constraint_holds_the_sparsity_and_resumes(tmp_path: Path):
    config = changed(num_steps=20, sharpening=0.0)
    wanted = learn(tiny(), text(), config, constraint=TwoMultipliers())
    assert wanted.history != learn(tiny(), text(), config).history
    assert [record["multiplier"] for record in wanted.history] == pytest.approx(
        np.cumsum([record["target"] - record["expected_sparsity"] for record in wanted.history])
    )
    with pytest.raises(Interrupted):
        learn(tiny(), text(), config, constraint=TwoMultipliers(), run_dir=tmp_path, on_step=at_step(9, interrupt))
    got = learn(tiny(), text(), config, constraint=TwoMultipliers(), run_dir=tmp_path)
    assert got.history == wanted.history


def test_a_constraint_may_see_sampled_gates():
    class Sampled(AugmentedLagrangian):
        generator = torch.Generator().manual_seed(0)

        def is_open(self, log_alpha: Tensor) -> Tensor:
            uniform = torch.rand(4, len(log_alpha), generator=self.generator)
            return gates.sample(log_alpha, uniform).mean(0)

    history = learn(tiny(), text(), changed(), constraint=Sampled(300, 3)).history
    assert history[0]["expected_sparsity"] != learn(tiny(), text(), changed()).history[0]["expected_sparsity"]


def test_draws_and_the_refinement_may_be_replaced():
    asked: list[tuple[int, int]] = []

    def independent(num_draws: int, num_units: int, generator: torch.Generator) -> Tensor:
        asked.append((num_draws, num_units))
        return torch.rand(num_draws, num_units, generator=generator)

    def reversed_candidates(model: Any, kept: Allocation, *given: Any, **options: Any) -> Allocation:
        assert kept.scores is not None
        ordered.append(kept)
        return refinement.refine(model, replace(kept, scores=-kept.scores), *given, **options)

    ordered: list[Allocation] = []
    config = changed(refine_evaluations=4)
    found = learn(tiny(), text(), config, draws=independent, refine=reversed_candidates)
    assert asked == [(2, 12)] * config.num_steps and len(ordered) == 1
    assert found.history[0]["loss"] != learn(tiny(), text(), config).history[0]["loss"]
    assert np.array_equal(found.allocation.scores, ordered[0].scores), "the record keeps the gates' scores"
