"""The charts of the report as Vega-Lite, and the rows of their data."""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.behaviour.record import MEASURES, Behaviour
from consa.evaluation.table import Line
from consa.picture import shades
from consa.report.vega import Chart, Columns, Spec

# Colour-blind readers can tell them apart, and they are visible on light and dark pages.
FA, SWA, OTHER = "#2868ad", "#d9952b", "#84878c"
DECISIONS = {"FA": FA, "SWA": SWA}
KINDS = {"learned": FA, "adapted": FA, "dense": "#4f9d69", "all-SWA": SWA, "other": OTHER}
LEARNING = ("loss", "expected_sparsity", "target", "multiplier", "fractional")  # of a step
ADAPTATION = ("loss", "heldout_loss", "learning_rate")
LINES: Spec = {"type": "line", "point": {"size": 30}}
MAX_POINTS = 400  # of a curve
DIGITS = 4  # significant, of numbers in a page


def units(allocation: Allocation, behaviour: Behaviour | None) -> Columns:
    """A row for each unit: its place, the decision, its score and its behaviour."""
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
    """Heatmap with a column for each layer and a row for each KV head; colours show decision and score."""
    tooltip = _tooltip("unit", "decision")
    if allocation.scores is not None:
        learned = allocation.provenance.get("method") == "consa"
        tooltip.append({"field": "score", "title": "log_alpha" if learned else "score"})
    num_full = int(allocation.full_attention.sum())
    num_units = len(allocation.layers) * allocation.num_kv_heads
    rows = 1 if allocation.granularity == "layer" else allocation.num_kv_heads
    shade = _amount("shade", None) | {"legend": None, "scale": {"domain": [0, 1], "range": [0.55, 1]}}
    return Chart(
        f"{name}-allocation",
        data,
        "Which units keep full attention",
        f"Heatmap of {num_units} KV heads in {allocation.num_layers} layers, {num_full} of them on full"
        " attention; the text below describes their depth.",
        {
            "mark": {"type": "rect", "cornerRadius": 2, "tooltip": True},
            "height": rows * (26 if rows <= 8 else 14),
            "encoding": {
                "x": _layers(allocation.num_layers),
                "y": _places("head", "KV head") | {"scale": {"paddingInner": 0.1}},
                "color": _colour(
                    "decision", DECISIONS | ({"native window": OTHER} if allocation.native_windows else {})
                ),
                "opacity": shade,
                "tooltip": tooltip + _measure_tooltips(behaviour),
            },
        },
    )


def positions(lines: Sequence[Line]) -> Columns:
    """Differences to the dense loss by position, with their intervals."""
    rows = [
        (line.name, line.kind, first, rise.mean, *(None if math.isnan(end) else end for end in (rise.low, rise.high)))
        for line in lines
        for first, rise in line.differences_by_position.items()
    ]
    return _columns("allocation kind from rise low high", rows)


def answers(lines: Sequence[Line]) -> Columns:
    """Share of hidden answers found, by task and prompt length."""
    rows = [
        (line.name, line.kind, task, length, share)
        for line in lines
        for task, lengths in line.retrieval.items()
        for length, share in lengths.items()
    ]
    return _columns("allocation kind task length share", rows)


def history(records: Sequence[Mapping[str, float]], *, adapted: bool) -> Columns:
    """The steps of a run; a long run becomes means of neighbouring steps. Only some steps have a held-out loss."""
    parts = np.array_split(np.arange(len(records)), min(len(records), MAX_POINTS))

    def column(name: str) -> list[float | None]:
        found = [[records[i][name] for i in part if name != "heldout_loss" or name in records[i]] for part in parts]
        return [_rounded(float(np.mean(values))) if values else None for values in found]

    return {name: column(name) for name in ("step", *(ADAPTATION if adapted else LEARNING))}


def curves(name: str, data: str, *, adapted: bool) -> list[Chart]:
    """Curves over the steps, of learning or of adaptation."""
    axis = {"grid": False, "tickMinStep": 1}
    step = _amount("step", "step") | {"axis": axis}

    def line(field: str, title: str, domain: list[float] | None = None, **mark: Any) -> Spec:
        y = _amount(field, title) | {"scale": {"domain": domain} if domain else {"zero": False}}
        return {
            "mark": {"type": "line", "color": FA, "point": {"size": 14, "color": FA}, **mark},
            "encoding": {"x": step, "y": y, "tooltip": _tooltip("step", **{field: ".4~r"})},
        }

    target = line("target", "sparsity", [0, 1], color=SWA, strokeDash=[5, 3], point=False)
    expected = line("expected_sparsity", "sparsity", [0, 1])
    fractional = line("fractional", "share", [0, 1])
    measured = {"transform": [{"filter": "isValid(datum.heldout_loss)"}], **line("heldout_loss", "nats")}
    rate = line("learning_rate", "learning rate")
    rate["encoding"]["y"]["axis"] = {"format": ".1e"}
    panels = [("loss", "Training loss", "loss of each step", line("loss", "nats"))]
    if adapted:
        panels += [
            ("heldout", "Held-out loss", "held-out loss at some of the steps", measured),
            ("rate", "Learning rate", "learning rate of each step", rate),
        ]
    else:
        sparsity = "Expected sparsity (blue) and its target (dashed)"
        panels += [
            ("sparsity", sparsity, "expected sparsity and its rising target", {"layer": [target, expected]}),
            ("multiplier", "Lagrange multiplier", "multiplier of each step", line("multiplier", "nats")),
            ("fractional", "Share of fractional gates", "share of gates not decided yet", fractional),
        ]
    return [
        Chart(f"{name}-{panel}", data, title, f"Line chart over the steps: {description}.", {"height": 170, **spec})
        for panel, title, description, spec in panels
    ]


def by_position(name: str, data: str, kinds: Collection[str]) -> Chart:
    """Loss above the dense model's, by position; rows hold allocation, kind, from, rise, low and high."""
    shared = {"x": _places("from", "from position"), "color": _kinds(kinds), "detail": {"field": "allocation"}}
    own = {
        "y": _amount("rise", "nats above dense"),
        "opacity": {"condition": {"test": "datum.kind === 'other'", "value": 0.6}, "value": 1},
        "tooltip": _tooltip("allocation", "from", rise=".4f"),
    }
    ends = {"y": _amount("low", "nats above dense"), "y2": {"field": "high"}}
    lines = {"mark": LINES | {"strokeWidth": 2}, "encoding": shared | own}
    band = {"mark": {"type": "area", "opacity": 0.15}, "encoding": shared | ends}
    return Chart(
        f"{name}-by-position",
        data,
        "Loss above the dense model's, by position (95 % intervals)",
        "Line chart of the difference between each allocation's loss and the dense model's, by position in"
        " the text; the table has the numbers.",
        {"height": 240, "layer": [band, lines]},
    )


def retrieval(name: str, data: str, task: str, kinds: Collection[str]) -> Chart:
    """Share of answers found by prompt length, for one task; rows hold allocation, kind, task, length and share."""
    encoding = {
        "x": _places("length", "prompt length, tokens"),
        "y": _amount("share", "share") | {"scale": {"domain": [0, 1]}},
        "color": _kinds(kinds),
        "detail": {"field": "allocation"},
        "tooltip": _tooltip("allocation", "length", share=".2f"),
    }
    one = {"transform": [{"filter": {"field": "task", "equal": task}}]}
    return Chart(
        f"{name}-retrieval-{task}",
        data,
        f"Answers found: {task.replace('_', ' ')}",
        "Line chart of the share of hidden answers found by prompt length, with a line for each"
        " allocation; the table has the numbers.",
        {"height": 190, "mark": LINES, "encoding": encoding, **one},
    )


def spectrum(name: str, data: str, behaviour: Behaviour, shown: str) -> Chart:
    """Units sorted by a measure that the reader chooses, coloured by decision."""
    names = [measure for measure in MEASURES if measure in behaviour.measures]
    labels = [measure.replace("_", " ") for measure in names]
    choice = {"input": "select", "name": "Measure ", "options": names, "labels": labels}
    rank = _places("rank", "units in order", labels=False, ticks=False)
    return Chart(
        f"{name}-spectrum",
        data,
        "Units sorted by a measure",
        "Bars of all units in rising order of the chosen measure, coloured by decision; the table of"
        " relations says how well the measure separates FA from SWA.",
        {
            "height": 240,
            "params": [{"name": "measure", "value": shown, "bind": choice}],
            "transform": [
                {"filter": "datum.decision !== 'native window'"},
                {"calculate": "datum[measure]", "as": "value"},
                {"window": [{"op": "row_number", "as": "rank"}], "sort": [{"field": "value"}]},
            ],
            "mark": {"type": "bar", "tooltip": True},
            "encoding": {
                "x": rank | {"scale": {"paddingInner": 0.15}, "sort": "ascending"},
                "y": _amount("value", None),
                "color": _colour("decision", DECISIONS),
                "tooltip": _tooltip("unit", "decision") + _measure_tooltips(behaviour),
            },
        },
    )


def predictors(name: str, data: str, num_measures: int) -> Chart:
    """How well each measure separates FA from SWA; rows hold measure and auc, in the order to be shown."""
    title = "AUC (blue: FA units have higher values, orange: SWA units)"
    encoding = {
        "y": _places("measure", None, labelLimit=140, ticks=False, domain=False),
        "x": _amount("auc", title) | {"scale": {"domain": [0, 1]}},
        "x2": {"datum": 0.5},
        "color": {"condition": {"test": "datum.auc >= 0.5", "value": FA}, "value": SWA},
        "tooltip": [{"field": "measure"}, {"field": "auc", "title": "AUC", "format": ".3f"}],
    }
    mark = {"type": "bar", "cornerRadius": 2, "height": {"band": 0.7}}
    return Chart(
        f"{name}-predictors",
        data,
        "Which measures separate FA from SWA",
        "Bars from 0.5 (chance) to the AUC of each measure; the table of relations has the numbers.",
        {"height": 20 * num_measures, "mark": mark, "encoding": encoding},
    )


def distances(allocation: Allocation, behaviour: Behaviour) -> Columns:
    """Mean attention by distance of the FA and of the SWA units."""
    rows: list[tuple[str, str, float | None]] = []
    full, decided = allocation.full_attention, np.zeros_like(allocation.full_attention)
    decided[allocation.layers] = True
    for decision, chosen in (("FA", full), ("SWA", decided & ~full)):
        if chosen.any():
            for bucket, share in enumerate(behaviour.by_distance[chosen].mean(0)):
                first, last = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
                bounds = str(first) if first == last else f"{first}\N{EN DASH}{last}"
                rows.append((decision, bounds, _rounded(float(share))))
    return _columns("decision bucket share", rows)


def by_distance(name: str, data: str) -> Chart:
    """Mean attention by distance in tokens, of FA and of SWA units, under full attention."""
    encoding = {
        "x": _places("bucket", "distance, tokens", labelAngle=-40),
        "y": _amount("share", "share of attention") | {"axis": {"format": "%"}},
        "color": _colour("decision", DECISIONS),
        "tooltip": _tooltip("decision", "bucket", share=".3f"),
    }
    return Chart(
        f"{name}-by-distance",
        data,
        "Attention by distance, under full attention",
        "Line chart of the mean share of attention by distance between query and key, with one line for the"
        " FA units and one for the SWA units.",
        {"height": 220, "mark": LINES | {"strokeWidth": 2}, "encoding": encoding},
    )


def layer_shares(allocations: Mapping[str, Allocation]) -> Columns:
    """The share of FA heads in every layer of several allocations."""
    rows = [
        (name, _rounded(allocation.sparsity), layer, _rounded(float(share)))
        for name, allocation in allocations.items()
        for layer, share in enumerate(allocation.full_attention.mean(1))
    ]
    return _columns("run sparsity layer share", rows)


def side_by_side(data: str, allocations: Mapping[str, Allocation]) -> Chart:
    """Heatmap with a row for each allocation: the share of each layer's heads that is FA."""
    num_layers = next(iter(allocations.values())).num_layers
    encoding = {
        "x": _layers(num_layers),
        "y": _places("run", None, labelLimit=90) | {"scale": {"paddingInner": 0.12}},
        "fillOpacity": _amount("share", "share") | {"legend": None, "scale": {"domain": [0, 1], "range": [0.02, 1]}},
        "tooltip": _tooltip("run", "sparsity", "layer", "share"),
    }
    mark = {"type": "rect", "cornerRadius": 2, "color": FA, "stroke": FA, "strokeOpacity": 0.35}
    return Chart(
        "side-by-side",
        data,
        "Share of each layer's KV heads on full attention",
        "Heatmap with a row for each run and a column for each layer; the stronger the colour, the larger"
        " the share of the layer's KV heads on full attention.",
        {"height": 30 * len(allocations), "mark": mark, "encoding": encoding},
    )


def benchmark(name: str, data: str) -> list[Chart]:
    """Decoding speed, prefill time and KV cache by context, dense and hybrid."""
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
            "tooltip": _tooltip("model", "context", "batch_size", **{field: ".4~r"}),
        }
        chart = Chart(
            f"{name}-{title.lower().replace(' ', '-')}",
            data,
            f"{title}, {unit}",
            f"Line chart of {title.lower()} by context, dense and hybrid; the table has the numbers.",
            {"height": 190, "mark": {"type": "line", "point": {"size": 40}}, "encoding": encoding},
        )
        charts.append(chart)
    return charts


def _columns(names: str, rows: Sequence[tuple[Any, ...]]) -> Columns:
    """Rows as columns; the names are separated by blanks."""
    return {name: [row[place] for row in rows] for place, name in enumerate(names.split())}


def _tooltip(*fields: str, **formats: str) -> list[Spec]:
    """What a tooltip shows: fields as they are, then numbers with a format of d3."""
    plain: list[Spec] = [{"field": field} for field in fields]
    return plain + [{"field": field, "format": how} for field, how in formats.items()]


def _measure_tooltips(behaviour: Behaviour | None) -> list[Spec]:
    return [
        {"field": name, "title": name.replace("_", " "), "format": ".4~r"}
        for name in MEASURES
        if behaviour is not None and name in behaviour.measures
    ]


def _places(field: str, title: str | None, **axis: Any) -> Spec:
    """An axis with a step for each value, in the order of the data."""
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


def _kinds(kinds: Collection[str]) -> Spec:
    return _colour("kind", {kind: colour for kind, colour in KINDS.items() if kind in kinds})


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
