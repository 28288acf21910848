"""Greedy refinement of the best rule of thumb: what ConSA's last stage finds without the gates before it."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods import SearchingMethod
from consa.methods.problem import Problem
from consa.methods.rule import Rule
from consa.model.layout import AttentionLayout
from consa.training.learning import units_of
from consa.training.refinement import Exchange, refine


@dataclass(frozen=True, kw_only=True)
class Greedy(SearchingMethod):
    """Probe each unit of `rules.middle` once, then exchange units by `training.refinement.refine`."""

    name = "greedy"

    def num_probes(self, layout: AttentionLayout, config: ChoiceConfig) -> int:
        """One for each unit."""
        return units_of(layout, config.granularity).count

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        texts = problem.sample(self.evaluation_sequences)
        full = problem.gather(Rule(name="middle").choose(problem).full_attention)
        before = problem.loss(full, texts)
        worth = np.zeros(problem.units.count)
        for unit in range(len(worth)):
            flipped = full ^ (np.arange(len(full)) == unit)
            change = problem.loss(flipped, texts) - before
            worth[unit] = change if full[unit] else -change
        exchanges: list[Exchange] = []
        refined = refine(
            problem.loaded.model,
            problem.decide(self, worth, full),
            np.stack([text.tokens for text in texts]),
            max_evaluations=self.evaluations - problem.units.count - 1,
            batch_size=problem.config.micro_batch,
            on_exchange=exchanges.append,
        )
        evaluations = exchanges[-1].evaluations if exchanges else 1
        problem.forward_tokens += evaluations * len(texts) * problem.sequences.shape[1]
        return problem.decide(self, worth, problem.gather(refined.full_attention), start="middle")
