"""Retrieval scores: how often a head looks most at the very token that is to come next (Wu et al., arXiv 2404.15574).

There over tokens as the model generates them, here over those of the right answer.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods.measure import mean_over_queries, per_unit
from consa.methods.problem import Problem, Text
from consa.model.load import LoadedModel


def retrieval_score(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """The units that copy most of the answers out of the prompt keep full attention.

    Of `sequences` only the length counts: the text is made.
    """
    problem = Problem(loaded, sequences, config)

    def score(text: Text) -> Tensor:
        tokens = problem.tensor(text)[0]

        def copies(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
            best = weights.argmax(-1)  # (q_heads, queries)
            return (tokens[best] == tokens[query[:, 0] + 1]) & (best < text.start)

        return mean_over_queries(problem, text, range(text.start - 1, len(tokens) - 1), copies)

    scores = [score(text) for text in problem.questions(config.evaluation_sequences)]
    best = per_unit(problem, torch.stack(scores).mean(0))
    return problem.decide("retrieval_score", problem.without_ties(best))
