"""Gates: closed forms against draws, atoms at 0 and 1, gradients, stratified noise, and units."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from consa.training import gates
from consa.training.gates import Units


def uniforms(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("log_alpha", [-4.0, -1.6, -0.5, 0.0, 0.7, 2.0, 3.5])
def test_probabilities_match_draws(log_alpha: float):
    draws = 200_000
    z = gates.sample(torch.tensor(log_alpha), uniforms(draws))
    is_open = float(gates.probability_open(torch.tensor(log_alpha)))
    # s crosses (1 - gamma) / (zeta - gamma) at the other end: the same form with the sign turned.
    is_one = 1 / (1 + math.exp(-(log_alpha - 2 / 3 * math.log(11))))
    for wanted, found in ((is_open, z > 0), (is_one, z == 1)):
        deviation = math.sqrt(wanted * (1 - wanted) / draws)
        assert abs(float(found.float().mean()) - wanted) <= 5 * deviation + 1e-5


def test_probability_is_the_formula_of_the_paper():
    log_alpha = torch.linspace(-8, 8, 33)
    wanted = torch.sigmoid(log_alpha + 1.5986)
    assert (gates.probability_open(log_alpha) - wanted).abs().max() < 1e-5
    assert float(gates.probability_open(torch.tensor(2.0))) == pytest.approx(0.973, abs=1e-3)
    assert (gates.TEMPERATURE, gates.STRETCH) == (2 / 3, (-0.1, 1.1))


@given(st.floats(-7, 4), st.floats(0, 1, width=32))
def test_a_draw_is_the_formula_of_the_paper(log_alpha: float, uniform: float):
    u = min(max(uniform, 1e-6), 1 - 1e-6)
    s = 1 / (1 + math.exp(-(math.log(u) - math.log(1 - u) + log_alpha) / (2 / 3)))
    z = float(gates.sample(torch.tensor(log_alpha, dtype=torch.float64), torch.tensor(uniform, dtype=torch.float64)))
    assert z == pytest.approx(min(1, max(0, 1.2 * s - 0.1)), abs=1e-6)
    assert 0 <= z <= 1


def test_draws_hold_exact_zeros_and_ones():
    z = gates.sample(torch.tensor(0.3), uniforms(10_000))
    assert (z == 0).any() and (z == 1).any() and ((z > 0) & (z < 1)).any()
    assert z.dtype == torch.float32
    edges = gates.sample(torch.tensor([-7.0, 0.0, 4.0]), torch.tensor([[0.0], [1.0]]))
    assert edges.isfinite().all()
    assert edges.tolist() == [[0, 0, 0], [1, 1, 1]]


def test_gradient_of_a_draw():
    uniform = uniforms(400).double()
    log_alpha = torch.linspace(-3, 3, 400, dtype=torch.float64, requires_grad=True)
    z = gates.sample(log_alpha, uniform)
    z.sum().backward()
    step = 1e-6
    with torch.no_grad():
        ahead, behind = (gates.sample(log_alpha + d, uniform) for d in (step, -step))
    inside = (z > 1e-4) & (z < 1 - 1e-4)
    assert 0.1 < inside.double().mean() < 0.9
    assert log_alpha.grad is not None
    assert torch.allclose(log_alpha.grad[inside], ((ahead - behind) / (2 * step))[inside], rtol=1e-5)
    assert (log_alpha.grad[inside] > 0).all()
    assert not log_alpha.grad[(z == 0) | (z == 1)].any(), "a saturated gate has no gradient"


def test_without_noise():
    log_alpha = torch.tensor([-7.0, math.log(1 / 11) - 1e-3, 0.0, math.log(11) + 1e-3, 4.0])
    assert gates.deterministic(log_alpha).tolist() == pytest.approx([0, 0, 0.5, 1, 1])
    assert gates.fractional_share(log_alpha) == pytest.approx(0.2)
    assert gates.fractional_share(torch.tensor([-2.0, 0.0, 2.0])) == 1.0
    assert gates.fractional_share(torch.tensor([-7.0, 4.0])) == 0.0


@given(st.integers(1, 9), st.integers(1, 20), st.integers(0, 2**31))
def test_each_stratum_is_drawn_once_for_each_unit(num_draws: int, num_units: int, seed: int):
    u = gates.stratified_uniform(num_draws, num_units, torch.Generator().manual_seed(seed))
    assert u.shape == (num_draws, num_units)
    assert ((u >= 0) & (u <= 1)).all()
    strata = (u.double() * num_draws).floor().clamp(max=num_draws - 1).long()  # rounding may reach the next one
    assert ((strata.sort(0).values - torch.arange(num_draws)[:, None]).abs() <= 1).all()
    inner = u.double() * num_draws - (u.double() * num_draws).round()
    if (inner.abs() > 1e-5).all():
        assert (strata.sort(0).values == torch.arange(num_draws)[:, None]).all()


def test_draws_are_uniform_each_and_independent_between_units():
    generator = torch.Generator().manual_seed(0)
    many = torch.stack([gates.stratified_uniform(4, 6, generator) for _ in range(4000)])  # (runs, draws, units)
    for draw in range(4):
        counts = torch.histc(many[:, draw, 0], bins=20, min=0, max=1)
        chi2 = float(((counts - 200) ** 2 / 200).sum())
        assert chi2 < 50, f"draw {draw} is not uniform"  # 19 degrees of freedom: 1 in 10,000
    assert torch.corrcoef(many[:, 0].T).fill_diagonal_(0).abs().max() < 5 / math.sqrt(4000)
    assert torch.corrcoef(many[:, :, 0].T)[0, 1] < -0.2, "a unit's draws spread out"


@given(st.data())
@settings(max_examples=60)
def test_spread_puts_each_unit_where_it_belongs(data):
    num_layers, heads = data.draw(st.integers(1, 5)), data.draw(st.integers(1, 4))
    layers = data.draw(st.sets(st.integers(0, num_layers - 1), min_size=1).map(sorted))
    per_layer = data.draw(st.sampled_from([1, heads]))
    batch = data.draw(st.sampled_from([(), (1,), (3,), (2, 3)]))
    units = Units(num_layers, heads, tuple(layers), per_layer)
    assert units.count == len(layers) * per_layer
    values = torch.randn(*batch, units.count, dtype=torch.float64, requires_grad=True)
    out = units.spread(values, elsewhere=-9.0)
    assert out.shape == (num_layers, *batch, heads)
    for layer in range(num_layers):
        for head in range(heads):
            found = out[layer, ..., head]
            if layer in layers:
                unit = layers.index(layer) * per_layer + (head if per_layer > 1 else 0)
                assert torch.equal(found, values[..., unit])
            else:
                assert (found == -9).all()
    weights = torch.randn(out.shape, dtype=torch.float64)
    (out * weights).sum().backward()
    wanted = weights[layers].movedim(0, -2)  # (*batch, layers, heads)
    wanted = wanted.flatten(-2) if per_layer == heads else wanted.sum(-1)
    assert values.grad is not None and torch.allclose(values.grad, wanted)
