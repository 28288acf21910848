"""ConSA itself: gates under a sparsity constraint, then a refinement (arXiv 2606.18056)."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods.problem import cost
from consa.model.load import LoadedModel
from consa.training.learning import learn
from consa.training.refinement import Exchange


def consa(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """Learn an allocation by `consa.training.learning.learn` at its defaults."""
    exchanges: list[Exchange] = []
    learning = config.for_learning()
    result = learn(loaded.model, sequences, learning, identity=loaded.identity, on_exchange=exchanges.append)
    trained = len(result.history) * config.sequences_per_step
    evaluations = exchanges[-1].evaluations if exchanges else 0  # that of the start included
    evaluated = evaluations * config.evaluation_sequences
    length = sequences.shape[1]
    spent = cost((trained + evaluated) * length, trained * length)
    return replace(result.allocation, provenance={**result.allocation.provenance, "cost": spent})
