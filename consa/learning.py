"""The learning loop: which units keep full attention (ConSA, arXiv 2606.18056), by gates under a sparsity constraint."""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from consa import gates, loss
from consa.allocation import (
    Allocation,
    Granularity,
    check_sparsity,
    num_full_units,
    num_full_units_within,
)
from consa.checkpointing import Checkpoint
from consa.errors import ConsaError
from consa.gates import Units
from consa.lagrangian import AugmentedLagrangian, target_at
from consa.model import AttentionLayout, attached, attention_layout
from consa.provenance import versions


def _option(default: Any, text: str) -> Any:
    return field(default=default, metadata={"help": text})


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Everything a learning run depends on, besides the model and the text.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    sparsity: float = _option(0.75, "share of units to put on sliding-window attention, in [0, 1]")
    kv_budget: int | None = _option(None, "instead of sparsity: KV-cache bytes (bf16) one sequence may take")
    context: int | None = _option(None, "tokens in that cache")
    granularity: Granularity = _option("kv_head", "what is decided as one: 'layer' or 'kv_head'")
    window: int = _option(128, "tokens a sliding-window query sees, itself included")
    num_sink_tokens: int = _option(4, "first tokens that stay visible on top of the window")
    seq_len: int = _option(8192, "tokens per training sequence")
    num_steps: int = _option(200, "optimiser steps")
    sequences_per_step: int = _option(4, "sequences per optimiser step")
    micro_batch: int = _option(1, "sequences computed at once; the rest is gradient accumulation")
    seed: int = _option(0, "of the gates' noise and the order of the text")
    objective: Literal["cross_entropy", "distillation"] = _option(
        "distillation", "loss: of the text's next tokens, or divergence from the dense model's predictions"
    )
    gradient: str = _option("pathwise", "experiment")
    lr_decay: float = _option(0.0, "experiment")
    mode: Literal["frozen", "joint"] = _option("frozen", "'joint' trains the weights along with the gates")
    weight_lr: float = _option(1e-5, "AdamW learning rate of the weights in joint mode")
    gate_lr: float | None = _option(
        None, "Adam learning rate of the gates; min(1, 60 / num_steps) unless given"
    )
    initial_log_alpha: float = _option(2.0, "where the gates start; 2 is a probability of 0.97 to be open")
    log_alpha_bound: float = _option(6.0, "gates are clamped to [-bound, bound]")
    warmup: float = _option(0.4, "share of the steps over which the target rises from 0")
    penalty: float = _option(300.0, "quadratic coefficient of the constraint (rho), nats")
    multiplier_step: float = _option(1.0, "step size of the constraint's multiplier (eta), nats")
    averaged: float = _option(0.2, "last share of the steps whose log_alpha is averaged for the decision")
    activation_checkpointing: bool = _option(False, "recompute layers in the backward pass to save memory")
    checkpoint_every: int = _option(10, "steps between checkpoints")

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if (self.kv_budget is None) != (self.context is None):
            raise ConsaError("kv_budget (bytes) and context (tokens) belong together; give both or neither")
        choices = {"granularity": ("layer", "kv_head"), "mode": ("frozen", "joint")}
        choices["objective"] = ("cross_entropy", "distillation")
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConsaError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        least = {"window": 1, "num_sink_tokens": 0, "seq_len": 2, "num_steps": 1, "sequences_per_step": 1}
        least |= {"micro_batch": 1, "checkpoint_every": 1, "kv_budget": 1, "context": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < minimum):
                raise ConsaError(f"{name} must be an integer >= {minimum}, got {value!r}")
        positive = ("weight_lr", "gate_lr", "log_alpha_bound", "penalty", "multiplier_step", "averaged")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConsaError(f"{name} must be a positive number, got {value!r}")
        for name in ("warmup", "averaged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConsaError(f"{name} must be a share in [0, 1], got {getattr(self, name)!r}")
        if self.sequences_per_step % self.micro_batch:
            raise ConsaError(
                f"micro_batch must divide sequences_per_step ({self.sequences_per_step}), got {self.micro_batch}"
            )
        if not abs(self.initial_log_alpha) < self.log_alpha_bound:
            raise ConsaError(
                f"initial_log_alpha must lie within +-log_alpha_bound ({self.log_alpha_bound}),"
                f" got {self.initial_log_alpha!r}; gates that start clamped start tied"
            )
        if self.mode == "joint" and self.objective == "distillation":
            raise ConsaError(
                "distillation needs the dense model unchanged; use objective cross_entropy in joint mode"
            )


@dataclass(frozen=True)
class LearnResult:
    """What `learn` returns.

    Attributes:
        allocation: the decision, exact at the target; its scores are the averaged log_alpha.
        history: one record per step: step, loss, expected_sparsity, target, multiplier, fractional.
    """

    allocation: Allocation
    history: list[dict[str, float]]


def learn(
    model: PreTrainedModel,
    sequences: np.ndarray,
    config: LearnConfig,
    *,
    identity: dict[str, str] | None = None,
    run_dir: Path | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> LearnResult:
    """Learn an allocation for `model`.

    Args:
        model: a causal language model of transformers; its weights change in joint mode only.
        sequences: int tokens `(num_sequences, seq_len)`, each from one document.
        config: the run's settings.
        identity: of the model, for the allocation's provenance.
        run_dir: where to keep checkpoints and metrics.jsonl; a run killed at any moment and started again with the same
            arguments goes on from there and ends with the same allocation, bit for bit, on the same machine.
        on_step: called with each step's record.

    Raises:
        ConsaError: unusable settings or text, a loss that is not finite, or a folder that cannot be written.
    """
    layout = attention_layout(model)
    units = units_of(layout, config.granularity)
    num_full = target_units(layout, config)
    target = 1 - num_full / units.count
    if len(sequences) == 0 or sequences.shape[1] < 2:
        raise ConsaError(
            f"no training text: got sequences of shape {sequences.shape}; give longer or more documents"
        )
    state = _State.fresh(model, units, config)
    run = Checkpoint(run_dir, _fingerprint(config, sequences, identity)) if run_dir else None
    history = state.restore(run.load()) if run else []
    start = _dense_start(layout, config)
    steps = range(state.step, config.num_steps if 0 < num_full < units.count else 0)
    trained = [p for p in model.parameters() if p.requires_grad] if config.mode == "joint" else []
    with _prepared(model, config), attached(model, start) as plan:
        for step in steps:
            began = time.perf_counter()
            value = _accumulate_gradients(
                model, plan, state, units, _batches(sequences, config, step), config
            )
            if not math.isfinite(value):
                raise ConsaError(
                    f"the loss became {value} at step {step + 1};"
                    + (f" the last good checkpoint is kept in {run_dir};" if run_dir else "")
                    + " lower gate_lr or weight_lr, or use float32"
                )
            record = _update(
                state, trained, value, target_at(step + 1, config.num_steps, target, config.warmup), config
            )
            history.append(record)
            if on_step:
                seconds = time.perf_counter() - began
                on_step(
                    record | {"tokens_per_second": config.sequences_per_step * sequences.shape[1] / seconds}
                )
            if run and (state.step % config.checkpoint_every == 0 or state.step == config.num_steps):
                run.save(state.tensors(), state.step, history)
    return LearnResult(_decide(state, units, num_full, layout, config, identity), history)


def units_of(layout: AttentionLayout, granularity: Granularity) -> Units:
    """What there is to decide in a model of this layout."""
    layers = tuple(layer for layer in range(layout.num_layers) if layer not in layout.native_windows)
    return Units(
        layout.num_layers, layout.num_kv_heads, layers, layout.num_kv_heads if granularity == "kv_head" else 1
    )


def target_units(layout: AttentionLayout, config: LearnConfig) -> int:
    """How many units keep full attention: nearest to the sparsity, or the most that the KV budget affords."""
    if config.kv_budget is None or config.context is None:
        return num_full_units(units_of(layout, config.granularity).count, config.sparsity)
    return num_full_units_within(
        config.kv_budget, config.context, example=_dense_start(layout, config), head_dim=layout.head_dim
    )


@dataclass
class _State:
    """What changes from step to step, and nothing else: a checkpoint holds exactly this."""

    log_alpha: torch.nn.Parameter  # (units,) float32
    gate_optimizer: torch.optim.Optimizer
    constraint: AugmentedLagrangian
    score_sum: Tensor  # (units,) float64, sum of log_alpha over the averaged steps
    weights: dict[str, torch.nn.Parameter]  # joint mode only
    weight_optimizer: torch.optim.Optimizer | None
    step: int = 0

    @classmethod
    def fresh(cls, model: PreTrainedModel, units: Units, config: LearnConfig) -> _State:
        noise = torch.randn(units.count, generator=_generator(config.seed, "start"))  # breaks ties
        log_alpha = torch.nn.Parameter(config.initial_log_alpha + 0.01 * noise)
        lr = config.gate_lr or min(1.0, 60 / config.num_steps)
        weights = dict(model.named_parameters()) if config.mode == "joint" else {}
        return cls(
            log_alpha,
            torch.optim.Adam([log_alpha], lr=lr, betas=(0.9, 0.95)),
            AugmentedLagrangian(config.penalty, config.multiplier_step),
            torch.zeros(units.count, dtype=torch.float64),
            weights,
            torch.optim.AdamW(weights.values(), lr=config.weight_lr, weight_decay=0) if weights else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of the state but `step`, by name."""
        multiplier = torch.tensor(self.constraint.multiplier, dtype=torch.float64)
        found = {"log_alpha": self.log_alpha, "score_sum": self.score_sum, "multiplier": multiplier}
        for prefix, optimizer in (("gate", self.gate_optimizer), ("weight", self.weight_optimizer)):
            for index, slots in (optimizer.state_dict()["state"] if optimizer else {}).items():
                found |= {f"{prefix}_optimizer.{index}.{slot}": value for slot, value in slots.items()}
        return found | {f"weights.{name}": value for name, value in self.weights.items()}

    def restore(
        self, saved: tuple[dict[str, Tensor], int, list[dict[str, float]]] | None
    ) -> list[dict[str, float]]:
        """Take over what a checkpoint held, if there was one; returns its history."""
        if saved is None:
            return []
        tensors, self.step, history = saved
        with torch.no_grad():
            self.log_alpha.copy_(tensors["log_alpha"])
            self.score_sum.copy_(tensors["score_sum"])
            for name, value in self.weights.items():
                value.copy_(tensors[f"weights.{name}"])
        self.constraint.multiplier = float(tensors["multiplier"])
        for prefix, optimizer in (("gate", self.gate_optimizer), ("weight", self.weight_optimizer)):
            if optimizer is not None:
                slots: dict[int, dict[str, Tensor]] = {}
                for name, value in tensors.items():
                    if name.startswith(f"{prefix}_optimizer."):
                        _, index, slot = name.split(".")
                        slots.setdefault(int(index), {})[slot] = value
                optimizer.load_state_dict(optimizer.state_dict() | {"state": slots})
        return history


def _accumulate_gradients(
    model: PreTrainedModel,
    plan: Any,
    state: _State,
    units: Units,
    batches: list[np.ndarray],
    config: LearnConfig,
) -> float:
    """One step's gradients on log_alpha (and weights), from one draw of the gates per sequence; returns the loss."""
    generator = _generator(config.seed, f"noise {state.step}")
    draws = gates.stratified_uniform(config.sequences_per_step, units.count, generator)
    total = 0.0
    for batch, uniform in zip(batches, draws.split(config.micro_batch), strict=True):
        tokens = torch.from_numpy(batch.astype(np.int64)).to(model.device)
        teacher = None
        if config.objective == "distillation":
            with torch.no_grad(), plan.dense():
                teacher = loss.hidden_states(model, tokens)
        z = units.spread(gates.sample(state.log_alpha, uniform), elsewhere=1.0)  # (layers, batch, kv_heads)
        with plan.gated(z, model.device, config.gradient != "pathwise") as leaf:
            total += float(loss.backward(model, tokens, scale=1 / len(batches), teacher=teacher))
        if leaf.grad is not None and z.requires_grad:
            if config.gradient == "marginal":
                z = units.spread(gates.probability_open(state.log_alpha).expand_as(uniform), elsewhere=1.0)
            elif config.gradient == "straight":
                z = units.spread(gates.unclipped(state.log_alpha, uniform), elsewhere=1.0)
            z.backward(leaf.grad.cpu())
    return total


def _update(
    state: _State, trained: list[Tensor], value: float, target: float, config: LearnConfig
) -> dict[str, float]:
    """Constraint, optimiser step, multiplier; returns the step's record."""
    expected = 1 - gates.probability_open(state.log_alpha).mean()
    state.constraint.loss(expected, target).backward()
    if config.lr_decay:
        lr = config.gate_lr or min(1.0, 60 / config.num_steps)
        left = (config.num_steps - state.step) / config.num_steps
        state.gate_optimizer.param_groups[0]["lr"] = lr * min(1.0, max(0.05, left / config.lr_decay))
    state.gate_optimizer.step()
    state.gate_optimizer.zero_grad()
    if state.weight_optimizer is not None:
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        state.weight_optimizer.step()
        state.weight_optimizer.zero_grad()
    with torch.no_grad():
        state.log_alpha.clamp_(-config.log_alpha_bound, config.log_alpha_bound)
        expected = float(1 - gates.probability_open(state.log_alpha).mean())
    state.constraint.update(expected, target)
    state.step += 1
    if state.step > config.num_steps * (1 - config.averaged):
        state.score_sum += state.log_alpha.detach().double()
    return {
        "step": state.step,
        "loss": value,
        "expected_sparsity": expected,
        "target": target,
        "multiplier": state.constraint.multiplier,
        "fractional": gates.fractional_share(state.log_alpha.detach()),
    }


def _decide(
    state: _State,
    units: Units,
    num_full: int,
    layout: AttentionLayout,
    config: LearnConfig,
    identity: dict[str, str] | None,
) -> Allocation:
    """The `num_full` units of highest averaged log_alpha keep full attention; ties go to the lower layer and head."""
    steps = config.num_steps - math.floor(config.num_steps * (1 - config.averaged))
    scores = state.score_sum / max(1, steps)
    full = torch.zeros(units.count, dtype=torch.float64)
    full[torch.argsort(scores, descending=True, stable=True)[:num_full]] = 1
    mask = units.spread(full, elsewhere=0.0).bool().numpy()
    assert mask.sum() == num_full * units.num_kv_heads // units.per_layer
    provenance = dict(identity or {}) | {
        "method": "consa",
        "target_sparsity": 1 - num_full / units.count,
        "config": {key: value for key, value in asdict(config).items() if key != "checkpoint_every"},
        "versions": versions(),
    }
    return Allocation(
        full_attention=mask,
        granularity=config.granularity,
        window=config.window,
        num_sink_tokens=config.num_sink_tokens,
        native_windows=layout.native_windows,
        scores=units.spread(scores, elsewhere=0.0).numpy(),
        provenance=provenance,
    )


def _batches(sequences: np.ndarray, config: LearnConfig, step: int) -> list[np.ndarray]:
    """This step's micro-batches: every sequence once per epoch, each epoch in its own order."""
    first = step * config.sequences_per_step
    chosen = []
    for position in range(first, first + config.sequences_per_step):
        epoch, place = divmod(position, len(sequences))
        chosen.append(np.random.default_rng([config.seed, epoch]).permutation(len(sequences))[place])
    return [sequences[chosen[i : i + config.micro_batch]] for i in range(0, len(chosen), config.micro_batch)]


@contextmanager
def _prepared(model: PreTrainedModel, config: LearnConfig) -> Iterator[None]:
    """Freeze or unfreeze, choose deterministic kernels, checkpoint activations; undo all of it on exit."""
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    training = model.training
    deterministic = torch.are_deterministic_algorithms_enabled()
    model.eval()  # no dropout: the gates are to see the model as it will be used
    model.requires_grad_(config.mode == "joint")
    fill = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = (
        False  # it costs time and guards against nothing here
    )
    if config.activation_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        for module in model.modules():  # transformers recomputes only in modules in training mode
            if hasattr(module, "gradient_checkpointing"):
                module.training = True
    try:
        yield
    finally:
        if config.activation_checkpointing:
            model.gradient_checkpointing_disable()
        model.train(training)
        torch.use_deterministic_algorithms(deterministic)
        torch.utils.deterministic.fill_uninitialized_memory = fill
        for parameter, required in wanted:
            parameter.requires_grad_(required)


def _dense_start(layout: AttentionLayout, config: LearnConfig) -> Allocation:
    full = np.ones((layout.num_layers, layout.num_kv_heads), dtype=bool)
    full[list(layout.native_windows)] = False
    return Allocation(
        full_attention=full,
        granularity=config.granularity,
        window=config.window,
        num_sink_tokens=config.num_sink_tokens,
        native_windows=layout.native_windows,
    )


def _generator(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends on nothing but its arguments, so that a resumed run draws what the first one would."""
    digest = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(digest) % 2**63)


def _fingerprint(
    config: LearnConfig, sequences: np.ndarray, identity: dict[str, str] | None
) -> dict[str, Any]:
    """What must be equal for a checkpoint to be continued."""
    text = hashlib.sha256(np.ascontiguousarray(sequences).tobytes()).hexdigest()
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name != "checkpoint_every"}
    return {"config": settings, "model": identity, "sequences": text}
