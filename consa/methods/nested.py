"""Nested allocations: one learning run for every sparsity.

Its target rises slowly from 0 to the largest sparsity, and the units close one after another. Averaged over all steps,
a unit's log_alpha says how long it stayed open. Cutting the order of these averages anywhere gives an allocation, and
sparser ones keep a subset of what denser ones keep (see `consa.methods.choose`).
"""

from __future__ import annotations

import numpy as np

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods.problem import Problem
from consa.model.load import LoadedModel
from consa.training.learning import learn


def nested(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """Learn once, up to the config's sparsity; the scores rank the units for every smaller one too."""
    problem = Problem(loaded, sequences, config)
    most = 1 - 1 / problem.units.count  # where no unit is left to keep FA, there is nothing to learn
    learning = config.for_learning(
        sparsity=min(config.sparsity, most), warmup=1.0, averaged=1.0, refine_evaluations=0
    )
    result = learn(loaded.model, sequences, learning)
    assert result.allocation.scores is not None
    tokens = len(result.history) * config.sequences_per_step * sequences.shape[1]
    problem.forward_tokens = problem.backward_tokens = tokens
    scores = problem.gather(result.allocation.scores)
    return problem.decide("nested", scores, warmup=1.0, averaged=1.0, up_to=config.sparsity)
