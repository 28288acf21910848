"""Records of where a result came from: hardware, versions, and how two records of settings differ."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from pathlib import Path

import consa


def environment() -> dict[str, object]:
    """Describe the machine and the software of this process."""
    return {"hardware": hardware(), "versions": versions()}


def versions() -> dict[str, str]:
    """Versions of Python, consa and the libraries that compute results."""
    found = {"python": platform.python_version(), "consa": consa.__version__}
    return found | {name: importlib.metadata.version(name) for name in ("torch", "transformers", "numpy")}


def hardware() -> str:
    """Name of the GPU, or of the CPU with the number of threads that torch uses."""
    import torch

    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:  # Linux; elsewhere the platform module knows
        name = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        name = None
    return f"{name[1] if name else platform.processor() or platform.machine()}, {torch.get_num_threads()} threads"


def first_difference(before: object, now: object, name: str = "") -> str:
    """Describe the first setting in which two records differ, with both values; "" if they are equal."""
    if isinstance(before, dict) and isinstance(now, dict):
        for key in sorted(before.keys() | now.keys()):
            difference = first_difference(before.get(key), now.get(key), f"{name}.{key}" if name else key)
            if difference:
                return difference
        return ""
    return "" if before == now else f"{name} was {before!r}, now {now!r}"
