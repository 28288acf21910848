"""The kernels over an engine's pages equal the reference, by Triton's interpreter."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_paged_kernels_equal_the_reference():
    """In a process of its own: whether kernels are compiled or interpreted is decided at the import of triton."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore:::triton", "-m", "tests.serving.kernel_cases"],
        cwd=Path(__file__).parent.parent,
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout, "no case ran"
