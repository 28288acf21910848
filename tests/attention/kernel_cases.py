"""Test cases of the Triton kernels, for GPUs and Triton's interpreter; run as a script, the small ones interpreted."""

from __future__ import annotations

import os
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor

from consa.attention import ops
from consa.attention.ops import hybrid_attention
from consa.attention.reference import reference_attention
from consa.attention.rows import Rows
from consa.cache import layer as cache_layer
from consa.cache.attend import cached_attention
from consa.cache.layer import STORAGE, HybridLayer, NewKeys
from consa.cache.split import HeadSplit
from consa.cache.static import StaticHybridLayer
from tests.compare import assert_close


class Case(NamedTuple):
    """z: gates of all rows, sequence by sequence; there are `len(z) / batch` KV heads."""

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
    """Fill uninitialised memory with NaN."""

    def allocated(*args: Any, **kwargs: Any) -> Tensor:
        x = allocate(*args, **kwargs)
        return x.fill_(torch.nan) if x.is_floating_point() and not x.is_meta else x

    return allocated


def run(case: Case, device: torch.device, dtype: torch.dtype, one_pass: bool) -> list[Tensor]:
    """Output, dq, dk, dv and dz of the kernels."""
    from consa.attention.triton import autograd

    q, k, v, upstream = draw(case, device, dtype)
    z = torch.tensor(case.z).reshape(case.batch, -1)
    gates = z.to(device).requires_grad_()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    options = {"window": case.window, "num_sink_tokens": case.num_sink_tokens, "scaling": 0.7 * case.head_dim**-0.5}
    with (
        mock.patch.object(autograd, "ONE_PASS_KEYS", 10**6 if one_pass else 0),
        mock.patch("torch.empty_like", poisoned(torch.empty_like)),
        mock.patch.object(Tensor, "new_empty", poisoned(Tensor.new_empty)),
    ):
        out = hybrid_attention(*leaves, Rows.sort(z, gates), **options)
        out.backward(upstream)
    zeros = torch.zeros_like(gates)
    return [out.detach(), *(x.grad for x in leaves), zeros if gates.grad is None else gates.grad]


def check(case: Case, device: torch.device, dtype: torch.dtype, one_pass: bool, tolerance: float) -> None:
    """Compare the kernels with the reference in float64, forward and backward."""
    out, *gradients = run(case, device, dtype, one_pass)
    *inputs, upstream = (x.double() for x in draw(case, device, dtype))
    z = torch.tensor(case.z, device=device).reshape(case.batch, -1)
    leaves = [x.detach().requires_grad_() for x in (*inputs, z.double())]
    wanted = reference_attention(
        *leaves, window=case.window, num_sink_tokens=case.num_sink_tokens, scaling=0.7 * case.head_dim**-0.5
    )
    wanted.backward(upstream)
    assert_close(out, wanted, tolerance, "output")
    for name, mine, leaf in zip("qkv", gradients, leaves, strict=False):
        assert_close(mine, leaf.grad, 2 * tolerance, f"d{name}", floor=0.1)
    mixed = (z > 0) & (z < 1)
    # A gate's gradient sums over a whole row: the rounding of each output adds up.
    assert_close(gradients[3], torch.where(mixed, leaves[3].grad, 0), 5 * tolerance, "dz", floor=1.0)


def run_full(case: Case, device: torch.device, dtype: torch.dtype) -> list[Tensor]:
    """Output, dq, dk and dv of deterministic full attention."""
    *inputs, upstream = draw(case, device, dtype)
    leaves = [x.detach().requires_grad_() for x in inputs]
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out = ops.full_attention(*leaves, scaling=0.7 * case.head_dim**-0.5)
        out.backward(upstream)
    finally:
        torch.use_deterministic_algorithms(False)
    return [out.detach(), *(x.grad for x in leaves)]


def check_full(case: Case, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """Compare deterministic full attention with the reference in float64."""
    *inputs, upstream = (x.double() for x in draw(case, device, dtype))
    leaves = [x.detach().requires_grad_() for x in inputs]
    z = torch.ones(1, leaves[1].shape[1], device=device)
    wanted = reference_attention(*leaves, z, window=1, num_sink_tokens=0, scaling=0.7 * case.head_dim**-0.5)
    wanted.backward(upstream)
    truth = [wanted, *(x.grad for x in leaves)]
    for name, mine, right in zip(("out", "dq", "dk", "dv"), run_full(case, device, dtype), truth, strict=True):
        assert_close(mine, right, 2 * tolerance, f"full attention's {name}", floor=0.1)


class Decoding(NamedTuple):
    """Contents of a layer's cache, and the size of its heads."""

    batch: int
    group: int
    head_dim: int
    full: tuple[int, ...]
    num_heads: int
    window: int
    num_sink_tokens: int
    prompt: int
    room: int | None  # tokens, of a static cache

    def split(self) -> HeadSplit:
        sliding = tuple(head for head in range(self.num_heads) if head not in self.full)
        return HeadSplit(self.full, sliding, self.window, self.num_sink_tokens)


SMALL_DECODING = [
    Decoding(2, 2, 16, (0, 2), 4, 5, 2, 3, None),  # a ring that fills and turns
    Decoding(1, 3, 24, (), 2, 1, 0, 1, None),  # the new token alone
    Decoding(2, 1, 16, (0, 1), 2, 4, 1, 30, 64),
    Decoding(3, 2, 16, (1,), 3, 20, 4, 26, 40),
]
LARGE_DECODING = [
    Decoding(4, 2, 128, (1, 5), 8, 512, 4, 5000, 8192),
    Decoding(1, 3, 64, (0,), 3, 128, 4, 1023, None),
    Decoding(2, 8, 256, (), 2, 700, 0, 900, 1024),
    Decoding(1, 5, 96, (0, 1, 2), 3, 64, 4, 20000, 30000),
]


def decoded(
    case: Decoding, device: torch.device, dtype: torch.dtype, *, kernels: bool, as_graph: bool = False
) -> list[Tensor]:
    """Outputs of some steps after a prompt, and the cache after them."""
    generator = torch.Generator().manual_seed(case.prompt)

    def one(heads: int, tokens: int) -> Tensor:
        x = torch.randn(case.batch, tokens, heads + 1, case.head_dim, generator=generator)
        return x.to(device, dtype)[:, :, 1:].transpose(1, 2)

    layer: Any = HybridLayer(case.split())
    if case.room is not None:
        layer = StaticHybridLayer(case.split(), case.room)
    prompt = one(case.num_heads, case.prompt), one(case.num_heads, case.prompt)
    layer.update(*prompt)
    layer.write(*prompt, None)
    if not kernels:
        layer.has_kernels = lambda softcap: False

    def step(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        layer.update(k, v)
        return cached_attention(q, NewKeys(layer, k, v), None, scaling=0.3, softcap=None)

    heads = (case.num_heads * case.group, case.num_heads, case.num_heads)
    inputs = [one(count, 1) for count in heads]
    found = [step(*inputs)]
    graph = torch.cuda.CUDAGraph() if as_graph else None
    if graph:
        with torch.cuda.graph(graph):
            out = step(*inputs)
    for _ in range(8):
        if graph:
            for there, new in zip(inputs, [one(count, 1) for count in heads], strict=True):
                there.copy_(new)
            graph.replay()
            found.append(out.clone())
        else:
            found.append(step(*[one(count, 1) for count in heads]))
    stored = [getattr(layer, name) for name in STORAGE]
    return found + [x[:, :, : layer.length] for x in stored if x is not None]


def check_decoding(case: Decoding, device: torch.device, dtype: torch.dtype, tolerance: float) -> None:
    """Compare the decoding kernels with the portable path in float64."""
    mine = decoded(case, device, dtype, kernels=True)
    for place, (x, wanted) in enumerate(zip(mine, decoded(case, device, torch.float64, kernels=False), strict=True)):
        assert_close(x, wanted, tolerance, f"result {place} of {case}", floor=0.1)


def interpret() -> None:
    """Run the small cases without a GPU; the first failure raises."""
    os.environ["TRITON_INTERPRET"] = "1"  # before the first import of triton
    from triton.runtime import interpreter

    patch = interpreter._patch_lang_tensor

    def patched(tensor: Any, scope: Any) -> None:
        patch(tensor, scope)  # its int() of an array of one element is an error since numpy 2.4
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    interpreter._patch_lang_tensor = patched
    from consa.attention.triton import autograd, decode, launch

    for module in (ops, cache_layer):
        module.kernels_for = lambda *tensors: autograd
    decode.CHUNKS = (16, 32)
    launch.BLOCKS_FLOAT32 = {128: launch.Blocks(32, 16, 4, 1)}
    for case in SMALL:
        for one_pass in (True, False):
            if one_pass or any(0 < z < 1 for z in case.z):
                print(case, "in one pass" if one_pass else "with FA given", flush=True)
                check(case, torch.device("cpu"), torch.float32, one_pass, 2e-5)
    for case in SMALL[:2]:
        check_full(case, torch.device("cpu"), torch.float32, 2e-5)
    check(SMALL[0], torch.device("cpu"), torch.float16, True, 5e-3)
    for case in SMALL_DECODING:
        print(case, flush=True)
        check_decoding(case, torch.device("cpu"), torch.float32, 2e-5)


if __name__ == "__main__":
    interpret()
