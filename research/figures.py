"""Draw docs/methods.png and docs/study.png from the results.

python -m research.figures
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import numpy as np
from matplotlib.figure import Figure

from benchmarks.common import parser_of
from consa.files import png, write_atomically
from consa.methods import METHODS
from research.analysis import GATES, Record, by_gates, by_kind, in_order, located, named, recovered
from research.records import read

DOCS = Path(__file__).parents[1] / "docs"


def main() -> None:
    parser_of(__doc__).parse_args()
    write_atomically(DOCS / "methods.png", frontier(read("methods")))
    write_atomically(DOCS / "study.png", places(read("study")))


def frontier(record: Record) -> bytes:
    """Quality over KV cache, a line for each method and granularity, as PNG."""
    dense = record["rows"]["dense"]["cache_bytes"]
    quality = by_kind(record, lambda row: row["recovered"])
    cache = by_kind(record, lambda row: row["cache_bytes"] / dense, mean)
    colours = {name: f"C{place}" for place, name in enumerate(METHODS)}
    drawing = Figure(figsize=(9, 5), layout="constrained")
    axes = drawing.subplots()
    for (method, granularity), of in quality.items():
        points = sorted((cache[method, granularity][sparsity], value) for sparsity, value in of.items())
        axes.plot(
            *zip(*points, strict=True),
            color=colours.get(method, "#bbbbbb"),
            linestyle="-" if granularity == "kv_head" else "--",
            marker="o",
            markersize=5 if method == "consa" else 3,
            linewidth=2.5 if method == "consa" else 1,
            label=f"{method}, {granularity}" if method in colours else None,
        )
    axes.plot([], [], color="#bbbbbb", marker="o", markersize=3, linewidth=1, label="rules")
    axes.set(
        xlabel=f"KV cache at {record['settings']['seq_len']:,} tokens, share of the dense model's",
        ylabel="recovered, median over the seeds",
        ylim=(-0.1, 1.02),
    )
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return png(drawing)


def places(record: Record) -> bytes:
    """Recovered over tokens of learning, and the share of each layer's KV heads on FA by cell, as PNG."""
    record = in_order(record)
    steps = [row for _, row in named(record, "steps")]
    drawing = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(1, 1.6))
    for which, label, style in (("losses", "refined", "-"), (GATES, "gates alone", "--")):
        values = [recovered(record, row, which) for row in steps]
        left.plot([row["tokens"] for row in steps], values, style, color="C0", marker="o", markersize=4, label=label)
    left.set(xscale="log", xlabel="tokens of learning", ylabel="recovered")
    left.legend(frameon=False)
    cells = located(record)
    shares = np.stack([by_gates(row).full_attention.mean(1) for row in cells.values()])
    right.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
    right.set_yticks(range(len(cells)), list(cells), fontsize=7)
    right.set(xlabel="layer", title="share of KV heads on FA")
    return png(drawing)


if __name__ == "__main__":
    main()
