"""Constraints of serving engines on an allocation, and the best choice of heads under them. Needs no torch.

Every constraint means that FA heads are added in *steps* of a fixed size, and that every multiple of a step is
feasible.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np

from consa.allocation import Allocation
from consa.errors import ConsaError

FullHeadsPerLayer = Literal["any", "even", "uniform"]


@dataclass(frozen=True, kw_only=True)
class Constraint:
    """A condition on the FA heads of every layer that an allocation decides.

    Attributes:
        full_heads_per_layer: "any" number, an "even" number on each rank, or "uniform": the same in every layer.
        tensor_parallel: ranks that share the KV heads of a layer in contiguous groups of equal size, each with the
            same number of FA heads.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    full_heads_per_layer: FullHeadsPerLayer = "any"
    tensor_parallel: int = 1

    def __post_init__(self) -> None:
        if self.full_heads_per_layer not in get_args(FullHeadsPerLayer):
            allowed = ", ".join(get_args(FullHeadsPerLayer))
            raise ConsaError(f"full_heads_per_layer must be one of {allowed}, got {self.full_heads_per_layer!r}")
        if not isinstance(self.tensor_parallel, int) or self.tensor_parallel < 1:  # pyright: ignore[reportUnnecessaryIsInstance]
            raise ConsaError(f"tensor_parallel must be an integer >= 1, got {self.tensor_parallel!r}")

    @property
    def heads_at_once(self) -> int:
        """FA heads that a rank gains together in a layer: 2 if they come in pairs, else 1."""
        return 2 if self.full_heads_per_layer == "even" else 1

    def step(self, num_layers: int, num_kv_heads: int) -> int:
        """FA heads that are added together: exactly the multiples of it, up to all heads, are feasible totals.

        Args:
            num_layers: layers that the allocation decides.
            num_kv_heads: KV heads of each.

        Raises:
            ConsaError: the KV heads of a layer cannot be split like this.
        """
        if reason := self.misfit(num_kv_heads):
            raise ConsaError(reason)
        layers_at_once = num_layers if self.full_heads_per_layer == "uniform" else 1
        return self.heads_at_once * self.tensor_parallel * layers_at_once

    def misfit(self, num_kv_heads: int) -> str | None:
        """Why no allocation with `num_kv_heads` per layer can meet the constraint, in one line; None if one can."""
        if num_kv_heads % self.tensor_parallel:
            return f"tensor_parallel must divide the {num_kv_heads} KV heads of a layer, got {self.tensor_parallel}"
        per_rank = num_kv_heads // self.tensor_parallel
        if per_rank % self.heads_at_once:
            return (
                f"full_heads_per_layer 'even' needs an even number of KV heads on each rank, got {per_rank};"
                " with an odd one, FA or SWA heads are left without a pair; use 'any' or 'uniform'"
            )
        return None


ANY = Constraint()


def choose(scores: np.ndarray, num_full: int, constraint: Constraint) -> np.ndarray:
    """The FA heads with the largest sum of scores among all choices that the constraint allows.

    The heads of a rank are taken best first, so its later steps never gain more than its earlier ones, and greedily
    taking the best steps is exact. Ties go to the lower layer and head.

    Args:
        scores: `(layers, kv_heads)`, of the layers that the allocation decides.
        num_full: FA heads, a multiple of `constraint.step`.
        constraint: the condition to meet.

    Returns:
        bool, the shape of `scores`, True for FA.

    Raises:
        ConsaError: the KV heads of a layer cannot be split like this, or no choice has `num_full` FA heads.
    """
    layers, heads = scores.shape
    step = constraint.step(layers, heads)
    if num_full % step or not 0 <= num_full <= scores.size:
        raise ConsaError(
            f"num_full must be a multiple of {step} in 0..{scores.size} under this constraint, got {num_full}"
        )
    ranks, at_once = constraint.tensor_parallel, constraint.heads_at_once
    by_rank = scores.reshape(layers, ranks, -1)
    best_first = np.argsort(-by_rank, axis=-1, kind="stable")
    ordered = np.take_along_axis(by_rank, best_first, axis=-1)
    gains = ordered.reshape(layers, ranks, -1, at_once).sum((1, 3))  # (layers, steps in a layer)
    if constraint.full_heads_per_layer == "uniform":
        gains = gains.sum(0, keepdims=True)
    taken = np.zeros(gains.shape, dtype=bool)
    taken.flat[np.argsort(-gains, axis=None, kind="stable")[: num_full // step]] = True
    per_rank = taken.sum(1) * at_once  # (layers,), or (1,) if uniform
    place = np.argsort(best_first, axis=-1)  # rank of each head's score among the heads of its rank
    return (place < per_rank[:, None, None]).reshape(layers, heads)


def violation(allocation: Allocation, constraint: Constraint) -> str | None:
    """Why an allocation violates a constraint, in one line; None if it meets it."""
    if reason := constraint.misfit(allocation.num_kv_heads):
        return reason
    first = allocation.layers[0]
    counts = allocation.full_attention.reshape(allocation.num_layers, constraint.tensor_parallel, -1).sum(2)
    for layer in allocation.layers:
        per_rank = counts[layer].tolist()
        if len(set(per_rank)) > 1:
            return (
                f"tensor_parallel={constraint.tensor_parallel} needs the same number of FA heads on every rank;"
                f" layer {layer} has {', '.join(map(str, per_rank))}"
            )
        if per_rank[0] % constraint.heads_at_once:
            suffix = "" if constraint.tensor_parallel == 1 else " on each rank"
            return (
                "full_heads_per_layer 'even' needs an even number of FA heads in every layer;"
                f" layer {layer} has {per_rank[0]}{suffix}"
            )
        if constraint.full_heads_per_layer == "uniform" and counts[layer].sum() != counts[first].sum():
            return (
                "full_heads_per_layer 'uniform' needs the same number of FA heads in every layer;"
                f" layer {first} has {counts[first].sum()}, layer {layer} has {counts[layer].sum()}"
            )
    return None
