"""How behaviour and allocations relate to each other; numpy only."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consa.allocation import Allocation
from consa.behaviour.record import MEASURES, Behaviour
from consa.errors import InvalidAllocationError


@dataclass(frozen=True)
class Relation:
    """How one measure relates to an allocation, over the units that the allocation decides.

    Attributes:
        measure: its name.
        auc: probability that an FA unit has a higher value than an SWA unit, ties counted half; None if all units are
            FA or all are SWA.
        with_decision: Spearman's rank correlation with FA (1) or SWA (0); None if either never varies.
        with_scores: Spearman's rank correlation with the scores; None without scores, or if either never varies.
    """

    measure: str
    auc: float | None
    with_decision: float | None
    with_scores: float | None


def relate(behaviour: Behaviour, allocation: Allocation) -> list[Relation]:
    """Relate each measure to the decision, in the order of `MEASURES`; the value of a layer is the mean of its heads.

    Raises:
        InvalidAllocationError: they are of models of different shapes.
    """
    shape = behaviour.by_distance.shape[:2]
    if shape != allocation.full_attention.shape:
        raise InvalidAllocationError(
            f"the allocation is for {allocation.num_layers} layers x {allocation.num_kv_heads} KV heads, but the"
            f" behaviour was measured on {shape[0]} x {shape[1]}; use those of one model"
        )

    def units(values: np.ndarray) -> np.ndarray:
        decided = values[allocation.layers]
        return decided.mean(1) if allocation.granularity == "layer" else decided

    full = units(allocation.full_attention) > 0
    scores = None if allocation.scores is None else units(allocation.scores)
    relations = []
    for name in filter(behaviour.measures.__contains__, MEASURES):
        values = units(behaviour.measures[name])
        with_scores = None if scores is None else rank_correlation(values, scores)
        relations.append(Relation(name, auc(values, full), rank_correlation(values, full), with_scores))
    return relations


@dataclass(frozen=True)
class Depth:
    """The depth of FA in a model, compared with random orders of the same layers.

    A layer belongs to a block if it has more FA heads than the average layer, for either granularity. Each p is a
    share of the random orders, with the observed order counted as one of them.

    Attributes:
        thirds: share of the FA heads in the bottom, middle and top third of the layers that the allocation decides.
        p_bottom: share of orders with no more FA in the bottom third.
        p_middle: share of orders with at least as much FA in the middle third.
        bare: number of layers at the bottom without FA.
        p_bare: share of orders with at least as many.
        blocks: first and last layer of each block.
        mean_run: mean length of the blocks, in layers.
        expected_run: its mean over the orders.
        p_run: share of orders whose mean run is at least as long.
    """

    thirds: tuple[float, float, float]
    p_bottom: float
    p_middle: float
    bare: int
    p_bare: float
    blocks: list[tuple[int, int]]
    mean_run: float
    expected_run: float
    p_run: float


def depth(allocation: Allocation, *, seed: int = 0, permutations: int = 1000) -> Depth:
    """Compute where FA lies by depth, and whether it forms blocks."""
    layers = np.array(allocation.layers)
    heads = allocation.full_attention[layers].sum(1)
    rng = np.random.default_rng(seed)
    orders = [heads, *(rng.permutation(heads) for _ in range(permutations))]

    def thirds(order: np.ndarray) -> list[int]:
        return [int(part.sum()) for part in np.array_split(order, 3)]

    def bare(order: np.ndarray) -> int:
        return int((order > 0).argmax()) if order.any() else len(order)

    def runs(order: np.ndarray) -> list[np.ndarray]:
        places = np.flatnonzero(order > order.mean())
        return np.split(places, np.flatnonzero(np.diff(places) > 1) + 1) if len(places) else []

    in_thirds = np.array([thirds(order) for order in orders])
    bares = np.array([bare(order) for order in orders])
    mean_runs = np.array([np.mean([len(run) for run in runs(order)] or [0]) for order in orders])
    bottom, middle, top = (in_thirds[0] / max(1, heads.sum())).tolist()
    return Depth(
        thirds=(bottom, middle, top),
        p_bottom=float((in_thirds[:, 0] <= in_thirds[0, 0]).mean()),
        p_middle=float((in_thirds[:, 1] >= in_thirds[0, 1]).mean()),
        bare=int(bares[0]),
        p_bare=float((bares >= bares[0]).mean()),
        blocks=[(int(layers[run[0]]), int(layers[run[-1]])) for run in runs(heads)],
        mean_run=float(mean_runs[0]),
        expected_run=float(mean_runs[1:].mean()),
        p_run=float((mean_runs >= mean_runs[0]).mean()),
    )


@dataclass(frozen=True)
class Agreement:
    """How similar two allocations are.

    Attributes:
        jaccard: FA heads that both have, divided by those that either has; 1 if neither has any.
        expected_jaccard: approximate value for two random allocations of these sizes.
        rank_correlation: Spearman's, of the scores; None if either has no scores or they never vary.
    """

    jaccard: float
    expected_jaccard: float
    rank_correlation: float | None


def agreement(first: Allocation, second: Allocation) -> Agreement:
    """Compare two allocations of one model head by head; their granularities may differ.

    Raises:
        InvalidAllocationError: they are for models of different shapes.
    """
    if (first.full_attention.shape, first.layers) != (second.full_attention.shape, second.layers):
        raise InvalidAllocationError(
            f"allocations for {first.num_layers} x {first.num_kv_heads} and {second.num_layers} x"
            f" {second.num_kv_heads} heads, or for other layers of them, do not compare; use those of one model"
        )
    a, b = (allocation.full_attention[first.layers] for allocation in (first, second))

    def jaccard(both: float) -> float:
        either = a.sum() + b.sum() - both
        return float(both / either) if either else 1.0

    correlation = None
    if first.scores is not None and second.scores is not None:
        correlation = rank_correlation(first.scores[first.layers], second.scores[first.layers])
    return Agreement(jaccard((a & b).sum()), jaccard(a.mean() * b.sum()), correlation)


def depth_correlation(first: Allocation, second: Allocation) -> float | None:
    """Spearman's rank correlation of the share of FA heads by relative depth; the models' shapes may differ.

    Depth is cut into as many equal parts as the shallower model has layers. None if either share never varies.
    """
    shares = [allocation.full_attention[allocation.layers].mean(1) for allocation in (first, second)]
    edges = np.linspace(0, 1, min(map(len, shares)) + 1)
    parts = [
        np.diff(np.interp(edges, np.linspace(0, 1, len(share) + 1), np.append(0, share.cumsum()))) for share in shares
    ]
    return rank_correlation(*(part.round(9) for part in parts))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, tied values at their mean rank; None if either never varies."""
    a, b = (_ranks(values) - (values.size + 1) / 2 for values in (a, b))
    norm = np.sqrt((a * a).sum() * (b * b).sum())
    return float((a * b).sum() / norm) if norm else None


def auc(values: np.ndarray, positive: np.ndarray) -> float | None:
    """Area under the ROC curve, by Mann and Whitney's rank sum; None if `positive` is all True or all False."""
    chosen = positive.ravel()
    num, others = int(chosen.sum()), int((~chosen).sum())
    if not num or not others:
        return None
    return float((_ranks(values)[chosen].sum() - num * (num + 1) / 2) / (num * others))


def _ranks(values: np.ndarray) -> np.ndarray:
    """Ranks from 1, tied values at the mean of theirs; flat."""
    _, place, counts = np.unique(values, return_inverse=True, return_counts=True)
    return (np.cumsum(counts) - (counts - 1) / 2)[place.ravel()]
