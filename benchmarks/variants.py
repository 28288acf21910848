"""Learning with one of its parts taken out or put back as others have it: what benchmarks/study.py compares."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor
from transformers import PreTrainedModel

from consa import Allocation
from consa.model import loss
from consa.training import gates, learning


class TwoMultipliers:
    """The constraint of CoFi, Sheared-LLaMA and PruLong: `l1 * h + l2 * h^2`, both raised by Adam at a rate of 1."""

    def __init__(self, *_: float) -> None:
        self.weights = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.Adam([self.weights], lr=1.0, betas=(0.9, 0.95), maximize=True)

    @property
    def multiplier(self) -> float:
        """The linear one, for the history."""
        return float(self.weights.detach()[0])

    def loss(self, expected_sparsity: Tensor, target: float, growth: float = 1.0) -> Tensor:
        """The term to add to the loss."""
        violation = target - expected_sparsity
        return self.weights.detach()[0] * violation + self.weights.detach()[1] * violation**2

    def update(self, expected_sparsity: float, target: float, growth: float = 1.0) -> None:
        """One step of ascent."""
        violation = target - expected_sparsity
        self.weights.grad = torch.tensor([violation, violation**2])
        self.optimizer.step()


@contextmanager
def two_multipliers(model: PreTrainedModel) -> Iterator[None]:
    """Instead of the augmented Lagrangian."""
    with patch.object(learning, "AugmentedLagrangian", TwoMultipliers):
        yield


@contextmanager
def sampled_sparsity(model: PreTrainedModel) -> Iterator[None]:
    """The constraint on the mean of four draws of the gates, not on the probability that they are open."""
    generator = torch.Generator().manual_seed(0)

    def mean_of_draws(log_alpha: Tensor) -> Tensor:
        return gates.sample(log_alpha, torch.rand(4, len(log_alpha), generator=generator)).mean(0)

    with patch.object(gates, "probability_open", mean_of_draws):
        yield


@contextmanager
def independent_draws(model: PreTrainedModel) -> Iterator[None]:
    """Draws of the sequences of a step that know nothing of each other."""

    def uniform(num_draws: int, num_units: int, generator: torch.Generator) -> Tensor:
        return torch.rand(num_draws, num_units, generator=generator)

    with patch.object(gates, "stratified_uniform", uniform):
        yield


@contextmanager
def distillation(model: PreTrainedModel) -> Iterator[None]:
    """KL divergence from the dense model's predictions instead of the cross-entropy of the text."""
    teacher = copy.deepcopy(model)
    plain = loss.backward

    def backward(student: PreTrainedModel, tokens: Tensor, *, scale: float) -> Tensor:
        with torch.no_grad():
            wanted = loss.hidden_states(teacher, tokens)
        head = loss.output_layer(teacher)

        def divergence(_: Tensor, logits: Tensor, chunk: slice) -> Tensor:
            with torch.no_grad():
                target = head(wanted[:, chunk]).float().log_softmax(-1)
            found = logits.float().log_softmax(-1)
            return torch.nn.functional.kl_div(found, target, reduction="sum", log_target=True)

        return plain(student, tokens, scale=scale, objective=divergence)

    with patch.object(loss, "backward", backward):
        yield


@contextmanager
def candidates_by_all_steps(model: PreTrainedModel) -> Iterator[None]:
    """The refinement orders its candidates by log_alpha averaged over all steps: by how long a gate stayed open.

    Over the last steps alone, most gates of a high sparsity are equal, at their lower bound.
    """
    update, refine = learning._update, learning.refine
    seen: list[Tensor] = []

    def updating(state: Any, *arguments: Any) -> dict[str, float]:
        record = update(state, *arguments)
        seen.append(state.log_alpha.detach().double().clone())
        return record

    def refining(
        refined: PreTrainedModel, allocation: Allocation, *arguments: Any, **options: Any
    ) -> Allocation:
        scores = torch.stack(seen).mean(0).numpy().reshape(allocation.full_attention.shape)
        return refine(refined, replace(allocation, scores=scores), *arguments, **options)

    with patch.object(learning, "_update", updating), patch.object(learning, "refine", refining):
        yield


VARIANTS: dict[str, Callable[[PreTrainedModel], Any]] = {
    f.__name__: f
    for f in (two_multipliers, sampled_sparsity, independent_draws, distillation, candidates_by_all_steps)
}
"""Name -> what makes learning so within its block."""
