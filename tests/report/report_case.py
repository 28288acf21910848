"""Runs with every piece, and what their page holds: what tests of the report share."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np

from consa import Allocation, rules
from consa.behaviour.record import MEASURES, Behaviour
from consa.evaluation.intervals import Estimate
from consa.evaluation.table import Line, Table
from consa.report import page

HOSTILE = "<script>alert('é\N{WAVE DASH}\"')<img src=x onerror=alert(1)>&amp;{{datum.x}}"
PIECES = ("allocation.json", "summary.json", "metrics.jsonl", "eval.json", "bench.json", "behaviour.safetensors")


def estimate(mean: float) -> Estimate:
    return Estimate(mean, mean - 0.02, mean + 0.02)


def make_line(name: str, kind: str, rise: float, *, sparsity: float = 0.5, **changes: Any) -> Line:
    """A line whose loss is `rise` above that of dense, which is 2."""
    fields: dict[str, Any] = {
        "by_position": {0: estimate(2 + rise / 2), 64: estimate(2 + rise)},
        "differences_by_position": {0: estimate(rise / 2), 64: estimate(rise)},
        **{"by_domain": {}, "differences_by_domain": {}, "recovered": 1 - rise, "cache_bytes": 1000},
    }
    return Line(
        name=name, kind=kind, sparsity=sparsity, loss=estimate(2 + rise), difference=estimate(rise), **fields | changes
    )


def make_table(*lines: Line, **how: Any) -> Table:
    return Table(start=64, cache_tokens=1000, lines=lines, how=how)


def make_run(
    folder: Path, *, name: str = "model", sparsity: float = 0.5, layers: int = 6, heads: int = 2, steps: int = 5
) -> Path:
    """A folder that holds every piece; whatever is text in it is `name`."""
    folder.mkdir()
    rng = np.random.default_rng(0)
    by_rule = rules.middle(layers, heads, sparsity=sparsity, granularity="kv_head", window=8)
    Allocation(
        full_attention=by_rule.full_attention,
        window=8,
        scores=rng.normal(size=(layers, heads)),
        provenance={"method": "consa", "model": name, "config": {"seed": 0}},
    ).save(folder / "allocation.json")
    measured = make_table(
        make_line("dense", "dense", 0.0),
        make_line("all_swa", "all-SWA", 1.0),
        make_line(name, "other", 0.5, recovered=math.nan),
        make_line("learned", "learned", 0.2),
    )
    summary = {
        "model": {"model": name, "revision": name},
        "command": f"consa learn {name}",
        "hardware": name,
        "rows": [],
        "table": measured.to_record(),
        "buckets": [[0, 64], [64, 127]],
        "losses": {"dense": 2.0, "stochastic": 2.3, "final": 2.2},
        "fractional": 0.1,
        **{"heldout_sequences": 4, "heldout_documents": 2, "seq_len": 128, "start": 64},
    }
    (folder / "summary.json").write_text(json.dumps(summary))
    step = {"loss": 2.0, "expected_sparsity": 0.4, "target": 0.5, "multiplier": -1.0, "fractional": 0.9}
    (folder / "metrics.jsonl").write_text("".join(json.dumps({"step": n + 1, **step}) + "\n" for n in range(steps)))
    asked = {"retrieval": {"single": {512: 0.0, 1024: 0.0}}, "tasks": {f"{name} acc": 0.5}}
    evaluation = make_table(
        make_line("dense", "dense", 0.0, sparsity=sparsity, **asked),
        make_line("all_swa", "all-SWA", 1.0, sparsity=sparsity, **asked),
        make_line(f"{name}/allocation.json", "learned", 0.2, sparsity=sparsity, **asked),
        command=name,
        model={"model": name},
    )
    (folder / "eval.json").write_text(json.dumps(evaluation.to_record()))
    benchmarked = [
        {"model": model, "context": context, "batch_size": 1, "prefill_seconds": 1.0, "decode_tokens_per_second": speed}
        | {"cache_bytes": 10**6 * context, "peak_bytes": 10**9}
        for context in (512, 1024)
        for model, speed in (("dense", 10.0), ("hybrid", 15.0))
    ]
    benchmark = {"sparsity": 0.5, "measurements": benchmarked, "where": {"hardware": name, "dtype": name}}
    (folder / "bench.json").write_text(json.dumps(benchmark))
    make_behaviour(layers, heads, name).save(folder / "behaviour.safetensors")
    return folder


def make_behaviour(layers: int, heads: int, name: str = "model") -> Behaviour:
    rng = np.random.default_rng(1)
    return Behaviour(
        measures={measure: rng.random((layers, heads)).astype(np.float32) for measure in MEASURES},
        by_distance=np.full((layers, heads, 8), 1 / 8, dtype=np.float32),
        window=8,
        num_sink_tokens=4,
        provenance={"model": name},
    )


class Seen(HTMLParser):
    """Tags with their attributes, text of headings, and what scripts hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.scripts: list[str] = []
        self._inside = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        self._inside = tag

    def handle_data(self, data: str) -> None:
        if self._inside == "script":
            self.scripts.append(data)
        elif self._inside != "style":
            self.text += data

    def handle_endtag(self, tag: str) -> None:
        self._inside = ""


def make_page(folders: list[Path], out: Path, **options: Any) -> tuple[str, Seen]:
    assert page.write(folders, out, command="consa report", **options)[0] == out
    html = out.read_text(encoding="utf-8")
    return html, Seen(html)


def cells(html: str, caption: str) -> list[str]:
    """What the table of a caption holds."""
    table = html.partition(f"{caption}</p>")[2].partition("</table>")[0]
    return re.findall(r"<t[hd](?: [^>]*)?>([^<]*)<", table)
