"""Check the files of a command: are they whole, and do two runs produce the same ones?"""

from __future__ import annotations

import csv
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy

from consa import Allocation
from consa.files import is_sealed, read_sealed
from consa.model.convert import verify


def results(folder: Path) -> dict[str, bytes]:
    """All files under final names, without measured seconds."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder)
        if path.is_dir() or any(part.startswith(".") for part in name.parts):
            continue
        content = path.read_bytes()
        if path.suffix == ".json" and path.parent.name not in ("cells", "model") and name.name != "consa.json":
            content = json.dumps(_timeless(json.loads(content))).encode()
        elif path.name == "checkpoint.sealed":  # in any order, as Rust writes maps
            saved = safetensors.numpy.load(read_sealed(path) or b"")
            content = repr([(name, saved[name].tobytes()) for name in sorted(saved)]).encode()
        elif path.suffix == ".csv":
            rows = csv.DictReader(io.StringIO(content.decode()))
            content = repr([{k: v for k, v in row.items() if k != "seconds"} for row in rows]).encode()
        elif path.suffix == ".md":
            content = re.sub(rb" (trained|learned|measured) for \d+ s|\nfor \d+ s", b"", content)
        found[str(name)] = content
    return found


def _timeless(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _timeless(part) for key, part in value.items() if key != "seconds"}
    return [_timeless(part) for part in value] if isinstance(value, list) else value


def broken(folder: Path) -> str:
    """The first file under a final name in a trial's folder that is not whole, or ""."""
    for path in sorted(folder.rglob("*")):
        if any(part.startswith(".") for part in path.relative_to(folder).parts) or path.is_dir():
            continue
        try:
            _read(path)
        except Exception as error:
            return f"half-written: {path.relative_to(folder)}: {type(error).__name__}: {error}"
    return ""


def _read(path: Path) -> None:
    content = path.read_bytes()
    if path.name == "consa.json":
        verify(path.parent)
    elif path.name == "allocation.json" or path.parent.name == "allocations":
        Allocation.load(path)
    elif path.suffix == ".sealed" or path.parent.name in ("cells", "sequences"):
        assert is_sealed(path)
    elif path.suffix == ".json":
        json.loads(content)
    elif path.suffix == ".jsonl":
        assert content.endswith(b"\n") and [json.loads(line) for line in content.splitlines()]
    elif path.suffix == ".npy":
        np.load(path)
    elif path.suffix == ".safetensors":
        with safetensors.safe_open(path, framework="np") as file:
            assert [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (no mapping)
    elif path.suffix == ".png":
        assert content.startswith(b"\x89PNG") and content.endswith(b"IEND\xaeB`\x82")
    elif path.suffix in (".md", ".csv"):
        assert content.endswith(b"\n")
