"""Where a result came from, as far as a machine can tell."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path
from typing import Any

import consa


def versions() -> dict[str, str]:
    """Versions of what computes: Python, consa and the libraries whose numbers end up in a result."""
    found = {"python": platform.python_version(), "consa": consa.__version__}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}


def hardware() -> str:
    """What computes: the GPU, or the CPU and how many threads torch uses on it."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:  # Linux; elsewhere the platform module knows
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return f"{name[1] if name else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def first_difference(found: Any, wanted: Any, name: str = "") -> str:
    """The first setting in which two records differ, with both values, or ""."""
    if isinstance(found, dict) and isinstance(wanted, dict):
        for key in sorted(found.keys() | wanted.keys()):
            difference = first_difference(found.get(key), wanted.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return ""
    return "" if found == wanted else f"{name} was {found!r}, now {wanted!r}"
