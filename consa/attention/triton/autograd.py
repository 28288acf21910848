"""Hybrid and sliding-window attention in Triton with gradients, and decoding.

`ops.kernels_for` imports this module on devices that run the kernels.
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

# PyTorch's FA is a fifth faster than ours, but its rows must be copied out first, at the cost of about this many keys.
# One pass of ours is faster if keys * (share of rows that need FA) is at most this (benchmarks/attention.py).
ONE_PASS_KEYS = 8192


def sliding_attention(q: Tensor, k: Tensor, v: Tensor, *, window: int, num_sink_tokens: int, scaling: float) -> Tensor:
    """As `portable.sliding_attention`."""
    order = torch.arange(k.shape[0] * k.shape[1], device=q.device)
    problem = _problem(q, k, window, num_sink_tokens, scaling)
    return _Hybrid.apply(q, k, v, None, None, order, 0, 0, problem)


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, window: int, num_sink_tokens: int, scaling: float
) -> Tensor:
    """As `portable.hybrid_attention`, for rows of which at least one needs SWA.

    In one pass, FA-only rows are mixed rows with gate 1.
    """
    problem = _problem(q, k, window, num_sink_tokens, scaling)
    num_open = rows.num_full + rows.num_mixed
    if must_repeat(q, k, v) or num_open * problem.keys <= ONE_PASS_KEYS * len(rows.order):
        return _Hybrid.apply(q, k, v, rows.gates, None, rows.order, 0, num_open, problem)
    if rows.num_mixed == len(rows.order):  # all rows, already in order
        given = full_attention(q, k, v, scaling=scaling)
    else:
        *taken, q, k, v = _Take.apply(q, k, v, rows.order[:num_open], rows.num_full)
        given = full_attention(*taken, scaling=scaling)
    return _Hybrid.apply(q, k, v, rows.gates, given, rows.order, rows.num_full, num_open, problem)


def _problem(q: Tensor, k: Tensor, window: int, num_sink_tokens: int, scaling: float) -> Problem:
    sinks = min(num_sink_tokens, k.shape[2])
    return Problem(k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], window, sinks, scaling)


class _Hybrid(torch.autograd.Function):
    """Hybrid attention of sorted rows; FA may be given.

    The first `num_full` of the sorted rows take the given FA as their result; rows up to `num_open` are mixed. `given`
    is FA of the first `num_open` rows, `(num_open, heads per row, queries, head_dim)`; without it, one pass computes
    both kinds. `gates` holds all rows, unsorted. `_Take` handles the gradients of q, k and v at FA-only rows.
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
        ctx.mode = kernels.SLIDING if gates is None else kernels.ONE_PASS if given is None else kernels.GIVEN_FULL
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
    """Copies of some rows of q, k and v, followed by q, k and v themselves.

    Backward, the gradients of the copies replace those of the first `num_alone` rows and are added to those of the
    others, in place. Plain indexing would allocate three more tensors of full size, mostly zero.
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
    """Indices of some rows in tensors `(batch, heads, tokens, head_dim)`."""

    sequences: Tensor
    heads: Tensor
    kv_heads: int

    @classmethod
    def of(cls, rows: Tensor, kv_heads: int) -> _Places:
        return cls(rows // kv_heads, rows % kv_heads, kv_heads)

    def split(self, count: int) -> tuple[_Places, _Places]:
        """The first `count` rows and the others."""
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
    """`x`, copied if TMA cannot read it: it requires contiguous head vectors at multiples of 16 bytes."""
    aligned = x.data_ptr() % 16 == 0 and all(stride * x.itemsize % 16 == 0 for stride in x.stride()[:3])
    return x if x.stride(3) == 1 and aligned else x.clone(memory_format=torch.contiguous_format)
