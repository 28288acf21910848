"""Learn which units keep full attention, by gates under a sparsity constraint (ConSA, arXiv 2606.18056)."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from consa import rules
from consa.allocation import (
    Allocation,
    Granularity,
    num_full_units,
    num_full_units_within,
)
from consa.config import LearnConfig
from consa.constraints import choose
from consa.errors import ConsaError
from consa.model import loss
from consa.model.attach import attached
from consa.model.layout import AttentionLayout, attention_layout
from consa.model.plan import Plan
from consa.provenance import versions
from consa.training import distributed, gates, loop
from consa.training.gates import Units
from consa.training.lagrangian import AugmentedLagrangian, ramp, target_at
from consa.training.refinement import Exchange, refine
from consa.training.resume import Checkpoint


@dataclass(frozen=True)
class LearnResult:
    """What `learn` returns.

    Attributes:
        allocation: the decision, exact at the target; its scores are the averaged log_alpha. The gates decide it, and
            the refinement may have exchanged units near the boundary.
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
    on_exchange: Callable[[Exchange], None] | None = None,
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
        on_exchange: called with each evaluation of the final refinement.

    Raises:
        ConsaError: unusable settings or text, a loss that is not finite, or a folder that cannot be written.
    """
    layout = attention_layout(model)
    units = units_of(layout, config.granularity)
    num_full = target_units(layout, config)
    target = 1 - num_full / units.count
    loop.check(config, sequences, window=config.window, num_sink_tokens=config.num_sink_tokens)
    config = replace(config, seq_len=sequences.shape[1])  # what the record says it was learned on
    with distributed.sharded(model) if config.parallel == "fsdp" else nullcontext(model) as trained:
        state = _State.fresh(trained, units, config)
        run = Checkpoint(run_dir, loop.fingerprint(config, sequences, identity)) if run_dir else None
        history = state.restore(run.load()) if run else []
        distributed.check_same(state.step, "the step to continue from")
        start = _dense_start(layout, config)
        if num_full in (0, units.count):  # nothing to choose
            return LearnResult(_decide(state, units, num_full, layout, config, identity), history)
        with (
            _prepared(trained, config),
            attached(trained, start) as plan,
            state.weights or nullcontext(),
        ):
            for step in range(state.step, config.num_steps):
                began = time.perf_counter()
                value = _accumulate_gradients(
                    trained, plan, state, units, loop.batches(sequences, config, step), config
                )
                loop.check_finite({"step": step + 1, "loss": value}, config, run_dir)
                record = _update(
                    state, value, target_at(step + 1, config.num_steps, target, config.warmup), config
                )
                loop.check_finite(record, config, run_dir)
                history.append(record)
                if on_step:
                    seconds = time.perf_counter() - began
                    speed = config.sequences_per_step * sequences.shape[1] / seconds
                    on_step(record | {"tokens_per_second": speed})
                if run and (state.step % config.checkpoint_every == 0 or state.step == config.num_steps):
                    _save(run, state, history)
    allocation = _decide(state, units, num_full, layout, config, identity)
    if config.refine_evaluations and state.refined is None:
        refined = _refine(model, allocation, sequences, config, on_exchange)
        state.refined = distributed.from_main(torch.from_numpy(refined.full_attention.copy()))
        if run:
            _save(run, state, history)
    if state.refined is not None:
        allocation = replace(allocation, full_attention=state.refined.numpy())
    distributed.check_same(allocation.to_json(), "the allocation")
    return LearnResult(allocation, history)


def units_of(layout: AttentionLayout, granularity: Granularity) -> Units:
    """What there is to decide in a model of this layout."""
    layers = tuple(layer for layer in range(layout.num_layers) if layer not in layout.native_windows)
    return Units(
        layout.num_layers, layout.num_kv_heads, layers, layout.num_kv_heads if granularity == "kv_head" else 1
    )


def target_units(layout: AttentionLayout, config: LearnConfig) -> int:
    """How many units keep full attention: nearest to the sparsity, or the most that the KV budget affords.

    Only counts that the configuration's constraint allows.

    Raises:
        ConsaError: the KV heads of a layer do not split as the constraint asks, the budget is too small, or joint mode
            has nothing to choose.
    """
    units = units_of(layout, config.granularity)
    step = config.constraint.step(len(units.layers), units.per_layer)
    if config.kv_budget is None or config.context is None:
        found = step * num_full_units(units.count // step, config.sparsity)
    else:
        affordable = num_full_units_within(
            config.kv_budget, config.context, example=_dense_start(layout, config), head_dim=layout.head_dim
        )
        found = affordable // step * step
    if config.mode == "joint" and found in (0, units.count):
        raise ConsaError(
            f"mode must be frozen where {found} of {units.count} units keep full attention and none is to be chosen;"
            " to train the weights, use adapt"
        )
    return found


@dataclass
class _State:
    """What changes from step to step, and nothing else: a checkpoint holds exactly this."""

    log_alpha: torch.nn.Parameter  # (units,) float32
    gate_optimizer: torch.optim.Optimizer
    constraint: AugmentedLagrangian
    score_sum: Tensor  # (units,) float64, sum of log_alpha over the averaged steps
    weights: loop.Weights | None  # joint mode only
    step: int = 0
    refined: Tensor | None = None  # (layers, kv_heads) bool, once the refinement is done

    @classmethod
    def fresh(cls, model: PreTrainedModel, units: Units, config: LearnConfig) -> _State:
        noise = torch.randn(units.count, generator=loop.generator(config.seed, "start"))  # breaks ties
        log_alpha = torch.nn.Parameter(config.initial_log_alpha + 0.01 * noise)
        lr = config.gate_lr or min(1.0, 60 / config.num_steps)
        joint = config.mode == "joint"
        return cls(
            log_alpha,
            torch.optim.Adam([log_alpha], lr=lr, betas=(0.9, 0.95)),
            AugmentedLagrangian(config.penalty, config.multiplier_step),
            torch.zeros(units.count, dtype=torch.float64),
            loop.Weights(dict(model.named_parameters()), learning_rate=config.weight_lr) if joint else None,
        )

    def tensors(self) -> dict[str, Tensor]:
        """All of the state but `step`, by name; of weights only in the main process, but every one must call it."""
        multiplier = torch.tensor(self.constraint.multiplier, dtype=torch.float64)
        found: dict[str, Tensor] = {
            "log_alpha": self.log_alpha,
            "score_sum": self.score_sum,
            "multiplier": multiplier,
        }
        for slot, value in self.gate_optimizer.state[self.log_alpha].items():
            found[f"gate_optimizer.{slot}"] = value
        if self.refined is not None:
            found["refined"] = self.refined
        return found | (self.weights.tensors() if self.weights else {})

    def restore(
        self, saved: tuple[dict[str, Tensor], int, list[dict[str, float]]] | None
    ) -> list[dict[str, float]]:
        """Take over what a checkpoint held, if there was one; returns its history."""
        if saved is None:
            return []
        tensors, self.step, history = saved
        self.refined = tensors.get("refined")
        with torch.no_grad():
            self.log_alpha.copy_(tensors["log_alpha"])
            self.score_sum.copy_(tensors["score_sum"])
        self.constraint.multiplier = float(tensors["multiplier"])
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            self.gate_optimizer.state[self.log_alpha][slot] = tensors[f"gate_optimizer.{slot}"]
        if self.weights:
            self.weights.restore(tensors)
        return history


def _save(run: Checkpoint, state: _State, history: list[dict[str, float]]) -> None:
    tensors = state.tensors()
    if distributed.is_main():
        run.save(tensors, state.step, history)


def _accumulate_gradients(
    model: PreTrainedModel,
    plan: Plan,
    state: _State,
    units: Units,
    batches: list[np.ndarray],
    config: LearnConfig,
) -> float:
    """One step's gradients on log_alpha (and weights), from one draw of the gates per sequence; returns the loss."""
    generator = loop.generator(config.seed, f"noise {state.step}")
    draws = gates.stratified_uniform(config.sequences_per_step, units.count, generator)
    draws = draws[distributed.share(len(draws))]
    found = []
    for batch, uniform in zip(batches, draws.split(config.micro_batch), strict=True):
        tokens = torch.from_numpy(batch.astype(np.int64)).to(model.device)
        z = units.spread(gates.sample(state.log_alpha, uniform), elsewhere=1.0)  # (layers, batch, kv_heads)
        with plan.gated(z, model.device) as leaf:
            value = float(loss.backward(model, tokens, scale=len(batch) / config.sequences_per_step))
        if leaf.grad is not None and z.requires_grad:
            (gradient,) = torch.autograd.grad(z, state.log_alpha, leaf.grad.cpu())
        else:
            gradient = torch.zeros(units.count)
        found.append([*gradient.tolist(), value])
    # Added up in the order of the step's sequences, so that any number of processes ends with the same bits.
    summed = distributed.all_gather(torch.tensor(found, dtype=torch.float64)).sum(0)
    state.log_alpha.grad = summed[:-1].float()
    return float(summed[-1])


def _update(state: _State, value: float, target: float, config: LearnConfig) -> dict[str, float]:
    """Constraint, optimiser step, multiplier; returns the step's record."""
    growth = config.penalty_growth ** ramp(state.step + 1, config.num_steps, config.warmup)
    sharpening = config.sharpening * ramp(state.step + 1, config.num_steps, config.sharpening_start)
    is_open = gates.probability_open(state.log_alpha)
    constraint = state.constraint.loss(1 - is_open.mean(), target, growth)
    (constraint + sharpening * (is_open * (1 - is_open)).mean()).backward()
    state.gate_optimizer.step()
    state.gate_optimizer.zero_grad()
    joint = {"grad_norm": state.weights.update(max_norm=1.0)} if state.weights else {}
    with torch.no_grad():
        state.log_alpha.clamp_(config.log_alpha_min, config.log_alpha_max)
        expected = float(1 - gates.probability_open(state.log_alpha).mean())
    state.constraint.update(expected, target, growth)
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
        **joint,
    }


def _decide(
    state: _State,
    units: Units,
    num_full: int,
    layout: AttentionLayout,
    config: LearnConfig,
    identity: dict[str, str] | None,
) -> Allocation:
    """The `num_full` units of highest averaged log_alpha, under the constraint, keep full attention.

    Ties go to the lower layer and head.
    """
    steps = config.num_steps - math.floor(config.num_steps * (1 - config.averaged))
    scores = state.score_sum / max(1, steps)
    full = choose(scores.reshape(len(units.layers), -1).numpy(), num_full, config.constraint)
    mask = units.spread(torch.from_numpy(full.flatten()).double(), elsewhere=0.0).bool().numpy()
    assert mask.sum() == num_full * units.num_kv_heads // units.per_layer
    provenance = dict(identity or {}) | {
        "method": "consa",
        "target_sparsity": 1 - num_full / units.count,
        "config": {key: value for key, value in asdict(config).items() if key not in loop.FREE},
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


def _refine(
    model: PreTrainedModel,
    allocation: Allocation,
    sequences: np.ndarray,
    config: LearnConfig,
    on_exchange: Callable[[Exchange], None] | None,
) -> Allocation:
    """The decision refined on the sequences that would have come next."""
    first = config.num_steps * config.sequences_per_step
    chosen = loop.order(sequences, config, range(first, first + config.refine_sequences))
    return refine(
        model,
        allocation,
        sequences[chosen],
        max_evaluations=config.refine_evaluations,
        batch_size=config.micro_batch,
        constraint=config.constraint,
        on_exchange=on_exchange,
    )


@contextmanager
def _prepared(model: PreTrainedModel, config: LearnConfig) -> Iterator[None]:
    checkpointing = config.activation_checkpointing
    with loop.prepared(model, activation_checkpointing=checkpointing, compile=config.compile):
        model.requires_grad_(config.mode == "joint")
        yield


def _dense_start(layout: AttentionLayout, config: LearnConfig) -> Allocation:
    return rules.dense(
        *layout.shape,
        granularity=config.granularity,
        window=config.window,
        num_sink_tokens=config.num_sink_tokens,
        native_windows=layout.native_windows,
    )
