"""Attention through the Triton kernels: hybrid and sliding-window, with their gradients, and decoding.

Imported only where the kernels run; `ops.kernels_for` says where that is.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from consa.attention.portable import full_attention, must_repeat
from consa.attention.rows import Rows
from consa.attention.triton import kernels, launch
from consa.attention.triton.decode import decode
from consa.attention.triton.launch import Problem

__all__ = ["decode", "hybrid_attention", "sliding_attention"]

# The library's FA takes a fifth less time than ours, but its rows have to be taken out first, which costs as much as so
# many keys would. Up to this share of open rows x keys, one pass of ours is faster (benchmarks/attention.py).
ONE_PASS_KEYS = 8192


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, num_sink_tokens: int, scaling: float
) -> Tensor:
    """As `portable.sliding_attention`."""
    order = torch.arange(k.shape[0] * k.shape[1], device=q.device)
    problem = _problem(q, k, window, num_sink_tokens, scaling)
    return _Hybrid.apply(q, k, v, None, None, order, 0, 0, problem)


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, window: int, num_sink_tokens: int, scaling: float
) -> Tensor:
    """As `portable.hybrid_attention`, if some row needs SWA.

    In one pass, rows on FA alone are mixed ones whose gate is 1.
    """
    problem = _problem(q, k, window, num_sink_tokens, scaling)
    num_open = rows.num_full + rows.num_mixed
    if must_repeat(q, k, v) or num_open * problem.keys <= ONE_PASS_KEYS * len(rows.order):
        return _Hybrid.apply(q, k, v, rows.gates, None, rows.order, 0, num_open, problem)
    if rows.num_mixed == len(rows.order):  # all rows, which are in order already
        given = full_attention(q, k, v, scaling=scaling)
    else:
        *taken, q, k, v = _Take.apply(q, k, v, rows.order[:num_open], rows.num_full)
        given = full_attention(*taken, scaling=scaling)
    return _Hybrid.apply(q, k, v, rows.gates, given, rows.order, rows.num_full, num_open, problem)


def _problem(q: Tensor, k: Tensor, window: int, num_sink_tokens: int, scaling: float) -> Problem:
    sinks = min(num_sink_tokens, k.shape[2])
    return Problem(
        k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], window, sinks, scaling
    )


class _Hybrid(torch.autograd.Function):
    """The rows that need SWA, beside those whose FA is given.

    Of the sorted rows, FA of the first `num_full` goes into the result as it is; those up to `num_open` are mixed. If
    FA was not computed elsewhere, as `given`, `(num_open, heads * group, queries, head_dim)`, they are so in one pass.
    Gates are of all rows. The gradients of q, k and v at rows on FA alone are left to `_Take`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor | None,
        given: Tensor | None,
        order: Tensor,
        num_full: int,
        num_open: int,
        problem: Problem,
    ) -> Tensor:
        q, k, v = (_dense(x) for x in (q, k, v))
        out = torch.empty_like(q)
        if given is not None and num_full:
            _Places.of(order[:num_full], problem.kv_heads).put(out, given[:num_full])
        ctx.mode = (
            kernels.SLIDING if gates is None else kernels.ONE_PASS if given is None else kernels.GIVEN_FULL
        )
        mixed = None if given is None else given[num_full:]
        state = launch.forward(
            q, k, v, out, order[num_full:], num_open - num_full, gates, mixed, problem, ctx.mode.value,
            training=any(ctx.needs_input_grad),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, gates, order, out, *state)
        ctx.num_full, ctx.problem = num_full, problem
        ctx.given = None if given is None else torch.empty_like(given, device="meta")
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        q, k, v, gates, order, out, lse, difference = ctx.saved_tensors
        dout = _dense(dout)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dgiven = mixed = None
        num_full = ctx.num_full
        if ctx.given is not None:
            dgiven = torch.empty_like(ctx.given, device=q.device)
            if num_full:
                dgiven[:num_full] = _Places.of(order[:num_full], ctx.problem.kv_heads).take(dout)
            mixed = dgiven[num_full:]
        dgates = launch.backward(
            q, k, v, out, dout, dq, dk, dv, order[num_full:], gates, mixed, lse, difference, ctx.problem,
            ctx.mode.value,
        )  # fmt: skip
        return dq, dk, dv, dgates, dgiven, None, None, None, None


class _Take(torch.autograd.Function):
    """Copies of some rows of q, k and v, and q, k and v themselves for the others.

    The copies' gradients become the rows' own in place, those of the first `num_alone` rows, or are added to them.
    Taken by an index, they would come as another three tensors of full size, zero elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, num_alone: int):
        ctx.rows, ctx.num_alone = _Places.of(rows, k.shape[1]), num_alone
        return *(ctx.rows.take(x) for x in (q, k, v)), *(x.view_as(x) for x in (q, k, v))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        alone, shared = ctx.rows.split(ctx.num_alone)
        for taken, whole in zip(gradients[:3], gradients[3:], strict=True):
            alone.put(whole, taken[: ctx.num_alone])
            if len(taken) > ctx.num_alone:
                shared.put(whole, shared.take(whole) + taken[ctx.num_alone :])
        return *gradients[3:], None, None


class _Places(NamedTuple):
    """Where some rows are in tensors `(batch, heads, tokens, head_dim)`."""

    sequences: Tensor
    heads: Tensor
    kv_heads: int

    @classmethod
    def of(cls, rows: Tensor, kv_heads: int) -> _Places:
        return cls(rows // kv_heads, rows % kv_heads, kv_heads)

    def split(self, count: int) -> tuple[_Places, _Places]:
        """The first `count` and the others."""
        first, rest = slice(count), slice(count, None)
        return self._some(first), self._some(rest)

    def _some(self, rows: slice) -> _Places:
        return _Places(self.sequences[rows], self.heads[rows], self.kv_heads)

    def take(self, x: Tensor) -> Tensor:
        """The rows as `(rows, heads per row, tokens, head_dim)`."""
        return x.unflatten(1, (self.kv_heads, -1))[self.sequences, self.heads]

    def put(self, x: Tensor, values: Tensor) -> None:
        """Replace the rows in x."""
        x.unflatten(1, (self.kv_heads, -1))[self.sequences, self.heads] = values


def _dense(x: Tensor) -> Tensor:
    """What the copy engine takes: each vector's numbers side by side, and vectors at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])
    return x if x.stride(3) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
