"""Read the folder of a run, or an allocation, for the page."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from consa import published, rules
from consa.allocation import Allocation
from consa.behaviour.record import Behaviour
from consa.errors import ConsaError
from consa.evaluation.table import Table
from consa.files import JsonObject, read_json, read_text
from consa.runs.evaluation import SETTINGS
from consa.runs.folder import CONFIG
from consa.runs.summary import Summary
from consa.runs.verdict import verdict

MAX_FILE_BYTES = 2**30
FILES = ("allocation.json", "summary.json", "eval.json", "bench.json")
WANTED = "a folder of consa learn, adapt, eval or bench, the file of an allocation, or a published allocation"


@dataclass(frozen=True, kw_only=True)
class Run:
    """What a folder of `consa learn`, `adapt`, `eval` or `bench` holds, or one allocation; missing files are None.

    Attributes:
        name: of the folder or file.
        folder: that it is, if it is one.
        allocation: from allocation.json.
        summary: from summary.json.
        measured: the table in `summary`.
        history: the steps of metrics.jsonl.
        evaluation: from eval.json.
        benchmark: from bench.json.
        behaviour: from behaviour.safetensors.
        adapted: whether it is a run of `consa adapt`.
    """

    name: str
    folder: Path | None = None
    allocation: Allocation | None = None
    summary: Summary | None = None
    measured: Table | None = None
    history: list[dict[str, float]] = field(default_factory=list[dict[str, float]])
    evaluation: Table | None = None
    benchmark: JsonObject | None = None
    behaviour: Behaviour | None = None
    adapted: bool = False

    @classmethod
    def read(cls, path: Path) -> Run:
        """Read a folder, the file of an allocation, or a published allocation.

        Raises:
            ConsaError: there is nothing to report, or a file is damaged.
        """
        if not os.path.exists(path):
            path = published.resolve(path)
        if os.path.isfile(path):
            return cls(name=path.stem, allocation=Allocation.load(path))
        if not os.path.exists(path):
            if str(path) in rules.RULES:
                raise ConsaError(f"{path} is a rule, which has no file; `consa eval` measures allocations beside rules")
            raise ConsaError(f"{path} does not exist; name {WANTED}")
        if not any(os.path.exists(path / name) for name in FILES):
            raise ConsaError(f"{path} holds none of {', '.join(FILES)}; name {WANTED}")
        name = path.resolve().name
        allocation, behaviour = path / "allocation.json", path / "behaviour.safetensors"
        summary, evaluation = (_read_json(path / file) for file in ("summary.json", "eval.json"))
        if summary and "rows" in summary and "table" not in summary:
            raise ConsaError(
                f"{path / 'summary.json'} was written by an older version of consa; make the run again in a new folder"
            )
        with naming(name):
            return cls(
                name=name,
                folder=path,
                allocation=Allocation.load(allocation) if allocation.exists() else None,
                summary=cast(Summary, summary) if summary is not None else None,
                measured=None if summary is None else Table.from_record(summary["table"]),
                history=_read_lines(path / "metrics.jsonl"),
                evaluation=None if evaluation is None else Table.from_record(evaluation),
                benchmark=_read_json(path / "bench.json"),
                behaviour=Behaviour.load(behaviour) if behaviour.exists() else None,
                adapted="adapt" in (_read_json(path / CONFIG) or {}),
            )

    @property
    def verdict(self) -> str | None:
        """Of a run of `consa learn`: the learned allocation against the best rule, in one line."""
        return verdict(self.summary) if self.summary and "learn" in self.summary else None

    @property
    def model(self) -> str | None:
        """Name of the model, if a record says it."""
        for record in (self.summary, self.evaluation and self.evaluation.how):
            if record:
                model: Any = cast(Mapping[str, Any], record).get("model")
                return Path(str(model.get("model") if isinstance(model, dict) else model)).name
        named = self.allocation.provenance.get("model") if self.allocation else None
        return None if named is None else str(named)


def is_unfinished(path: Path) -> bool:
    """Whether a folder holds the settings of a run and not yet its results."""
    begun, ended = (CONFIG, SETTINGS), ("summary.json", "eval.json", "bench.json")
    return any(os.path.exists(path / n) for n in begun) and not any(os.path.exists(path / n) for n in ended)


@contextmanager
def naming(name: str) -> Iterator[None]:
    """Name the run in errors: files of other programs or versions may lack whatever the page shows."""
    try:
        yield
    except ConsaError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConsaError(
            f"the records of run {name!r} are not as consa writes them ({type(error).__name__}: {error}); make the run"
            " again"
        ) from error


def _read_json(path: Path) -> JsonObject | None:
    return read_json(path, max_bytes=MAX_FILE_BYTES) if path.exists() else None


def _read_lines(path: Path) -> list[dict[str, float]]:
    lines = read_text(path, max_bytes=MAX_FILE_BYTES).splitlines() if path.exists() else []
    try:
        records = [json.loads(line) for line in lines]
    except (ValueError, RecursionError) as error:
        raise ConsaError(f"{path} is damaged: not JSON ({error})") from error
    for record in records:
        if not isinstance(record, dict):
            raise ConsaError(f"{path} is damaged: it should hold objects, not {type(record).__name__}")
    return records
