"""What every benchmark records beside its numbers."""

from __future__ import annotations

import datetime
import json
import platform
import shlex
import sys
from pathlib import Path
from typing import Any

from consa.files import write_atomically
from consa.provenance import hardware, versions


def environment() -> dict[str, Any]:
    """The command, hardware, versions and date of this run."""
    return {
        "command": shlex.join(["python", *sys.argv]),
        "hardware": hardware(),
        "machine": platform.machine(),
        "date": datetime.date.today().isoformat(),
        "versions": versions(),
    }


def write_json(path: Path, record: dict[str, Any]) -> None:
    """Write one record, whole or not at all."""
    write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())


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
