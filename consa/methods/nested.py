"""Nested allocations: one learning run for every sparsity.

Its target rises slowly from 0 to the largest sparsity, and the units close one after another. Averaged over all steps,
a unit's log_alpha says how long it stayed open. Cutting the order of these averages anywhere gives an allocation, and
sparser ones keep a subset of what denser ones keep (see `consa.methods.choice.choose`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from consa.allocation import Allocation
from consa.methods import TrainingMethod
from consa.methods.problem import Problem
from consa.training.learning import learn


@dataclass(frozen=True, kw_only=True)
class Nested(TrainingMethod):
    """Learn once, up to the largest sparsity; the scores rank the units for every smaller one too."""

    name = "nested"
    ranks = True

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        most = 1 - 1 / problem.units.count  # where no unit is left to keep FA, there is nothing to learn
        schedule: dict[str, Any] = {"warmup": 1.0, "averaged": 1.0}
        learning = self.learning(
            problem.config, sparsity=min(problem.config.sparsity, most), refine_evaluations=0, **schedule
        )
        result = learn(problem.loaded.model, problem.sequences, learning)
        assert result.allocation.scores is not None
        tokens = len(result.history) * self.sequences_per_step * problem.sequences.shape[1]
        problem.forward_tokens = problem.backward_tokens = tokens
        scores = problem.gather(result.allocation.scores)
        return problem.decide(self, scores, up_to=problem.config.sparsity, **schedule)
