"""What benchmarks share: options, tables, and JSON files that say where their numbers come from."""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import re
import shlex
import sys
from pathlib import Path
from typing import Any

from consa.files import write_atomically
from consa.provenance import hardware, versions

QWEN3_06B: dict[str, Any] = {  # Qwen3-0.6B's shape, for models with random weights
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 131072,
    "tie_word_embeddings": True,
}


def parser_of(description: str | None) -> argparse.ArgumentParser:
    """An empty parser that shows the script's docstring as it stands."""
    return argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)


def environment() -> dict[str, Any]:
    """Command, hardware, versions and date of this run.

    `--seconds` is left out of the command: it says when to stop, not what is measured.
    """
    spec = sys.modules["__main__"].__spec__
    program = ["-m", spec.name] if spec else [sys.argv[0]]
    return {
        "command": re.sub(r" --seconds[ =]\S+", "", shlex.join(["python", *program, *sys.argv[1:]])),
        "hardware": hardware(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write a record atomically, in the form of `as_lines`."""
    write_atomically(path, as_lines(record).encode())


def as_lines(record: dict[str, Any]) -> str:
    """JSON for people and for diffs: one line for each key of `record`, and one for each row of a table.

    A list or an object that contains others, such as `rows`, gets a line for each of its items.
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


def table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    """The lines of a Markdown table; every column but the first is aligned to the right."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def print_table(columns: list[str], rows: list[list[Any]]) -> None:
    """Print a Markdown table."""
    print("\n".join(table(columns, rows)))
