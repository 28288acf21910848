"""Attention mass: how much of its attention a unit of the dense model pays to what SWA would hide."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consa.allocation import Allocation
from consa.attention import masks
from consa.methods import ObservingMethod
from consa.methods.measure import mean_over_queries, per_unit
from consa.methods.problem import Problem


@dataclass(frozen=True, kw_only=True)
class AttentionMass(ObservingMethod):
    """The units with the largest share of their attention beyond window and sinks keep full attention."""

    name = "attention_mass"

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        config = problem.config

        def hidden(weights: Tensor, query: Tensor, key: Tensor) -> Tensor:
            visible = masks.sliding(query, key, config.window, config.num_sink_tokens)
            return (weights * ~visible).sum(-1)

        texts = problem.sample(self.evaluation_sequences)
        mass = [mean_over_queries(problem, text, range(len(text.tokens)), hidden) for text in texts]
        return problem.decide(self, per_unit(problem, torch.stack(mass).mean(0)))
