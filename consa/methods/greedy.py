"""Greedy refinement of the best rule of thumb: what ConSA's last stage finds without the gates before it."""

from __future__ import annotations

import numpy as np

from consa import rules
from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods import check_budget
from consa.methods.problem import Problem
from consa.model.load import LoadedModel
from consa.training.refinement import Exchange, refine


def greedy(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """Probe each unit of `rules.middle` once, then exchange units by `training.refinement.refine` within the budget.

    Raises:
        ConsaError: the budget does not cover the probes.
    """
    problem = Problem(loaded, sequences, config)
    check_budget("greedy", loaded.layout, config)
    layout, texts = loaded.layout, problem.sample()
    start = rules.middle(
        layout.num_layers,
        layout.num_kv_heads,
        sparsity=config.sparsity,
        granularity=config.granularity,
        native_windows=layout.native_windows,
    )
    full = problem.gather(start.full_attention)
    before = problem.loss(full, texts)
    worth = np.zeros(problem.units.count)
    for unit in range(len(worth)):
        flipped = full ^ (np.arange(len(full)) == unit)
        change = problem.loss(flipped, texts) - before
        worth[unit] = change if full[unit] else -change
    exchanges: list[Exchange] = []
    refined = refine(
        loaded.model,
        problem.decide("greedy", worth, full),
        np.stack([text.tokens for text in texts]),
        max_evaluations=config.evaluations - problem.units.count - 1,
        batch_size=config.micro_batch,
        on_exchange=exchanges.append,
    )
    evaluations = exchanges[-1].evaluations if exchanges else 1
    problem.forward_tokens += evaluations * len(texts) * sequences.shape[1]
    return problem.decide("greedy", worth, problem.gather(refined.full_attention), start="middle")
