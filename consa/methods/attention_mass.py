"""Attention mass: how much of its attention a unit of the dense model pays to what SWA would hide."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention import masks
from consa.config import ChoiceConfig
from consa.methods.measure import mean_over_queries, per_unit
from consa.methods.problem import Problem
from consa.model.load import LoadedModel


def attention_mass(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """The units with the largest share of their attention beyond window and sinks keep full attention."""
    problem = Problem(loaded, sequences, config)

    def hidden(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (weights * ~masks.sliding(query, key, config.window, config.num_sink_tokens)).sum(-1)

    texts = problem.sample()
    mass = [mean_over_queries(problem, text, range(len(text.tokens)), hidden) for text in texts]
    return problem.decide("attention_mass", per_unit(problem, torch.stack(mass).mean(0)))
