"""On a CUDA device: the Triton kernels equal the reference, and repeat bit for bit."""

from __future__ import annotations

import importlib.util

import pytest
import torch

from consa.attention.ops import kernels_for
from tests.attention.kernel_cases import (
    LARGE,
    LARGE_DECODING,
    SMALL,
    SMALL_DECODING,
    Case,
    Decoding,
    check,
    check_decoding,
    check_full,
    decoded,
    draw,
    run,
    run_full,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
    pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="needs triton"),
]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("one_pass", [True, False], ids=["one_pass", "full_given"])
@pytest.mark.parametrize("case", SMALL + LARGE, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)], ids=str
)
def test_kernels_equal_the_reference(case: Case, dtype: torch.dtype, tolerance: float, one_pass: bool):
    if kernels_for(*draw(case, DEVICE, dtype)[:3], None) is None:
        pytest.skip("this device has too little shared memory for the kernels")
    check(case, DEVICE, dtype, one_pass, tolerance)


@pytest.mark.parametrize("case", LARGE, ids=str)
def test_kernels_repeat_bit_for_bit(case: Case):
    check_full(case, DEVICE, torch.bfloat16, 1e-2)
    first, again = (run_full(case, DEVICE, torch.bfloat16) for _ in range(2))
    first += run(case, DEVICE, torch.bfloat16, one_pass=True)
    again += run(case, DEVICE, torch.bfloat16, one_pass=True)
    for one, two in zip(first, again, strict=True):
        assert torch.equal(one, two)


@pytest.mark.parametrize("case", SMALL_DECODING + LARGE_DECODING, ids=str)
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3), (torch.float32, 1e-4)], ids=str
)
def test_decoding_equals_the_portable_path(case: Decoding, dtype: torch.dtype, tolerance: float):
    check_decoding(case, DEVICE, dtype, tolerance)
    repeats = [decoded(case, DEVICE, dtype, kernels=True) for _ in range(2)]
    if case.room is not None:
        repeats.append(decoded(case, DEVICE, dtype, kernels=True, as_graph=True))
    for first, *others in zip(*repeats, strict=True):
        assert all(torch.equal(first, other) for other in others)
