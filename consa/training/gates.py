"""Hard-concrete gates (Louizos, Welling, Kingma 2018, arXiv 1712.01312): one number per unit, float32, on the CPU.

A gate z is 1 for full attention and 0 for sliding-window attention; its `log_alpha` says how likely either is. There
are at most a few thousand, so they stay on the CPU whatever the model's device: planning a step then waits for nothing,
and every rank of a distributed run holds the same ones.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

TEMPERATURE = 2 / 3  # beta
STRETCH = (-0.1, 1.1)  # gamma, zeta
UNIFORM_EPSILON = 1e-6


def sample(log_alpha: Tensor, uniform: Tensor) -> Tensor:
    """Draw z in [0, 1] by eq. 10-11, from draws `uniform` in (0, 1); differentiable where it is not exactly 0 or 1."""
    uniform = uniform.clamp(UNIFORM_EPSILON, 1 - UNIFORM_EPSILON)
    return _stretch(torch.sigmoid((torch.logit(uniform) + log_alpha) / TEMPERATURE))


def probability_open(log_alpha: Tensor) -> Tensor:
    """P(z > 0), eq. 12: the probability that a unit does any full attention."""
    gamma, zeta = STRETCH
    return torch.sigmoid(log_alpha - TEMPERATURE * math.log(-gamma / zeta))


def deterministic(log_alpha: Tensor) -> Tensor:
    """z without noise, eq. 13: the gate's setting at test time."""
    return _stretch(torch.sigmoid(log_alpha))


def fractional_share(log_alpha: Tensor) -> float:
    """Share of gates whose setting at test time is neither 0 nor 1: what rounding them would change."""
    z = deterministic(log_alpha)
    return float(((z > 0) & (z < 1)).float().mean())


def _stretch(s: Tensor) -> Tensor:
    gamma, zeta = STRETCH
    return (s * (zeta - gamma) + gamma).clamp(0, 1)


def stratified_uniform(num_draws: int, num_units: int, generator: torch.Generator) -> Tensor:
    """`(num_draws, num_units)` draws from Uniform(0, 1), one in each of `num_draws` equal strata for every unit.

    Each single draw is uniform and the units are independent, but a unit's draws cover the distribution evenly, so that
    the mean gradient over them varies less than with independent draws.
    """
    strata = torch.rand(num_draws, num_units, generator=generator).argsort(0)
    return (strata + torch.rand(num_draws, num_units, generator=generator)) / num_draws


@dataclass(frozen=True)
class Units:
    """What one gate governs: a KV head, or all KV heads of a layer, of the layers that are to be decided."""

    num_layers: int
    num_kv_heads: int  # of each layer
    layers: tuple[int, ...]  # those that hold units; the others keep what they are
    per_layer: int  # gates per layer, 1 or num_kv_heads

    @property
    def count(self) -> int:
        """Number of units."""
        return len(self.layers) * self.per_layer

    def spread(self, values: Tensor, elsewhere: float) -> Tensor:
        """`(..., count)` to `(num_layers, ..., num_kv_heads)`, `elsewhere` in layers without units; differentiable."""
        by_layer: Tensor = values.reshape(*values.shape[:-1], len(self.layers), self.per_layer).movedim(-2, 0)
        by_layer = by_layer.expand(*by_layer.shape[:-1], self.num_kv_heads)
        out = values.new_full((self.num_layers, *by_layer.shape[1:]), elsewhere)
        return out.index_copy(0, torch.tensor(self.layers), by_layer)
