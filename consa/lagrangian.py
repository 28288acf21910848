"""The sparsity constraint: an augmented Lagrangian with one signed multiplier."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


def target_at(step: int, num_steps: int, target: float, warmup: float) -> float:
    """The target sparsity at a step: a cubic rise from 0 over the first `warmup` share of the steps."""
    progress = min(1.0, step / max(1.0, warmup * num_steps))
    return target * (1 - (1 - progress) ** 3)


@dataclass
class AugmentedLagrangian:
    """Adds `multiplier * h + penalty / 2 * h^2` to the loss, with `h` the target minus the expected sparsity.

    The multiplier moves by `step_size * h` once per optimiser step and may take either sign: it remembers how hard the
    loss pulls at the target, so that the quadratic term need not (Bertsekas 1982, ch. 2). It knows no momentum, decay
    or schedule, which would forget the size of the violation.

    Attributes:
        penalty: coefficient of the quadratic term (rho), nats.
        step_size: of the multiplier (eta), nats.
        multiplier: lambda, nats.
    """

    penalty: float
    step_size: float
    multiplier: float = 0.0

    def loss(self, expected_sparsity: Tensor, target: float) -> Tensor:
        """The term to add to the loss; differentiable in `expected_sparsity`, a scalar tensor."""
        violation = target - expected_sparsity
        return self.multiplier * violation + self.penalty / 2 * violation**2

    def update(self, expected_sparsity: float, target: float) -> None:
        """Move the multiplier; call once per optimiser step."""
        self.multiplier += self.step_size * (target - expected_sparsity)
