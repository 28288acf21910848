"""Charts as Vega-Lite, drawn alike by the page and as figures for papers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from consa.errors import missing_extra
from consa.files import write_files

Columns = Mapping[str, Sequence[Any]]
Spec = dict[str, Any]


class Chart(NamedTuple):
    """A figure.

    Attributes:
        name: of its files.
        data: name of its data set; charts may share one.
        title: what it shows, as text.
        description: what it shows, for readers who cannot see it.
        spec: Vega-Lite without data.
    """

    name: str
    data: str
    title: str
    description: str
    spec: Spec


def draw(charts: Sequence[Chart], data: Mapping[str, Columns], folder: Path) -> list[Path]:
    """Write every chart as SVG and PNG; returns the paths.

    Raises:
        ConsaError: the package that draws is not installed, or the folder cannot take the files.
    """
    renderer = _vl_convert()
    drawn: dict[str, bytes] = {}
    for chart in charts:
        columns = data[chart.data]
        rows = [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]
        spec = complete(chart) | {"data": {"values": rows}, "background": "white"}
        chosen = "".join(f": {param['value'].replace('_', ' ')}" for param in spec.get("params", ()))
        spec |= {"width": 620, "title": {"text": chart.title + chosen, "anchor": "start"}}
        drawn[f"{chart.name}.svg"] = renderer.vegalite_to_svg(spec).encode()
        drawn[f"{chart.name}.png"] = renderer.vegalite_to_png(spec, scale=3)
    return write_files(folder, drawn)


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
    """Import the package that holds Vega-Lite and draws with it."""
    try:
        import vl_convert
    except ImportError as error:
        raise missing_extra("the report", "report") from error
    return vl_convert


@cache
def library() -> str:
    """Vega-Lite with its dependencies: 0.9 MB of JavaScript that defines `vegaEmbed`."""
    return _vl_convert().javascript_bundle("window.vegaEmbed = vegaEmbed;")
