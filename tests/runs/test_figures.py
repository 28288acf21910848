from __future__ import annotations

import io
import struct
import subprocess
import sys
from pathlib import Path

import matplotlib.image
import numpy as np
import pytest

from consa import Allocation, rules
from consa.files import png
from consa.picture import shades
from consa.runs import figures


def allocation(
    num_layers: int = 30,
    num_kv_heads: int = 3,
    *,
    granularity: str = "kv_head",
    native: dict[int, int] | None = None,
    scores: bool = True,
    model: str = "someone/a-model",
) -> Allocation:
    native = native or {}
    rng = np.random.default_rng(0)
    values = rng.normal(size=(num_layers, 1 if granularity == "layer" else num_kv_heads)) * 3
    values = np.broadcast_to(values, (num_layers, num_kv_heads)).copy()
    mask = values > 1
    mask[list(native)] = False
    return Allocation(
        full_attention=mask,
        granularity=granularity,  # pyright: ignore[reportArgumentType]
        window=64,
        native_windows=native,
        scores=values if scores else None,
        provenance={"model": model, "method": "consa"},
    )


SHAPES = {
    "30x3": allocation(),
    "28x8": allocation(28, 8),
    "64x8": allocation(64, 8),
    "32x32": allocation(32, 32),
    "1x1": allocation(1, 1),
    "layers": allocation(granularity="layer"),
    "native": allocation(26, 1, native={layer: 512 for layer in range(26) if layer % 6 != 5}),
    "two native windows": allocation(6, 2, native={0: 512, 1: 1024}),
    "no scores": allocation(scores=False),
    "long name": allocation(model="someone/" + "a-very-long-name-" * 9),
    "rule": rules.sandwich(12, 4, sparsity=0.5, granularity="kv_head"),
    "all FA": rules.top(4, 2, sparsity=0.0),
    "all SWA": rules.top(4, 2, sparsity=1.0),
}
HISTORY = [
    {
        "step": step,
        "loss": 2 + 1 / step,
        "expected_sparsity": 0.7,
        "target": 0.75,
        "multiplier": -1.0,
        "fractional": 0.5,
    }
    for step in range(1, 41)
]


def luminance(colour: tuple[float, ...]) -> float:
    return 0.2126 * colour[0] + 0.7152 * colour[1] + 0.0722 * colour[2]


def everything_is_inside(figure) -> None:
    figure.canvas.draw()  # places the labels
    renderer = figure.canvas.get_renderer()
    box = figure.bbox
    texts = [*figure.texts, *(text for axes in figure.axes for text in axes.texts)]
    labels = [label for axes in figure.axes for label in (axes.xaxis.label, axes.yaxis.label, axes.title)]
    entries = [text for legend in figure.legends for text in legend.get_texts()]
    for text in [*texts, *labels, *entries]:
        extent = text.get_window_extent(renderer)
        inside = extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= box.x1 and extent.y1 <= box.y1
        assert inside, (text.get_text(), extent, box)


@pytest.mark.parametrize("name", SHAPES)
def test_a_heatmap_shows_all_of_it(name: str):
    figure = figures.heatmap(SHAPES[name])
    everything_is_inside(figure)
    drawn = SHAPES[name]
    (axes,) = figure.axes
    units = len(drawn.layers) * (1 if drawn.granularity == "layer" else drawn.num_kv_heads)
    assert len(axes.patches) == units + len(drawn.native_windows)
    assert len(axes.texts) == (0 if drawn.scores is None or drawn.num_layers > figures.MAX_NUMBERED else units)
    if len(axes.texts) > 1:  # numbers do not run into each other
        widest = max(text.get_window_extent().width for text in axes.texts)
        assert widest < axes.bbox.width / drawn.num_layers


def test_the_title_says_what_it_is():
    texts = " ".join(text.get_text() for text in figures.heatmap(SHAPES["30x3"]).texts)
    for part in ("a-model", "consa", f"sparsity {SHAPES['30x3'].sparsity:.3g}", "window 64", "4 sink tokens"):
        assert part in texts


def test_full_and_sliding_differ_in_greyscale():
    lightest_full = max(luminance(figures._between(figures.FA_RAMP, shade)) for shade in (0, 0.5, 1))
    darkest_sliding = min(luminance(figures._between(figures.SWA_RAMP, shade)) for shade in (0, 0.5, 1))
    assert darkest_sliding - lightest_full > 0.35


def test_layer_0_is_on_the_left_and_head_0_at_the_top():
    mask = np.zeros((10, 4), dtype=bool)
    mask[0, 0] = True
    figure = figures.heatmap(Allocation(full_attention=mask, window=8))
    image = matplotlib.image.imread(io.BytesIO(png(figure)))[:, :, :3]
    colour = np.array(figures._between(figures.FA_RAMP, 0.5))
    rows, columns = np.nonzero((abs(image - colour) < 0.02).all(-1))
    box = figure.axes[0].bbox  # from the bottom
    rows, columns = image.shape[0] - rows - box.y0, columns - box.x0
    inside = rows < box.height  # above is the legend
    assert inside.sum() > 500 and rows[inside].min() > 0.7 * box.height and columns[inside].max() < 0.15 * box.width


def test_names_of_lines_keep_apart_and_in_order():
    from matplotlib.figure import Figure

    axes = Figure(figsize=(5, 3)).subplots()
    for name, end in (("a", 0.5), ("b", 0.51), ("c", 0.49), ("far", 0.9), ("_unnamed", 0.5)):
        axes.plot([0, 1], [0, end], label=name)
    axes.set_ylim(0, 1)
    figures.name_lines(axes)
    heights = {text.get_text(): text.get_position()[1] for text in axes.texts}
    assert sorted(heights, key=lambda name: heights[name]) == ["c", "a", "b", "far"] and heights["far"] > 0.89
    points = 72 * 3 * axes.get_position().height
    assert min(heights["b"] - heights["a"], heights["a"] - heights["c"]) * points > 9
    assert heights["a"] == pytest.approx(0.5)
    assert figures.spread([5, 5, 0], 2, 0, 6) == [4, 6, 0] and figures.spread([0, 0], 1, 0, 6) == [0, 1]


def test_the_same_data_give_the_same_png():
    for draw, of in ((figures.heatmap, SHAPES["28x8"]), (figures.curves, HISTORY)):
        content = png(draw(of))  # pyright: ignore[reportArgumentType]
        assert content == png(draw(of))  # pyright: ignore[reportArgumentType]
        assert content.startswith(b"\x89PNG")
        assert min(struct.unpack(">II", content[16:24])) > 500  # pixels


@pytest.mark.parametrize("steps", [1, 2, 40])
def test_curves_of_any_length(steps: int):
    figure = figures.curves(HISTORY[:steps])
    everything_is_inside(figure)
    assert [axes.get_title() for axes in figure.axes] == [
        "training loss (nats)",
        "sparsity",
        "Lagrange multiplier (nats)",
        "share of fractional gates",
    ]
    assert np.asarray(figure.axes[0].lines[0].get_xdata()).tolist() == list(range(1, steps + 1))


def test_drawing_needs_no_display_and_changes_nothing_global():
    code = (
        "import sys; from consa.runs import figures; assert 'matplotlib' not in sys.modules\n"
        "from consa import rules; figures.heatmap(rules.top(2, 2, sparsity=0.5))\n"
        "assert 'matplotlib.pyplot' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=60, cwd=Path(__file__).parents[2])


def test_shades_say_how_far_a_score_is_from_the_decision():
    full = np.array([[True], [True], [True], [False], [False], [False]])
    scores = np.array([[3.0], [1.0], [2.0], [0.0], [-2.0], [-50.0]])
    allocation = Allocation(full_attention=full, window=8, scores=scores, native_windows={5: 4})
    assert shades(allocation)[:5, 0].tolist() == [1, 0, 0.5, 0, 1]


def test_every_unit_of_a_heatmap_has_its_own_score():
    scores = np.array([[1.0, -2.0], [3.0, 4.0]])
    allocation = Allocation(full_attention=scores > 0, window=8, scores=scores)
    axes = figures.heatmap(allocation).axes[0]
    found = {text.get_position(): text.get_text() for text in axes.texts}
    assert found == {
        (layer, column): f"{scores[layer, column]:.1f}".replace("-", "\N{MINUS SIGN}")
        for layer in range(2)
        for column in range(2)
    }


def test_all_runs_share_one_scale_of_log_alpha():
    def shade(apart: float) -> float:
        full = np.array([[True], [False]])
        scores = np.array([[apart], [-apart]])
        provenance = {"method": "consa"}
        allocation = Allocation(full_attention=full, window=8, scores=scores, provenance=provenance)
        assert allocation.margin == 2 * apart
        return float(shades(allocation)[0, 0])

    assert shade(0.01) < 0.01 < shade(1) < shade(6) == 1
