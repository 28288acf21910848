"""Parameters in training: float32 master weights, their optimizer, clipping and checkpoints."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from consa.training import distributed


class Weights:
    """Parameters by name in training: float32 masters of those with lower precision, and AdamW without weight decay.

    Within a `with` block, the backward pass adds up gradients in float32 on the masters and frees those of the
    parameters. Parameters may be sharded (see `distributed.sharded`) and are then float32; others are equal everywhere.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], *, learning_rate: float) -> None:
        self.parameters = parameters
        self.masters: dict[str, Tensor] = {
            name: parameter if parameter.dtype == torch.float32 else parameter.detach().float().requires_grad_()
            for name, parameter in parameters.items()
        }
        self._hooks: list[Any] = []
        kinds = [[m for m in self.masters.values() if isinstance(m, DTensor) == kind] for kind in (False, True)]
        groups = [{"params": kind} for kind in kinds if kind]  # one call cannot update both kinds
        # Fused: otherwise an update holds several copies of the weights.
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0, fused=True)
        for master in self.masters.values():  # now, so that what fits in memory at the first step fits later
            step = torch.zeros((), dtype=torch.float32, device=master.device)
            averages = {slot: torch.zeros_like(master) for slot in ("exp_avg", "exp_avg_sq")}
            self.optimizer.state[master] = {"step": step, **averages}

    def __enter__(self) -> Weights:
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(partial(_move, self.masters[name])))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def update(self, *, max_norm: float, learning_rate: float | None = None) -> float:
        """One step of AdamW on gradients added up over processes; returns their norm, before clipping to `max_norm`."""
        for master in self.masters.values():
            if distributed.world_size() > 1 and not isinstance(master, DTensor):
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                distributed.all_reduce(master.grad)
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        parts = [gradient.to_local() for gradient in gradients if isinstance(gradient, DTensor)]
        norm = torch.nn.utils.get_total_norm(whole)
        if parts:
            norm = (norm**2 + distributed.all_reduce(torch.nn.utils.get_total_norm(parts) ** 2)).sqrt()
        for gradient in whole + parts:
            gradient.mul_((max_norm / (norm + 1e-6)).clamp(max=1.0))
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate or group["lr"]
        self.optimizer.step()
        self.optimizer.zero_grad()
        self._refresh()
        return float(norm)

    def discard(self) -> None:
        """Forget all gradients, also those of parameters that a failed backward pass has not moved to masters."""
        for tensor in (*self.masters.values(), *self.parameters.values()):
            tensor.grad = None

    def tensors(self) -> dict[str, Tensor]:
        """Masters and the optimizer's state by name, whole; every process must call it, the main one gets them."""
        state: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            slots = {f"weight_optimizer.{slot}": value for slot, value in self.optimizer.state[master].items()}
            for part, value in ({"weights": master} | slots).items():
                whole = distributed.gathered(value)
                if distributed.is_main():
                    state[f"{part}.{name}"] = whole.detach().cpu()
        return state

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned, on any number of processes."""
        for name, master in self.masters.items():
            master.copy_(distributed.like(tensors[f"weights.{name}"], master))
            for slot in ("step", "exp_avg", "exp_avg_sq"):
                value = tensors.get(f"weight_optimizer.{slot}.{name}")
                if value is not None:  # no gradient ever: an output layer, if hidden states alone count
                    placed = value.to(master.device) if slot == "step" else distributed.like(value, master)
                    self.optimizer.state[master][slot] = placed
        self._refresh()

    def _refresh(self) -> None:
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])


def _move(master: Tensor, parameter: Tensor) -> None:
    assert parameter.grad is not None
    gradient = parameter.grad.float()
    master.grad = gradient if master.grad is None else master.grad.add_(gradient)
    parameter.grad = None
