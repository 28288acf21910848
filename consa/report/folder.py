"""What a run holds, read for the page."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from consa import published
from consa.allocation import Allocation
from consa.behaviour.relate import Behaviour
from consa.errors import ConsaError
from consa.files import read_json, read_text
from consa.runs.folder import CONFIG

MAX_FILE_BYTES = 2**30
FILES = ("allocation.json", "summary.json", "eval.json", "bench.json")
WANTED = "a folder of consa learn, adapt, eval or bench, the file of an allocation, or one published"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a folder of `consa learn`, `adapt`, `eval` or `bench` holds, or one allocation; None or empty if not there.

    Attributes:
        name: of the folder or file.
        allocation: from allocation.json.
        summary: summary.json.
        history: the steps of metrics.jsonl.
        evaluation: eval.json.
        benchmark: bench.json.
        behaviour: from behaviour.safetensors.
        adapted: whether it is of `consa adapt`.
    """

    name: str
    allocation: Allocation | None = None
    summary: dict[str, Any] | None = None
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    evaluation: dict[str, Any] | None = None
    benchmark: dict[str, Any] | None = None
    behaviour: Behaviour | None = None
    adapted: bool = False

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder, the file of an allocation, or one published.

        Raises:
            ConsaError: there is nothing to report, or a file is damaged.
        """
        if not os.path.exists(path):
            path = published.resolve(path)
        if os.path.isfile(path):
            return cls(name=path.stem, allocation=Allocation.load(path))
        if not any(os.path.exists(path / name) for name in FILES):
            raise ConsaError(f"{path} holds none of {', '.join(FILES)}; name {WANTED}")
        allocation, behaviour, metrics = (
            path / name for name in ("allocation.json", "behaviour.safetensors", "metrics.jsonl")
        )
        lines = read_text(metrics, max_bytes=MAX_FILE_BYTES).splitlines() if metrics.exists() else []
        return cls(
            name=path.resolve().name,
            allocation=Allocation.load(allocation) if allocation.exists() else None,
            summary=_read_json(path / "summary.json"),
            history=[_parse(line, metrics) for line in lines],
            evaluation=_read_json(path / "eval.json"),
            benchmark=_read_json(path / "bench.json"),
            behaviour=Behaviour.load(behaviour) if behaviour.exists() else None,
            adapted="adapt" in (_read_json(path / CONFIG) or {}),
        )


def _read_json(path: Path) -> dict[str, Any] | None:
    return read_json(path, max_bytes=MAX_FILE_BYTES) if path.exists() else None


def _parse(text: str, path: Path) -> dict[str, Any]:
    try:
        record = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConsaError(f"{path} is damaged: not JSON ({error})") from error
    if not isinstance(record, dict):
        raise ConsaError(f"{path} is damaged: it should hold an object, not {type(record).__name__}")
    return record
