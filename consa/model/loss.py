"""The next-token loss, computed in chunks of positions, so that the logits of a long sequence never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# Positions whose logits exist at once: 2048 x 150k tokens of vocabulary in float32 take 1.2 GB.
CHUNK_TOKENS = 2048


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """The input of the output layer: `(batch, seq, hidden)` for `(batch, seq)` int64 tokens."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def token_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token without gradients, float32 `(batch, seq - 1)`, in nats."""
    head = output_layer(model)
    with torch.no_grad(), evaluating(model):
        hidden = hidden_states(model, tokens)
        return torch.cat([cross_entropy(head(hidden[:, c]), tokens, c) for c in _chunks(tokens)], dim=1)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block, the model is in evaluation mode; on exit, every module returns to its former mode."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True


Objective = Callable[[Tensor, Tensor, slice], Tensor]
"""(hidden states, logits, positions) of a chunk -> its summed loss."""


def backward(model: PreTrainedModel, tokens: Tensor, *, scale: float, objective: Objective | None = None) -> Tensor:
    """Forward and backward through the model; gradients accumulate as after `loss.backward()`.

    Each chunk of positions goes through the output layer and back immediately, which leaves its gradient on the hidden
    states. One backward pass through the model then takes the gradients of all chunks. Nothing is computed twice.

    Returns the mean loss per predicted token of `(batch, seq)` int64 `tokens`, times `scale`, as a float32 scalar
    without gradient. Without an `objective`, the loss is the cross-entropy.
    """
    hidden = hidden_states(model, tokens)
    factor = scale / tokens[:, 1:].numel()
    total = torch.zeros((), device=tokens.device)
    gradients = torch.zeros_like(hidden)
    head = output_layer(model)
    for chunk in _chunks(tokens):
        piece = hidden[:, chunk].detach().requires_grad_(hidden.requires_grad)
        logits = head(piece)
        summed = objective(piece, logits, chunk) if objective else cross_entropy(logits, tokens, chunk).sum()
        loss = summed * factor
        total += loss.detach()
        if loss.requires_grad:
            loss.backward()
        if piece.grad is not None:
            gradients[:, chunk] = piece.grad
    if hidden.requires_grad:  # false if every gate of the step is saturated and the weights are frozen
        hidden.backward(gradients)
    return total


def output_layer(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states -> logits, including any scaling or capping in the model's forward pass.

    During a call, the model's backbone returns the given hidden states, so that the model's own code computes the
    logits.
    """
    backbone = model.base_model
    own = vars(backbone).get("forward")  # set by hooks

    def head(hidden: Tensor) -> Tensor:
        tokens = hidden.new_zeros(hidden.shape[:2], dtype=torch.long)
        backbone.forward = lambda *args, **kwargs: _BackboneOutput(hidden)
        try:
            return model(input_ids=tokens, use_cache=False).logits
        finally:
            del backbone.forward
            if own:
                backbone.forward = own

    return head


class _BackboneOutput:
    """A minimal output of a backbone: hidden states, and None for everything else."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        return None


def cross_entropy(logits: Tensor, tokens: Tensor, chunk: slice) -> Tensor:
    """Losses of the tokens that a chunk of positions predicts: float32 `(batch, positions)`, in nats."""
    targets = tokens[:, chunk.start + 1 : chunk.stop + 1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _chunks(tokens: Tensor) -> list[slice]:
    """Slices of the positions that predict a token: all but the last."""
    positions = tokens.shape[1] - 1
    per_sequence = max(1, CHUNK_TOKENS // tokens.shape[0])
    return [slice(s, min(s + per_sequence, positions)) for s in range(0, positions, per_sequence)]
