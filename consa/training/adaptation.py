"""Continued training of a hybrid: its allocation stays, its weights adapt to the sliding windows."""

from __future__ import annotations

import copy
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from consa.allocation import Allocation
from consa.config import AdaptConfig
from consa.model import loss
from consa.model.attach import attached
from consa.training import distributed, loop, lora
from consa.training.objective import Dense, Gradients, Mixture, Objective
from consa.training.retrieval import with_retrieval
from consa.training.weights import Weights


def adapt(
    model: PreTrainedModel,
    sequences: np.ndarray,
    allocation: Allocation,
    config: AdaptConfig,
    *,
    identity: dict[str, str] | None = None,
    run_dir: Path | None = None,
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    on_step: Callable[[loop.Record], None] | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    objective: Objective | None = None,
) -> list[loop.Record]:
    """Train `model` under `allocation`; it keeps the weights it ends with, LoRA's adapters merged.

    The dense model that distillation follows is the one given: a frozen copy of it, or with LoRA the same weights with
    adapters off and full attention everywhere.

    Args:
        model: a causal language model of transformers. What computes in bfloat16 is trained on float32 masters.
        sequences: int tokens `(num_sequences, seq_len)`, each from one document.
        allocation: which KV heads keep full attention.
        config: the run's settings.
        identity: of the model, for the checkpoint's fingerprint.
        run_dir: where to keep checkpoints and metrics.jsonl, and with LoRA the folder `adapter`. A run that was
            interrupted at any moment resumes from its last checkpoint when it is called again with the same arguments,
            and ends with the same weights, bit for bit, on the same machine and number of processes.
        evaluate: called with the hybrid every `evaluate_every` steps and after the last; its numbers join the record.
        on_step: called with each step's record.
        tokenizer: the model's own, which `config.retrieval` needs.
        objective: what is minimised; by default a `Mixture` with the config's factors, and its share of retrieval.

    Returns:
        One record per step: step, loss and its parts, learning_rate, grad_norm, micro_batch, and what `evaluate`
        returned.

    Raises:
        ConsaError: unusable settings or text, a loss that is not finite, or a folder that cannot be written.
    """
    config = config.for_size(model.num_parameters())
    loop.check(config, sequences, window=allocation.window, num_sink_tokens=allocation.num_sink_tokens)
    decided = loop.described(objective) | {"allocation": allocation.decision()}
    checkpoint = loop.checkpoint_of(run_dir, config, sequences, identity, **decided)
    factors = {name: getattr(config, name) for name in ("cross_entropy", "distillation", "hidden_loss")}
    objective = objective or with_retrieval(Mixture(**factors), config.retrieval, tokenizer)
    full = config.method == "full"
    with ExitStack() as stack:
        stack.enter_context(loss.evaluating(model))  # its copy too
        trained = stack.enter_context(distributed.sharded(model)) if config.parallel == "fsdp" else model
        copied = copy.deepcopy(model) if objective.needs_dense and full and trained is model else model
        stack.enter_context(
            loop.prepared(trained, gradient_checkpointing=config.gradient_checkpointing, compile=config.compile)
        )
        if full:
            trained.requires_grad_(True)
        else:
            stack.enter_context(lora.adapters(trained, config, run_dir))
        parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        weights = stack.enter_context(Weights(parameters, learning_rate=config.learning_rate_at(0)))
        plan = stack.enter_context(attached(trained, allocation))
        dense = (Dense(copied) if full else Dense(trained, plan)) if objective.needs_dense else None
        adaptation = _Adaptation(trained, sequences, config, weights, objective, dense, evaluate)
        return loop.train(adaptation, config, seq_len=sequences.shape[1], checkpoint=checkpoint, on_step=on_step)


@dataclass
class _Adaptation(loop.Training):
    """The weights in training."""

    model: PreTrainedModel
    sequences: np.ndarray
    config: AdaptConfig
    weights: Weights
    objective: Objective
    dense: Dense | None
    measure: Callable[[PreTrainedModel], loop.Record] | None

    def accumulate(self, step: int) -> loop.Record:
        batches = self.objective.batches(self.sequences, self.config, step)
        gradients = Gradients(self.model, self.objective, batches)
        for batch in batches:
            batch = batch.to(self.model.device)
            gradients.add(batch, self.objective.losses(batch, self.dense))
        parts = gradients.parts()
        return {"loss": sum(self.objective.factors[name] * part for name, part in parts.items()), **parts}

    def update(self, step: int, losses: loop.Record) -> loop.Record:
        rate = self.config.learning_rate_at(step)
        norm = self.weights.update(max_norm=self.config.max_grad_norm, learning_rate=rate)
        return {"step": step + 1, **losses, "learning_rate": rate, "grad_norm": norm}

    def evaluate(self, step: int) -> loop.Record:
        done = step + 1
        due = done % self.config.evaluate_every == 0 or done == self.config.num_steps
        return self.measure(self.model) if self.measure and due else {}

    def discard(self) -> None:
        self.weights.discard()

    def tensors(self) -> dict[str, Tensor]:
        return self.weights.tensors()

    def restore(self, tensors: dict[str, Tensor]) -> None:
        self.weights.restore(tensors)
