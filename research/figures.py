"""Draw docs/headline.png, docs/frontier.png, docs/methods.png and docs/study.png from the results.

python -m research.figures
"""

from __future__ import annotations

from collections.abc import Callable
from math import isnan, nan
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.common import parser_of
from consa.files import png, write_atomically
from consa.rules import RULES
from consa.runs.figures import BEST_RULE, DENSE, MADE, PALE, name_lines
from research.analysis import GATES, LARGE, Record, by_gates, by_kind, in_order, joined, located, named, recovered
from research.records import read

DOCS = Path(__file__).parents[1] / "docs"
HEADLINE = "Qwen2.5-Coder-0.5B"
MODELS = {"SmolLM2-135M": ("methods",), HEADLINE: LARGE[HEADLINE]}


def main() -> None:
    parser_of(__doc__).parse_args()
    records = {title: joined(*map(read, files)) for title, files in MODELS.items()}
    write_atomically(DOCS / "frontier.png", frontier(records))
    write_atomically(DOCS / "headline.png", frontier({HEADLINE: records[HEADLINE]}))
    write_atomically(DOCS / "methods.png", methods(read("methods")))
    write_atomically(DOCS / "study.png", places(read("study")))


def frontier(records: dict[str, Record]) -> bytes:
    """Loss and hidden answers found over the KV cache, of ConSA, rules and dense, a row for each model, as PNG."""
    drawing = Figure(figsize=(10, 4 * len(records)), layout="constrained")
    for (title, record), row in zip(records.items(), drawing.subplots(len(records), 2, squeeze=False), strict=True):
        dense, shown = record["rows"]["dense"], ("dense", "consa", *RULES)
        record |= {"rows": {name: row for name, row in record["rows"].items() if row["method"] in shown}}
        _over_cache(row[0], record, f"{title}: nats above dense", lambda row, least=dense["loss"]: row["loss"] - least)
        _over_cache(row[1], record, "share of hidden answers found", _found)
    return png(drawing)


def methods(record: Record) -> bytes:
    """Quality over KV cache, a line for each method and granularity, as PNG."""
    drawing = Figure(figsize=(9, 6), layout="constrained")
    axes = drawing.subplots()
    axes.set_ylim(-0.1, 1.03)
    _over_cache(axes, record, "recovered, median over the seeds", lambda row: row.get("recovered", 1.0))
    return png(drawing)


def _found(row: Record) -> float:
    """Mean over tasks and lengths; NaN where no question was asked."""
    return mean(row["retrieval"].values()) if row["retrieval"] else nan


def _over_cache(axes: Axes, record: Record, label: str, value: Callable[[Record], float]) -> None:
    """A line for each method and granularity with values; ConSA, the best rule and dense are strong."""
    losses = by_kind(record, lambda row: row["loss"], mean)
    known = record | {"rows": {name: row for name, row in record["rows"].items() if not isnan(value(row))}}
    quality = by_kind(known, value)
    cache = by_kind(record, lambda row: row["cache_bytes"] / 1e6, mean)
    best = min((kind for kind in losses if kind[0] in RULES), key=lambda kind: mean(losses[kind].values()))
    colours = {best: BEST_RULE, ("consa", "layer"): MADE[0], ("consa", "kv_head"): MADE[0]}
    for kind in sorted(quality, key=lambda kind: kind in colours):
        points = sorted((cache[kind][sparsity], value) for sparsity, value in quality[kind].items())
        style: Any = {"lw": 2, "ms": 4} if kind in colours else {"lw": 0.8, "ms": 2.5}
        style |= {"color": colours.get(kind, PALE), "label": ("best rule: " if kind == best else "") + ", ".join(kind)}
        axes.plot(*zip(*points, strict=True), "o-" if kind[1] == "kv_head" else "o--", **style)
    dense = record["rows"]["dense"]
    axes.plot([dense["cache_bytes"] / 1e6], [value(dense)], "o", color=DENSE, label="dense", linewidth=2)
    axes.set(xlabel=f"KV cache at {record['settings']['seq_len']:,} tokens, MB", ylabel=label)
    axes.spines[["top", "right"]].set_visible(False)
    name_lines(axes)


def places(record: Record) -> bytes:
    """Recovered over tokens of learning, and the share of each layer's KV heads on FA by cell, as PNG."""
    record = in_order(record)
    steps = [row for _, row in named(record, "steps")]
    drawing = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(1, 1.6))
    for which, label, style in (("losses", "refined", "-"), (GATES, "gates alone", "--")):
        values = [recovered(record, row, which) for row in steps]
        left.plot([row["tokens"] for row in steps], values, style, color=MADE[0], marker="o", markersize=4, label=label)
    left.set(xscale="log", xlabel="tokens of learning", ylabel="recovered")
    left.spines[["top", "right"]].set_visible(False)
    name_lines(left)
    cells = located(record)
    shares = np.stack([by_gates(row).full_attention.mean(1) for row in cells.values()])
    right.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
    right.set_yticks(range(len(cells)), list(cells), fontsize=7)
    right.set(xlabel="layer", title="share of KV heads on FA")
    return png(drawing)


if __name__ == "__main__":
    main()
