"""What is known of one allocation, and how two differ, as text for the terminal."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from consa import rules
from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.files import read_json
from consa.model.convert import MANIFEST
from consa.picture import grid
from consa.report.folder import MAX_FILE_BYTES, Run

Facts = list[tuple[str, str]]
MAX_NAMED = 12  # units that a line lists


def read(name: str) -> tuple[Run, Allocation]:
    """Read the folder of a run, the file of an allocation, a published one, or a converted folder."""
    run = Run.read(Path(name))
    if run.allocation is None:
        raise ConsaError(f"{name} holds no allocation; name a run of learn or adapt, a file, or a converted folder")
    return run, run.allocation


def of(name: str, *, tokens: int, head_dim: int | None = None) -> Facts:
    """Label and text of everything known of an allocation.

    Args:
        name: as for `read`.
        tokens: in the KV cache whose size is shown.
        head_dim: elements per key of a head; None reads it from the run or the converted folder, if either tells.
    """
    run, allocation = read(name)
    made, units = allocation.provenance, np.array(allocation.full_attention[allocation.layers])
    units = units[:, :1] if allocation.granularity == "layer" else units
    config: dict[str, Any] = made.get("config") or {}
    settings = ", ".join(f"{key} {config[key]}" for key in ("seed", "num_steps", "seq_len") if key in config)
    facts = [
        ("what", _kind(name, run)),
        ("shape", f"{allocation.num_layers} layers x {allocation.num_kv_heads} KV heads"),
        (
            "sparsity",
            f"{allocation.sparsity:.4f}: {units.sum()} of {units.size} {_unit(allocation)}s keep full attention",
        ),
        ("window", f"{allocation.window} tokens and {allocation.num_sink_tokens} sink tokens"),
        ("KV cache", _cache(allocation, tokens, head_dim or _head_dim(name, run, allocation))),
        ("margin", _margin(allocation)),
        ("model", run.model or str(made.get("model") or "unknown")),
        ("method", str(made.get("method") or "unknown") + (f" ({settings})" if settings else "")),
    ]
    facts += [
        (key, str(made[key])) for key in ("quality", "weights", "sha256", "date", "hardware", "command") if key in made
    ]
    if run.summary:
        facts.append(("command", run.summary["command"]))
        facts += [("verdict", run.verdict)] if run.verdict else []
    return facts


def _kind(name: str, run: Run) -> str:
    path = Path(name)
    if os.path.isfile(path / MANIFEST):
        return f"converted folder ({read_json(path / MANIFEST, max_bytes=MAX_FILE_BYTES).get('kind')} checkpoint)"
    if os.path.isdir(path):
        return f"run of consa {'adapt' if run.adapted else 'learn'}"
    return "file of an allocation" if os.path.isfile(path) else "published allocation"


def _margin(allocation: Allocation) -> str:
    if allocation.margin is None:
        return "unknown"
    exchanged = " (negative: the refinement exchanged units)" if allocation.margin < 0 else ""
    return f"{allocation.margin:.3f} between FA and SWA scores{exchanged}"


def _dense(allocation: Allocation) -> Allocation:
    shape = allocation.num_layers, allocation.num_kv_heads
    return rules.dense(*shape, native_windows=dict(allocation.native_windows))


def _unit(allocation: Allocation) -> str:
    return "layer" if allocation.granularity == "layer" else "KV head"


def _head_dim(name: str, run: Run, allocation: Allocation) -> int | None:
    if run.measured:
        per_element = _dense(allocation).kv_cache_bytes(run.measured.cache_tokens, head_dim=1)
        return run.measured.lines[0].cache_bytes // per_element
    if os.path.isfile(Path(name) / MANIFEST):
        from consa.model.load import read_layout

        return read_layout(name).head_dim
    return None


def _cache(allocation: Allocation, tokens: int, head_dim: int | None) -> str:
    both = (allocation, _dense(allocation))
    taken, whole = (one.kv_cache_bytes(tokens, head_dim=head_dim or 1) for one in both)
    share = f"{taken / whole:.1%} of dense at {tokens} tokens"
    if head_dim is None:
        return f"{share}; --head-dim gives bytes"
    return f"{taken / 2**20:.1f} MiB in bfloat16 (head dimension {head_dim}), {share}"


def compared(first: str, second: str, *, tokens: int) -> Iterator[list[str]]:
    """Rows that compare two allocations: a label, and the text of each.

    Raises:
        ConsaError: they are of models of different shape, or one cannot be read.
    """
    pair = [read(name) for name in (first, second)]
    a, b = (allocation for _, allocation in pair)
    if a.full_attention.shape != b.full_attention.shape:
        raise ConsaError(f"{first} has (layers, KV heads) {a.full_attention.shape}, {second} {b.full_attention.shape}")
    known = [dict(of(name, tokens=tokens)) for name in (first, second)]
    for label in ("sparsity", "window", "KV cache", "margin", "model", "method"):
        yield [label, *(re.split(r": |; | \(| between", facts[label])[0] for facts in known)]
    lines = [run.measured and run.measured.lines[-1] for run, _ in pair]
    for label, attribute in (("loss", "loss"), ("to dense", "difference")):
        if any(lines):
            yield [label, *("unknown" if line is None else str(getattr(line, attribute)) for line in lines)]


def difference(first: str, second: str) -> str:
    """How much the full attention of two allocations overlaps, a picture of it, and the KV heads that differ."""
    (_, a), (_, b) = read(first), read(second)
    one, two = a.full_attention, b.full_attention
    union = int((one | two).sum())
    overlap = f"{(one & two).sum() / union:.3f}" if union else "1.000"

    def symbol(layer: int, head: int) -> str:
        return {(True, True): "#", (True, False): "A", (False, True): "B"}.get(
            (bool(one[layer, head]), bool(two[layer, head])), "."
        )

    whole = a.granularity == b.granularity == "layer"
    picture_of = replace(a, granularity="layer" if whole else "kv_head")
    lines = [f"Jaccard index of the KV heads with full attention: {overlap}", "", grid(picture_of, symbol)]
    lines += ["", "# both keep full attention   A, B only that one   . neither", ""]
    for name, only in ((f"A, {first}", one & ~two), (f"B, {second}", two & ~one)):
        places = [
            str(layer) if whole else f"{layer}.{head}" for layer, head in np.argwhere(only[:, :1] if whole else only)
        ]
        named = ", ".join(places[:MAX_NAMED]) + (", ..." if len(places) > MAX_NAMED else "")
        unit = "layers" if whole else "KV heads (layer.head)"
        lines.append(f"Only in {name}: {len(places)} {unit}" + (f": {named}" if places else ""))
    return "\n".join(lines)
