"""What the Triton kernels are tested on, wherever they run; by itself, the small cases under Triton's interpreter."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from consa.attention import branches, hybrid
from consa.attention.hybrid import Rows, hybrid_attention
from consa.attention.reference import reference_attention
from tests.compare import assert_close


class Case(NamedTuple):
    """z: of all rows, sequence by sequence; there are `len(z) / batch` KV heads."""

    batch: int
    group: int
    queries: int
    keys: int
    head_dim: int
    window: int
    num_sink_tokens: int
    z: tuple[float, ...]


SMALL = [
    Case(1, 3, 53, 53, 16, 12, 4, (0.3, 0.0, 1.0)),  # every kind of row, packed queries not a power of 2
    Case(2, 2, 21, 50, 24, 7, 3, (0.7, 0.0, 1.0, 0.01)),  # more keys than queries, padded head_dim
    Case(2, 1, 33, 33, 16, 40, 0, (0.5, 0.6, 0.99, 1e-6)),  # all open, window beyond the length
    Case(1, 2, 37, 37, 16, 1, 0, (0.4, 0.0)),  # the query's own key alone
    Case(1, 1, 36, 36, 16, 5, 19, (0.4, 0.0)),  # sinks of more than one block
    Case(1, 4, 18, 18, 16, 3, 99, (0.4, 0.0)),  # sinks beyond the length
    Case(3, 2, 1, 1, 16, 1, 0, (0.4, 0.0, 1.0)),
    Case(1, 2, 1, 47, 16, 9, 2, (0.4, 0.0, 1.0)),
    Case(2, 1, 49, 61, 16, 10, 2, (0.0, 0.0)),  # SWA alone
]
LARGE = [
    Case(2, 3, 1037, 1037, 64, 128, 4, (0.3, 0.0, 1.0, 0.9, 0.0, 1.0)),
    Case(1, 2, 700, 1500, 128, 63, 0, (0.7, 0.0, 1.0, 0.01)),
    Case(2, 1, 2048, 2048, 64, 256, 4, (0.5, 0.6, 0.99, 1e-6)),
    Case(1, 5, 515, 515, 96, 100, 33, (0.4, 0.0, 0.5)),
    Case(1, 2, 333, 333, 256, 64, 1, (0.4, 0.0, 1.0)),
    Case(1, 8, 900, 900, 128, 300, 4, (0.2, 0.0)),
    Case(1, 4, 3000, 3001, 128, 512, 4, (0.0, 0.0)),
]


def draw(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """q, k, v and the output's gradient, as views that are neither contiguous nor dense."""
    generator = torch.Generator().manual_seed(case.queries)
    heads = len(case.z) // case.batch

    def one(heads: int, tokens: int) -> Tensor:
        x = torch.randn(case.batch, tokens, heads + 1, case.head_dim, generator=generator)
        return x.to(device, dtype)[:, :, 1:].transpose(1, 2)

    q, upstream = (one(heads * case.group, case.queries) for _ in range(2))
    return q, one(heads, case.keys), one(heads, case.keys), upstream


def poisoned(allocate: Any) -> Any:
    """What comes uninitialised is NaN."""

    def allocated(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() and not x.is_meta else x

    return allocated


def run(case: Case, device: torch.device, dtype: torch.dtype, one_pass: bool) -> list[Tensor]:
    """Output, dq, dk, dv and dz of the kernels."""
    from consa.attention import fused

    q, k, v, upstream = draw(case, device, dtype)
    z = torch.tensor(case.z).reshape(case.batch, -1)
    gates = z.to(device).requires_grad_()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {
        "window": case.window,
        "num_sink_tokens": case.num_sink_tokens,
        "scaling": 0.7 * case.head_dim**-0.5,
    }
    with (
        mock.patch.object(fused, "MIX_IN_ONE_PASS", one_pass),
        mock.patch("torch.empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        out = hybrid_attention(*leaves, Rows.sort(z, gates), **options)
        out.backward(upstream)
    zeros = torch.zeros_like(gates)
    return [out.detach(), *(x.grad for x in leaves), zeros if gates.grad is None else gates.grad]


def check(case: Case, device: torch.device, dtype: torch.dtype, one_pass: bool, tolerance: float) -> None:
    """The kernels against the reference in float64, forward and backward."""
    out, *gradients = run(case, device, dtype, one_pass)
    *inputs, upstream = (x.double() for x in draw(case, device, dtype))
    z = torch.tensor(case.z, device=device).reshape(case.batch, -1)
    leaves = [x.detach().requires_grad_() for x in (*inputs, z.double())]
    wanted = reference_attention(
        *leaves,
        window=case.window,
        num_sink_tokens=case.num_sink_tokens,
        scaling=0.7 * case.head_dim**-0.5,
    )
    wanted.backward(upstream)
    assert_close(out, wanted, tolerance, "output")
    for name, mine, leaf in zip("qkv", gradients, leaves, strict=False):
        assert_close(mine, leaf.grad, 2 * tolerance, f"d{name}", floor=0.1)
    mixed = (z > 0) & (z < 1)
    # A gate's gradient sums over a whole row: the rounding of each output adds up.
    assert_close(gradients[3], torch.where(mixed, leaves[3].grad, 0), 5 * tolerance, "dz", floor=1.0)


def run_full(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output, dq, dk and dv of full attention that is to repeat bit for bit."""
    *inputs, upstream = draw(case, device, dtype)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out = branches.full_attention(*leaves, scaling=0.7 * case.head_dim**-0.5)
        out.backward(upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    return [out.detach(), *(x.grad for x in leaves)]


def check_full(case: Case, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """The same against the reference in float64."""
    *inputs, upstream = (x.double() for x in draw(case, device, dtype))
    leaves = [x.detach().requires_grad_() for x in inputs]
    z = torch.ones(1, leaves[1].shape[1], device=device)
    wanted = reference_attention(*leaves, z, window=1, num_sink_tokens=0, scaling=0.7 * case.head_dim**-0.5)
    wanted.backward(upstream)
    truth = [wanted, *(x.grad for x in leaves)]
    for name, mine, right in zip(
        ("out", "dq", "dk", "dv"), run_full(case, device, dtype), truth, strict=True
    ):
        assert_close(mine, right, 2 * tolerance, f"full attention's {name}", floor=0.1)


def interpret() -> None:
    """The small cases without a GPU; ends with an error at the first that fails."""
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # its int() of an array of one element is an error since numpy 2.4
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    from consa.attention import fused, kernels

    for module in (branches, hybrid):
        module.fused_for = lambda *tensors: fused
    kernels.BLOCKS_FLOAT32, kernels.SINK_CHUNK = kernels.Blocks(32, 16, 4, 1), 64
    for case in SMALL:
        for one_pass in (True, False):
            if one_pass or any(0 < z < 1 for z in case.z):
                print(case, "in one pass" if one_pass else "with FA given", flush=True)
                check(case, torch.device("cpu"), torch.float32, one_pass, 2e-5)
    for case in SMALL[:2]:
        check_full(case, torch.device("cpu"), torch.float32, 2e-5)
    check(SMALL[0], torch.device("cpu"), torch.float16, True, 5e-3)


if __name__ == "__main__":
    interpret()
