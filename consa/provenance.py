"""Where a result came from, as far as a machine can tell."""

from __future__ import annotations

import importlib.metadata
import platform


def versions() -> dict[str, str]:
    """Versions of what computes: Python, consa and the libraries whose numbers end up in a result."""
    found = {"python": platform.python_version()}
    for package in ("consa", "torch", "transformers", "numpy"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # run from a checkout that was not installed
            found[package] = "unknown"
    return found
