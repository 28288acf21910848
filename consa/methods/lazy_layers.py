"""LightTransfer's lazy layers: those whose last queries attend to sinks and recent tokens alone (arXiv 2410.13846).

There the units are layers, with 4 sinks and 1,020 recent tokens; here KV heads too, with the sinks and window that are
asked for. The number of last queries is that of yuyijiong/sliding-window-attention-adaptation, which repeats the paper.
"""

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

LAST_QUERIES = 64


def lazy_layers(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
    """The units of lowest lazy ratio keep full attention; scores are what the ratio leaves of 1."""
    problem = Problem(loaded, sequences, config)

    def not_lazy(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return 1 - (weights * masks.sliding(query, key, config.window, config.num_sink_tokens)).sum(-1)

    length = sequences.shape[1]
    last = range(max(0, length - LAST_QUERIES), length)
    ratios = [mean_over_queries(problem, text, last, not_lazy) for text in problem.sample()]
    return problem.decide(
        "lazy_layers", per_unit(problem, torch.stack(ratios).mean(0)), last_queries=LAST_QUERIES
    )
