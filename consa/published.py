"""Allocations that ship with consa, learned on real models, by names like `smollm2-135m/kv_head-0.733`.

Those of Qwen2.5-Coder were learned on weights of 4 bits. They apply to weights of the same model in any precision.
"""

from __future__ import annotations

import os
from pathlib import Path

FOLDER = Path(__file__).parent / "allocations"
MODELS = {
    "smollm2-135m": ("llama", (30, 3)),
    "qwen2.5-coder-0.5b": ("qwen2", (24, 2)),
    "qwen2.5-coder-1.5b": ("qwen2", (28, 2)),
}
"""Model -> its model_type in transformers, and (layers, KV heads)."""


def fitting(model_type: str, shape: tuple[int, int]) -> list[str]:
    """The names whose model is of this type and shape, (layers, KV heads)."""
    return [name for name in names() if MODELS[name.partition("/")[0]] == (model_type, shape)]


def names() -> list[str]:
    """All names, each `MODEL/GRANULARITY-SPARSITY`, with `-windowN` where several windows of N tokens were learned."""
    return sorted(path.relative_to(FOLDER).with_suffix("").as_posix() for path in FOLDER.glob("*/*.json"))


def alike(name: str) -> list[str]:
    """The names of the same model; of a model that has none, the models that have some, each as `MODEL/...`."""
    same = [known for known in names() if known.partition("/")[0] == name.partition("/")[0]]
    return same or sorted({known.partition("/")[0] + "/..." for known in names()})


def resolve(name: str | Path) -> Path:
    """The file that `name` means: a file, the allocation in a run's folder, or a published allocation."""
    path = Path(name)
    if os.path.isfile(path / "allocation.json"):
        return path / "allocation.json"
    if not os.path.exists(path) and path.as_posix() in names():
        return FOLDER / f"{path}.json"
    return path
