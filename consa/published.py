"""Allocations that ship with consa, learned on real models, by names like `smollm2-135m/kv_head-0.733`."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "allocations"


def names() -> list[str]:
    """All names, each `MODEL/GRANULARITY-SPARSITY`."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.json"))


def resolve(name: str | Path) -> Path:
    """The file that `name` means: a file, the allocation in a run's folder, or a published allocation."""
    path = Path(name)
    if os.path.isfile(path / "allocation.json"):
        return path / "allocation.json"
    if not os.path.exists(path) and path.as_posix() in names():
        return FOLDER / f"{path}.json"
    return path
