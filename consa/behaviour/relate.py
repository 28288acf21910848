"""What was measured of a model's heads, as a file, and how it and allocations relate to each other; numpy, no torch."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.errors import ConsaError, InvalidAllocationError
from consa.files import write_atomically

SCHEMA = "consa.behaviour/1"
MEASURES = {  # name -> what it says of a KV head; shares are of attention mass, means are over queries and query heads
    "sink_share": "share of attention on the sink tokens",
    "beyond_window_share": "share of attention beyond the window, sinks left out",
    "mean_span": "mean distance of what is attended to, tokens",
    "effective_span": "effective number of keys attended to, exp(entropy)",
    "entropy": "entropy of attention, nats",
    "previous_token": "attention to the token before",
    "induction": "attention to what followed the current token earlier in the text",
    "copy": "attention to earlier occurrences of the current token",
    "induction_repeated": "induction on a repeated random sequence",
    "copy_repeated": "copying on a repeated random sequence",
    "needle": "attention to the needle while answering",
    "causal_effect": "rise of the loss when this head alone slides, nats per token",
}
OPTIONAL = {"needle", "causal_effect"}
UNBOUNDED = {"mean_span", "effective_span", "entropy", "causal_effect"}  # the others are shares


@dataclass(frozen=True, kw_only=True, eq=False)
class Behaviour:
    """What each KV head attends to on given text.

    Attributes:
        measures: name of `MEASURES` -> float32 `(num_layers, num_kv_heads)`; those of `OPTIONAL` may be missing.
        by_distance: float32 `(num_layers, num_kv_heads, num_buckets)`, share of attention by distance between query
            and key: 0, 1, 2-3, 4-7, and so on in powers of two.
        window: tokens a sliding-window query sees, itself included.
        num_sink_tokens: first tokens of a sequence that count as sinks.
        provenance: JSON-able record of model, text and versions.

    Raises:
        ConsaError: a field does not add up; the message names it.
    """

    measures: Mapping[str, np.ndarray]
    by_distance: np.ndarray
    window: int
    num_sink_tokens: int
    provenance: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        missing = MEASURES.keys() - OPTIONAL - self.measures.keys()
        unknown = self.measures.keys() - MEASURES.keys()
        if missing or unknown:
            raise ConsaError(
                f"measures missing: {', '.join(sorted(missing)) or 'none'};"
                f" unknown: {', '.join(sorted(unknown)) or 'none'}"
            )
        if self.by_distance.ndim != 3 or 0 in self.by_distance.shape:
            raise ConsaError(
                f"by_distance must be (num_layers, num_kv_heads, num_buckets), got {self.by_distance.shape}"
            )
        for name, values in {"by_distance": self.by_distance, **self.measures}.items():
            shape = self.by_distance.shape[: 3 if name == "by_distance" else 2]
            if values.shape != shape or values.dtype != np.float32 or not np.isfinite(values).all():
                raise ConsaError(
                    f"{name} must be finite float32 {shape}, got {values.dtype} {values.shape}"
                    if values.shape != shape or values.dtype != np.float32
                    else f"{name} holds numbers that are not finite"
                )
            if name not in UNBOUNDED and not (values.min() > -1e-3 and values.max() < 1 + 1e-3):
                raise ConsaError(
                    f"{name} must hold shares in [0, 1], got {values.min():g} to {values.max():g}"
                )
        total = self.by_distance.sum(-1)
        if abs(total - 1).max() > 1e-3:
            raise ConsaError(f"by_distance must add up to 1 per head, got {total.min():g} to {total.max():g}")
        for name, least in (("window", 1), ("num_sink_tokens", 0)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ConsaError(f"{name} must be an integer >= {least} (tokens), got {value!r}")

    def save(self, path: str | Path) -> None:
        """Write one safetensors file, atomically."""
        from safetensors.numpy import save

        record = {
            "schema": SCHEMA,
            "window": self.window,
            "num_sink_tokens": self.num_sink_tokens,
            "provenance": dict(self.provenance),
        }
        tensors = {"by_distance": self.by_distance, **self.measures}
        tensors = {name: np.ascontiguousarray(values) for name, values in tensors.items()}
        write_atomically(Path(path), save(tensors, {"consa": json.dumps(record, sort_keys=True)}))

    @classmethod
    def load(cls, path: str | Path) -> Behaviour:
        """Read what `save` wrote.

        Raises:
            ConsaError: the file cannot be read or does not add up; the message names file and field.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, framework="numpy") as file:
                metadata = file.metadata() or {}
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
            record = json.loads(metadata.get("consa", "{}"))
            if not isinstance(record, dict) or record.get("schema") != SCHEMA:
                raise ConsaError(
                    f"its metadata does not say schema {SCHEMA!r}; write it with consa behaviour"
                )
            if "by_distance" not in tensors:
                raise ConsaError("by_distance is missing")
            return cls(
                by_distance=tensors.pop("by_distance"),
                measures=tensors,
                window=record["window"],
                num_sink_tokens=record["num_sink_tokens"],
                provenance=record["provenance"],
            )
        except ConsaError as error:
            raise ConsaError(f"{path}: {error}") from error
        except KeyError as error:
            raise ConsaError(f"{path}: {error.args[0]} is missing in its metadata") from error
        except (SafetensorError, ValueError, TypeError) as error:
            raise ConsaError(f"{path} is damaged or no safetensors file: {error}") from error
        except OSError as error:
            reason = error.strerror or "no such file"  # safetensors says it in words of its own
            raise ConsaError(f"cannot read {path}: {reason}") from error


@dataclass(frozen=True)
class Relation:
    """How one measure goes with an allocation, over the units that the allocation decides.

    Attributes:
        measure: its name.
        auc: probability that an FA unit measures higher than an SWA unit, ties counted half; None if all are of a kind.
        with_decision: Spearman's rank correlation with FA (1) or SWA (0); None where either never varies.
        with_scores: Spearman's rank correlation with the scores; None without scores too.
    """

    measure: str
    auc: float | None
    with_decision: float | None
    with_scores: float | None


def relate(behaviour: Behaviour, allocation: Allocation) -> list[Relation]:
    """How each measure goes with what was decided, in the order of `MEASURES`; of a layer, its heads' mean counts.

    Raises:
        InvalidAllocationError: the two are of models of different shapes.
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
    """Where in a model FA lies, beside random orders of the same layers.

    A layer belongs to a block if more of its KV heads are FA than on average, so that both granularities compare. A
    p is a share of random orders, the observed one counted among them.

    Attributes:
        thirds: share of the FA heads in the bottom, middle and top third of the layers that the allocation decides.
        p_bottom: of orders with as little FA in the bottom third.
        p_middle: of orders with as much FA in the middle third.
        bare: layers at the bottom that have no FA.
        p_bare: of orders with as many.
        blocks: first and last layer of each block.
        mean_run: mean length of the blocks, in layers.
        expected_run: its mean over the orders.
        p_run: of orders whose mean run is as long.
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
    """Where FA lies, by depth, and whether it gathers in blocks."""
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
    """How alike two allocations are.

    Attributes:
        jaccard: FA heads that both have, over those that either has; 1 if neither has any.
        expected_jaccard: about what two random allocations of these sizes would have.
        rank_correlation: Spearman's, of the scores; None unless both have scores that vary.
    """

    jaccard: float
    expected_jaccard: float
    rank_correlation: float | None


def agreement(first: Allocation, second: Allocation) -> Agreement:
    """Compare two allocations of one model, head by head, whatever their granularities.

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

    Depth is cut into as many equal parts as the shallower model has layers; None where either share never varies.
    """
    shares = [allocation.full_attention[allocation.layers].mean(1) for allocation in (first, second)]
    edges = np.linspace(0, 1, min(map(len, shares)) + 1)
    parts = [
        np.diff(np.interp(edges, np.linspace(0, 1, len(share) + 1), np.append(0, share.cumsum())))
        for share in shares
    ]
    return rank_correlation(*(part.round(9) for part in parts))


def rank_correlation(a: np.ndarray, b: np.ndarray) -> float | None:
    """Spearman's rank correlation, tied values at their mean rank; None where either never varies."""
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
