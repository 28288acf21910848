"""The Triton kernels equal the reference, by Triton's interpreter; tests/gpu has what needs a device."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consa.attention.ops import kernels_for


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton")
def test_kernels_equal_the_reference():
    """In a process of its own: whether kernels are compiled or interpreted is decided at the import of triton."""
    done = subprocess.run(
        [sys.executable, "-W", "ignore:::triton", "-m", "tests.attention.kernel_cases"],
        cwd=Path(__file__).parents[2],
        env=os.environ | {"TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        timeout=250,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout, "no case ran"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_elsewhere_attention_takes_the_portable_path(dtype: torch.dtype):
    q = torch.zeros(1, 1, 1, 64, dtype=dtype)
    assert kernels_for(q, q, q, None) is None
    assert "triton" not in sys.modules or "consa.attention.triton.autograd" not in sys.modules
