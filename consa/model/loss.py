"""The next-token loss, a chunk of positions at a time: the logits of a long sequence never exist at once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import PreTrainedModel

# Positions whose logits exist together: 2048 x a vocabulary of 150k in float32 are 1.2 GB.
CHUNK_TOKENS = 2048


def hidden_states(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """What the output layer would receive: `(batch, seq, hidden)` for `(batch, seq)` int64 tokens."""
    return model.base_model(input_ids=tokens, use_cache=False).last_hidden_state


def token_losses(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Cross-entropy of each next token without gradients, float32 `(batch, seq - 1)`, in nats."""
    head = output_layer(model)
    with torch.no_grad(), evaluating(model):
        hidden = hidden_states(model, tokens)
        return torch.cat([cross_entropy(head(hidden[:, c]), tokens, c) for c in _chunks(tokens)], dim=1)


@contextmanager
def evaluating(model: PreTrainedModel) -> Iterator[None]:
    """Within the block nothing is dropped out; then every module is in the mode that it was in."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        model.eval()
        for module in training:
            module.training = True


Objective = Callable[[Tensor, Tensor, slice], Tensor]


def backward(
    model: PreTrainedModel, tokens: Tensor, *, scale: float, objective: Objective | None = None
) -> Tensor:
    """Forward and backward through the model; gradients accumulate as after `loss.backward()`.

    Each chunk of positions goes through the output layer and back at once, which leaves its gradient on the hidden
    states; those then flow through the model together. Nothing is computed twice.

    Args:
        model: attached or plain.
        tokens: `(batch, seq)` int64.
        scale: factor on the loss, for accumulation.
        objective: hidden states and logits of a chunk of positions, and which they are -> their summed loss; the
            cross-entropy unless given.

    Returns:
        The mean loss per predicted token, times `scale`: a float32 scalar without gradient.
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
    if hidden.requires_grad:  # not so when every gate of the step is saturated and the weights are frozen
        hidden.backward(gradients)
    return total


def output_layer(model: PreTrainedModel) -> Callable[[Tensor], Tensor]:
    """Hidden states -> logits, with whatever scaling or capping the model's own forward pass applies.

    For one call the model's backbone hands back what it is given, so that the model's own code, not a copy of it, turns
    hidden states into logits.
    """
    backbone = model.base_model
    own = vars(backbone).get("forward")  # as hooks give it

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
    """Looks like a backbone's output to a language-model head: hidden states, and None for all the rest."""

    def __init__(self, hidden: Tensor) -> None:
        self.last_hidden_state = hidden

    def __getitem__(self, index: int) -> Tensor:
        return (self.last_hidden_state,)[index]

    def __getattr__(self, name: str) -> Any:
        return None


def cross_entropy(logits: Tensor, tokens: Tensor, chunk: slice) -> Tensor:
    """Of the tokens that a chunk of positions predicts: float32 `(batch, positions of the chunk)`, in nats."""
    targets = tokens[:, chunk.start + 1 : chunk.stop + 1]
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none").view_as(targets)


def _chunks(tokens: Tensor) -> list[slice]:
    """Slices of the positions that predict a token: all but the last."""
    positions = tokens.shape[1] - 1
    per_sequence = max(1, CHUNK_TOKENS // tokens.shape[0])
    return [slice(s, min(s + per_sequence, positions)) for s in range(0, positions, per_sequence)]
