"""The constraint: its schedule, its multiplier, and that gates under it end at the target."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
import torch

from consa.config import LearnConfig
from consa.training import gates
from consa.training.lagrangian import AugmentedLagrangian, ramp, target_at


def test_target_rises_to_the_target_and_stays():
    targets = [target_at(step, 100, 0.8, 0.4) for step in range(101)]
    assert targets[0] == 0
    assert all(a < b for a, b in pairwise(targets[:41]))
    assert targets[40:] == [0.8] * 61
    assert targets[20] == pytest.approx(0.8 * (1 - 0.5**3))
    assert targets[10] == pytest.approx(0.8 * (1 - 0.75**3))
    assert target_at(1, 10, 0.6, 0.0) == target_at(1, 1, 0.6, 0.4) == 0.6, "without a warm-up at once"


def test_ramp():
    assert [ramp(step, 10, 0.6) for step in (0, 5, 6)] == [0, 0, 0]
    assert ramp(8, 10, 0.6) == pytest.approx(0.5)
    assert ramp(10, 10, 0.6) == pytest.approx(1)
    assert ramp(10, 10, 1.0) == 0 and ramp(5, 10, 0.0) == 0.5


def at_sparsity(sparsity: float) -> torch.Tensor:
    """log_alpha of three gates of this expected sparsity."""
    offset = gates.TEMPERATURE * math.log(-gates.STRETCH[0] / gates.STRETCH[1])
    return (torch.logit(torch.tensor(1 - sparsity, dtype=torch.float64)) + offset).expand(3)


@pytest.mark.parametrize("growth", [1.0, 4.0])
@pytest.mark.parametrize(("expected", "target"), [(0.2, 0.7), (0.9, 0.7), (0.7, 0.7)])
def test_loss_and_update(expected: float, target: float, growth: float):
    constraint = AugmentedLagrangian(penalty=300, step_size=3, multiplier=-2.0)
    is_open = torch.full((3,), 1 - expected, dtype=torch.float64, requires_grad=True)
    h = target - expected
    loss = constraint.loss(is_open, target, growth)
    assert loss.item() == pytest.approx(-2 * h + growth * 150 * h**2)
    loss.backward()
    assert is_open.grad is not None
    assert float(is_open.grad.sum()) == pytest.approx(-2 + growth * 300 * h)
    assert constraint.multiplier == -2.0, "asking for the loss moves nothing"
    assert constraint.update(at_sparsity(expected), target, growth) == pytest.approx(expected)
    assert constraint.multiplier == pytest.approx(-2 + 3 * growth * h, abs=1e-12)
    other = AugmentedLagrangian(penalty=300, step_size=3)
    other.restore(constraint.tensors())
    assert other.multiplier == constraint.multiplier


def test_the_multiplier_may_take_either_sign_and_forgets_nothing():
    constraint = AugmentedLagrangian(penalty=1, step_size=0.5)
    for _ in range(4):
        constraint.update(at_sparsity(0.9), 0.5)
    assert constraint.multiplier == pytest.approx(-0.8)
    for _ in range(6):
        constraint.update(at_sparsity(0.1), 0.5)
    assert constraint.multiplier == pytest.approx(0.4)


def control(num_units: int, target: float, cost: float, seed: int) -> tuple[float, float]:
    """Gates under LearnConfig's defaults on a sum of convex costs of closing; final sparsity and fractional share."""
    config = LearnConfig(sparsity=target)
    generator = torch.Generator().manual_seed(seed)
    costs = torch.randn(num_units, generator=generator).exp()
    costs *= cost / costs.sum()
    log_alpha = torch.nn.Parameter(config.initial_log_alpha + 0.01 * torch.randn(num_units, generator=generator))
    optimizer = torch.optim.Adam([log_alpha], lr=min(1.0, 60 / config.num_steps), betas=(0.9, 0.95))
    constraint = AugmentedLagrangian(config.penalty, config.multiplier_step)
    expected = 0.0
    for step in range(1, config.num_steps + 1):
        z = gates.sample(log_alpha, gates.stratified_uniform(config.sequences_per_step, num_units, generator))
        loss = (costs * (1 - z) ** 2).sum(-1).mean()
        aim = target_at(step, config.num_steps, target, config.warmup)
        growth = config.penalty_growth ** ramp(step, config.num_steps, config.warmup)
        sharpening = config.sharpening * ramp(step, config.num_steps, config.sharpening_start)
        is_open = gates.probability_open(log_alpha)
        loss = loss + constraint.loss(is_open, aim, growth)
        (loss + sharpening * (is_open * (1 - is_open)).mean()).backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            log_alpha.clamp_(config.log_alpha_min, config.log_alpha_max)
            expected = constraint.update(log_alpha, aim, growth)
    return expected, gates.fractional_share(log_alpha.detach())


@pytest.mark.parametrize("target", [0.1, 0.3, 0.5, 0.75, 0.9, 0.95])
@pytest.mark.parametrize("num_units", [30, 90])
def test_sparsity_ends_at_the_target_with_few_gates_undecided(num_units: int, target: float):
    target = round(target * num_units) / num_units
    for cost, seed in ((0.6, 0), (0.1, 1), (3.0, 2)):
        expected, fractional = control(num_units, target, cost, seed)
        assert abs(expected - target) <= 0.01, f"cost {cost}: ended at {expected}"
        assert fractional < 0.15, f"cost {cost}: {fractional:.0%} of gates undecided"
