"""The sparsity constraint: an augmented Lagrangian with one signed multiplier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def target_at(step: int, num_steps: int, target: float, warmup: float) -> float:
    """The target sparsity at a step: a cubic rise from 0 over the first `warmup` share of the steps."""
    progress = min(1.0, step / max(1.0, warmup * num_steps))
    return target * (1 - (1 - progress) ** 3)


def ramp(step: int, num_steps: int, start: float) -> float:
    """0 up to the share `start` of the steps, then linear to 1 at the last one."""
    return max(0.0, (step / num_steps - start) / (1 - start)) if start < 1 else 0.0


@dataclass
class AugmentedLagrangian:
    """Adds `multiplier * h + penalty / 2 * h^2` to the loss, with `h` the target minus the expected sparsity.

    The multiplier moves by `step_size * h` once per optimiser step and may take either sign: it remembers how hard the
    loss pulls at the target, so that the quadratic term need not (Bertsekas 1982, ch. 2). It knows no momentum, decay
    or schedule, which would forget the size of the violation.

    Both coefficients may grow by a common factor late in a run, as the method of multipliers does when a violation
    persists: where few units are left open, each is worth much and pulls hard at the target.

    Attributes:
        penalty: coefficient of the quadratic term (rho), nats.
        step_size: of the multiplier (eta), nats.
        multiplier: lambda, nats.
    """

    penalty: float
    step_size: float
    multiplier: float = 0.0

    def loss(self, expected_sparsity: Tensor, target: float, growth: float = 1.0) -> Tensor:
        """The term to add to the loss; differentiable in `expected_sparsity`, a scalar tensor."""
        violation = target - expected_sparsity
        return self.multiplier * violation + growth * self.penalty / 2 * violation**2

    def update(self, expected_sparsity: float, target: float, growth: float = 1.0) -> None:
        """Move the multiplier; call once per optimiser step."""
        self.multiplier += growth * self.step_size * (target - expected_sparsity)
