"""LightTransfer's lazy layers: those whose last queries attend to sinks and recent tokens alone (arXiv 2410.13846).

There the units are layers, with 4 sinks and 1,020 recent tokens; here KV heads too, with the sinks and window that are
asked for.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention import masks
from consa.methods import ObservingMethod
from consa.methods.measure import mean_over_queries, per_unit
from consa.methods.problem import Problem
from consa.settings import option


@dataclass(frozen=True, kw_only=True)
class LazyLayers(ObservingMethod):
    """The units of lowest lazy ratio keep full attention; scores are what the ratio leaves of 1.

    The default of `last_queries` is that of yuyijiong/sliding-window-attention-adaptation, which repeats the paper.
    """

    name = "lazy_layers"

    last_queries: int = option(64, "Last queries of a sequence whose attention is measured.", ge=1)

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        config, length = problem.config, problem.sequences.shape[1]

        def not_lazy(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
            return 1 - (weights * masks.sliding(query, key, config.window, config.num_sink_tokens)).sum(-1)

        last = range(max(0, length - self.last_queries), length)
        texts = problem.sample(self.evaluation_sequences)
        ratios = [mean_over_queries(problem, text, last, not_lazy) for text in texts]
        return problem.decide(self, per_unit(problem, torch.stack(ratios).mean(0)))
