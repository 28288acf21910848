"""One HTML page about one or several runs. It needs no network, and executes nothing from a run's files."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from consa.behaviour.record import Behaviour
from consa.errors import missing_extra
from consa.files import write_atomically
from consa.progress import note
from consa.report import vega
from consa.report.folder import Run, is_unfinished, naming
from consa.report.sections import Sections, number, percent


def write(
    paths: Sequence[Path], out: Path, *, command: str, behaviour: Behaviour | None = None, figures: Path | None = None
) -> list[Path]:
    """Read runs and write the page.

    Args:
        paths: the runs' folders, or files of allocations.
        out: the HTML file.
        command: the command line that does the same again, for the record.
        behaviour: of the model's heads, for runs of its shape that have no behaviour of their own.
        figures: a folder for every chart as SVG and PNG, or None.

    Returns:
        The files written.

    Raises:
        ConsaError: a path holds nothing to report or something damaged, or a file cannot be written.
    """
    unfinished = [path for path in paths if is_unfinished(path)]
    for path in unfinished if len(unfinished) < len(paths) else ():
        note(f"Left out {path}: its run is not finished; the same command resumes it")
    runs = [Run.read(path) for path in paths if path not in unfinished or len(unfinished) == len(paths)]
    runs.sort(
        key=lambda run: (run.model is None, run.model or "", run.allocation.sparsity if run.allocation else math.inf)
    )
    sections = Sections(runs, behaviour)
    write_atomically(out, _html(sections, command).encode(errors="replace"))
    return [out, *(vega.draw(sections.charts, sections.data, figures) if figures else [])]


def _html(sections: Sections, command: str) -> str:
    try:
        from jinja2 import Environment, FileSystemLoader, StrictUndefined, UndefinedError
        from markupsafe import Markup
    except ImportError as error:
        raise missing_extra("the report", "report", error) from error
    folder = Path(__file__).parent
    scripts = [vega.library(), (folder / "page.js").read_text(encoding="utf-8")]
    digests = [base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts]
    hashes = " ".join(f"'sha256-{digest}'" for digest in digests)
    record = {
        "charts": [{"spec": vega.complete(chart), "rows": chart.data} for chart in sections.charts],
        "data": sections.data,
    }
    models = dict.fromkeys(filter(None, (run.model for run in sections.runs)))
    environment = Environment(
        loader=FileSystemLoader(folder),
        autoescape=True,
        undefined=StrictUndefined,
        keep_trailing_newline=True,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"count": "{:,}".format, "number": number, "percent": percent}
    macros: Any = environment.get_template("sections.html").module
    parts = []
    for view in sections.views:
        with naming(view["name"]):
            try:
                parts.append(macros.sections_of(view, sections.charts))
            except UndefinedError as error:
                raise LookupError(str(error)) from error
    parts.append(macros.comparison(sections.charts, sections.side_by_side, sections.across))
    parts.append(macros.origins(sections.origins()))
    return environment.get_template("page.html").render(
        title=f"{', '.join(models) or 'Runs'}: which units keep full attention",
        # Vega compiles its expressions, so it needs 'unsafe-eval'; none of them comes from a run's files.
        policy=f"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-eval' {hashes}",
        styles=(folder / "page.css").read_text(encoding="utf-8"),
        views=sections.views,
        is_series=sections.is_series,
        sections=Markup("").join(parts),
        command=command,
        # No tag can end the script element that holds the data.
        data=json.dumps(record, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c"),
        scripts=scripts,
    )
