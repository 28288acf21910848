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
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout, "no case ran"


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
@pytest.mark.parametrize(
    ("programs", "rows", "keys", "parts"),
    [
        (1024, 96, 516, 9),  # one block each
        (1024, 384, 516, 2),
        (1024, 768, 516, 1),
        (1024, 2000, 516, 1),
        (0, 1, 516, 1),
        (1024, 6, 4, 1),  # less than a block
        (1024, 6, 4100, 22),  # of 3 blocks each: 22 are as fast as 32
        (1024, 2, 2**30, 32),
    ],
)
def test_parts_of_decoding(programs: int, rows: int, keys: int, parts: int):
    """They are no more than are wanted, than there are blocks, or than make a program's share smaller."""
    from consa.serving.kernels import Blocks, num_parts

    assert num_parts(Blocks(16, 64, 4, 1, programs), rows, keys) == parts
