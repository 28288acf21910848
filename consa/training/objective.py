"""What a training step minimises, and on which tokens. Learning and adaptation take any `Objective`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from consa.config import AdaptConfig, LearnConfig, at_once
from consa.model import loss
from consa.model.plan import Plan
from consa.training import distributed


@dataclass(frozen=True, eq=False)
class Batch:
    """Sequences of one length that are computed at once: a micro-batch.

    A step's loss is the sum over its predicted tokens divided by their number, whatever their weights are.
    """

    tokens: Tensor  # (sequences, seq_len) int64
    weights: Tensor | None = None  # (sequences, seq_len - 1) float32, factors on their losses; 1 if None

    @property
    def num_predicted(self) -> int:
        """Number of predicted tokens: all but the first of each sequence."""
        return self.tokens[:, 1:].numel()

    def to(self, device: torch.device) -> Batch:
        """The same batch on another device."""
        return Batch(self.tokens.to(device), None if self.weights is None else self.weights.to(device))

    def split(self, size: int) -> list[Batch]:
        """Batches of `size` sequences; the last may have fewer."""
        parts = range(0, len(self.tokens), size)
        weights = [None if self.weights is None else self.weights[start : start + size] for start in parts]
        return [Batch(self.tokens[start : start + size], own) for start, own in zip(parts, weights, strict=True)]


LossOfChunk = Callable[[Tensor, Tensor, slice], Mapping[str, Tensor]]
"""Hidden states `(sequences, positions, hidden)` and logits of a chunk of positions, and which they are -> the parts of
the loss by name, each summed over the chunk: scalars, in nats."""


class Dense:
    """The dense model that an objective compares the hybrid with: another model, or the hybrid's own weights.

    Args:
        model: computes the dense model's outputs.
        plan: of `model` where it is the trained model itself; it then computes full attention everywhere, without
            LoRA's adapters.
    """

    def __init__(self, model: PreTrainedModel, plan: Plan | None = None) -> None:
        self._model = model
        self._plan = plan
        self.output_layer = loss.output_layer(model)

    @torch.no_grad()
    def hidden_states(self, tokens: Tensor) -> Tensor:
        """Last hidden states `(sequences, seq_len, hidden)`, the input of `output_layer`."""
        if self._plan is None:
            return loss.hidden_states(self._model, tokens)
        full = torch.ones(*self._plan.allocation.full_attention.shape)[:, None].expand(-1, len(tokens), -1)
        adapted = getattr(self._model, "_hf_peft_config_loaded", False)
        if adapted:
            self._model.disable_adapters()
        with self._plan.gated(full, self._model.device):
            hidden = loss.hidden_states(self._model, tokens)
        if adapted:
            self._model.enable_adapters()
        return hidden


class Objective:
    """The mean next-token loss, in nats. Subclass it for another objective.

    Attributes:
        factors: factor on each part of the loss, by the part's name; parts without a factor are ignored.
        needs_dense: whether `losses` uses the dense model.
    """

    factors: Mapping[str, float] = {"cross_entropy": 1.0}
    needs_dense: bool = False

    def batches(self, sequences: np.ndarray, config: LearnConfig | AdaptConfig, step: int) -> list[Batch]:
        """The micro-batches that this process computes at a step; every process has as many.

        Args:
            sequences: the training text, int tokens `(num_sequences, seq_len)`.
            config: has the number of sequences of a step and of a micro-batch.
            step: counted from 0. A resumed run asks for the same step again and must get the same tokens.
        """
        first = step * config.sequences_per_step
        places = range(first, first + config.sequences_per_step)
        own = self.drawn(sequences, config.seed, places[distributed.share(len(places))])
        return own.split(at_once(config.micro_batch))

    def drawn(self, sequences: np.ndarray, seed: int, places: range) -> Batch:
        """The sequences at some places of a run's stream, which the steps and then the refinement use up.

        Args:
            sequences: as in `batches`.
            seed: the run's.
            places: counted from 0. The same seed and places give the same tokens and weights.
        """
        return Batch(torch.from_numpy(sequences[order(sequences, seed, places)].astype(np.int64)))

    def losses(self, batch: Batch, dense: Dense | None) -> LossOfChunk:
        """The loss of a micro-batch, as a function of a chunk of its positions.

        Args:
            batch: one of `batches`, on the model's device.
            dense: the dense model, if `needs_dense`.
        """
        return lambda hidden, logits, chunk: {"cross_entropy": next_token_loss(logits, batch, chunk)}


class Mixture(Objective):
    """A weighted sum of the next-token loss and of distances from the dense model.

    Args:
        cross_entropy: factor on the next-token loss.
        distillation: factor on KL(dense model || hybrid) of the next token.
        hidden_loss: factor on the squared distance of the last hidden states, relative to the dense model's norm.
    """

    def __init__(self, *, cross_entropy: float = 1.0, distillation: float = 0.0, hidden_loss: float = 0.0) -> None:
        factors = {"cross_entropy": cross_entropy, "distillation": distillation, "hidden_loss": hidden_loss}
        self.factors = {name: factor for name, factor in factors.items() if factor}
        self.needs_dense = bool(distillation or hidden_loss)

    def losses(self, batch: Batch, dense: Dense | None) -> LossOfChunk:
        """See `Objective.losses`."""
        wanted = dense.hidden_states(batch.tokens) if dense else None

        def of_chunk(hidden: Tensor, logits: Tensor, chunk: slice) -> dict[str, Tensor]:
            parts: dict[str, Tensor] = {}
            if "cross_entropy" in self.factors:
                parts["cross_entropy"] = next_token_loss(logits, batch, chunk)
            if wanted is not None and dense is not None:
                target = wanted[:, chunk]
                if "distillation" in self.factors:
                    with torch.no_grad():
                        target_logits = dense.output_layer(target)
                    parts["distillation"] = divergence(logits, target_logits, batch, chunk)
                if "hidden_loss" in self.factors:
                    target = target.float()
                    distance = (hidden.float() - target).square().sum(-1) / target.square().sum(-1)
                    parts["hidden_loss"] = _weighted(distance, batch, chunk)
            return parts

        return of_chunk


def next_token_loss(logits: Tensor, batch: Batch, chunk: slice) -> Tensor:
    """Cross-entropy of the tokens that a chunk of positions predicts, weighted and summed, in nats."""
    return _weighted(loss.cross_entropy(logits, batch.tokens, chunk), batch, chunk)


def divergence(logits: Tensor, target_logits: Tensor, batch: Batch, chunk: slice) -> Tensor:
    """KL(target || model) of the tokens that a chunk of positions predicts, weighted and summed, in nats."""
    target = target_logits.float().log_softmax(-1)
    predicted = logits.float().log_softmax(-1)
    if batch.weights is None:
        return torch.nn.functional.kl_div(predicted, target, reduction="sum", log_target=True)
    each = torch.nn.functional.kl_div(predicted, target, reduction="none", log_target=True).sum(-1)
    return _weighted(each, batch, chunk)


def _weighted(losses: Tensor, batch: Batch, chunk: slice) -> Tensor:
    return losses.sum() if batch.weights is None else (losses * batch.weights[:, chunk]).sum()


def order(sequences: np.ndarray, seed: int, places: range) -> list[int]:
    """Indices of the sequences at some places of a run's stream: each once per epoch, every epoch in its own order."""
    count = len(sequences)
    epochs = {
        epoch: np.random.default_rng([seed, epoch]).permutation(count) for epoch in {place // count for place in places}
    }
    return [int(epochs[place // count][place % count]) for place in places]


class Gradients:
    """Adds up the gradients of one step over this process's micro-batches, and the parts of its loss."""

    def __init__(self, model: PreTrainedModel, objective: Objective, batches: list[Batch]) -> None:
        self._model = model
        self._factors = objective.factors
        self._sums = torch.zeros(len(self._factors), device=model.device)
        predicted = torch.tensor(sum(batch.num_predicted for batch in batches))
        self._num_predicted = int(distributed.all_reduce(predicted))

    def add(self, batch: Batch, losses: LossOfChunk) -> float:
        """Forward and backward through the model; returns the micro-batch's share of the step's loss."""

        def weighted_sum(hidden: Tensor, logits: Tensor, chunk: slice) -> Tensor:
            parts = losses(hidden, logits, chunk)
            self._sums += torch.stack([parts[name].detach() for name in self._factors])
            zero = torch.zeros((), device=hidden.device)
            return sum((factor * parts[name] for name, factor in self._factors.items()), zero)

        scale = batch.num_predicted / self._num_predicted
        return float(loss.backward(self._model, batch.tokens, scale=scale, objective=weighted_sum))

    def parts(self) -> dict[str, float]:
        """The parts of the loss, means per predicted token over all processes; every process must call it."""
        means = (distributed.all_reduce(self._sums) / self._num_predicted).tolist()
        return dict(zip(self._factors, means, strict=True))
