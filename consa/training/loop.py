"""What training loops share: the order of the text, a model made ready for training, and weights in float32."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

from consa.config import AdaptConfig, LearnConfig, check_window
from consa.errors import ConsaError, first_line
from consa.model.layout import decoder_layers
from consa.model.loss import evaluating
from consa.training import distributed
from consa.training.resume import CHECKPOINT

# What may differ when a run is continued: none of these changes what is computed, but for rounding.
FREE = {"checkpoint_every", "parallel"}


def batches(sequences: np.ndarray, config: LearnConfig | AdaptConfig, step: int) -> list[np.ndarray]:
    """This step's micro-batches, of this process."""
    first = step * config.sequences_per_step
    places = range(first, first + config.sequences_per_step)
    chosen = order(sequences, config, places[distributed.share(len(places))])
    return [sequences[chosen[i : i + config.micro_batch]] for i in range(0, len(chosen), config.micro_batch)]


def order(sequences: np.ndarray, config: LearnConfig | AdaptConfig, places: range) -> list[int]:
    """The sequences at some places of the run's stream: each once per epoch, every epoch in its own order."""
    count = len(sequences)
    epochs = {
        epoch: np.random.default_rng([config.seed, epoch]).permutation(count)
        for epoch in {place // count for place in places}
    }
    return [int(epochs[place // count][place % count]) for place in places]


@contextmanager
def prepared(
    model: PreTrainedModel, *, activation_checkpointing: bool = False, compile: bool = False
) -> Iterator[None]:
    """Choose deterministic kernels, checkpoint activations, compile layers.

    On exit all of that is undone, and changes of requires_grad.

    Raises:
        ConsaError: the layers do not compile.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # it costs time and guards against nothing
    try:
        # No dropout: the model is to be trained as it will be used.
        with (
            evaluating(model),
            _recomputing(model) if activation_checkpointing else nullcontext(),
            _compiled(decoder_layers(model) if compile else []),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
        for parameter, required in wanted:
            parameter.requires_grad_(required)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Within the block layers keep their inputs alone and are computed again in the backward pass."""
    modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = any(module.gradient_checkpointing for module in modules)
    # Before transformers 5.23 it was called gradient checkpointing, a name that 6 drops.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    settings = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{word}_checkpointing_enable")(**settings)
    for module in modules:  # transformers recomputes only in modules in training mode
        module.training = True
    try:
        yield
    finally:
        if not before:
            getattr(model, f"{word}_checkpointing_disable")()


@contextmanager
def _compiled(layers: list[Any]) -> Iterator[None]:
    """Within the block these modules run compiled; a forward of their own, as hooks give them, is put back."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", None) or error
        raise ConsaError(
            f"layers cannot be compiled: {first_line(cause)}; leave compile out, which on a CPU needs g++ and torch in"
            " a path without spaces"
        ) from error
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


class Weights:
    """Parameters in training: float32 masters of those that compute in less, their AdamW, clipping and checkpoints.

    Within a `with` block, gradients of such a parameter are added up in float32 on its master, and its own freed, as
    the backward pass makes them. Parameters may be sharded (see `distributed.sharded`); the others are equal on every
    process.

    Args:
        parameters: by name; those of a sharded model are float32.
        learning_rate: of AdamW, without weight decay.
    """

    def __init__(self, parameters: dict[str, torch.nn.Parameter], *, learning_rate: float) -> None:
        self.parameters = parameters
        self.masters: dict[str, Tensor] = {
            name: parameter
            if parameter.dtype == torch.float32
            else parameter.detach().float().requires_grad_()
            for name, parameter in parameters.items()
        }
        self._hooks: list[Any] = []
        kinds = [
            [m for m in self.masters.values() if isinstance(m, DTensor) == kind] for kind in (False, True)
        ]
        groups = [{"params": kind} for kind in kinds if kind]  # one call cannot update both kinds
        # Fused: otherwise an update holds several copies of the weights.
        self.optimizer = torch.optim.AdamW(groups, lr=learning_rate, weight_decay=0, fused=True)

    def __enter__(self) -> Weights:
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                self._hooks.append(parameter.register_post_accumulate_grad_hook(_mover(self.masters[name])))
        return self

    def __exit__(self, *_: object) -> None:
        while self._hooks:
            self._hooks.pop().remove()

    @torch.no_grad()
    def update(self, *, max_norm: float, learning_rate: float | None = None) -> float:
        """One step of AdamW on gradients added up over processes; they are cleared.

        Returns:
            The gradients' norm before it was clipped to `max_norm`.
        """
        for master in self.masters.values():
            if distributed.world_size() > 1 and not isinstance(master, DTensor):
                master.grad = torch.zeros_like(master) if master.grad is None else master.grad
                distributed.all_reduce(master.grad)
        gradients = [master.grad for master in self.masters.values() if master.grad is not None]
        whole = [gradient for gradient in gradients if not isinstance(gradient, DTensor)]
        parts = [distributed.local(gradient) for gradient in gradients if isinstance(gradient, DTensor)]
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

    def tensors(self) -> dict[str, Tensor]:
        """Masters and the optimiser's state by name, whole; every process must call it, the main one gets them."""
        found: dict[str, Tensor] = {}
        for name, master in self.masters.items():
            slots = {
                f"weight_optimizer.{slot}": value for slot, value in self.optimizer.state[master].items()
            }
            for part, value in ({"weights": master} | slots).items():
                whole = distributed.gathered(value)
                if distributed.is_main():
                    found[f"{part}.{name}"] = whole.detach().cpu()
        return found

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` gave, on whatever number of processes."""
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


def _mover(master: Tensor) -> Callable[[Tensor], None]:
    def move(parameter: Tensor) -> None:
        assert parameter.grad is not None
        gradient = parameter.grad.float()
        master.grad = gradient if master.grad is None else master.grad.add_(gradient)
        parameter.grad = None

    return move


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends on nothing but its arguments, so that a resumed run draws what the first one would."""
    digest = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(digest) % 2**63)


def check(
    config: LearnConfig | AdaptConfig, sequences: np.ndarray, *, window: int, num_sink_tokens: int
) -> None:
    """Make sure that a loop can run.

    Raises:
        ConsaError: there is no text, none of it beyond window and sinks, or a step's sequences do not divide among the
            processes.
    """
    if not isinstance(sequences, np.ndarray) or sequences.ndim != 2:
        raise ConsaError(
            "sequences must be a numpy array of tokens (num_sequences, seq_len), got"
            f" {type(sequences).__name__} of shape {tuple(getattr(sequences, 'shape', ()))}"
        )
    if len(sequences) == 0 or sequences.shape[1] < 2:
        raise ConsaError(
            f"no training text: got sequences of shape {sequences.shape}; give longer or more documents"
        )
    check_window(window, num_sink_tokens, sequences.shape[1])
    distributed.check_divides(config.sequences_per_step, config.micro_batch)


def check_finite(record: dict[str, Any], config: LearnConfig | AdaptConfig, run_dir: Path | None) -> None:
    """Make sure that training has not diverged, before anything is kept of a step.

    Raises:
        ConsaError: one of the step's numbers is not finite.
    """
    for name, value in record.items():
        if not math.isfinite(value):
            kept = run_dir and (run_dir / CHECKPOINT).exists()
            rates = "gate_lr or weight_lr" if isinstance(config, LearnConfig) else "learning_rate"
            raise ConsaError(
                f"the {name} became {value} at step {record['step']};"
                + (f" the last good checkpoint is kept in {run_dir};" if kept else "")
                + f" lower {rates}{' and choose another folder' if run_dir else ''}"
                + ", or use float32 where that is not in use"
            )


def fingerprint(
    config: LearnConfig | AdaptConfig, sequences: np.ndarray, identity: dict[str, str] | None
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    text = hashlib.sha256(np.ascontiguousarray(sequences).tobytes()).hexdigest()
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE}
    return {"config": settings, "model": identity, "sequences": text}
