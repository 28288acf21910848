"""Pictures of an allocation without a plotting library: characters for a terminal, HTML for a notebook."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from consa.allocation import Allocation

FAR = 4.0  # of log_alpha: e**4 times likelier open, or closed, than a gate at the decision
LAYERS_PER_LINE = 60
UNICODE, ASCII = "█▓░·=", "#+-.="  # FA, FA near the decision, SWA near the decision, SWA, a native window
COLOURS = {"full attention": "#08264d", "sliding window": "#f9dfb4", "native window": "#d9d9d9"}


def shades(allocation: Allocation) -> np.ndarray:
    """How far each unit's score is from the decision, from 0 to 1; `(num_layers, num_kv_heads)`.

    For log_alpha, 1 is `FAR` from the middle of the margin in every run, so that undecided gates look so. Other scores
    have no scale in common: theirs go from 0 to 1 within FA and within SWA.
    """
    full, scores = allocation.full_attention, allocation.scores
    shades = np.full(full.shape, 0.5)
    if scores is None:
        return shades
    decided = np.zeros_like(full)
    decided[allocation.layers] = True
    if allocation.margin is not None and allocation.provenance.get("method") == "consa":
        middle = scores[full & decided].min() - allocation.margin / 2
        return np.clip(np.abs(scores - middle) / FAR, 0, 1)
    for chosen in (full, decided & ~full):
        if chosen.any():
            low, high = scores[chosen].min(), scores[chosen].max()
            shades[chosen] = (scores[chosen] - low) / (high - low) if high > low else 0.5
    return np.where(full, shades, 1 - shades)


def characters(allocation: Allocation, *, symbols: str = UNICODE) -> str:
    """Draw an allocation with a column for each layer and a row for each KV head, or one row for whole layers."""
    near = shades(allocation) < 0.25
    full, full_near, sliding_near, sliding, native = symbols

    def symbol(layer: int, head: int) -> str:
        if layer in allocation.native_windows:
            return native
        kinds = (full, full_near) if allocation.full_attention[layer, head] else (sliding, sliding_near)
        return kinds[int(near[layer, head])]

    legend = f"{full} full attention   {sliding} sliding window"
    legend += f"   {full_near} {sliding_near} near the decision" if near[allocation.layers].any() else ""
    legend += f"   {native} native window" if allocation.native_windows else ""
    return f"{grid(allocation, symbol)}\n\n{legend}"


def grid(allocation: Allocation, symbol: Callable[[int, int], str]) -> str:
    """Lay out `symbol(layer, KV head)`: layers from left to right, with a mark above each tenth, KV heads as rows."""
    rows = 1 if allocation.granularity == "layer" else allocation.num_kv_heads
    names = ["all KV heads"] if allocation.granularity == "layer" else [f"KV head {head}" for head in range(rows)]
    width = max(map(len, [*names, "layer"]))
    blocks = []
    for first in range(0, allocation.num_layers, LAYERS_PER_LINE):
        layers = range(first, min(first + LAYERS_PER_LINE, allocation.num_layers))
        marks = "".join(f"{layer:<10}" for layer in layers if layer % 10 == 0)
        lines = [f"{'layer':>{width}} {marks}".rstrip()]
        lines += [
            f"{name:>{width}} {''.join(symbol(layer, head) for layer in layers)}" for head, name in enumerate(names)
        ]
        blocks.append("\n".join(lines))
    return "\n\n".join(blocks)


def html(allocation: Allocation) -> str:
    """Draw an allocation as an HTML table for notebooks, with layers from left to right."""

    def cell(layer: int, head: int) -> str:
        kind = "full attention" if allocation.full_attention[layer, head] else "sliding window"
        kind = "native window" if layer in allocation.native_windows else kind
        score = "" if allocation.scores is None else f", score {allocation.scores[layer, head]:.2f}"
        where = f"layer {layer}" if allocation.granularity == "layer" else f"layer {layer}, KV head {head}"
        style = f"background:{COLOURS[kind]};padding:0;width:12px;height:12px;border:1px solid #9a9a9a"
        return f'<td style="{style}" title="{where}: {kind}{score}"></td>'

    heads = range(1 if allocation.granularity == "layer" else allocation.num_kv_heads)
    rows = ("".join(cell(layer, head) for layer in range(allocation.num_layers)) for head in heads)
    table = "".join(f"<tr>{row}</tr>" for row in rows)
    legend = "dark: full attention; light: sliding window" + ("; grey: native window" * bool(allocation.native_windows))
    style = "border-collapse:collapse;margin:4px 0"
    return (
        f"<div>{allocation!r}<table style='{style}'>{table}</table>"
        f"<small>Columns: layers from 0. Rows: KV heads. {legend}.</small></div>"
    )
