"""One HTML page about one or several runs: no network, nothing executed that a run's files say."""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from consa.behaviour.relate import Behaviour
from consa.files import write_atomically
from consa.report import vega
from consa.report.folder import Run
from consa.report.sections import Sections


def write(
    paths: Sequence[Path],
    out: Path,
    *,
    command: str,
    behaviour: Behaviour | None = None,
    figures: Path | None = None,
) -> list[Path]:
    """Read runs and write the page.

    Args:
        paths: the runs' folders, or files of allocations.
        out: the HTML file.
        command: that does the same again, for the record.
        behaviour: of the model's heads, for the runs that have none of their own and are of its shape.
        figures: a folder for every chart as SVG and PNG, or None.

    Returns:
        The files written.

    Raises:
        ConsaError: a path holds nothing to report or something damaged, or a file cannot be written.
    """
    runs = [Run.read(path) for path in paths]
    runs.sort(key=lambda run: run.allocation.sparsity if run.allocation else math.inf)
    sections = Sections(runs, behaviour)
    write_atomically(out, _html(sections, command).encode(errors="replace"))
    return [out, *(vega.draw(sections.charts, sections.data, figures) if figures else [])]


def _html(sections: Sections, command: str) -> str:
    """All of it, as one file."""
    folder = Path(__file__).parent
    styles = (folder / "page.css").read_text(encoding="utf-8")
    scripts = [vega.library(), (folder / "page.js").read_text(encoding="utf-8")]
    record = {
        "charts": [{"spec": vega.complete(chart), "rows": chart.data} for chart in sections.charts],
        "data": sections.data,
    }
    models = dict.fromkeys(filter(None, (_model_of(run) for run in sections.runs)))
    title = f"{', '.join(models) or 'Runs'}: which units keep full attention"
    hashes = " ".join(f"'sha256-{_sha256(script)}'" for script in scripts)
    # Vega compiles its expressions, so it needs 'unsafe-eval'; none of them comes from a run's files.
    policy = f"default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-eval' {hashes}"
    return "".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n',
            '<meta name="viewport" content="width=device-width, initial-scale=1">\n',
            f"<title>{escape(title)}</title>\n<style>\n{styles}</style>\n</head>\n<body>\n",
            f"<header><h1>{escape(title)}</h1>\n",
            "<p class=quiet>FA is full attention, SWA sliding-window attention; losses are cross-entropy per token"
            " in nats.</p></header>\n",
            f"<main>\n{sections.html}</main>\n",
            f"<footer><p>This page: <code>{escape(command)}</code></p></footer>\n",
            f'<script id="data" type="application/json">{_as_script_data(record)}</script>\n',
            *(f"<script>{script}</script>\n" for script in scripts),
            "</body>\n</html>\n",
        ]
    )


def _model_of(run: Run) -> str | None:
    records: list[Any] = [run.summary, (run.evaluation or {}).get("how")]
    for record in filter(None, records):
        model = record.get("model")
        return Path(str(model.get("model") if isinstance(model, dict) else model)).name
    named = run.allocation.provenance.get("model") if run.allocation else None
    return None if named is None else str(named)


def _as_script_data(record: Any) -> str:
    """JSON in which nothing can end the script element that holds it."""
    return json.dumps(record, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def _sha256(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
