"""NLL-guided selection: how much the loss of answers rises when one unit alone uses SWA (arXiv 2606.27791).

There the units are layers, and the answers are to long prompts; here KV heads too, on what `consa.data.questions` asks.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consa.allocation import Allocation
from consa.methods import ObservingMethod
from consa.methods.problem import Problem


@dataclass(frozen=True, kw_only=True)
class NLLGuided(ObservingMethod):
    """Close every unit alone; those that raise the loss of the answers most keep full attention.

    The text is generated: of the problem's sequences only the length counts. It takes an evaluation per unit and one
    more.
    """

    name = "nll_guided"

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        questions = problem.questions(self.evaluation_sequences)
        everything = np.ones(problem.units.count, dtype=bool)
        dense = problem.loss(everything, questions)
        rise = [
            problem.loss(everything & (np.arange(len(everything)) != unit), questions) - dense
            for unit in range(len(everything))
        ]
        return problem.decide(self, np.array(rise))
