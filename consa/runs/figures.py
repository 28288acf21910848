"""Figures of an allocation and of a training run, for `consa.files.png`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from consa.allocation import Allocation
from consa.picture import shades

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Each ramp goes from a score near the decision to one far from it. The darkest SWA is much lighter than the lightest
# FA, so that the two differ in greyscale print and for colour-blind readers.
FA_RAMP = ("#4a7fb5", "#08264d")
SWA_RAMP = ("#f9dfb4", "#fffaf0")
MAX_NUMBERED = 48  # layers
NATIVE: Any = {"fc": "#d9d9d9", "ec": "white", "hatch": "////"}
LEGEND: Any = {"frameon": False, "fontsize": 8}
GRID_COLOUR = "#9a9a9a"
# Rows have these colours in every figure; those of `MADE_KINDS` are what runs have made, in their order.
DENSE, BEST_RULE, PALE = "#6f747b", "#2f9c7a", "#a3a8af"
MADE_KINDS = ("learned", "adapted")
MADE = ("#8a5cd0", "#d14d8f", "#a3673a", "#6a8f2a")
LIGHT = "#c9b6ea"  # of single steps


def heatmap(allocation: Allocation) -> Figure:
    """Draw which units keep full attention, with layer 0 on the left and scores as shade and number.

    Title and numbers also show the scores and the model of the allocation's provenance, if it has them. Models of more
    than `MAX_NUMBERED` layers have no numbers.
    """
    from matplotlib.patches import Rectangle

    num_layers = allocation.num_layers
    rows = 1 if allocation.granularity == "layer" else allocation.num_kv_heads
    numbered = allocation.scores is not None and num_layers <= MAX_NUMBERED
    width, height = num_layers * (0.34 if num_layers <= MAX_NUMBERED else 0.15), rows * 0.24
    left, right, bottom, top = 0.6, 0.15, 0.5, 1.15  # margins, inches
    least = 4.6 if allocation.native_windows else 4.2  # what title and legend need
    side = max(0.0, least - left - right - width) / 2
    total = (left + width + right + 2 * side, bottom + height + top)
    figure = _new_figure(*total)
    axes = figure.add_axes(
        ((left + side) / total[0], bottom / total[1], width / total[0], height / total[1]),
        xlim=(-0.5, num_layers - 0.5),
        ylim=(rows - 0.5, -0.5),
        yticks=range(rows) if rows > 1 else (),
        xlabel="layer",
        ylabel="KV head" if rows > 1 else "",
    )
    strengths = shades(allocation)
    for layer in range(num_layers):
        if layer in allocation.native_windows:
            axes.add_patch(Rectangle((layer - 0.5, -0.5), 1, rows, **NATIVE))
            continue
        for row in range(rows):
            is_full = bool(allocation.full_attention[layer, row])
            colour = _between(FA_RAMP if is_full else SWA_RAMP, strengths[layer, row])
            axes.add_patch(Rectangle((layer - 0.5, row - 0.5), 1, 1, fc=colour, ec=GRID_COLOUR, lw=0.5))
            if allocation.scores is not None and numbered:
                number = f"{allocation.scores[layer, row]:z.1f}".replace("-", "\N{MINUS SIGN}")
                ink = "white" if is_full else "#333333"
                axes.text(layer, row, number, color=ink, fontsize=7, ha="center", va="center")
    axes.set_xticks(range(0, num_layers, 1 if num_layers <= 16 else 2 if num_layers <= MAX_NUMBERED else 4))
    axes.tick_params(length=0, labelsize=8)

    model = Path(str(allocation.provenance.get("model", ""))).name
    method = str(allocation.provenance.get("method", ""))
    sinks = f"{allocation.num_sink_tokens} sink token" + "s" * (allocation.num_sink_tokens != 1)
    center = (left + side + width / 2) / total[0]

    def line(text: str, below_top: float, size: float, weight: str = "normal") -> None:
        figure.text(center, 1 - below_top / total[1], text, fontsize=size, weight=weight, ha="center")

    title = " \N{MIDDLE DOT} ".join(filter(None, [model, method])) or "Allocation"
    room = int(total[0] / 0.11)  # characters
    line(title if len(title) <= room else f"{title[: room - 1]}\N{HORIZONTAL ELLIPSIS}", 0.3, 11, "bold")
    line(f"sparsity {allocation.sparsity:.3g}, window {allocation.window}, {sinks}", 0.53, 9)
    if numbered:
        kind = "log_alpha" if method == "consa" else "score"
        line(f"numbers: {kind}, the higher the more it keeps full attention", 0.72, 7.5)
    _legend(figure, allocation, (center, (bottom + height + 0.02) / total[1]))
    return figure


def _legend(figure: Figure, allocation: Allocation, place: tuple[float, float]) -> None:
    from matplotlib.patches import Patch

    entries = [
        Patch(fc=_between(FA_RAMP, 0.5), ec=GRID_COLOUR, label="full attention"),
        Patch(fc=_between(SWA_RAMP, 0.2), ec=GRID_COLOUR, label="sliding window"),
    ]
    if allocation.native_windows:
        windows = sorted(set(allocation.native_windows.values()))
        text = f"native window {', '.join(map(str, windows))}"
        entries.append(Patch(label=text, **NATIVE))
    spacing = {"columnspacing": 1.2, "handlelength": 1.4}
    figure.legend(handles=entries, loc="lower center", bbox_to_anchor=place, ncols=len(entries), **LEGEND, **spacing)


def curves(history: list[dict[str, float]]) -> Figure:
    """Draw a learning run by the records of its steps: loss, sparsity and target, multiplier, fractional gates."""
    figure = _new_figure(9, 5.6)
    panels = figure.subplots(2, 2, sharex=True)
    figure.subplots_adjust(left=0.08, right=0.98, top=0.94, bottom=0.09, hspace=0.2, wspace=0.2)
    steps = [record["step"] for record in history]
    marker = "o" if len(steps) == 1 else ""  # one point makes no line

    def draw(axes: Any, name: str, **style: Any) -> None:
        axes.plot(steps, [record[name] for record in history], marker=marker, **style)

    loss, sparsity, multiplier, fractional = panels.flat
    draw(loss, "loss", color=LIGHT, lw=1, label="one step")
    averaged = max(1, len(steps) // 10)
    if averaged > 1:
        values = np.convolve([record["loss"] for record in history], np.ones(averaged) / averaged, "valid")
        loss.plot(steps[averaged - 1 :], values, color=MADE[0], lw=1.6, label=f"mean of {averaged} steps")
        loss.legend(**LEGEND)
    draw(sparsity, "target", color=DENSE, ls="--", lw=1.5, label="target")
    draw(sparsity, "expected_sparsity", color=MADE[0], lw=1.6, label="expected")
    sparsity.set(ylim=(-0.02, 1.02))
    sparsity.legend(**LEGEND, loc="lower right")
    draw(multiplier, "multiplier", color=MADE[0], lw=1.6)
    multiplier.axhline(0, color=GRID_COLOUR, lw=0.8)
    draw(fractional, "fractional", color=MADE[0], lw=1.6)
    fractional.set(ylim=(-0.02, 1.02))
    _style(loss, "training loss (nats)", xlabel="")
    _style(sparsity, "sparsity", xlabel="")
    _style(multiplier, "Lagrange multiplier (nats)")
    _style(fractional, "share of fractional gates")
    return figure


def adaptation_curves(history: list[dict[str, float]], ends: dict[str, float]) -> Figure:
    """Draw an adaptation by the records of its steps: training loss, held-out loss, learning rate.

    Only some records hold "heldout_loss"; `ends` are the held-out losses to compare with, by name.
    """
    figure = _new_figure(9, 3.2)
    loss, heldout, rate = figure.subplots(1, 3)
    figure.subplots_adjust(left=0.07, right=0.98, top=0.9, bottom=0.15, wspace=0.28)
    steps = [record["step"] for record in history]
    loss.plot(steps, [record["loss"] for record in history], color=LIGHT, lw=1)
    measured = [(record["step"], record["heldout_loss"]) for record in history if "heldout_loss" in record]
    heldout.plot(*zip(*measured, strict=True), color=MADE[0], marker="o", ms=3, label="adapted")
    for (name, value), colour in zip(ends.items(), (DENSE, BEST_RULE, PALE), strict=False):
        heldout.axhline(value, color=colour, ls="--", lw=1.2, label=name)
    heldout.legend(**LEGEND)
    rate.plot(steps, [record["learning_rate"] for record in history], color=MADE[0], lw=1.6)
    rate.ticklabel_format(axis="y", style="sci", scilimits=(0, 0))
    for axes, title in ((loss, "training loss (nats)"), (heldout, "held-out loss (nats)"), (rate, "learning rate")):
        _style(axes, title)
    return figure


def name_lines(axes: Axes) -> None:
    """Write the name of each labelled line to the right of its last point; the names keep apart."""
    low, high = sorted(axes.get_ylim())
    points = axes.bbox.height * 72 / axes.figure.dpi
    ends: dict[float, list[tuple[float, Any]]] = {}  # by place along x, where names could meet
    for line in axes.lines:
        if not str(line.get_label()).startswith("_"):
            x, y = (float(np.asarray(values)[-1]) for values in (line.get_xdata(), line.get_ydata()))
            ends.setdefault(x, []).append((min(max(y, low), high), line))
    for x, lines in ends.items():
        gap = (high - low) * 10 / points
        heights = spread([y for y, _ in lines], gap, low + gap / 2, high - gap / 2)
        for (y, line), height in zip(lines, heights, strict=True):
            axes.annotate(
                line.get_label(),
                (x, y),
                (18, height),
                textcoords=("offset points", "data"),
                va="center",
                annotation_clip=False,
                fontsize=7.5,
                weight="bold" if line.get_linewidth() > 1 else "normal",
                arrowprops={"arrowstyle": "-", "color": line.get_color(), "lw": 0.5, "shrinkA": 0, "relpos": (0, 0.5)},
            )


def spread(values: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move values apart until neighbours are at least `gap` apart, in their order, between `low` and `high`."""
    order = np.argsort(values, kind="stable")
    steps = gap * np.arange(len(values))
    level = np.array(values, dtype=np.float64)[order] - steps
    up, down = np.maximum.accumulate(level), np.minimum.accumulate(level[::-1])[::-1]
    moved = np.empty(len(values))
    moved[order] = np.clip((up + down) / 2, low, high - steps[-1]) + steps
    return moved.tolist()


def _style(axes: Any, title: str, xlabel: str = "step") -> None:
    axes.set_title(title, fontsize=10)
    axes.set_xlabel(xlabel, fontsize=9)
    axes.tick_params(labelsize=8)
    axes.grid(color="#e6e6e6", lw=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)


def _between(ramp: tuple[str, str], shade: float) -> tuple[float, ...]:
    from matplotlib.colors import to_rgb

    first, last = (np.array(to_rgb(colour)) for colour in ramp)
    return tuple(first + shade * (last - first))


def _new_figure(width: float, height: float) -> Figure:
    """Make a figure without pyplot, so that nothing global changes and no display is needed; sizes in inches."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=150)
    FigureCanvasAgg(figure)
    return figure
