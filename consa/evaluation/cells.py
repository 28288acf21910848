"""Measurements that are made once: each result is kept in a small file, named after everything it depends on."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.files import JsonObject, read_sealed, write_sealed
from consa.progress import progress

Advance = Callable[[int], None]
"""Called during a measurement with the number of steps done since the last call."""

Results = dict[tuple[str, str], JsonObject]
"""Results by names of allocation and measure."""


@dataclass(frozen=True, kw_only=True)
class Measure:
    """Something that can be measured of every allocation.

    Attributes:
        name: unique among the measures of a table.
        settings: JSON-able; everything that decides the result besides the model and the allocation.
        size: number of steps, for the progress bar.
        compute: returns the JSON-able result for an allocation; None stands for the model as it is.
    """

    name: str
    settings: JsonObject
    size: int
    compute: Callable[[Allocation | None, Advance], JsonObject]


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One measurement of one allocation.

    Attributes:
        allocation: its name.
        measure: name of what is measured.
        depends_on: JSON-able; everything that decides the result.
        size: number of steps, for the progress bar.
        compute: returns the JSON-able result.
    """

    allocation: str
    measure: str
    depends_on: JsonObject
    size: int
    compute: Callable[[Advance], JsonObject]

    def path(self, folder: Path) -> Path:
        """The file that holds the result."""
        described = json.dumps({"measure": self.measure} | self.depends_on, sort_keys=True)
        return folder / "cells" / f"{digest(described)[:32]}.json"


def run_cells(cells: Sequence[Cell], folder: Path) -> Results:
    """Return the results of all cells: those that `folder` holds are read, the others are computed and kept."""
    paths = [cell.path(folder) for cell in cells]
    kept = {path: read_sealed(path) for path in paths}
    results = {path: json.loads(content)["result"] for path, content in kept.items() if content is not None}
    missing = {path: cell for path, cell in zip(paths, cells, strict=True) if path not in results}
    done = 0
    with progress("Measuring", sum(cell.size for cell in missing.values())) as update:
        for path, cell in missing.items():

            def advance(count: int, text: str = f"{cell.allocation}, {cell.measure}") -> None:
                nonlocal done
                done += count
                update(done, text)

            try:
                result = results[path] = cell.compute(advance)
            except ConsaError as error:
                raise ConsaError(f"{cell.allocation}: {error}") from error
            record = {"measure": cell.measure, **cell.depends_on, "result": result}
            write_sealed(path, (json.dumps(record, indent=1) + "\n").encode())
    return {(cell.allocation, cell.measure): results[path] for path, cell in zip(paths, cells, strict=True)}


def digest(content: str | bytes) -> str:
    """SHA-256 of a text, as hex."""
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()
