"""Charts as Vega-Lite, drawn alike by the page and as figures for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

from consa.errors import missing_extra
from consa.files import write_atomically

Columns = Mapping[str, Sequence[Any]]
Spec = dict[str, Any]


@dataclass(frozen=True, kw_only=True)
class Chart:
    """A figure.

    Attributes:
        name: of its files.
        title: what it shows, as text.
        description: what it shows, for readers who cannot see it.
        spec: Vega-Lite without data.
        data: name of its data set; charts may share one.
    """

    name: str
    title: str
    description: str
    spec: Spec
    data: str


def rows_of(columns: Columns) -> list[dict[str, Any]]:
    """Columns as a list of rows, which Vega takes."""
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def draw(charts: Sequence[Chart], data: Mapping[str, Columns], folder: Path) -> list[Path]:
    """Write every chart as SVG and PNG; returns the paths.

    Raises:
        ConsaError: the package that draws is not installed, or the folder cannot take the files.
    """
    renderer = _vl_convert()
    paths = []
    for chart in charts:
        spec = complete(chart) | {"data": {"values": rows_of(data[chart.data])}, "background": "white"}
        chosen = "".join(f": {param['value'].replace('_', ' ')}" for param in spec.get("params", ()))
        spec |= {"width": 620, "title": {"text": chart.title + chosen, "anchor": "start"}}
        drawn = {".svg": renderer.vegalite_to_svg(spec).encode(), ".png": renderer.vegalite_to_png(spec, scale=3)}
        for suffix, content in drawn.items():
            path = folder / f"{chart.name}{suffix}"
            write_atomically(path, content)
            paths.append(path)
    return paths


def complete(chart: Chart) -> Spec:
    """The chart's specification without data; the page's style sheet sets size and text colours."""
    config = {
        "view": {"stroke": None},
        "font": "system-ui, sans-serif",
        "axis": {"domainOpacity": 0.5, "gridOpacity": 0.35, "labelFontSize": 11, "titleFontWeight": "normal"},
        "legend": {"labelFontSize": 12},
    }
    size = {"width": "container", "autosize": {"type": "fit-x", "contains": "padding"}}
    return {"description": chart.description, "config": config, **size, **chart.spec}


def _vl_convert() -> ModuleType:
    """Import the package that holds Vega-Lite and draws with it.

    Raises:
        ConsaError: it is not installed.
    """
    try:
        import vl_convert
    except ImportError as error:
        raise missing_extra("the report", "report") from error
    return vl_convert


@cache
def library() -> str:
    """Vega-Lite with its dependencies: 0.9 MB of JavaScript that defines `vegaEmbed`."""
    return _vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;")
