"""Pieces that every section is made of."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from typing import Any

MODELS = {"smollm2-135m": "SmolLM2-135M-Instruct"}
UNITS = {"kv_head": "KV heads", "layer": "layers"}


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def model_of(name: str) -> str:
    """A model in words, of its name or its folder."""
    name = Path(name).name
    return MODELS.get(name, f"a model of {name.upper()} parameters from scratch")


def spread(values: Sequence[float | None], form: str = ".2f") -> str:
    """Median, lowest and highest of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, middle, high = (format(value, form) for value in (min(known), median(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def source(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    earlier = "".join(
        f" {entry['rows']} of the rows on {entry['hardware']}, {entry['date']}."
        for entry in record.get("earlier", [])
    )
    remark = f" {record['remark']}" if "remark" in record else ""
    if share := re.search(r"--share I/(\d)", record["command"]):
        remark += f" I/{share[1]}: {share[1]} processes side by side, joined by benchmarks/merge.py."
    return [
        f"`{record['command']}` on {record['hardware']}, {record['date']}; {versions}.{earlier}{remark}",
        "",
    ]
