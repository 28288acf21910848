"""Next-token losses on held-out sequences, under an allocation or under sampled gates."""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from itertools import pairwise

import numpy as np
import torch
from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.evaluation.cells import Advance, Measure, digest
from consa.files import JsonObject
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import LoadedModel
from consa.training import gates

LOSSES = "losses"
SAMPLED = "losses of sampled gates"
MIN_GAP = 1e-4
"""Smallest difference of dense and all-SWA, in nats, that tables show and that sums in another order do not move."""


def heldout(loaded: LoadedModel, tokens: np.ndarray, *, start: int, batch_size: int) -> Measure:
    """Measure the mean loss of every sequence of `tokens`, `(num_sequences, seq_len)`.

    The result holds a list with a number per sequence for "all" positions from `start` on, and for each bucket of
    positions, named after its first position.
    """

    def compute(allocation: Allocation | None, advance: Advance) -> np.ndarray:
        return heldout_losses(loaded.model, tokens, allocation, batch_size=batch_size, on_batch=advance)

    return _measure(LOSSES, tokens, start, {}, compute)


def sampled(loaded: LoadedModel, tokens: np.ndarray, learned: Allocation, *, start: int, batch_size: int) -> Measure:
    """As `heldout`, with gates drawn from the scores of `learned` instead of its decision."""

    def compute(_: Allocation | None, advance: Advance) -> np.ndarray:
        return sampled_losses(loaded.model, tokens, learned, batch_size=batch_size, on_batch=advance)

    scores = None if learned.scores is None else learned.scores.tolist()
    return _measure(SAMPLED, tokens, start, {"scores": scores}, compute)


def _measure(
    name: str,
    tokens: np.ndarray,
    start: int,
    settings: JsonObject,
    compute: Callable[[Allocation | None, Advance], np.ndarray],
) -> Measure:
    def means(allocation: Allocation | None, advance: Advance) -> JsonObject:
        losses = compute(allocation, advance)
        if not np.isfinite(losses).all():
            raise ConsaError("held-out losses are not finite; use float32, or train at lower learning rates")
        parts = {"all": losses[:, start:]}
        parts |= {str(first): losses[:, first:end] for first, end in buckets_of(losses.shape[1])}
        return {part: values.mean(1, dtype=np.float64).tolist() for part, values in parts.items()}

    settings = {"tokens": digest(tokens.tobytes()), "start": start} | settings
    return Measure(name=name, settings=settings, size=len(tokens), compute=means)


def heldout_losses(
    model: PreTrainedModel,
    sequences: np.ndarray,
    allocation: Allocation | None = None,
    *,
    batch_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Cross-entropy of every next token in nats, float32 `(num_sequences, seq_len - 1)`.

    Args:
        model: a causal language model.
        sequences: int tokens `(num_sequences, seq_len)`.
        allocation: attached while the losses are computed; None leaves the model as it is.
        batch_size: sequences computed at once.
        on_batch: called with the number of sequences done since the last call.
    """
    with nullcontext() if allocation is None else attached(model, allocation):
        return _losses(model, sequences, batch_size, on_batch, lambda start, end: nullcontext())


def sampled_losses(
    model: PreTrainedModel,
    sequences: np.ndarray,
    allocation: Allocation,
    *,
    seed: int = 0,
    batch_size: int = 1,
    on_batch: Callable[[int], None] | None = None,
) -> np.ndarray:
    """Cross-entropy as in `heldout_losses`, with gates drawn for each sequence, as in learning.

    Args:
        model: a causal language model.
        sequences: int tokens `(num_sequences, seq_len)`.
        allocation: a learned one; its scores are the gates' log_alpha.
        seed: of the draws.
        batch_size: sequences computed at once.
        on_batch: called with the number of sequences done since the last call.

    Raises:
        ConsaError: the allocation has no scores.
    """
    if allocation.scores is None:
        raise ConsaError("the allocation has no scores to draw gates from; use one that was learned")
    heads = allocation.num_kv_heads if allocation.granularity == "kv_head" else 1
    generator = torch.Generator().manual_seed(seed)
    uniform = torch.rand(allocation.num_layers, len(sequences), heads, generator=generator)
    log_alpha = torch.from_numpy(allocation.scores.astype(np.float32))[:, None]
    # (layers, sequences, kv_heads): a layer's draw goes to all its heads.
    z = gates.sample(log_alpha, uniform)
    with attached(model, allocation) as plan:
        return _losses(
            model, sequences, batch_size, on_batch, lambda start, end: plan.gated(z[:, start:end], model.device)
        )


def _losses(
    model: PreTrainedModel,
    sequences: np.ndarray,
    batch_size: int,
    on_batch: Callable[[int], None] | None,
    setting: Callable[[int, int], AbstractContextManager[object]],
) -> np.ndarray:
    out = np.empty((len(sequences), sequences.shape[1] - 1), dtype=np.float32)
    for start in range(0, len(sequences), batch_size):
        batch = torch.from_numpy(sequences[start : start + batch_size].astype(np.int64)).to(model.device)
        with setting(start, start + len(batch)):
            out[start : start + len(batch)] = loss.token_losses(model, batch).cpu().numpy()
        if on_batch:
            on_batch(len(batch))
    return out


def buckets_of(positions: int) -> tuple[tuple[int, int], ...]:
    """Ranges of positions `[first, end)`: 0 to 64, then doubling, up to `positions`."""
    return tuple(pairwise([0, *(2**k for k in range(6, 40) if 2**k < positions), positions]))


def recovered(loss: float, *, dense: float, floor: float) -> float:
    """Share of the gap from the loss of all-SWA (`floor`) to the dense model's that is closed.

    NaN for a gap below `MIN_GAP`: its share would be noise.
    """
    return float((floor - loss) / (floor - dense)) if floor - dense >= MIN_GAP else math.nan
