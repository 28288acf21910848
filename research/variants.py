"""Learning with one of its parts replaced by another: what research/study.py compares.

Each variant is called like `learn`, and hands it another object: the constraint, the objective, the random draws of the
gates, or the refinement. `Distilled` and `Backward` are methods, for the `--methods` of research/methods.py.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from consa import Allocation, rules
from consa.config import ChoiceConfig, LearnConfig, at_once
from consa.evaluation.losses import heldout_losses
from consa.methods import SearchingMethod
from consa.methods.problem import Problem
from consa.methods.searching import exchanged
from consa.methods.training import ConSA
from consa.model.layout import AttentionLayout, attention_layout
from consa.settings import option
from consa.training import gates
from consa.training.lagrangian import AugmentedLagrangian
from consa.training.learning import LearnResult, asked_of, learn, units_of
from consa.training.objective import Batch, Mixture, Objective, order
from consa.training.refinement import refine
from consa.training.retrieval import with_retrieval

Variant = Callable[[PreTrainedModel, np.ndarray, LearnConfig], LearnResult]


class TwoMultipliers(AugmentedLagrangian):
    """The constraint of CoFi, Sheared-LLaMA and PruLong: `l1 * h + l2 * h^2`, both raised by Adam at a rate of 1."""

    def __init__(self) -> None:
        super().__init__(penalty=0.0, step_size=0.0)
        self.multipliers = torch.nn.Parameter(torch.zeros(2))
        self.optimizer = torch.optim.Adam([self.multipliers], lr=1.0, betas=(0.9, 0.95), maximize=True)

    def loss(self, is_open: Tensor, target: float, growth: float = 1.0) -> Tensor:
        """See `SparsityConstraint.loss`; the coefficients do not grow with the run."""
        violation = target - (1 - is_open.mean())
        linear, quadratic = self.multipliers.detach()
        return linear * violation + quadratic * violation**2

    def update(self, log_alpha: Tensor, target: float, growth: float = 1.0) -> float:
        """One step of ascent; returns the expected sparsity."""
        expected = float(1 - self.is_open(log_alpha).mean())
        violation = target - expected
        self.multipliers.grad = torch.tensor([violation, violation**2])
        self.optimizer.step()
        self.multiplier = float(self.multipliers.detach()[0])
        return expected


class SampledSparsity(AugmentedLagrangian):
    """The constraint on the mean of four draws of the gates, not on the probability that they are open."""

    def __init__(self, config: LearnConfig) -> None:
        super().__init__(config.penalty, config.multiplier_step)
        self.generator = torch.Generator().manual_seed(0)

    def is_open(self, log_alpha: Tensor) -> Tensor:
        """Mean of the draws, `(units,)`."""
        return gates.sample(log_alpha, torch.rand(4, len(log_alpha), generator=self.generator)).mean(0)


class Recording(AugmentedLagrangian):
    """The default constraint, which also keeps the mean of log_alpha over all steps: how long a gate stayed open."""

    def __init__(self, config: LearnConfig) -> None:
        super().__init__(config.penalty, config.multiplier_step)
        self.total, self.steps = torch.zeros(()), 0

    def update(self, log_alpha: Tensor, target: float, growth: float = 1.0) -> float:
        """See `SparsityConstraint.update`."""
        self.total, self.steps = self.total + log_alpha.detach().double(), self.steps + 1
        return super().update(log_alpha, target, growth)

    def refine(self, model: PreTrainedModel, allocation: Allocation, *args: Any, **options: Any) -> Allocation:
        """Refine with candidates in the order of the mean over all steps.

        By the average over the last steps, most gates at a high sparsity are equal, at their lower bound.
        """
        scores = (self.total / self.steps).numpy().reshape(allocation.full_attention.shape)
        return refine(model, replace(allocation, scores=scores), *args, **options)


def independent(num_draws: int, num_units: int, generator: torch.Generator) -> Tensor:
    """Draws that are independent between the sequences of a step, instead of stratified over them."""
    return torch.rand(num_draws, num_units, generator=generator)


def distant_tokens(model: PreTrainedModel, sequences: np.ndarray, config: LearnConfig) -> LearnResult:
    """Tokens weigh as much as all-SWA raises their loss; sequences keep their mean weight of 1."""
    layout = attention_layout(model)
    count = config.num_steps * config.sequences_per_step + config.refine_sequences
    used = np.unique(order(sequences, config.seed, range(count)))
    floor = rules.all_swa(*layout.shape, **asked_of(config, layout))
    dense, swa = (
        heldout_losses(model, sequences[used], one, batch_size=at_once(config.micro_batch)) for one in (None, floor)
    )
    rise = torch.from_numpy(np.maximum(swa - dense, 0) + 1e-3)

    class Weighted(Objective):
        def drawn(self, sequences: np.ndarray, seed: int, places: range) -> Batch:
            weights = rise[np.searchsorted(used, order(sequences, seed, places))]
            return Batch(super().drawn(sequences, seed, places).tokens, weights / weights.mean(1, keepdim=True))

    return learn(model, sequences, config, objective=Weighted())


def candidates_by_all_steps(model: PreTrainedModel, sequences: np.ndarray, config: LearnConfig) -> LearnResult:
    """Candidates of the refinement in the order of log_alpha over all steps."""
    recording = Recording(config)
    return learn(model, sequences, config, constraint=recording, refine=recording.refine)


VARIANTS: dict[str, Variant] = {
    "": learn,
    "two_multipliers": lambda *run: learn(*run, constraint=TwoMultipliers()),
    "sampled_sparsity": lambda *run: learn(*run, constraint=SampledSparsity(run[-1])),
    "independent_draws": partial(learn, draws=independent),
    # KL divergence from the dense model's predictions instead of the cross-entropy of the text
    "distillation": partial(learn, objective=Mixture(cross_entropy=0.0, distillation=1.0)),
    "distant_tokens": distant_tokens,
    "candidates_by_all_steps": candidates_by_all_steps,
}


@dataclass(frozen=True, kw_only=True)
class Distilled(ConSA):
    """ConSA whose gates follow the dense model's predictions, those of the answers too; refined by the loss."""

    name = "distilled"

    def objective(self, problem: Problem) -> Objective:
        """See `ConSA.objective`."""
        followed = Mixture(cross_entropy=0.0, distillation=1.0)
        return with_retrieval(followed, self.retrieval, problem.loaded.tokenizer)


@dataclass(frozen=True, kw_only=True)
class Backward(SearchingMethod):
    """From the dense model close one unit after another, the one that costs least; then exchange units.

    A step tries the `num_tried` open units that cost least when they were last tried. Every unit is tried first.
    """

    name = "backward"
    num_tried: int = option(4, "Units of which each step closes one.", ge=1)

    def num_probes(self, layout: AttentionLayout, config: ChoiceConfig) -> int:
        """One for each unit, and `num_tried` for each unit that is closed after the first, at most."""
        count = units_of(layout, config.granularity).count
        return count + self.num_tried * (round(count * config.sparsity) - 1)

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        texts, count = problem.sample(self.evaluation_sequences, self.retrieval), problem.units.count
        full, cost, worth = np.ones(count, dtype=bool), np.zeros(count), np.full(count, float(count))
        current, spent, tried = problem.loss(full, texts), 1, range(count)
        for closed in range(count - problem.num_full):
            for unit in tried:
                cost[unit] = problem.loss(full & (np.arange(count) != unit), texts) - current
            spent += len(tried)
            least = min(tried, key=lambda unit: cost[unit])
            full[least], worth[least], current = False, closed, current + cost[least]
            tried = sorted(np.flatnonzero(full), key=lambda unit: cost[unit])[: self.num_tried]
        start = problem.decide(self, worth, full)
        return problem.decide(self, worth, exchanged(problem, start, texts, self.evaluations - spent))
