"""What benchmarks share: options, and what they record beside their numbers."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.files import write_atomically
from consa.provenance import hardware, versions


def parser_of(description: str | None, *, text: bool = False) -> argparse.ArgumentParser:
    """An empty parser, or one with what every benchmark on text takes."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    if text:
        parser.add_argument("--model", default="smollm2-135m")
        parser.add_argument("--train", required=True)
        parser.add_argument("--heldout", required=True)
        parser.add_argument("--num-heldout", type=int, default=48)
        parser.add_argument("--start", type=int, default=1024, help="first position that counts")
    return parser


def environment() -> dict[str, Any]:
    """The command, hardware, versions and date of this run; when it was to stop is no part of what it measures."""
    return {
        "command": re.sub(r" --seconds[ =]\S+", "", shlex.join(["python", *sys.argv])),
        "hardware": hardware(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write one record, whole or not at all."""
    write_atomically(path, as_lines(record).encode())


def as_lines(record: dict[str, Any]) -> str:
    """JSON that people can read and compare: a key of `record` a line, and a row of a table a line.

    A list or an object that holds others, such as `rows`, takes one line for each of its items.
    """
    return "{\n" + ",\n".join(f" {json.dumps(key)}: {_value(record[key])}" for key in record) + "\n}\n"


def _value(value: Any) -> str:
    items = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    if not any(isinstance(item, (dict, list)) for item in items):
        return json.dumps(value)
    if isinstance(value, dict):
        lines = (f"  {json.dumps(name)}: {json.dumps(item)}" for name, item in value.items())
        return "{\n" + ",\n".join(lines) + "\n }"
    return "[\n" + ",\n".join(f"  {json.dumps(item)}" for item in value) + "\n ]"


def measured_before(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What a killed or unfinished run left at `path`, for the record of this one; refuses what has other settings.

    Returns:
        `rows` and whatever else was measured or remarked, and in `earlier`, if there are any, how many of the rows were
        measured on other hardware or another day, with both.
    """
    if not path.exists():
        return {"rows": {}}
    before = json.loads(path.read_text())
    if before["settings"] != settings:
        raise SystemExit(f"{path} was measured with {before['settings']}; choose another --out")
    earlier = list(before.get("earlier", []))
    if (before["hardware"], before["date"]) != (hardware(), datetime.date.today().isoformat()):
        number = len(before["rows"]) - sum(entry["rows"] for entry in earlier)
        earlier.append({"rows": number, "hardware": before["hardware"], "date": before["date"]})
    kept = {name: before[name] for name in ("rows", "killed", "remark") if name in before}
    return kept | ({"earlier": earlier} if earlier else {})


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """A Markdown table on stdout."""
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(str(value) for value in row) + " |")


def overrides(items: list[str]) -> dict[str, Any]:
    """`name=value` arguments as fields of LearnConfig: numbers as numbers, the rest as text."""
    found = {}
    for name, value in (item.split("=", 1) for item in items):
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def digits_of(allocation: Allocation) -> list[str]:
    """A string of each layer: 1 for a KV head on FA, 0 for one on SWA."""
    return ["".join("01"[int(full)] for full in layer) for layer in allocation.full_attention]


def mask_of(digits: list[str]) -> np.ndarray:
    """What `digits_of` wrote, bool `(layers, kv_heads)`."""
    return np.array([[head == "1" for head in layer] for layer in digits])


def learned_allocations(record: dict[str, Any]) -> list[Allocation]:
    """What benchmarks/allocations.py recorded as learned, a seed each, after the refinement and with its scores."""
    settings = record["settings"]
    return [
        Allocation(
            full_attention=mask_of(row["allocation"]),
            granularity=settings["granularity"],
            window=settings["window"],
            num_sink_tokens=settings["num_sink_tokens"],
            scores=np.array(row["scores"]),
            provenance={"method": "consa", "model": "smollm2-135m", "name": row["name"]},
        )
        for row in record["rows"]
        if row["scores"] is not None and not row["name"].endswith("gates alone")
    ]


def gates_alone(allocation: Allocation) -> Allocation:
    """What the gates decided before the refinement: as many units on FA, those of the highest scores."""
    assert allocation.scores is not None
    heads = allocation.num_kv_heads if allocation.granularity == "layer" else 1
    scores = allocation.scores.reshape(-1, heads)[:, 0]
    full = np.zeros(len(scores), dtype=bool)
    full[np.argsort(-scores, kind="stable")[: allocation.full_attention.sum() // heads]] = True
    return replace(allocation, full_attention=full.repeat(heads).reshape(allocation.full_attention.shape))
