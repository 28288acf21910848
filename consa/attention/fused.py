"""Hybrid and sliding-window attention through the Triton kernels, with their gradients.

Imported only where the kernels run: `branches.fused_for` says where that is.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from consa.attention import kernels
from consa.attention.branches import full_attention
from consa.attention.kernels import Problem

if TYPE_CHECKING:
    from consa.attention.hybrid import Rows

# Rows that need both: FA and SWA in one pass over the keys, or FA from the library and SWA beside it.
MIX_IN_ONE_PASS = True


def repeatable_full_attention(q: Tensor, k: Tensor, v: Tensor, *, scaling: float) -> Tensor:
    """As `branches.full_attention`, but gradients repeat bit for bit. Every gate is open, so any window serves."""
    order = torch.arange(k.shape[0] * k.shape[1], device=q.device)
    gates = torch.ones(len(order), device=q.device)
    return _Hybrid.apply(q, k, v, gates, None, order, 0, _problem(q, k, 1, 0, scaling))


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, num_sink_tokens: int, scaling: float
) -> Tensor:
    """As `branches.sliding_attention`."""
    order = torch.arange(k.shape[0] * k.shape[1], device=q.device)
    problem = _problem(q, k, window, num_sink_tokens, scaling)
    return _Hybrid.apply(q, k, v, q.new_empty(0), None, order, 0, problem)


def hybrid_attention(
    q: Tensor, k: Tensor, v: Tensor, rows: Rows, *, window: int, num_sink_tokens: int, scaling: float
) -> Tensor:
    """As `hybrid.hybrid_attention`, if some row needs SWA."""
    problem = _problem(q, k, window, num_sink_tokens, scaling)
    num_given = rows.num_full if MIX_IN_ONE_PASS else rows.num_full + rows.num_mixed
    given = None
    if num_given and rows.num_mixed == len(rows.order):  # all rows, which are in order already
        given = full_attention(q, k, v, scaling=scaling)
    elif num_given:
        *taken, q, k, v = _Take.apply(q, k, v, rows.order[:num_given], rows.num_full)
        given = full_attention(*taken, scaling=scaling)
    return _Hybrid.apply(q, k, v, rows.gates, given, rows.order, rows.num_full, problem)


def _problem(q: Tensor, k: Tensor, window: int, num_sink_tokens: int, scaling: float) -> Problem:
    sinks = min(num_sink_tokens, k.shape[2])
    return Problem(
        k.shape[1], q.shape[1] // k.shape[1], q.shape[2], k.shape[2], q.shape[3], window, sinks, scaling
    )


class _Hybrid(torch.autograd.Function):
    """The rows that need SWA, beside those whose FA is given.

    `given` holds FA of the first rows of `order`, `(n, heads * group, queries, head_dim)`: the first `num_full` go into
    the result as they are, any others are mixed with SWA. Gates are of the rows after the first `num_full`. The
    gradients of q, k and v at rows on FA alone are left to `_Take`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        gates: Tensor,
        given: Tensor | None,
        order: Tensor,
        num_full: int,
        problem: Problem,
    ) -> Tensor:
        q, k, v = (_dense(x) for x in (q, k, v))
        out = torch.empty_like(q)
        if given is not None and num_full:
            _put(out, order[:num_full], problem.kv_heads, given[:num_full])
        saved: list[Tensor | None] = [q, k, v, gates, order, out]
        for mode, rows, z, full in _parts(order, gates, given, num_full):
            saved += kernels.forward(
                q, k, v, out, rows, z, full, problem, mode, training=any(ctx.needs_input_grad)
            )
        ctx.save_for_backward(*saved)
        ctx.num_full, ctx.problem = num_full, problem
        ctx.given = None if given is None else torch.empty_like(given, device="meta")
        return out

    @staticmethod
    def backward(ctx: Any, dout: Tensor):
        q, k, v, gates, order, out, *states = ctx.saved_tensors
        dout = _dense(dout)
        dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
        dgates = dgiven = None
        if ctx.given is not None:
            dgiven = torch.empty_like(ctx.given, device=q.device)
            if ctx.num_full:
                dgiven[: ctx.num_full] = _take(dout, order[: ctx.num_full], ctx.problem.kv_heads)
        for mode, rows, z, dfull in _parts(order, gates, dgiven, ctx.num_full):
            lse, difference, *states = states
            dz = kernels.backward(
                q, k, v, out, dout, dq, dk, dv, rows, z, dfull, lse, difference, ctx.problem, mode
            )
            dgates = dgates if dz is None else dz
        return dq, dk, dv, dgates, dgiven, None, None, None


def _parts(
    order: Tensor, gates: Tensor, given: Tensor | None, num_full: int
) -> Iterator[tuple[int, Tensor, Tensor | None, Tensor | None]]:
    """What one launch each does: kernel mode, rows, their gates and their FA."""
    mixed, sliding = order[num_full:].tensor_split((len(gates),))
    if len(mixed):
        if given is None or len(given) == num_full:
            yield kernels.ONE_PASS.value, mixed, gates, None
        else:
            yield kernels.GIVEN_FULL.value, mixed, gates, given[num_full:]
    if len(sliding):
        yield kernels.SLIDING.value, sliding, None, None


class _Take(torch.autograd.Function):
    """Copies of some rows of q, k and v, and q, k and v themselves for the others.

    The copies' gradients become the rows' own in place, those of the first `num_alone` rows, or are added to them.
    Taken by an index, they would come as another three tensors of full size, zero elsewhere.
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, rows: Tensor, num_alone: int):
        ctx.save_for_backward(rows)
        ctx.kv_heads, ctx.num_alone = k.shape[1], num_alone
        return *(_take(x, rows, k.shape[1]) for x in (q, k, v)), *(x.view_as(x) for x in (q, k, v))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor):
        (rows,) = ctx.saved_tensors
        alone, shared = rows.tensor_split((ctx.num_alone,))
        for taken, whole in zip(gradients[:3], gradients[3:], strict=True):
            _put(whole, alone, ctx.kv_heads, taken[: len(alone)])
            if len(shared):
                _put(whole, shared, ctx.kv_heads, _take(whole, shared, ctx.kv_heads) + taken[len(alone) :])
        return *gradients[3:], None, None


def _take(x: Tensor, rows: Tensor, kv_heads: int) -> Tensor:
    """Rows of `(batch, heads, tokens, head_dim)` as `(rows, heads per row, tokens, head_dim)`."""
    return x.unflatten(1, (kv_heads, -1))[rows // kv_heads, rows % kv_heads]


def _put(x: Tensor, rows: Tensor, kv_heads: int, values: Tensor) -> None:
    x.unflatten(1, (kv_heads, -1))[rows // kv_heads, rows % kv_heads] = values


def _dense(x: Tensor) -> Tensor:
    """The kernels want each vector of head_dim numbers side by side."""
    return x if x.stride(3) == 1 else x.contiguous()
