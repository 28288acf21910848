"""The sparsity constraint: an augmented Lagrangian with one signed multiplier."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from consa.training import gates


def target_at(step: int, num_steps: int, target: float, warmup: float) -> float:
    """The target sparsity at a step: a cubic rise from 0 over the first `warmup` share of the steps."""
    progress = min(1.0, step / max(1.0, warmup * num_steps))
    return target * (1 - (1 - progress) ** 3)


def ramp(step: int, num_steps: int, start: float) -> float:
    """0 up to the share `start` of the steps, then linear to 1 at the last one."""
    return max(0.0, (step / num_steps - start) / (1 - start)) if start < 1 else 0.0


@dataclass(eq=False)
class AugmentedLagrangian:
    """Adds `multiplier * h + penalty / 2 * h^2` to the loss, with `h` the target minus the expected sparsity.

    The multiplier moves by `step_size * h` once per optimizer step and may take either sign: it remembers how hard the
    loss pulls at the target, so that the quadratic term need not (Bertsekas 1982, ch. 2). It has no momentum, decay or
    schedule, which would forget the size of the violation. Subclass it for another way to hold the sparsity.

    Both coefficients may grow by a common factor late in a run, as the method of multipliers does when a violation
    persists: where few units are left open, each is worth much and pulls hard at the target.
    """

    penalty: float  # rho, nats
    step_size: float  # eta, nats
    multiplier: float = 0.0  # lambda, nats

    def is_open(self, log_alpha: Tensor) -> Tensor:
        """P(z > 0) of each gate, `(units,)`, differentiable: the constraint is on the expected sparsity, not a draw."""
        return gates.probability_open(log_alpha)

    def loss(self, is_open: Tensor, target: float, growth: float = 1.0) -> Tensor:
        """The term to add to the loss, for what `is_open` returned; `growth` is the factor on both coefficients."""
        violation = target - (1 - is_open.mean())
        return self.multiplier * violation + growth * self.penalty / 2 * violation**2

    def update(self, log_alpha: Tensor, target: float, growth: float = 1.0) -> float:
        """Move the multiplier, once after each optimizer step; returns the expected sparsity."""
        expected = float(1 - self.is_open(log_alpha).mean())
        self.multiplier += growth * self.step_size * (target - expected)
        return expected

    def tensors(self) -> dict[str, Tensor]:
        """The state to keep in a checkpoint, by name."""
        return {"multiplier": torch.tensor(self.multiplier, dtype=torch.float64)}

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned."""
        self.multiplier = float(tensors["multiplier"])
