"""On a CUDA device: the Triton kernels equal the reference, and repeat bit for bit."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from consa.attention.branches import fused_for
from tests.kernel_cases import LARGE, SMALL, Case, check, check_full, draw, run, run_full

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("one_pass", [True, False], ids=["one_pass", "full_given"])
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)],
    ids=str,
)
def test_kernels_equal_the_reference(case: Case, dtype: torch.dtype, tolerance: float, one_pass: bool):
    if fused_for(*draw(case, DEVICE, dtype)[:3], None) is None:
        pytest.skip("this device has too little shared memory for the kernels")
    check(case, DEVICE, dtype, one_pass, tolerance)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_kernels_repeat_bit_for_bit(case: Case):
    check_full(case, DEVICE, torch.bfloat16, 1e-2)
    first, again = (run_full(case, DEVICE, torch.bfloat16) for _ in range(2))
    no_library = case._replace(z=tuple(0.5 if z == 1 else z for z in case.z))  # whose backward pass may not
    first += run(no_library, DEVICE, torch.bfloat16, one_pass=True)
    again += run(no_library, DEVICE, torch.bfloat16, one_pass=True)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)
