"""Nested allocations: one learning run for every sparsity.

Its target rises slowly from 0 to the largest sparsity, and the units close one after another. Averaged over all steps,
a unit's log_alpha says how long it stayed open. Cutting the order of these averages anywhere gives an allocation, and
sparser ones keep a subset of what denser ones keep.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from consa.allocation import Allocation
from consa.learning import learn
from consa.methods import ChoiceConfig
from consa.methods.problem import Problem
from consa.model import LoadedModel


def nested(
    loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig, sparsities: list[float]
) -> dict[float, Allocation]:
    """Learn once; returns an allocation for each of `sparsities`. That of the config does not count.

    The cost in each provenance is that of the one run.
    """
    learning = replace(config, sparsity=max(sparsities)).for_learning(
        warmup=1.0, averaged=1.0, refine_evaluations=0
    )
    result = learn(loaded.model, sequences, learning)
    assert result.allocation.scores is not None
    tokens = len(result.history) * config.sequences_per_step * sequences.shape[1]
    found = {}
    for sparsity in sparsities:
        problem = Problem(loaded, sequences, replace(config, sparsity=sparsity))
        problem.forward_tokens = problem.backward_tokens = tokens
        scores = problem.gather(result.allocation.scores)
        found[sparsity] = problem.decide("nested", scores, warmup=1.0, averaged=1.0)
    return found
