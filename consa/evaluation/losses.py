"""Next-token losses of a model under different allocations, on the same held-out sequences."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.files import write_atomically
from consa.model import loss
from consa.model.attach import attached
from consa.training import gates


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
        allocation: attached for the purpose; None leaves the model as it is.
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
    """As `heldout_losses`, under gates drawn anew for each sequence, as in learning, instead of the decision.

    Args:
        model: as there.
        sequences: as there.
        allocation: a learned one; its scores are the gates' log_alpha.
        seed: of the draws.
        batch_size: as there.
        on_batch: as there.
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
            model,
            sequences,
            batch_size,
            on_batch,
            lambda start, end: plan.gated(z[:, start:end], model.device),
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


def save_losses(path: Path, values: np.ndarray) -> None:
    """Keep losses, float32 `(num_sequences, seq_len - 1)`, for `load_losses`.

    Raises:
        ConsaError: the folder or the disk does not take them.
    """
    content = io.BytesIO()
    np.save(content, values, allow_pickle=False)
    write_atomically(path, content.getvalue() + hashlib.sha256(content.getvalue()).digest())


def load_losses(path: Path, shape: tuple[int, ...]) -> np.ndarray | None:
    """Losses of that shape as they were kept, or None if they are absent or damaged."""
    try:
        content = path.read_bytes()
    except OSError:
        return None
    content, digest = content[:-32], content[-32:]
    if hashlib.sha256(content).digest() != digest:
        return None
    values = np.load(io.BytesIO(content), allow_pickle=False)
    return values if values.shape == shape else None


@dataclass(frozen=True)
class Row:
    """One allocation's line in a comparison.

    Attributes:
        name: of the allocation.
        sparsity: achieved share of units on SWA.
        loss: mean cross-entropy from `Comparison.start` on, nats.
        recovered: share of the gap from all-SWA to dense that the allocation closes; 1 is dense, 0 is all-SWA; NaN
            where dense is no better.
        by_position: mean cross-entropy of each bucket of positions, nats.
    """

    name: str
    sparsity: float
    loss: float
    recovered: float
    by_position: tuple[float, ...]


@dataclass(frozen=True)
class Comparison:
    """Losses of several allocations between the two ends, dense and all-SWA.

    Attributes:
        start: first position that counts; before it a window still reaches most of the text.
        buckets: position ranges `[from, to)`, in powers of two up to the sequence length.
        rows: dense first, all-SWA second, then the others as given.
    """

    start: int
    buckets: tuple[tuple[int, int], ...]
    rows: tuple[Row, ...]


def buckets_of(positions: int) -> tuple[tuple[int, int], ...]:
    """Position ranges `[from, to)` in powers of two from 64 on, up to `positions`."""
    return tuple(pairwise([0, *(2**k for k in range(6, 40) if 2**k < positions), positions]))


def recovered(loss: float, *, dense: float, floor: float) -> float:
    """Share of the gap from all-SWA's loss, `floor`, to the dense model's that is closed; NaN without a gap."""
    return float((floor - loss) / (floor - dense)) if floor > dense else math.nan


def compare(losses: dict[str, tuple[float, np.ndarray]], *, start: int) -> Comparison:
    """Compare held-out losses.

    Args:
        losses: name -> (sparsity, losses as `heldout_losses` returns); must hold "dense" and "all_swa".
        start: first position that counts for `loss` and `recovered`.

    Raises:
        ConsaError: no position is left from `start` on.
    """
    positions = losses["dense"][1].shape[1]
    if start >= positions:
        raise ConsaError(
            f"sequences of {positions + 1} tokens hold no position from {start} on; use longer ones"
        )
    buckets = buckets_of(positions)
    dense, floor = (float(losses[name][1][:, start:].mean()) for name in ("dense", "all_swa"))
    rows = []
    for name in sorted(losses, key=lambda name: {"dense": 0, "all_swa": 1}.get(name, 2)):
        sparsity, values = losses[name]
        mean = float(values[:, start:].mean())
        by_position = tuple(float(values[:, a:b].mean()) for a, b in buckets)
        rows.append(Row(name, sparsity, mean, recovered(mean, dense=dense, floor=floor), by_position))
    return Comparison(start, buckets, tuple(rows))
