"""Patterns that DuoAttention and PruLong publish: a line per layer, a number per KV head, tabs between."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from consa.allocation import MAX_FILE_BYTES, NUM_SINK_TOKENS, WINDOW, Allocation, num_full_units
from consa.errors import ConsaError
from consa.files import read_text

THRESHOLD = 0.5
"""Both keep a head from 0.5 on where no sparsity is asked for: `--threshold` in mit-han-lab/duo-attention,
`threshold` in princeton-pli/PruLong's save_prulong_masks.py."""


def read_tsv(
    path: str | Path,
    *,
    num_layers: int,
    num_kv_heads: int,
    sparsity: float | None = None,
    window: int = WINDOW,
    num_sink_tokens: int = NUM_SINK_TOKENS,
) -> Allocation:
    """Read DuoAttention's `full_attention_heads.tsv` or PruLong's `masks.tsv` and `masks_sp*.tsv`.

    Args:
        path: the file.
        num_layers: layers of the model it was made for.
        num_kv_heads: KV heads of each layer.
        sparsity: share of KV heads to put on SWA, those of lowest value; ties keep the lower layer and head. Unless
            given, the heads below `THRESHOLD` are.
        window: tokens an SWA query sees, itself included; the file does not say.
        num_sink_tokens: first tokens that stay visible on top of the window; the file does not say.

    Raises:
        ConsaError: unreadable, not numbers, or not of that shape; the message names the file and the line.
    """
    rows: list[list[float]] = []
    for number, line in enumerate(read_text(Path(path), max_bytes=MAX_FILE_BYTES).splitlines(), 1):
        try:
            rows.append([float(value) for value in line.split("\t")])
        except ValueError as error:
            raise ConsaError(f"{path}, line {number}: not numbers with tabs between ({error})") from error
        if len(rows[-1]) != num_kv_heads or not np.isfinite(rows[-1]).all():
            raise ConsaError(
                f"{path}, line {number}: must hold {num_kv_heads} finite numbers, one per KV head, got {line[:80]!r}"
            )
    if len(rows) != num_layers:
        raise ConsaError(
            f"{path} has {len(rows)} lines, but the model has {num_layers} layers; use its own file"
        )
    scores = np.array(rows)
    full = scores >= THRESHOLD
    if sparsity is not None:
        full = np.zeros_like(full)
        num_full = num_full_units(full.size, sparsity)
        full.flat[np.argsort(-scores, axis=None, kind="stable")[:num_full]] = True
    return Allocation(
        full_attention=full,
        window=window,
        num_sink_tokens=num_sink_tokens,
        scores=scores,
        provenance={"method": "tsv", "file": Path(path).name, "target_sparsity": sparsity},
    )
