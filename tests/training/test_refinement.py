"""Refinement exchanges units for better ones, at equal sparsity and within its budget."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consa import Allocation
from consa.errors import InvalidAllocationError
from consa.training import refinement
from consa.training.objective import Batch
from consa.training.refinement import Exchange, refine
from tests.models import allocate, exact, tiny, tokens

NOTHING: Any = None  # the model and text where the loss is made up


def scored(full: np.ndarray, scores: np.ndarray, granularity: Any = "kv_head", **options: Any) -> Allocation:
    return Allocation(full_attention=full, granularity=granularity, window=4, scores=scores, **options)


class MadeUp:
    """A loss of allocations that can be checked: a cost for each closed unit, and for some pairs closed together."""

    def __init__(self, costs: np.ndarray, pairs: np.ndarray | None = None) -> None:
        self.costs, self.pairs, self.seen = costs, pairs, []

    def __call__(self, model: Any, allocation: Allocation, sequences: Any, batch_size: int) -> float:
        self.seen.append(allocation)
        closed = ~allocation.full_attention.flatten()
        extra = 0 if self.pairs is None else closed @ self.pairs @ closed
        return float(self.costs.flatten() @ closed + extra)


@st.composite
def made_up(draw: Any):
    layers, heads = draw(st.integers(1, 5)), draw(st.integers(1, 4))
    granularity = draw(st.sampled_from(["layer", "kv_head"]))
    rng = np.random.default_rng(draw(st.integers(0, 2**31)))
    native = {layer: 3 for layer in range(layers) if layer and rng.random() < 0.3}
    full, scores = rng.random((layers, heads)) < 0.5, rng.normal(size=(layers, heads))
    if granularity == "layer":
        full, scores = (np.repeat(x[:, :1], heads, 1) for x in (full, scores))
    full[list(native)] = False
    allocation = scored(full, scores, granularity, native_windows=native)
    pairs = rng.normal(size=(full.size, full.size)) * draw(st.sampled_from([0, 0.3]))
    return allocation, MadeUp(rng.normal(size=full.shape), pairs)


@given(made_up(), st.integers(1, 60), st.integers(1, 9))
@settings(max_examples=150)
def test_never_worse_never_sparser_never_over_budget(made_up, max_evaluations: int, num_candidates: int):
    start, loss = made_up
    exchanges: list[Exchange] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "_mean_loss", loss)
        out = refine(
            NOTHING,
            start,
            NOTHING,
            max_evaluations=max_evaluations,
            num_candidates=num_candidates,
            on_exchange=exchanges.append,
        )
    assert 1 <= len(loss.seen) <= max_evaluations
    told = [exchange.evaluations for exchange in exchanges]
    assert told == list(range(2, len(loss.seen) + 1)), "every evaluation after that of the start"
    before, after = (loss(NOTHING, allocation, NOTHING, 1) for allocation in (start, out))
    assert after <= before
    assert out.sparsity == start.sparsity
    assert replace(out, full_attention=start.full_attention) == start, "only the mask may change"
    assert after == pytest.approx(before + sum(e.change for e in exchanges if e.accepted))
    heads = start.num_kv_heads if start.granularity == "layer" else 1
    full = start.full_attention.reshape(-1, heads)[:, 0].copy()
    for exchange in exchanges:
        tried_both = None not in (exchange.closed, exchange.opened)
        assert exchange.accepted == (exchange.change < 0 and tried_both)
        assert exchange.evaluations <= max_evaluations
        if exchange.accepted:
            assert full[exchange.closed] and not full[exchange.opened]
            full[[exchange.closed, exchange.opened]] = [False, True]
    assert np.array_equal(np.repeat(full, heads), out.full_attention.flatten())


def test_with_enough_budget_no_exchange_of_two_units_is_left_that_helps(monkeypatch: pytest.MonkeyPatch):
    rng = np.random.default_rng(0)
    for _ in range(20):
        loss = MadeUp(rng.normal(size=(3, 2)))
        monkeypatch.setattr(refinement, "_mean_loss", loss)
        start = scored(rng.permutation(6).reshape(3, 2) < 3, rng.normal(size=(3, 2)))
        out = refine(NOTHING, start, NOTHING, max_evaluations=10_000)
        closed = set(np.argsort(loss.costs.flatten())[:3])  # where costs add up, the cheapest three
        assert set(np.flatnonzero(~out.full_attention)) == closed


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
def test_finds_a_planted_exchange_and_no_other(granularity: str, monkeypatch: pytest.MonkeyPatch):
    costs = np.array([[5.0, 5.0], [0.1, 0.1], [3.0, 3.0], [0.2, 0.2]])
    full = np.array([[True, True], [True, True], [False, False], [False, False]])
    scores = np.array([[9.0, 9.0], [2.0, 2.0], [1.0, 1.0], [0.0, 0.0]])
    loss, exchanges = MadeUp(costs), []
    monkeypatch.setattr(refinement, "_mean_loss", loss)
    start = scored(full, scores, granularity)
    out = refine(NOTHING, start, NOTHING, max_evaluations=100, on_exchange=exchanges.append)
    assert out.full_attention.all(1).tolist() == [True, False, True, False]
    assert out.granularity == granularity and (out.full_attention.all(1) == out.full_attention.any(1)).all()
    accepted = [(e.closed, e.opened) for e in exchanges if e.accepted]
    if granularity == "layer":
        assert accepted == [(1, 2)]
        assert all((a.full_attention.all(1) == a.full_attention.any(1)).all() for a in loss.seen)
    else:
        assert sorted(unit for pair in accepted for unit in pair) == [2, 3, 4, 5]


def test_candidates_are_those_nearest_the_boundary(monkeypatch: pytest.MonkeyPatch):
    full = np.array([[True], [True], [True], [False], [False], [False]])
    scores = np.array([[9.0], [7.0], [8.0], [1.0], [3.0], [2.0]])
    loss = MadeUp(np.array([[1.0], [2.0], [3.0], [4.0], [0.5], [0.6]]))  # a far exchange would help
    monkeypatch.setattr(refinement, "_mean_loss", loss)
    out = refine(NOTHING, scored(full, scores), NOTHING, max_evaluations=4, num_candidates=1)
    assert np.array_equal(out.full_attention, full)
    assert {int(a.full_attention.flatten().argmin()) for a in loss.seen if a.full_attention.sum() == 2} == {1}
    assert {a.full_attention[4, 0] for a in loss.seen if a.full_attention.sum() == 4} == {True}
    assert len(loss.seen) == 4


def test_a_budget_that_is_left_goes_to_further_candidates(monkeypatch: pytest.MonkeyPatch):
    full = np.array([[True], [True], [True], [False], [False], [False]])
    scores = np.array([[9.0], [7.0], [8.0], [1.0], [3.0], [2.0]])
    loss = MadeUp(np.array([[1.0], [2.0], [3.0], [4.0], [0.5], [0.6]]))
    monkeypatch.setattr(refinement, "_mean_loss", loss)
    out = refine(NOTHING, scored(full, scores), NOTHING, max_evaluations=100, num_candidates=1)
    assert out.full_attention.flatten().tolist() == [False, True, True, True, False, False]
    before = next(place for place, a in enumerate(loss.seen) if a == out)
    masks = [a.full_attention.tobytes() for a in loss.seen[:before]]
    assert len(set(masks)) == len(masks), "nothing is measured twice"


@pytest.mark.parametrize("full", [np.ones((2, 2), dtype=bool), np.zeros((2, 2), dtype=bool)])
def test_nothing_to_exchange(full: np.ndarray, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(refinement, "_mean_loss", MadeUp(np.arange(4.0)))
    start = scored(full, np.zeros((2, 2)))
    assert refine(NOTHING, start, NOTHING, max_evaluations=50) == start


def test_needs_scores():
    model = tiny()
    with pytest.raises(InvalidAllocationError, match="scores are needed"):
        refine(model, allocate(model), Batch(tokens(2, 12)), max_evaluations=9)


@pytest.mark.parametrize("batch_size", [1, 2, 3, 7])
def test_the_loss_is_the_mean_over_all_tokens_under_the_allocation(batch_size: int):
    model, ids = tiny(), tokens(7, 15)
    allocation = allocate(model, window=3)
    with torch.no_grad(), exact(model, allocation):
        wanted = float(model(input_ids=ids, labels=ids, use_cache=False).loss)
    assert refinement._mean_loss(model, allocation, Batch(ids), batch_size) == pytest.approx(wanted, rel=1e-5)


def test_on_a_model_it_trades_a_head_without_effect_for_one_with():
    model = tiny(num_hidden_layers=2)
    with torch.no_grad():  # KV head 0 of layer 0 (query heads 0 and 1) writes nothing
        model.model.layers[0].self_attn.o_proj.weight[:, : 2 * 8] = 0
        prompt = torch.full((6, 1), 1)
        torch.manual_seed(0)
        sequences = model.generate(prompt, do_sample=True, max_new_tokens=40, top_k=0)
    full = np.array([[True, False, True], [True, True, True]])  # the head without effect is open, the next is not
    scores = np.array([[0.5, 0.4, 3.0], [3.0, 3.0, 3.0]])
    flags = [p.requires_grad for p in model.parameters()]
    out = refine(model, scored(full, scores), Batch(sequences), max_evaluations=12, num_candidates=1)
    assert out.full_attention.tolist() == [[False, True, True], [True, True, True]]
    assert [p.requires_grad for p in model.parameters()] == flags
    assert all(p.grad is None for p in model.parameters())
