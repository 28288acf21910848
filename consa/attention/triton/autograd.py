"""Hybrid and sliding-window attention in Triton with gradients, and decoding.

`ops.kernels_for` imports this module on devices that run the kernels.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false
# (The arguments of a launch differ from those of the Python function.)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from consa.attention.portable import full_attention, must_repeat
from consa.attention.rows import Rows
from consa.attention.triton import kernels
from consa.attention.triton.decode import decode
from consa.attention.triton.launch import SINK_BLOCK, Problem, blocks_for, cdiv, heads_of, strides, tma_blocks

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
        out, p, swa_rows = torch.empty_like(q), problem, order[num_full:]
        if given is not None and num_full:
            _Places.of(order[:num_full], p.kv_heads).put(out, given[:num_full])
        ctx.mode = kernels.SLIDING if gates is None else kernels.ONE_PASS if given is None else kernels.GIVEN_FULL
        mixed = None if given is None else given[num_full:]
        # log-sum-exps: near, and with ONE_PASS full; FA minus SWA of the open rows
        lse = q.new_empty((1 + (ctx.mode is kernels.ONE_PASS), len(swa_rows), p.group, p.queries), dtype=torch.float32)
        difference = None
        if gates is not None and any(ctx.needs_input_grad):
            difference = q.new_empty((num_open - num_full, p.packed, p.head_dim))
        blocks = blocks_for("forward", q)
        kernels.forward[cdiv(p.packed, blocks.queries), len(swa_rows)](
            q, *tma_blocks(blocks.keys, k, v), *tma_blocks(SINK_BLOCK, k, v), out, difference, lse, mixed, swa_rows,
            gates, *map(strides, (q, out, mixed)), p.kv_heads, heads_of(mixed, p), p.queries, p.keys, p.window,
            p.num_sink_tokens, p.scaling / math.log(2), SINK_KEYS=SINK_BLOCK, TRAINING=difference is not None,
            **p.settings(q, blocks, ctx.mode.value),
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, gates, order, out, lse, difference)
        ctx.num_full, ctx.problem = num_full, problem
        ctx.given = None if given is None else torch.empty_like(given, device="meta")
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        q, k, v, gates, order, out, lse, difference = ctx.saved_tensors
        dout = _dense(dout)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dgiven = mixed = None
        num_full, p = ctx.num_full, ctx.problem
        swa_rows = order[num_full:]
        if ctx.given is not None:
            dgiven = torch.empty_like(ctx.given, device=q.device)
            if num_full:
                dgiven[:num_full] = _Places.of(order[:num_full], p.kv_heads).take(dout)
            mixed = dgiven[num_full:]
        padded = cdiv(p.queries, kernels.TERM_BLOCK.value) * kernels.TERM_BLOCK.value
        terms = lse.new_empty((4 if ctx.mode is kernels.ONE_PASS else 2, len(swa_rows), p.group, padded))
        scale, blocks = p.scaling / math.log(2), blocks_for("backward_q", q)
        num_blocks = cdiv(p.packed, blocks.queries)
        dgates = None if gates is None else lse.new_zeros((len(gates), num_blocks))
        sink_parts = lse.new_empty((num_blocks, 2, len(swa_rows), p.num_sink_tokens, p.head_dim))
        kernels.backward_q[num_blocks, len(swa_rows)](
            q, *tma_blocks(blocks.keys, k, v), *tma_blocks(SINK_BLOCK, k, v), out, difference, dout, dq, mixed, dgates,
            lse, terms, sink_parts, swa_rows, gates, *map(strides, (q, out, dout, dq, mixed)), p.kv_heads,
            heads_of(mixed, p), p.queries, p.keys, p.window, p.num_sink_tokens, p.scaling, scale, SINK_KEYS=SINK_BLOCK,
            **p.settings(q, blocks, ctx.mode.value),
        )  # fmt: skip
        sink_sums = sink_parts.sum(0) if p.num_sink_tokens else sink_parts
        blocks = blocks_for("backward_kv", q)
        (q_blocks, dout_blocks), kv_blocks = tma_blocks(blocks.queries, q, dout), tma_blocks(blocks.keys, k, v)
        kernels.backward_kv[cdiv(p.keys, blocks.keys), len(swa_rows)](
            q_blocks, *kv_blocks, dout_blocks, dk, dv, terms, sink_sums, swa_rows, gates, *map(strides, (dk, dv)),
            p.kv_heads, p.queries, p.keys, p.window, p.num_sink_tokens, p.scaling, scale,
            **p.settings(q, blocks, ctx.mode.value),
        )  # fmt: skip
        if dgates is not None:
            dgates = dgates.sum(1)
        return dq, dk, dv, dgates, dgiven, None, None, None, None


class _Take(torch.autograd.Function):
    """Copies of some rows of q, k and v, followed by q, k and v themselves.

    Backward, the gradients of the copies replace those of the first `num_alone` rows and are added to those of the
    others, in place. Plain indexing would allocate three more tensors of full size, mostly zero.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, num_alone: int):
        ctx.alone, ctx.shared = (_Places.of(x, k.shape[1]) for x in (rows[:num_alone], rows[num_alone:]))
        places = _Places.of(rows, k.shape[1])
        return *(places.take(x) for x in (q, k, v)), *(x.view_as(x) for x in (q, k, v))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        num_alone = len(ctx.alone.heads)
        for taken, whole in zip(gradients[:3], gradients[3:], strict=True):
            ctx.alone.put(whole, taken[:num_alone])
            if len(taken) > num_alone:
                ctx.shared.put(whole, ctx.shared.take(whole) + taken[num_alone:])
        return *gradients[3:], None, None


class _Places(NamedTuple):
    """Indices of some rows in tensors `(batch, heads, tokens, head_dim)`."""

    sequences: Tensor
    heads: Tensor
    kv_heads: int

    @classmethod
    def of(cls, rows: Tensor, kv_heads: int) -> _Places:
        return cls(rows // kv_heads, rows % kv_heads, kv_heads)

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
