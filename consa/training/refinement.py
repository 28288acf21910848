"""Refine an allocation by measured losses: exchange units near the boundary while the loss falls."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from itertools import product

import numpy as np
from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.constraints import ANY, Constraint
from consa.errors import InvalidAllocationError
from consa.model import loss
from consa.model.attach import attached
from consa.training.objective import Batch


@dataclass(frozen=True)
class Exchange:
    """One evaluation: unit `closed` to SWA, `opened` to FA (a probe has only one), and the change in loss, nats."""

    closed: int | None
    opened: int | None
    change: float
    accepted: bool
    evaluations: int


def refine(
    model: PreTrainedModel,
    allocation: Allocation,
    text: Batch,
    *,
    max_evaluations: int,
    num_candidates: int = 8,
    batch_size: int = 1,
    constraint: Constraint = ANY,
    on_exchange: Callable[[Exchange], None] | None = None,
) -> Allocation:
    """Exchange FA for SWA units, at equal sparsity, while that lowers the mean loss on `text`.

    A round measures what closing each of the `num_candidates` FA units of lowest score costs and what opening each of
    the SWA units of highest score gains, one unit at a time; then tries exchanges, the most promising sum first, and
    keeps every one that lowers the loss. After a round that keeps none, the next has twice as many candidates and
    measures nothing again, until every unit has been one.

    Under a constraint, KV heads are exchanged only within their layer and rank, which leaves every count as it is. The
    candidates are then the FA head of lowest and the SWA head of highest score of the `num_candidates` layers (of a
    rank) where the two scores are closest. Exchanges between layers are not tried.

    Every evaluation, of which there are at most `max_evaluations`, runs the model on the whole `text`, `batch_size`
    sequences at once; the weights of the text count, as in a training step. `on_exchange` is called after each but the
    first, of the start. An allocation without scores, which order the candidates, raises InvalidAllocationError.
    """
    if allocation.scores is None:
        raise InvalidAllocationError("scores are needed to order the candidates; this allocation has none")
    heads = allocation.num_kv_heads if allocation.granularity == "layer" else 1
    scores = allocation.scores.reshape(-1, heads)[:, 0]  # (units,), units of native sliding layers included
    per_layer = allocation.num_kv_heads // heads
    native = {unit for unit in range(len(scores)) if unit // per_layer in allocation.native_windows}
    full = allocation.full_attention.reshape(-1, heads)[:, 0].copy()
    # Units are exchanged within groups of this many: a layer's heads on one rank, or all there are.
    group = len(full) if constraint == ANY else per_layer // constraint.tensor_parallel

    def exchanged(closed: int | None, opened: int | None) -> np.ndarray:
        out = full.copy()
        out[[unit for unit in (closed, opened) if unit is not None]] ^= True
        return out

    def attempt(closed: int | None, opened: int | None) -> Exchange:
        nonlocal spent
        spent += 1
        trial = _with_units(allocation, exchanged(closed, opened), heads)
        change = _mean_loss(model, trial, text, batch_size) - current
        tried = Exchange(closed, opened, change, change < 0 and None not in (closed, opened), spent)
        if on_exchange:
            on_exchange(tried)
        return tried

    spent, current = 1, _mean_loss(model, allocation, text, batch_size)
    alone: dict[int, float] = {}  # what each unit changes by itself, since the last exchange
    failed: set[tuple[int, int]] = set()
    while spent < max_evaluations:
        order = [int(unit) for unit in np.argsort(-scores, kind="stable") if unit not in native]
        closing, opening = (units[:num_candidates] for units in _candidates(order, full, scores, group))
        for unit in (unit for unit in closing + opening if unit not in alone):
            if spent >= max_evaluations:
                break
            alone[unit] = (attempt(unit, None) if full[unit] else attempt(None, unit)).change
        tested = product(*([unit for unit in units if unit in alone] for units in (closing, opening)))
        possible = [pair for pair in tested if pair[0] // group == pair[1] // group and pair not in failed]
        pairs = [(alone[closed] + alone[opened], closed, opened) for closed, opened in possible]
        used, failures = set[int](), 0
        for _, closed, opened in sorted(pairs):
            if spent >= max_evaluations or failures == num_candidates:
                break
            if closed in used or opened in used:
                continue
            tried = attempt(closed, opened)
            if tried.accepted:
                full = exchanged(closed, opened)
                used |= {closed, opened}
                current, failures = current + tried.change, 0
            else:
                failed.add((closed, opened))
                failures += 1
        if used:
            alone.clear()
            failed.clear()
        elif num_candidates < len(order):
            num_candidates *= 2
        else:
            break
    return _with_units(allocation, full, heads)


def _candidates(order: list[int], full: np.ndarray, scores: np.ndarray, group: int) -> tuple[list[int], list[int]]:
    """FA units to close and SWA units to open, the most promising first; `order` has all units by falling score."""
    closing = [unit for unit in reversed(order) if full[unit]]
    opening = [unit for unit in order if not full[unit]]
    if group == len(full):
        return closing, opening
    lowest = {unit // group: unit for unit in reversed(closing)}  # the last of a group stays
    highest = {unit // group: unit for unit in reversed(opening)}
    both = lowest.keys() & highest.keys()
    closest = sorted(both, key=lambda place: (scores[lowest[place]] - scores[highest[place]], place))
    return [lowest[place] for place in closest], [highest[place] for place in closest]


def _with_units(allocation: Allocation, full: np.ndarray, heads: int) -> Allocation:
    return replace(allocation, full_attention=np.repeat(full, heads).reshape(allocation.full_attention.shape))


def _mean_loss(model: PreTrainedModel, allocation: Allocation, text: Batch, batch_size: int) -> float:
    total = 0.0
    with attached(model, allocation):
        for batch in (part.to(model.device) for part in text.split(batch_size)):
            losses = loss.token_losses(model, batch.tokens).double()
            total += (losses if batch.weights is None else losses * batch.weights).sum().item()
    return total / text.num_predicted
