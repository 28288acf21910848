"""Constraints for serving: the best choice under each, violations, and learning under constraints."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from consa import Allocation
from consa.config import LearnConfig
from consa.constraints import ANY, Constraint, choose, violation
from consa.errors import ConsaError
from consa.model.layout import attention_layout
from consa.training import refinement
from consa.training.learning import learn, target_units
from consa.training.refinement import Exchange, refine
from tests.models import tiny, tokens

NOTHING: Any = None  # the model and text where the loss is made up
KINDS: Any = ["any", "even", "uniform"]
SHAPES = [(1, 4), (2, 2), (2, 4), (3, 2), (3, 3), (2, 6)]
CASES = [
    (layers, heads, Constraint(full_heads_per_layer=kind, tensor_parallel=ranks))
    for layers, heads in SHAPES
    for kind in KINDS
    for ranks in (1, 2, 3)
    if heads % ranks == 0 and (kind != "even" or heads // ranks % 2 == 0)
]


def allowed(mask: np.ndarray, constraint: Constraint) -> bool:
    """The constraint, checked head by head."""
    width = mask.shape[1] // constraint.tensor_parallel
    counts = [[int(sum(row[i : i + width])) for i in range(0, len(row), width)] for row in mask]
    kinds = {
        "any": True,
        "even": all(count % 2 == 0 for row in counts for count in row),
        "uniform": len({sum(row) for row in counts}) == 1,
    }
    return kinds[constraint.full_heads_per_layer] and all(len(set(row)) == 1 for row in counts)


def every_mask(layers: int, heads: int) -> np.ndarray:
    numbers = np.arange(2 ** (layers * heads))
    return (numbers[:, None] >> np.arange(layers * heads) & 1).astype(bool).reshape(-1, layers, heads)


ALLOWED = {
    (layers, heads, constraint): np.array([m for m in every_mask(layers, heads) if allowed(m, constraint)])
    for layers, heads, constraint in CASES
}


@given(st.sampled_from(CASES), st.integers(0, 2**31), st.booleans())
@settings(max_examples=150, deadline=None)
def test_no_choice_is_better_and_every_feasible_total_can_be_had(case: Any, seed: int, tied: bool):
    layers, heads, constraint = case
    scores = np.random.default_rng(seed).normal(size=(layers, heads))
    scores = np.round(scores) if tied else scores
    masks = ALLOWED[case]
    totals = {int(mask.sum()) for mask in masks}
    assert totals == set(range(0, layers * heads + 1, constraint.step(layers, heads)))
    for num_full in totals:
        mask = choose(scores, num_full, constraint)
        assert mask.shape == scores.shape and mask.sum() == num_full and allowed(mask, constraint)
        rivals = masks[masks.sum((1, 2)) == num_full]
        assert scores[mask].sum() == pytest.approx((rivals * scores).sum((1, 2)).max(), abs=1e-9)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_violation_finds_exactly_what_is_not_allowed(case: Any):
    layers, heads, constraint = case
    rng = np.random.default_rng(0)
    masks = every_mask(layers, heads)
    for mask in (*rng.permutation(masks)[:60], *rng.permutation(ALLOWED[case])[:20]):
        allocation = Allocation(full_attention=mask, window=4)
        assert (violation(allocation, constraint) is None) == allowed(mask, constraint)


@pytest.mark.parametrize("shape", [(5, 3), (30, 8)])
def test_without_a_constraint_the_highest_scores_win_and_ties_go_to_the_lower_unit(shape: tuple[int, int]):
    scores = np.random.default_rng(0).integers(0, 4, size=shape).astype(float)
    for num_full in range(scores.size + 1):
        wanted = np.argsort(-scores.flatten(), kind="stable")[:num_full]
        assert np.flatnonzero(choose(scores, num_full, ANY)).tolist() == sorted(wanted)


@pytest.mark.parametrize(
    ("rows", "constraint", "said"),
    [
        ("1100 1000", Constraint(full_heads_per_layer="even"), "'even' .*; layer 1 has 1$"),
        ("1100 1110", Constraint(full_heads_per_layer="uniform"), "'uniform' .*; layer 0 has 2, layer 1 has 3"),
        ("1010 1100", Constraint(tensor_parallel=2), "tensor_parallel=2 .* every rank; layer 1 has 2, 0"),
        ("1100 1010", Constraint(full_heads_per_layer="even", tensor_parallel=2), "every rank; layer 0 has 2, 0"),
        ("1010 1010", Constraint(full_heads_per_layer="even", tensor_parallel=2), "layer 0 has 1 on each rank"),
        ("1100 1100", Constraint(tensor_parallel=3), "tensor_parallel must divide the 4 KV heads .* got 3"),
        ("110 110", Constraint(full_heads_per_layer="even"), "even number of KV heads on each rank, got 3"),
    ],
)
def test_a_violation_says_what_lacks(rows: str, constraint: Constraint, said: str):
    mask = np.array([[digit == "1" for digit in row] for row in rows.split()])
    reason = violation(Allocation(full_attention=mask, window=4), constraint)
    with pytest.raises(ConsaError, match=said):
        raise ConsaError(reason)


def test_layers_that_the_model_slides_itself_are_not_counted():
    mask = np.array([[True, False], [False, False], [True, False]])
    allocation = Allocation(full_attention=mask, window=4, native_windows={1: 3})
    assert violation(allocation, Constraint(full_heads_per_layer="uniform")) is None


def test_a_total_that_no_choice_has_is_refused():
    with pytest.raises(ConsaError, match=r"multiple of 4 in 0\.\.8 under this constraint, got 6"):
        choose(np.zeros((2, 4)), 6, Constraint(full_heads_per_layer="even", tensor_parallel=2))


# Learning.


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"full_heads_per_layer": "odd"}, "full_heads_per_layer must be one of any, even, uniform, got 'odd'"),
        ({"tensor_parallel": 0}, "tensor_parallel must be an integer >= 1, got 0"),
        ({"granularity": "layer", "full_heads_per_layer": "uniform"}, "granularity layer, got 'uniform'"),
    ],
)
def test_settings_that_cannot_be_met_are_refused(changes: dict[str, Any], message: str):
    with pytest.raises(ConsaError, match=message):
        LearnConfig(**changes)


def test_layers_decided_as_one_meet_everything():
    config = LearnConfig(granularity="layer", full_heads_per_layer="even", tensor_parallel=7)
    assert config.constraint == ANY
    LearnConfig(granularity="layer", full_heads_per_layer="uniform", sparsity=1)


@pytest.mark.parametrize("sparsity", [0, 0.1, 0.4, 0.5, 0.61, 0.625, 0.8, 1])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("ranks", [1, 2])
def test_the_target_is_the_nearest_feasible_one(sparsity: float, kind: Any, ranks: int):
    layout = attention_layout(tiny(num_attention_heads=4, num_key_value_heads=4))
    config = LearnConfig(sparsity=sparsity, full_heads_per_layer=kind, tensor_parallel=ranks)
    feasible = {int(m.sum()) for m in ALLOWED[2, 4, config.constraint]}  # of two layers; here are four
    feasible = {a + b for a in feasible for b in feasible if kind != "uniform" or a == b}
    nearest = min(sorted(feasible), key=lambda full: round(abs(1 - full / 16 - sparsity), 9))
    assert target_units(layout, config) == nearest


def test_under_a_budget_the_target_is_the_most_that_is_feasible():
    layout = attention_layout(tiny(num_attention_heads=4, num_key_value_heads=4))
    budget: dict[str, Any] = {"kv_budget": 11 * 100 * 32, "context": 100, "window": 1, "num_sink_tokens": 0}
    wanted = {"any": 10, "even": 10, "uniform": 8}
    got = {kind: target_units(layout, LearnConfig(full_heads_per_layer=kind, **budget)) for kind in KINDS}
    assert got == wanted


@pytest.mark.parametrize("refined", [0, 12])
@pytest.mark.parametrize(("kind", "ranks"), [("even", 1), ("uniform", 1), ("any", 2), ("even", 2), ("uniform", 2)])
def test_learning_keeps_to_the_constraint(kind: Any, ranks: int, refined: int):
    model = tiny(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3)
    config = LearnConfig(
        sparsity=0.6,
        full_heads_per_layer=kind,
        tensor_parallel=ranks,
        window=3,
        num_sink_tokens=1,
        seq_len=16,
        num_steps=3,
        sequences_per_step=2,
        gate_lr=0.5,
        refine_evaluations=refined,
        refine_sequences=2,
    )
    result = learn(model, tokens(7, 16).numpy().astype(np.uint16), config)
    assert violation(result.allocation, config.constraint) is None
    num_full = target_units(attention_layout(model), config)
    assert result.allocation.full_attention.sum() == num_full
    provenance = result.allocation.provenance
    assert provenance["target_sparsity"] == pytest.approx(result.allocation.sparsity) == 1 - num_full / 12
    assert result.history[-1]["target"] == pytest.approx(1 - num_full / 12)
    assert provenance["config"]["full_heads_per_layer"] == kind


def test_a_constraint_that_the_model_cannot_meet_is_refused_before_learning():
    with pytest.raises(ConsaError, match="tensor_parallel must divide the 3 KV heads of a layer, got 2"):
        learn(tiny(), tokens(7, 16).numpy(), LearnConfig(tensor_parallel=2))


# Refinement.


@given(st.sampled_from([case for case in CASES if case[2] != ANY]), st.integers(0, 2**31), st.data())
@settings(max_examples=100, deadline=None)
def test_refinement_exchanges_within_layer_and_rank_until_none_of_those_helps(case: Any, seed: int, data: Any):
    layers, heads, constraint = case
    rng = np.random.default_rng(seed)
    scores, costs = rng.normal(size=(2, layers, heads))
    step = constraint.step(layers, heads)
    num_full = step * data.draw(st.integers(0, layers * heads // step))
    start = Allocation(full_attention=choose(scores, num_full, constraint), window=4, scores=scores)
    seen: list[Exchange] = []

    def loss(model: Any, allocation: Allocation, sequences: Any, batch_size: int) -> float:
        return float(costs[~allocation.full_attention].sum())

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(refinement, "_mean_loss", loss)
        budget = data.draw(st.integers(1, 30))
        out = refine(NOTHING, start, NOTHING, max_evaluations=budget, constraint=constraint, on_exchange=seen.append)
    assert len(seen) < budget
    assert violation(out, constraint) is None and out.sparsity == start.sparsity
    assert loss(NOTHING, out, NOTHING, 1) <= loss(NOTHING, start, NOTHING, 1)
    assert replace(out, full_attention=start.full_attention) == start
    width = heads // constraint.tensor_parallel
    per_rank = [a.full_attention.reshape(-1, width).sum(1).tolist() for a in (start, out)]
    assert per_rank[0] == per_rank[1]
    both = [(e.closed, e.opened) for e in seen if e.closed is not None and e.opened is not None]
    assert all(closed // width == opened // width for closed, opened in both)


def test_refinement_tries_the_layers_first_where_the_choice_was_close(monkeypatch: pytest.MonkeyPatch):
    scores = np.array([[9.0, 1.0], [5.0, 4.9], [2.0, 8.0]])
    full = np.array([[True, False], [True, False], [False, True]])
    costs = np.array([[0.0, 5.0], [0.0, 1.0], [5.0, 0.0]])
    monkeypatch.setattr(
        refinement, "_mean_loss", lambda _m, allocation, _s, _b: float(costs[~allocation.full_attention].sum())
    )
    start = Allocation(full_attention=full, window=4, scores=scores)
    uniform = Constraint(full_heads_per_layer="uniform")
    out = refine(NOTHING, start, NOTHING, max_evaluations=4, num_candidates=1, constraint=uniform)
    assert out.full_attention.tolist() == [[True, False], [False, True], [False, True]]
    out = refine(NOTHING, start, NOTHING, max_evaluations=50, constraint=uniform)
    assert out.full_attention.tolist() == [[False, True], [False, True], [True, False]]


def test_the_first_layer_that_is_decided_is_what_others_are_alike_to():
    mask = np.array([[False, False], [True, False], [False, True]])
    allocation = Allocation(full_attention=mask, window=4, native_windows={0: 3})
    assert violation(allocation, Constraint(full_heads_per_layer="uniform")) is None


@pytest.mark.parametrize(("kind", "ranks"), [("even", 1), ("uniform", 1), ("any", 2)])
def test_learning_refines_within_the_constraint(kind: Any, ranks: int, monkeypatch: pytest.MonkeyPatch):
    """Heads are worth what would draw FA out of its layer and rank."""
    worth = np.array([[0, 9, 1, 2], [3, 4, 10, 5], [6, 7, 8, 11]])
    loss = lambda _m, allocation, _s, _b: -float(worth[allocation.full_attention].sum())  # noqa: E731
    monkeypatch.setattr(refinement, "_mean_loss", loss)
    config = LearnConfig(
        **{"sparsity": 0.6, "full_heads_per_layer": kind, "tensor_parallel": ranks, "seq_len": 16, "window": 3},
        **{"num_sink_tokens": 1, "num_steps": 2, "sequences_per_step": 2, "refine_evaluations": 60},
    )
    model = tiny(num_attention_heads=4, num_key_value_heads=4, num_hidden_layers=3)
    allocation = learn(model, tokens(7, 16).numpy(), config).allocation
    assert violation(allocation, config.constraint) is None
