"""Learn which units keep full attention, by gates under a sparsity constraint (ConSA, arXiv 2606.18056)."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from consa import rules
from consa.allocation import Allocation, Granularity, num_full_units, num_full_units_within
from consa.config import ChoiceConfig, LearnConfig, at_once
from consa.constraints import choose
from consa.errors import ConsaError
from consa.model import loss
from consa.model.attach import attached
from consa.model.layout import AttentionLayout, attention_layout
from consa.provenance import versions
from consa.training import distributed, gates, loop, refinement
from consa.training.gates import Units
from consa.training.lagrangian import AugmentedLagrangian, ramp, target_at
from consa.training.objective import Dense, Gradients, Objective
from consa.training.refinement import Exchange
from consa.training.retrieval import with_retrieval
from consa.training.weights import Weights

Draws = Callable[[int, int, torch.Generator], Tensor]
"""`(num_draws, num_units, generator)` -> `(num_draws, num_units)` in (0, 1): a row for each sequence of a step."""


@dataclass(frozen=True)
class LearnResult:
    """What `learn` returns: the decision, exact at the target, and a record per step."""

    allocation: Allocation  # decided by the averaged log_alpha, its scores, but for exchanges by the refinement
    history: list[loop.Record]  # step, loss, expected_sparsity, target, multiplier, fractional, micro_batch


def learn(
    model: PreTrainedModel,
    sequences: np.ndarray,
    config: LearnConfig,
    *,
    identity: dict[str, str] | None = None,
    run_dir: Path | None = None,
    on_step: Callable[[loop.Record], None] | None = None,
    on_exchange: Callable[[Exchange], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
    constraint: AugmentedLagrangian | None = None,
    draws: Draws | None = None,
    refine: Callable[..., Allocation] | None = None,
) -> LearnResult:
    """Learn an allocation for `model`.

    Args:
        model: a causal language model of transformers; its weights change in joint mode only.
        sequences: int tokens `(num_sequences, seq_len)`, each from one document.
        config: the run's settings.
        identity: of the model, for the allocation's provenance.
        run_dir: where to keep checkpoints and metrics.jsonl. A run that was interrupted at any moment resumes from its
            last checkpoint when it is called again with the same arguments, and ends with the same allocation, bit for
            bit, on the same machine.
        on_step: called with each step's record.
        on_exchange: called with each evaluation of the final refinement.
        tokenizer: the model's own, which `config.retrieval` needs.
        objective: what is minimised; by default the next-token loss, with the config's share of retrieval.
        constraint: what holds the target sparsity; by default an `AugmentedLagrangian` with the config's coefficients.
        draws: the random numbers of a step's gates; `gates.stratified_uniform` by default.
        refine: exchanges units of the decision at the end; called like `consa.training.refinement.refine`, the default.

    Raises:
        ConsaError: unusable settings or text, a loss that is not finite, or a folder that cannot be written.
    """
    layout = attention_layout(model)
    units = units_of(layout, config.granularity)
    num_full = target_units(layout, config)
    loop.check(config, sequences, window=config.window, num_sink_tokens=config.num_sink_tokens)
    config = replace(config, seq_len=sequences.shape[1])  # the length that the provenance is to show
    replaced = loop.described(objective, constraint, draws, refine)
    checkpoint = loop.checkpoint_of(run_dir, config, sequences, identity, **replaced)
    provenance = dict(identity or {}) | replaced
    objective = objective or with_retrieval(Objective(), config.retrieval, tokenizer)
    draws = draws or gates.stratified_uniform
    target = 1 - num_full / units.count
    constraint = constraint or AugmentedLagrangian(config.penalty, config.multiplier_step)
    with distributed.sharded(model) if config.parallel == "fsdp" else nullcontext(model) as trained:
        learning = _Learning(trained, sequences, units, target, config, objective, constraint, draws)
        if num_full in (0, units.count):  # nothing to choose
            return LearnResult(learning.decide(num_full, layout, provenance), [])
        with learning.attached(model, _dense_start(layout, config)):
            history = loop.train(learning, config, seq_len=sequences.shape[1], checkpoint=checkpoint, on_step=on_step)
    allocation = learning.decide(num_full, layout, provenance)
    if config.refine_evaluations and learning.refined is None:
        first = config.num_steps * config.sequences_per_step  # the sequences that would have come next
        following = objective.drawn(sequences, config.seed, range(first, first + config.refine_sequences))
        refined = (refine or refinement.refine)(
            model,
            allocation,
            following,
            max_evaluations=config.refine_evaluations,
            batch_size=at_once(learning.config.micro_batch),
            constraint=config.constraint,
            on_exchange=on_exchange,
        )
        learning.refined = distributed.from_main(torch.from_numpy(refined.full_attention.copy()))
        if checkpoint:
            loop.save(checkpoint, learning, history)
    if learning.refined is not None:
        allocation = replace(allocation, full_attention=learning.refined.numpy())
    distributed.check_same(allocation.to_json(), "the allocation")
    return LearnResult(allocation, history)


def units_of(layout: AttentionLayout, granularity: Granularity) -> Units:
    """The units of a model with this layout."""
    layers = tuple(layer for layer in range(layout.num_layers) if layer not in layout.native_windows)
    return Units(layout.num_layers, layout.num_kv_heads, layers, layout.num_kv_heads if granularity == "kv_head" else 1)


def asked_of(config: LearnConfig | ChoiceConfig, layout: AttentionLayout) -> Mapping[str, Any]:
    """The fields that every allocation for this configuration and layout shares."""
    shared = {name: getattr(config, name) for name in ("granularity", "window", "num_sink_tokens")}
    return {**shared, "native_windows": layout.native_windows}


def target_units(layout: AttentionLayout, config: LearnConfig) -> int:
    """How many units keep full attention: nearest to the sparsity, or the most that fit the KV budget and constraint.

    Raises:
        ConsaError: the KV heads of a layer do not split as the constraint asks, the budget is too small, or joint mode
            has nothing to choose.
    """
    units = units_of(layout, config.granularity)
    step = config.constraint.step(len(units.layers), units.per_layer)
    if config.kv_budget is None or config.context is None:
        num_full = step * num_full_units(units.count // step, config.sparsity)
    else:
        affordable = num_full_units_within(
            config.kv_budget, config.context, example=_dense_start(layout, config), head_dim=layout.head_dim
        )
        if affordable == units.count:
            raise ConsaError(
                f"kv_budget of {config.kv_budget} bytes holds the dense model's cache of {config.context} tokens, so"
                " there is nothing to learn; lower kv_budget, raise context, or use the model as it is"
            )
        num_full = affordable // step * step
    if config.mode == "joint" and num_full in (0, units.count):
        raise ConsaError(
            f"mode must be frozen where {num_full} of {units.count} units keep full attention and none is to be chosen;"
            " to train the weights, use adapt"
        )
    return num_full


@dataclass
class _Learning(loop.Training):
    """The gates in training, and in joint mode the weights, with `target` as the sparsity to end at."""

    model: PreTrainedModel
    sequences: np.ndarray
    units: Units
    target: float
    config: LearnConfig
    objective: Objective
    constraint: AugmentedLagrangian
    draws: Draws

    def __post_init__(self) -> None:
        config, units = self.config, self.units
        noise = torch.randn(units.count, generator=loop.generator(config.seed, "start"))  # breaks ties
        self.log_alpha = torch.nn.Parameter(config.initial_log_alpha + 0.01 * noise)  # (units,) float32
        lr = config.gate_lr or min(1.0, 60 / config.num_steps)
        self.optimizer = torch.optim.Adam([self.log_alpha], lr=lr, betas=(0.9, 0.95))
        self.score_sum = torch.zeros(units.count, dtype=torch.float64)  # of log_alpha over the averaged steps
        self.refined: Tensor | None = None  # (layers, kv_heads) bool, once the refinement is done
        parameters = dict(self.model.named_parameters()) if config.mode == "joint" else {}
        self.weights = Weights(parameters, learning_rate=config.weight_lr) if parameters else None

    @contextmanager
    def attached(self, model: PreTrainedModel, start: Allocation) -> Iterator[None]:
        """Within the block the steps can run; `model` is the dense model before it is trained."""
        joint, config, needs_dense = self.config.mode == "joint", self.config, self.objective.needs_dense
        copied = copy.deepcopy(model) if needs_dense and joint and self.model is model else model
        with (
            loss.evaluating(copied),
            loop.prepared(self.model, gradient_checkpointing=config.gradient_checkpointing, compile=config.compile),
            attached(self.model, start) as self.plan,
            self.weights or nullcontext(),
        ):
            self.model.requires_grad_(joint)
            dense = Dense(copied) if joint else Dense(self.model, self.plan)
            self.dense = dense if needs_dense else None
            yield

    def accumulate(self, step: int) -> loop.Record:
        """Gradients on log_alpha (and weights), from one draw of the gates per sequence."""
        config, count = self.config, self.units.count
        generator = loop.generator(config.seed, f"noise {step}")
        uniform = self.draws(config.sequences_per_step, count, generator)[distributed.share(config.sequences_per_step)]
        batches = self.objective.batches(self.sequences, config, step)
        gradients = Gradients(self.model, self.objective, batches)
        rows = []
        for batch, own in zip(batches, uniform.split([len(b.tokens) for b in batches]), strict=True):
            batch = batch.to(self.model.device)
            losses = self.objective.losses(batch, self.dense)
            # (layers, sequences, kv_heads)
            z = self.units.spread(gates.sample(self.log_alpha, own), elsewhere=1.0)
            with self.plan.gated(z, self.model.device) as leaf:
                value = gradients.add(batch, losses)
            if leaf.grad is not None and z.requires_grad:
                (gradient,) = torch.autograd.grad(z, self.log_alpha, leaf.grad.cpu())
            else:
                gradient = torch.zeros(count)
            rows.append([*gradient.tolist(), value])
        # Added up in the order of the step's sequences, so that any number of processes ends with the same bits.
        summed = distributed.all_gather(torch.tensor(rows, dtype=torch.float64)).sum(0)
        self.log_alpha.grad = summed[:-1].float()
        parts = gradients.parts() if len(self.objective.factors) > 1 else {}
        return {"loss": float(summed[-1]), **parts}

    def update(self, step: int, losses: loop.Record) -> loop.Record:
        config, done = self.config, step + 1
        target = target_at(done, config.num_steps, self.target, config.warmup)
        growth = config.penalty_growth ** ramp(done, config.num_steps, config.warmup)
        sharpening = config.sharpening * ramp(done, config.num_steps, config.sharpening_start)
        is_open = self.constraint.is_open(self.log_alpha)
        term = self.constraint.loss(is_open, target, growth)
        (term + sharpening * (is_open * (1 - is_open)).mean()).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        joint = {"grad_norm": self.weights.update(max_norm=1.0)} if self.weights else {}
        with torch.no_grad():
            self.log_alpha.clamp_(config.log_alpha_min, config.log_alpha_max)
            expected = self.constraint.update(self.log_alpha, target, growth)
        if done > config.num_steps * (1 - config.averaged):
            self.score_sum += self.log_alpha.detach().double()
        return {
            "step": done,
            **losses,
            "expected_sparsity": expected,
            "target": target,
            "multiplier": self.constraint.multiplier,
            "fractional": gates.fractional_share(self.log_alpha.detach()),
            **joint,
        }

    def discard(self) -> None:
        self.log_alpha.grad = None
        if self.weights:
            self.weights.discard()

    def tensors(self) -> dict[str, Tensor]:
        state = {"log_alpha": self.log_alpha, "score_sum": self.score_sum, **self.constraint.tensors()}
        slots = self.optimizer.state[self.log_alpha]
        state |= {f"gate_optimizer.{slot}": value for slot, value in slots.items()}
        if self.refined is not None:
            state["refined"] = self.refined
        return state | (self.weights.tensors() if self.weights else {})

    @torch.no_grad()
    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.refined = tensors.get("refined")
        self.log_alpha.copy_(tensors["log_alpha"])
        self.score_sum.copy_(tensors["score_sum"])
        self.constraint.restore(tensors)
        for slot in ("step", "exp_avg", "exp_avg_sq"):
            self.optimizer.state[self.log_alpha][slot] = tensors[f"gate_optimizer.{slot}"]
        if self.weights:
            self.weights.restore(tensors)

    def decide(self, num_full: int, layout: AttentionLayout, provenance: Mapping[str, Any]) -> Allocation:
        """The `num_full` units of highest averaged log_alpha keep full attention; ties go to the lower layer, head."""
        config, units = self.config, self.units
        steps = config.num_steps - math.floor(config.num_steps * (1 - config.averaged))
        scores = self.score_sum / max(1, steps)
        full = choose(scores.reshape(len(units.layers), -1).numpy(), num_full, config.constraint)
        mask = units.spread(torch.from_numpy(full.flatten()).double(), elsewhere=0.0).bool().numpy()
        assert mask.sum() == num_full * units.num_kv_heads // units.per_layer
        own = {
            "method": "consa",
            "target_sparsity": 1 - num_full / units.count,
            "config": {key: value for key, value in asdict(config).items() if key not in loop.FREE},
            "versions": versions(),
        }
        per_head = units.spread(scores, elsewhere=0.0).numpy()
        return Allocation(
            full_attention=mask, scores=per_head, provenance={**provenance, **own}, **asked_of(config, layout)
        )


def _dense_start(layout: AttentionLayout, config: LearnConfig) -> Allocation:
    return rules.dense(*layout.shape, **asked_of(config, layout))
