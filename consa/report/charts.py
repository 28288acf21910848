"""The charts of the report as Vega-Lite, and the rows of their data."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import chain, cycle
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.behaviour.record import MEASURES, Behaviour
from consa.evaluation.intervals import Estimate
from consa.evaluation.table import Line, Table
from consa.picture import shades
from consa.report.vega import Chart, Columns, Spec
from consa.runs.figures import BEST_RULE, DENSE, MADE, MADE_KINDS, PALE, spread

# Visible on light and dark pages. The first two mean FA and SWA, and nothing else has them.
FA, SWA = "#3a7bc2", "#d9952b"
DECISIONS = {"FA": FA, "SWA": SWA}
NATIVE = "#84878c"
LEARNING = ("loss", "expected_sparsity", "target", "multiplier", "fractional")  # of a step
ADAPTATION = ("loss", "heldout_loss", "learning_rate")
MAX_POINTS = 400  # of a curve
LEAST = 1e-4  # of a measure on a log axis, where smaller ones stand too
DIGITS = 4  # significant, of numbers in a page
HEIGHT, LABEL = 250, 15  # pixels: of a chart with named lines, and of a name


def best_rule(lines: Sequence[Line]) -> str | None:
    """Name of the allocation of lowest loss among those that no run has made; None if there are none."""
    others = [line for line in lines if line.kind == "other"]
    return min(others, key=lambda line: line.loss.mean).name if others else None


def colours(lines: Sequence[Line], best: str | None) -> dict[str, str]:
    """The colour of each row wherever the page shows it; all but dense, learned, adapted and best rule are pale."""
    made = cycle(MADE)
    others = {best: BEST_RULE} | {line.name: DENSE for line in lines if line.kind == "dense"}
    return {line.name: next(made) if line.kind in MADE_KINDS else others.get(line.name, PALE) for line in lines}


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


def outlines(units: Columns) -> dict[str, str]:
    """SVG paths by colour, with a square for each unit, for browsers that run no scripts."""
    paths: dict[str, str] = {}
    for layer, head, decision in zip(units["layer"], units["head"], units["decision"], strict=True):
        colour = DECISIONS.get(decision, NATIVE)
        paths[colour] = paths.get(colour, "") + f"M{layer} {0 if head == 'all' else head}h.9v.9h-.9z"
    return paths


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
                    "decision", DECISIONS | ({"native window": NATIVE} if allocation.native_windows else {})
                ),
                "opacity": shade,
                "tooltip": tooltip + _measure_tooltips(behaviour),
            },
        },
    )


def _rows(lines: Sequence[Line], best: str | None, names: str, values: Callable[[Line], Iterable[Any]]) -> Columns:
    """The rows of all lines, pale ones first and so below the others, each with its line's name and colour."""
    colour = colours(lines, best)
    order = sorted(lines, key=lambda line: colour[line.name] != PALE)
    rows = [(line.name, colour[line.name], *row) for line in order for row in values(line)]
    return _columns(f"allocation colour {names}", rows, names.split()[1])


def frontier(lines: Sequence[Line], best: str | None) -> Columns:
    """KV cache and difference to the dense loss, with its interval."""
    return _rows(lines, best, "cache rise low high", lambda line: [(line.cache_bytes, *_estimate(line.difference))])


def frontiers(tables: Sequence[Table]) -> Columns:
    """The same of several runs: what each has made, and the best rule of each."""
    strong = {"dense": DENSE, "best rule": BEST_RULE} | dict(zip(MADE_KINDS, MADE, strict=False))
    rows: set[tuple[Any, ...]] = set()
    for table in tables:
        best = best_rule(table.lines)
        for line in table.lines:
            kind = "best rule" if line.name == best else line.kind
            if kind in strong:
                rows.add((kind, strong[kind], line.cache_bytes, *_estimate(line.difference)))
    return _columns("allocation colour cache rise low high", sorted(rows, key=lambda row: row[:3]), "rise")


def positions(lines: Sequence[Line], best: str | None) -> Columns:
    """Differences to the dense loss by position, with their intervals."""
    return _rows(
        lines,
        best,
        "from rise low high",
        lambda line: [(first, *_estimate(rise)) for first, rise in line.differences_by_position.items()],
    )


def answers(lines: Sequence[Line], best: str | None, task: str) -> Columns:
    """Share of hidden answers found by prompt length, for one task."""
    return _rows(
        lines, best, "length found", lambda line: [(n, _rounded(share)) for n, share in line.retrieval[task].items()]
    )


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
            "mark": {"type": "line", "color": MADE[0], "point": {"size": 14, "color": MADE[0]}, **mark},
            "encoding": {"x": step, "y": y, "tooltip": _tooltip("step", **{field: ".4~r"})},
        }

    target = line("target", "sparsity", [0, 1], color=DENSE, strokeDash=[5, 3], point=False)
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
        sparsity = "Expected sparsity and its target (dashed)"
        panels += [
            ("sparsity", sparsity, "expected sparsity and its rising target", {"layer": [target, expected]}),
            ("multiplier", "Lagrange multiplier", "multiplier of each step", line("multiplier", "nats")),
            ("fractional", "Share of fractional gates", "share of gates not decided yet", fractional),
        ]
    return [
        Chart(f"{name}-{panel}", data, title, f"Line chart over the steps: {description}.", {"height": 170, **spec})
        for panel, title, description, spec in panels
    ]


def loss_by_cache(name: str, data: str, tokens: int, *, intervals: bool) -> Chart:
    """Loss above the dense model's over the KV cache; rows are of `frontier`."""
    x = _amount("cache", "KV cache, bytes") | {"axis": {"format": "~s", "tickCount": 4}}
    y, interval = _amount("rise", "nats above dense"), {"type": "rule", "strokeWidth": 2} if intervals else None
    return _lines(f"{name}-frontier", data, f"Loss against KV cache at {tokens:,} tokens", x, y, interval=interval)


def by_position(name: str, data: str, *, intervals: bool) -> Chart:
    """Loss above the dense model's, by position; rows are of `positions`."""
    title = "Loss above the dense model's, by position" + (" (95 % intervals)" if intervals else "")
    x, y = _places("from", "from position"), _amount("rise", "nats above dense")
    interval = {"type": "area", "opacity": 0.15} if intervals else None
    return _lines(f"{name}-by-position", data, title, x, y, interval=interval)


def retrieval(name: str, data: str, task: str) -> Chart:
    """Share of answers found by prompt length, for one task; rows are of `answers`."""
    title, x = f"Hidden answers found: {task.replace('_', ' ')}", _places("length", "prompt length, tokens")
    y = _amount("found", "share") | {"scale": {"domain": [0, 1]}}
    return _lines(f"{name}-retrieval-{task}", data, title, x, y)


def spectrum(name: str, data: str, behaviour: Behaviour, shown: str) -> Chart:
    """A strip of the FA units and one of the SWA units, by a measure that the reader chooses."""
    names = [measure for measure in MEASURES if measure in behaviour.measures]
    labels = [measure.replace("_", " ") for measure in names]
    choice = {"input": "select", "name": "Measure ", "options": names, "labels": labels}
    value = _amount("value", None) | {
        "scale": {"type": "log", "nice": False, "padding": 6},
        "axis": {"format": "~g", "labelOverlap": "greedy"},
    }
    return Chart(
        f"{name}-spectrum",
        data,
        "Units by a measure, on a log axis",
        "Strip plot: a stroke for each unit at its value of the chosen measure, FA units above and SWA units below;"
        " the table of relations says how well the measure separates FA from SWA.",
        {
            "height": 110,
            "params": [{"name": "measure", "value": shown, "bind": choice}],
            "transform": [
                {"filter": "datum.decision !== 'native window'"},
                {"calculate": f"max(datum[measure], {LEAST})", "as": "value"},
            ],
            "mark": {"type": "tick", "thickness": 2, "opacity": 0.7, "tooltip": True, "bandSize": 38},
            "encoding": {
                "x": value,
                "y": _places("decision", None, domain=False, ticks=False) | {"scale": {"domain": list(DECISIONS)}},
                "color": _colour("decision", DECISIONS) | {"legend": None},
                "tooltip": _tooltip("unit", "decision") + _measure_tooltips(behaviour),
            },
        },
    )


def predictors(name: str, data: str, num_measures: int) -> Chart:
    """How well each measure separates FA from SWA; rows hold measure and auc, in the order to be shown."""
    encoding = {
        "y": _places("measure", None, labelLimit=140, ticks=False, domain=False),
        "x": _amount("auc", "AUC") | {"scale": {"domain": [0, 1]}},
        "x2": {"datum": 0.5},
        "color": {"condition": {"test": "datum.auc >= 0.5", "value": FA}, "value": SWA},
        "tooltip": [{"field": "measure"}, {"field": "auc", "title": "AUC", "format": ".3f"}],
    }
    mark = {"type": "bar", "cornerRadius": 2, "height": {"band": 0.7}}
    return Chart(
        f"{name}-predictors",
        data,
        "Which measures separate FA (higher to the right) from SWA",
        "Bars from 0.5 (chance) to the AUC of each measure; the table of relations has the numbers.",
        {"height": 20 * num_measures, "mark": mark, "encoding": encoding},
    )


def distances(allocation: Allocation, behaviour: Behaviour) -> Columns:
    """Mean attention by distance of the FA and of the SWA units."""
    rows: list[tuple[str, str, str, float | None]] = []
    full, decided = allocation.full_attention, np.zeros_like(allocation.full_attention)
    decided[allocation.layers] = True
    for decision, chosen in (("FA", full), ("SWA", decided & ~full)):
        if chosen.any():
            for bucket, share in enumerate(behaviour.by_distance[chosen].mean(0)):
                first, last = (0, 0) if bucket == 0 else (2 ** (bucket - 1), 2**bucket - 1)
                bounds = str(first) if first == last else f"{first}\N{EN DASH}{last}"
                rows.append((decision, DECISIONS[decision], bounds, _rounded(float(share))))
    return _columns("decision colour bucket share", rows, "share")


def by_distance(name: str, data: str) -> Chart:
    """Mean attention by distance in tokens, of FA and of SWA units, under full attention."""
    x = _places("bucket", "distance, tokens", labelAngle=-40)
    y = _amount("share", "share of attention") | {"axis": {"format": "%"}}
    return _lines(f"{name}-by-distance", data, "Attention by distance, under full attention", x, y, line="decision")


def layer_shares(allocations: Mapping[str, Allocation]) -> Columns:
    """The share of FA heads in every layer of several allocations."""
    rows = [
        (f"{number}. {name}", _rounded(allocation.sparsity), layer, _rounded(float(share)))
        for number, (name, allocation) in enumerate(allocations.items(), 1)
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


def speeds(measured: Sequence[Mapping[str, Any]]) -> Columns:
    """The measurements of `consa bench`, a line for each model and batch size."""
    batches = len({one["batch_size"] for one in measured}) > 1
    rows = [
        (
            f"{one['model']}, batch {one['batch_size']}" if batches else one["model"],
            DENSE if one["model"] == "dense" else MADE[0],
            *(one[name] for name in ("context", "decode_tokens_per_second", "prefill_seconds")),
            one["cache_bytes"] / 1e6,
        )
        for one in measured
    ]
    fields = ("decode_tokens_per_second", "prefill_seconds", "cache_mb")
    return _columns(f"model colour context {' '.join(fields)}", rows, *fields)


def benchmark(name: str, data: str) -> list[Chart]:
    """Decoding speed, prefill time and KV cache by context, dense and hybrid."""
    panels = {
        "decode_tokens_per_second": ("Decoding", "tokens per second"),
        "prefill_seconds": ("Prefill", "seconds"),
        "cache_mb": ("KV cache", "MB"),
    }
    x = _places("context", "context, tokens")
    return [
        _lines(
            f"{name}-{what.lower().replace(' ', '-')}", data, f"{what}, {unit}", x, _amount(field, unit), line="model"
        )
        for field, (what, unit) in panels.items()
    ]


def _lines(
    name: str, data: str, title: str, x: Spec, y: Spec, *, line: str = "allocation", interval: Spec | None = None
) -> Chart:
    """Lines in their rows' colours, each with its name at its end; `interval` is the mark from low to high."""
    colour: Spec = {"field": "colour", "type": "nominal", "scale": None}
    shared = {"x": {"scale": {"padding": 0.2}} | x if x["type"] == "ordinal" else x, "detail": {"field": line}}
    pale = {"condition": {"test": f"datum.colour === '{PALE}'", "value": 1}, "value": 2.5}
    drawn = {"y": y, "color": colour, "strokeWidth": pale}
    drawn |= {"tooltip": _tooltip(line, x["field"], **{y["field"]: ".4~r"})}
    layers: list[Spec] = [{"mark": {"type": "line", "point": {"size": 40}}, "encoding": drawn}, *_names(x, y, line)]
    if interval:
        ends = {"y": y | {"field": "low"}, "y2": {"field": "high"}, "color": colour}
        strong = [{"filter": f"datum.colour !== '{PALE}' && isValid(datum.low)"}]
        layers.insert(0, {"transform": strong, "mark": interval, "encoding": ends})
    room = {"left": 5, "top": 5, "right": 45 if line == "decision" else 120, "bottom": 5}  # for the names
    return Chart(
        name,
        data,
        title,
        f"Line chart over {x['title']}, with a line for each {line}: {title}. The section has the numbers as a table.",
        {"height": HEIGHT, "padding": room, "encoding": shared, "layer": layers},
    )


def _names(x: Spec, y: Spec, line: str) -> list[Spec]:
    """The names of lines, in the rows where `_columns` says that one stands; a pale line's is not bold.

    A thin line leads from the end of each line to its name, which stands elsewhere where names would overlap.
    """
    bold = {"expr": f"datum.colour === '{PALE}' ? 'normal' : 'bold'"}
    at = f"{y['field']} name"
    named = [{"filter": f"isValid(datum['{at}'])"}]
    leader = {"type": "rule", "x2Offset": 10, "strokeWidth": 0.7, "color": PALE, "tooltip": None}
    text = {"type": "text", "align": "left", "dx": 12, "limit": 106, "fontSize": 11, "fontWeight": bold}
    moved = y | {"field": at}
    return [
        {"transform": named, "mark": leader, "encoding": {"y": y, "x2": {"field": x["field"]}, "y2": {"field": at}}},
        {
            "transform": named,
            "mark": text,
            "encoding": {"y": moved, "text": {"field": line}, "color": {"value": "#333333"}},
        },
    ]


def _columns(names: str, rows: Sequence[tuple[Any, ...]], *named: str) -> Columns:
    """Rows as columns; the names are separated by blanks. The first column says of which line a row is.

    For each field of `named`, a column "FIELD name" tells how high the line's name stands, in the line's last row.
    """
    columns: dict[str, list[Any]] = {name: [row[i] for row in rows] for i, name in enumerate(names.split())}
    lines = next(iter(columns.values()))
    for field in named:
        last = {line: place for place, line in enumerate(lines) if columns[field][place] is not None}
        drawn = chain(columns[field], *(columns[end] for end in ("low", "high") if end in columns))
        values = [0, field == "found", *(value for value in drawn if value is not None)]  # on the axis
        low, high = min(values), max(values) or 1
        heights = spread([columns[field][place] for place in last.values()], (high - low) * LABEL / HEIGHT, low, high)
        at = dict(zip(last.values(), heights, strict=True))
        columns[f"{field} name"] = [_rounded(at[place]) if place in at else None for place in range(len(rows))]
    return columns


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
    x = _places("layer", "layer, from bottom to top", values=labelled)
    return x | {"scale": {"paddingInner": 0.08}}


def _amount(field: str, title: str | None) -> Spec:
    return {"field": field, "type": "quantitative", "title": title}


def _colour(field: str, colours: Mapping[str, str]) -> Spec:
    scale = {"domain": list(colours), "range": list(colours.values())}
    legend = {"orient": "top", "symbolOpacity": 1}
    return {"field": field, "type": "nominal", "title": None, "scale": scale, "legend": legend}


def _estimate(estimate: Estimate) -> tuple[float | None, ...]:
    return estimate.mean, *(None if math.isnan(end) else end for end in (estimate.low, estimate.high))


def _rounded(value: float) -> float | None:
    return float(f"{value:.{DIGITS}g}") if math.isfinite(value) else None
