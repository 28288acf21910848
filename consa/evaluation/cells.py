"""Measurements that are made once: each is kept in a small JSON file, named after everything it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from consa.errors import ConsaError
from consa.files import read_json, write_atomically
from consa.progress import progress

MAX_FILE_BYTES = 64 * 2**20


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement of one allocation.

    Attributes:
        allocation: its name.
        measure: what is measured.
        depends_on: JSON-able, all that decides the result.
        size: steps that it takes, for the progress bar.
        compute: makes the result, JSON-able; calls its argument with the number of steps done since the last call.
    """

    allocation: str
    measure: str
    depends_on: dict[str, Any]
    size: int
    compute: Callable[[Callable[[int], None]], dict[str, Any]]

    def path(self, folder: Path) -> Path:
        """The cell's file."""
        described = json.dumps({"measure": self.measure} | self.depends_on, sort_keys=True)
        return folder / "cells" / f"{hashlib.sha256(described.encode()).hexdigest()[:32]}.json"


def run_cells(cells: Sequence[Cell], folder: Path) -> dict[tuple[str, str], dict[str, Any]]:
    """The results of all cells by (allocation, measure): those that `folder` holds are read, the others computed.

    Raises:
        ConsaError: the folder does not take a result.
    """
    paths = [cell.path(folder) for cell in cells]
    found = {path: _read(path) for path in paths}
    missing = {path: cell for path, cell in zip(paths, cells, strict=True) if found[path] is None}
    done = 0
    with progress("Measuring", sum(cell.size for cell in missing.values())) as update:
        for path, cell in missing.items():

            def advance(count: int, text: str = f"{cell.allocation}, {cell.measure}") -> None:
                nonlocal done
                done += count
                update(done, text)

            record = {"measure": cell.measure, **cell.depends_on, "result": cell.compute(advance)}
            record["sha256"] = _digest(record)
            write_atomically(path, (json.dumps(record, indent=1) + "\n").encode())
            found[path] = record
    return {
        (cell.allocation, cell.measure): record["result"]
        for path, cell in zip(paths, cells, strict=True)
        if (record := found[path])
    }


def _read(path: Path) -> dict[str, Any] | None:
    try:
        record = read_json(path, max_bytes=MAX_FILE_BYTES)
    except ConsaError:  # absent or damaged: computed again
        return None
    return record if record.pop("sha256", None) == _digest(record) else None


def _digest(record: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record).encode()).hexdigest()
