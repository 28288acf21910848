"""Allocations that come with consa, learned on real models: `smollm2-135m/kv_head-0.733` is the name of one."""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "allocations"


def names() -> list[str]:
    """All of them: the model, then granularity and sparsity."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.json"))


def resolve(name: str | Path) -> Path:
    """The path itself; of a run's folder its allocation; where there is nothing, what is published under that name."""
    path = Path(name)
    if os.path.isfile(path / "allocation.json"):
        return path / "allocation.json"
    if not os.path.exists(path) and path.as_posix() in names():
        return FOLDER / f"{path}.json"
    return path
