"""NLL-guided selection: how much the loss of answers rises when one unit alone uses SWA (arXiv 2606.27791).

There the units are layers, and the answers are to long prompts; here KV heads too, on what `consa.data.questions` asks.
"""

from __future__ import annotations

import numpy as np

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods.problem import Problem
from consa.model.load import LoadedModel


def nll_guided(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """Close every unit alone; those that raise the loss of the answers most keep full attention.

    Of `sequences` only the length counts: the text is made. It takes an evaluation per unit and one more, whatever the
    budget.
    """
    problem = Problem(loaded, sequences, config)
    questions = problem.questions(config.evaluation_sequences)
    everything = np.ones(problem.units.count, dtype=bool)
    dense = problem.loss(everything, questions)
    rise = [
        problem.loss(everything & (np.arange(len(everything)) != unit), questions) - dense
        for unit in range(len(everything))
    ]
    return problem.decide("nll_guided", np.array(rise))
