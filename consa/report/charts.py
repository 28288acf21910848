"""What each chart of the report shows, as Vega-Lite, and the rows of its data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.behaviour.relate import MEASURES, Behaviour
from consa.report.vega import Chart, Columns, Spec
from consa.runs.figures import shades

# Told apart by colour-blind readers, and seen on light and dark.
FA, SWA, OTHER = "#2868ad", "#d9952b", "#84878c"
DECISIONS = {"FA": FA, "SWA": SWA}
KINDS = {"learned": FA, "dense": "#4f9d69", "all-SWA": SWA, "other": OTHER}
LEARNING = ("loss", "expected_sparsity", "target", "multiplier", "fractional")  # of a step
ADAPTATION = ("loss", "heldout_loss", "learning_rate")
MAX_POINTS = 400  # of a curve
DIGITS = 4  # significant, of numbers in a page


def units(allocation: Allocation, behaviour: Behaviour | None) -> Columns:
    """A row per unit: where it is, what was decided, its score and what was measured of it."""
    by_layer = allocation.granularity == "layer"
    heads = range(1 if by_layer else allocation.num_kv_heads)
    places = [(layer, head) for layer in range(allocation.num_layers) for head in heads]

    def column(values: np.ndarray) -> list[float | None]:
        values = values.mean(1, keepdims=True) if by_layer else values
        return [_rounded(float(values[place])) for place in places]

    def decision(layer: int, head: int) -> str:
        if layer in allocation.native_windows:
            return "native window"
        return "FA" if allocation.full_attention[layer, head] else "SWA"

    columns: dict[str, list[Any]] = {
        "unit": [f"layer {layer}" + ("" if by_layer else f", KV head {head}") for layer, head in places],
        "layer": [layer for layer, _ in places],
        "head": ["all" if by_layer else head for _, head in places],
        "decision": [decision(*place) for place in places],
        "shade": column(shades(allocation)),
    }
    if allocation.scores is not None:
        columns["score"] = column(allocation.scores)
    if behaviour is not None:
        columns |= {name: column(values) for name, values in behaviour.measures.items()}
    return columns


def heatmap(name: str, data: str, allocation: Allocation, behaviour: Behaviour | None) -> Chart:
    """Layers to the right, KV heads downwards; the further a score from the decision, the stronger the colour."""
    fields = ["unit", "decision"] + ["score"] * (allocation.scores is not None)
    tooltip = [{"field": field, "title": field} for field in fields]
    if allocation.provenance.get("method") == "consa" and allocation.scores is not None:
        tooltip[-1]["title"] = "log_alpha"
    tooltip += _measure_tooltips(behaviour)
    num_full = int(allocation.full_attention.sum())
    num_units = len(allocation.layers) * allocation.num_kv_heads
    rows = 1 if allocation.granularity == "layer" else allocation.num_kv_heads
    decisions = DECISIONS | ({"native window": OTHER} if allocation.native_windows else {})
    spec: Spec = {
        "mark": {"type": "rect", "cornerRadius": 2, "tooltip": True},
        "height": rows * (26 if rows <= 8 else 14),
        "encoding": {
            "x": _layers(allocation.num_layers),
            "y": _places("head", "KV head") | {"scale": {"paddingInner": 0.1}},
            "color": _colour("decision", decisions),
            "opacity": {
                "field": "shade",
                "type": "quantitative",
                "legend": None,
                "scale": {"domain": [0, 1], "range": [0.55, 1]},
            },
            "tooltip": tooltip,
        },
    }
    return Chart(
        name=f"{name}-allocation",
        title="Which units keep full attention",
        description=f"Heatmap of {num_units} KV heads in {allocation.num_layers} layers, {num_full} of them on full"
        " attention; the text below says at which depth.",
        spec=spec,
        data=data,
    )


def history(records: Sequence[Mapping[str, float]], *, adapted: bool) -> Columns:
    """The steps of a run; of a long one, means of neighbouring steps. Held-out losses are of some steps alone."""
    parts = np.array_split(np.arange(len(records)), min(len(records), MAX_POINTS))

    def column(name: str) -> list[float | None]:
        found = [
            [records[i][name] for i in part if name != "heldout_loss" or name in records[i]] for part in parts
        ]
        return [_rounded(float(np.mean(values))) if values else None for values in found]

    return {name: column(name) for name in ("step", *(ADAPTATION if adapted else LEARNING))}


def curves(name: str, data: str, *, adapted: bool) -> list[Chart]:
    """By step: loss, sparsity with its target, multiplier and share of fractional gates; or loss and learning rate."""
    step = {
        "field": "step",
        "type": "quantitative",
        "title": "step",
        "axis": {"grid": False, "tickMinStep": 1},
    }

    def line(field: str, title: str, domain: list[float] | None = None, **mark: Any) -> Spec:
        return {
            "mark": {"type": "line", "color": FA, "point": {"size": 14, "color": FA}, **mark},
            "encoding": {
                "x": step,
                "y": _amount(field, title) | {"scale": {"domain": domain} if domain else {"zero": False}},
                "tooltip": [{"field": "step"}, {"field": field, "format": ".4~r"}],
            },
        }

    target = line("target", "sparsity", [0, 1], color=SWA, strokeDash=[5, 3], point=False)
    expected = line("expected_sparsity", "sparsity", [0, 1])
    panels = {
        "loss": ("Training loss", "loss of each step", line("loss", "nats")),
        "sparsity": (
            "Expected sparsity (blue) and its target (dashed)",
            "expected sparsity following a rising target",
            {"layer": [target, expected]},
        ),
        "multiplier": ("Lagrange multiplier", "multiplier of each step", line("multiplier", "nats")),
        "fractional": (
            "Share of fractional gates",
            "share of gates not yet decided",
            line("fractional", "share", [0, 1]),
        ),
    }
    if adapted:
        measured = {"transform": [{"filter": "isValid(datum.heldout_loss)"}], **line("heldout_loss", "nats")}
        rate = line("learning_rate", "learning rate")
        rate["encoding"]["y"]["axis"] = {"format": ".1e"}
        panels = {
            "loss": panels["loss"],
            "heldout": ("Held-out loss", "held-out loss of some steps", measured),
            "rate": ("Learning rate", "learning rate of each step", rate),
        }
    return [
        Chart(
            name=f"{name}-{panel}",
            title=title,
            description=f"Line chart over the steps: {description}.",
            spec={"height": 170, **spec},
            data=data,
        )
        for panel, (title, description, spec) in panels.items()
    ]


def by_position(name: str, data: str, *, intervals: bool, made: str = "learned") -> Chart:
    """Loss beyond the dense model's, by position; rows hold allocation, kind, from, rise, low and high.

    `made` is the kind of what the run made.
    """
    shared = {
        "x": _places("from", "from position"),
        "color": _colour("kind", {made if kind == "learned" else kind: c for kind, c in KINDS.items()}),
        "detail": {"field": "allocation"},
    }
    lines = {
        "mark": {"type": "line", "point": {"size": 30}, "strokeWidth": 2},
        "encoding": shared
        | {
            "y": _amount("rise", "nats beyond dense"),
            "opacity": {"condition": {"test": "datum.kind === 'other'", "value": 0.6}, "value": 1},
            "tooltip": [{"field": "allocation"}, {"field": "from"}, {"field": "rise", "format": ".4f"}],
        },
    }
    band = {
        "mark": {"type": "area", "opacity": 0.15},
        "encoding": shared | {"y": _amount("low", "nats beyond dense"), "y2": {"field": "high"}},
    }
    return Chart(
        name=f"{name}-by-position",
        title="Loss beyond the dense model's, by position" + (" (95 % intervals)" if intervals else ""),
        description="Line chart of the rise of the loss over the dense model's by position in the text, a line for"
        " each allocation; the table holds the same numbers.",
        spec={"height": 240, "layer": [band, lines] if intervals else [lines]},
        data=data,
    )


def retrieval(name: str, data: str, task: str) -> Chart:
    """Share of answers found by length of text, for one task; rows hold allocation, kind, task, length and share."""
    return Chart(
        name=f"{name}-retrieval-{task}",
        title=f"Answers found: {task.replace('_', ' ')}",
        description="Line chart of the share of hidden answers found by length of the text, a line for each"
        " allocation; the table holds the same numbers.",
        spec={
            "height": 190,
            "transform": [{"filter": {"field": "task", "equal": task}}],
            "mark": {"type": "line", "point": {"size": 30}},
            "encoding": {
                "x": _places("length", "tokens of text"),
                "y": _amount("share", "share") | {"scale": {"domain": [0, 1]}},
                "color": _colour("kind", KINDS),
                "detail": {"field": "allocation"},
                "tooltip": [
                    {"field": "allocation"},
                    {"field": "length"},
                    {"field": "share", "format": ".2f"},
                ],
            },
        },
        data=data,
    )


def spectrum(name: str, data: str, behaviour: Behaviour, shown: str) -> Chart:
    """Units sorted by a measure, which the reader chooses, coloured by what was decided."""
    names = [measure for measure in MEASURES if measure in behaviour.measures]
    tooltip: list[Spec] = [{"field": "unit"}, {"field": "decision"}]
    return Chart(
        name=f"{name}-spectrum",
        title="Units sorted by what they do",
        description="Bars of all units in rising order of the chosen measure, coloured by decision; the table of"
        " relations says how well the measure tells FA from SWA.",
        spec={
            "height": 240,
            "params": [
                {
                    "name": "measure",
                    "value": shown,
                    "bind": {
                        "input": "select",
                        "name": "Measure ",
                        "options": names,
                        "labels": [measure.replace("_", " ") for measure in names],
                    },
                }
            ],
            "transform": [
                {"filter": "datum.decision !== 'native window'"},
                {"calculate": "datum[measure]", "as": "value"},
                {"window": [{"op": "row_number", "as": "rank"}], "sort": [{"field": "value"}]},
            ],
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {
                "x": _places("rank", "units in order", labels=False, ticks=False)
                | {"scale": {"paddingInner": 0.15}, "sort": "ascending"},
                "y": _amount("value", None),
                "color": _colour("decision", DECISIONS),
                "tooltip": tooltip + _measure_tooltips(behaviour),
            },
        },
        data=data,
    )


def predictors(name: str, data: str, num_measures: int) -> Chart:
    """How well each measure tells FA from SWA; rows hold measure and auc, in the order to be shown."""
    return Chart(
        name=f"{name}-predictors",
        title="What tells FA from SWA",
        description="Bars from 0.5, chance, to the AUC of each measure; the table of relations holds the same numbers.",
        spec={
            "height": 20 * num_measures,
            "mark": {"type": "bar", "cornerRadius": 2, "height": {"band": 0.7}},
            "encoding": {
                "y": _places("measure", None, labelLimit=140, ticks=False, domain=False),
                "x": {
                    "field": "auc",
                    "type": "quantitative",
                    "title": "AUC (blue: FA has more of it, orange: SWA)",
                    "scale": {"domain": [0, 1]},
                },
                "x2": {"datum": 0.5},
                "color": {"condition": {"test": "datum.auc >= 0.5", "value": FA}, "value": SWA},
                "tooltip": [{"field": "measure"}, {"field": "auc", "title": "AUC", "format": ".3f"}],
            },
        },
        data=data,
    )


def distances(allocation: Allocation, behaviour: Behaviour) -> Columns:
    """Mean attention by distance of the FA and of the SWA units."""
    rows: dict[str, list[Any]] = {"decision": [], "bucket": [], "share": []}
    decided = np.zeros_like(allocation.full_attention)
    decided[allocation.layers] = True
    for decision, chosen in (
        ("FA", allocation.full_attention),
        ("SWA", decided & ~allocation.full_attention),
    ):
        if chosen.any():
            for bucket, share in enumerate(behaviour.by_distance[chosen].mean(0)):
                first, last = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
                rows["decision"].append(decision)
                rows["bucket"].append(str(first) if first == last else f"{first}\N{EN DASH}{last}")
                rows["share"].append(_rounded(float(share)))
    return rows


def by_distance(name: str, data: str) -> Chart:
    """Where attention goes, by distance in tokens, for FA and SWA units under full attention."""
    return Chart(
        name=f"{name}-by-distance",
        title="Attention by distance, before any window was set",
        description="Line chart of the mean share of attention by distance between query and key, one line for the"
        " units that were put on full attention and one for those on a sliding window.",
        spec={
            "height": 220,
            "mark": {"type": "line", "point": {"size": 30}, "strokeWidth": 2},
            "encoding": {
                "x": _places("bucket", "distance, tokens", labelAngle=-40),
                "y": _amount("share", "share of attention") | {"axis": {"format": "%"}},
                "color": _colour("decision", DECISIONS),
                "tooltip": [
                    {"field": "decision"},
                    {"field": "bucket"},
                    {"field": "share", "format": ".3f"},
                ],
            },
        },
        data=data,
    )


def layer_shares(allocations: Mapping[str, Allocation]) -> Columns:
    """The share of FA heads of every layer of several allocations."""
    rows: dict[str, list[Any]] = {"run": [], "sparsity": [], "layer": [], "share": []}
    for name, allocation in allocations.items():
        for layer, share in enumerate(allocation.full_attention.mean(1)):
            rows["run"].append(name)
            rows["sparsity"].append(_rounded(allocation.sparsity))
            rows["layer"].append(layer)
            rows["share"].append(_rounded(float(share)))
    return rows


def side_by_side(data: str, allocations: Mapping[str, Allocation]) -> Chart:
    """A row per allocation: which share of each layer's heads is FA."""
    num_layers = next(iter(allocations.values())).num_layers
    return Chart(
        name="side-by-side",
        title="Share of each layer's KV heads on full attention",
        description="Heatmap with a row per run and a column per layer; the stronger the colour, the more of the"
        " layer's KV heads keep full attention.",
        spec={
            "height": 30 * len(allocations),
            "mark": {"type": "rect", "cornerRadius": 2, "color": FA, "stroke": FA, "strokeOpacity": 0.35},
            "encoding": {
                "x": _layers(num_layers),
                "y": _places("run", None, labelLimit=90) | {"scale": {"paddingInner": 0.12}},
                "fillOpacity": {
                    "field": "share",
                    "type": "quantitative",
                    "title": "share",
                    "scale": {"domain": [0, 1], "range": [0.02, 1]},
                    "legend": None,
                },
                "tooltip": [{"field": field} for field in ("run", "sparsity", "layer", "share")],
            },
        },
        data=data,
    )


def benchmark(name: str, data: str) -> list[Chart]:
    """Decoding, prefill and cache by context, dense and hybrid; rows are `Measurement`s and the cache in MB."""
    panels = {
        "decode_tokens_per_second": ("Decoding", "tokens per second"),
        "prefill_seconds": ("Prefill", "seconds"),
        "cache_mb": ("KV cache", "MB"),
    }
    charts = []
    for field, (title, unit) in panels.items():
        encoding: Spec = {
            "x": _places("context", "context, tokens"),
            "y": _amount(field, unit),
            "color": _colour("model", {"dense": OTHER, "hybrid": FA}),
            "detail": {"field": "batch_size"},
            "tooltip": [
                {"field": "model"},
                {"field": "context"},
                {"field": "batch_size"},
                {"field": field, "format": ".4~r"},
            ],
        }
        charts.append(
            Chart(
                name=f"{name}-{title.lower().replace(' ', '-')}",
                title=f"{title}, {unit}",
                description=f"Line chart of {title.lower()} by context, dense and hybrid; the table holds the same.",
                spec={
                    "height": 190,
                    "mark": {"type": "line", "point": {"size": 40}},
                    "encoding": encoding,
                },
                data=data,
            )
        )
    return charts


def _measure_tooltips(behaviour: Behaviour | None) -> list[Spec]:
    return [
        {"field": name, "title": name.replace("_", " "), "format": ".4~r"}
        for name in MEASURES
        if behaviour is not None and name in behaviour.measures
    ]


def _places(field: str, title: str | None, **axis: Any) -> Spec:
    """A scale of steps, in the order of the data."""
    axis = {"labelAngle": 0, "labelOverlap": "greedy", "grid": False, **axis}
    return {"field": field, "type": "ordinal", "sort": None, "title": title, "axis": axis}


def _layers(num_layers: int) -> Spec:
    labelled = list(range(0, num_layers, 1 + num_layers // 24))
    x = _places("layer", "layer, from the bottom to the top of the model", values=labelled)
    return x | {"scale": {"paddingInner": 0.08}}


def _amount(field: str, title: str | None) -> Spec:
    return {"field": field, "type": "quantitative", "title": title}


def _colour(field: str, colours: Mapping[str, str]) -> Spec:
    scale = {"domain": list(colours), "range": list(colours.values())}
    legend = {"orient": "top", "symbolOpacity": 1}
    return {"field": field, "type": "nominal", "title": None, "scale": scale, "legend": legend}


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
