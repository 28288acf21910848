"""Attention on CUDA, in Triton: full and sliding-window attention mixed by a gate, and sliding-window attention alone.

Both softmaxes of a gated row share their scores. Forward, the keys that sliding-window attention (SWA) sees come first;
that result and its log-sum-exp are kept, and the same accumulator goes on through the distant keys to full attention
(FA).

Backward, write a query's output as z * FA + (1 - z) * SWA with weights FA_j = exp(s_j - lse_full), and
SWA_j = exp(s_j - lse_near) on near keys. With w = exp(lse_near - lse_full), delta_x = dO . O_x and dP_j = dO . v_j,

    near:     weight_j = SWA_j * a,    dS_j = weight_j * (dP_j - b / a),    a = z w + 1 - z,
                                                                            b = z w delta_full + (1 - z) delta_near
    distant:  weight_j = FA_j * z,     dS_j = weight_j * (dP_j - delta_full)

so both are the backward pass of ordinary flash attention (Dao, arXiv 2307.08691), for a log-sum-exp less the logarithm
of the factor, and a delta, of each kind: the *terms* of a query. SWA alone has the near ones only, with a = 1.

A row is one KV head of one sequence. Its query heads are packed, query by query: packed query p is query p // group of
head p % group. A block of them spans few positions, so little of what it computes is masked, and dk and dv sum over
the group in the order of p, without atomics: results repeat bit for bit. Exponents are of base 2.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false
# (What a kernel takes is not what its Python function says.)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

SINK_BLOCK = 16  # the smallest that tl.dot takes
SINK_CHUNK = 1024  # packed queries whose gradients of the sinks one program sums; whole blocks of them

# What a kernel computes for its rows.
SLIDING = tl.constexpr(0)
ONE_PASS = tl.constexpr(1)  # FA and SWA, mixed
GIVEN_FULL = tl.constexpr(2)  # SWA, mixed with an FA computed elsewhere

# Which keys a loop goes through, and so which mask and terms hold.
SINKS = tl.constexpr(0)
NEAR = tl.constexpr(1)  # the window, without sinks
DISTANT = tl.constexpr(2)  # all of them distant to all queries: no mask
DISTANT_EDGE = tl.constexpr(3)
MIXED = tl.constexpr(4)  # near or distant


# Not compiled anew for another length, nor for another place in the sorted rows.
COUNTS = ["kv_heads", "full_heads", "num_queries", "num_keys", "window", "sinks"]
SLICES = ["order", "gates"]


class Blocks(NamedTuple):
    """How a kernel cuts its work: packed queries and keys per block, warps, and stages of the pipeline."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and padded head_dim, for 16-bit numbers.
BLOCKS = {
    ("forward", 64): Blocks(128, 64, 8, 3),
    ("forward", 128): Blocks(128, 64, 8, 3),
    ("forward", 256): Blocks(64, 32, 8, 2),
    ("backward_q", 64): Blocks(128, 64, 8, 3),
    ("backward_q", 128): Blocks(128, 64, 8, 2),
    ("backward_q", 256): Blocks(64, 32, 8, 1),
    ("backward_kv", 64): Blocks(64, 128, 8, 3),
    ("backward_kv", 128): Blocks(64, 128, 8, 2),
    ("backward_kv", 256): Blocks(32, 64, 8, 1),
}
BLOCKS_FLOAT32 = Blocks(32, 32, 4, 1)


def blocks_for(kernel: str, q: Tensor) -> Blocks:
    """The block sizes of "forward", "backward_q" or "backward_kv"."""
    if q.dtype == torch.float32:
        return BLOCKS_FLOAT32
    return BLOCKS[kernel, max(64, triton.next_power_of_2(q.shape[3]))]


@triton.jit
def _tile(x, tokens, heads, d, stride_token, stride_head, valid, HEAD_DIM: tl.constexpr):
    """Vectors `(tokens, BLOCK_D)` from x, the first vector of its sequence and, for keys, of its head."""
    # 64 bits: a long sequence's offsets do not fit in 32.
    place = x + tokens[:, None].to(tl.int64) * stride_token + heads[:, None] * stride_head + d[None, :]
    if d.shape[0] != HEAD_DIM:
        return tl.load(place, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)
    return tl.load(place, mask=valid[:, None], other=0.0)


@triton.jit
def _put(x, value, tokens, heads, d, stride_token, stride_head, valid, HEAD_DIM: tl.constexpr):
    place = x + tokens[:, None].to(tl.int64) * stride_token + heads[:, None] * stride_head + d[None, :]
    mask = valid[:, None]
    if d.shape[0] != HEAD_DIM:
        mask = mask & (d < HEAD_DIM)[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=mask)


@triton.jit
def _visible(query, key, window, sinks, KEYS: tl.constexpr):
    """Which keys a loop's queries see, for positions that broadcast; see `consa.attention.masks`."""
    if KEYS == SINKS:
        return (key < sinks) & (key <= query)
    elif KEYS == NEAR:
        return (key >= sinks) & (key <= query) & (query - key < window)
    elif KEYS == DISTANT_EDGE:
        return query - key >= window
    else:
        return key <= query


@triton.jit
def _attend(
    state, q, query, keys, lo, hi,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over keys lo to hi; state: weighted sum, weights' sum, maximum."""
    acc, total, top = state
    k, v, stride_k, stride_v, d, num_keys, window, sinks, scale = keys
    for start in range(lo, hi, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < num_keys
        k_tile = _tile(k, key, tl.zeros_like(key), d, stride_k, 0, exists, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if KEYS != DISTANT:
            visible = _visible(query[:, None], key[None, :], window, sinks, KEYS)
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = _tile(v, key, tl.zeros_like(key), d, stride_v, 0, exists, HEAD_DIM)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def _forward(
    q, k, v, out, difference, lse, full, order, gates, q_strides, k_strides, v_strides, out_strides, full_strides,
    kv_heads, full_heads, num_queries, num_keys, window, sinks, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SINK_KEYS: tl.constexpr, MODE: tl.constexpr,
    TRAINING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """A block of packed queries of a row. The last blocks start first: they have the most keys."""
    rows, place = tl.num_programs(1), tl.program_id(1)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    packed = start + tl.arange(0, QUERIES)
    token, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    num_packed = num_queries * GROUP
    valid = packed < num_packed
    offset = num_keys - num_queries
    query = offset + token
    first = offset + start // GROUP
    last = offset + (tl.minimum(start + QUERIES, num_packed) - 1) // GROUP
    d = tl.arange(0, BLOCK_D)
    q_tile = _tile(q + sequence * q_strides[0], token, head, d, q_strides[2], q_strides[1], valid, HEAD_DIM)
    k += sequence * k_strides[0] + kv_head * k_strides[1]
    v += sequence * v_strides[0] + kv_head * v_strides[1]

    keys = (k, v, k_strides[2], v_strides[2], d, num_keys, window, sinks, scale)

    # The maximum starts finite: where nothing is visible yet, exp2(-inf - top) is 0, not NaN.
    top = tl.full([QUERIES], -1e30, tl.float32)
    state = (tl.zeros([QUERIES, BLOCK_D], tl.float32), tl.zeros([QUERIES], tl.float32), top)
    state = _attend(
        state, q_tile, query, keys, 0, tl.minimum(sinks, last + 1),
        HEAD_DIM, SINK_KEYS, SINKS, PRECISION,
    )  # fmt: skip
    state = _attend(
        state, q_tile, query, keys, tl.maximum(sinks, first - window + 1), last + 1,
        HEAD_DIM, KEYS, NEAR, PRECISION,
    )  # fmt: skip
    acc, total, top = state
    result = acc / total[:, None]
    lse += place.to(tl.int64) * num_packed + packed
    tl.store(lse, top + tl.log2(total), mask=valid)
    if MODE != SLIDING:
        near = result.to(q_tile.dtype)  # kept through the loop below: half the registers
        if MODE == ONE_PASS:
            edge = sinks + tl.maximum(first - window + 1 - sinks, 0) // KEYS * KEYS
            state = _attend(
                state, q_tile, query, keys, sinks, edge,
                HEAD_DIM, KEYS, DISTANT, PRECISION,
            )  # fmt: skip
            state = _attend(
                state, q_tile, query, keys, edge, last - window + 1,
                HEAD_DIM, KEYS, DISTANT_EDGE, PRECISION,
            )  # fmt: skip
            acc, total, top = state
            full_tile = acc / total[:, None]
            tl.store(lse + rows.to(tl.int64) * num_packed, top + tl.log2(total), mask=valid)
        else:
            full += (place // full_heads).to(tl.int64) * full_strides[0]
            full_head = place % full_heads * GROUP + packed % GROUP
            full_tile = _tile(full, token, full_head, d, full_strides[2], full_strides[1], valid, HEAD_DIM)
        change = full_tile.to(tl.float32) - near.to(tl.float32)
        result = near.to(tl.float32) + tl.load(gates + place) * change
        if TRAINING:
            difference += place.to(tl.int64) * num_packed * HEAD_DIM
            _put(difference, change, packed, tl.zeros_like(packed), d, HEAD_DIM, 0, valid, HEAD_DIM)
    _put(
        out + sequence * out_strides[0],
        result,
        token,
        head,
        d,
        out_strides[2],
        out_strides[1],
        valid,
        HEAD_DIM,
    )


@triton.jit
def _gradient_q(
    dq, q, dout, query, terms, keys, lo, hi,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what keys lo to hi contribute to dq of a block of queries."""
    near_lse, near_delta, full_lse, full_delta = terms
    k, v, stride_k, stride_v, d, num_keys, window, sinks, scale = keys
    for start in range(lo, hi, BLOCK):
        key = start + tl.arange(0, BLOCK)
        exists = key < num_keys
        k_tile = _tile(k, key, tl.zeros_like(key), d, stride_k, 0, exists, HEAD_DIM)
        v_tile = _tile(v, key, tl.zeros_like(key), d, stride_v, 0, exists, HEAD_DIM)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
        dweights = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        if KEYS == DISTANT:
            weights = tl.exp2(scores - full_lse[:, None])
            dscores = weights * (dweights - full_delta[:, None])
        else:
            lse, delta = near_lse[:, None], near_delta[:, None]
            if KEYS == MIXED:
                near = query[:, None] - key[None, :] < window
                lse, delta = (
                    tl.where(near, lse, full_lse[:, None]),
                    tl.where(near, delta, full_delta[:, None]),
                )
            visible = _visible(query[:, None], key[None, :], window, sinks, KEYS)
            weights = tl.where(visible, tl.exp2(scores - lse), 0.0)
            dscores = weights * (dweights - delta)
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def _backward_q(
    q, k, v, out, difference, dout, dq, dfull, dgates, lse, terms, order, gates, q_strides, k_strides, v_strides,
    out_strides, dout_strides, dq_strides, dfull_strides, kv_heads, full_heads, num_queries, num_keys, window, sinks,
    scaling, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, SINK_KEYS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of packed queries, their terms for `_backward_kv`, and their part of their gate's gradient."""
    rows, place = tl.num_programs(1), tl.program_id(1)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    start = block * QUERIES
    packed = start + tl.arange(0, QUERIES)
    token, head = packed // GROUP, kv_head * GROUP + packed % GROUP
    num_packed = num_queries * GROUP
    valid = packed < num_packed
    offset = num_keys - num_queries
    query = offset + token
    first = offset + start // GROUP
    last = offset + (tl.minimum(start + QUERIES, num_packed) - 1) // GROUP
    d = tl.arange(0, BLOCK_D)
    q_tile = _tile(q + sequence * q_strides[0], token, head, d, q_strides[2], q_strides[1], valid, HEAD_DIM)
    out += sequence * out_strides[0]
    out_tile = _tile(out, token, head, d, out_strides[2], out_strides[1], valid, HEAD_DIM).to(tl.float32)
    dout += sequence * dout_strides[0]
    dout_tile = _tile(dout, token, head, d, dout_strides[2], dout_strides[1], valid, HEAD_DIM)

    # The terms of the queries.
    term = place.to(tl.int64) * num_packed + packed
    apart = rows.to(tl.int64) * num_packed  # from one kind of term to the next
    near_lse = tl.load(lse + term, mask=valid, other=0.0)
    near_delta = tl.sum(out_tile * dout_tile.to(tl.float32), 1)
    full_lse, full_delta = near_lse, near_delta
    if MODE != SLIDING:
        z = tl.load(gates + place)
        difference += place.to(tl.int64) * num_packed * HEAD_DIM
        change = _tile(difference, packed, tl.zeros_like(packed), d, HEAD_DIM, 0, valid, HEAD_DIM).to(
            tl.float32
        )
        dz = tl.sum(change * dout_tile.to(tl.float32), 1)
        tl.store(dgates + place * tl.num_programs(0) + block, tl.sum(dz, 0))
        near_delta -= z * dz
        if MODE == ONE_PASS:
            full_delta = near_delta + dz
            full_lse = tl.load(lse + apart + term, mask=valid, other=0.0)
            full_share = z * tl.exp2(near_lse - full_lse)
            near_share = tl.maximum(full_share + (1 - z), 2**-126)  # at z = 1, w may vanish
            near_delta = (full_share * full_delta + (1 - z) * near_delta) / near_share
            near_lse -= tl.log2(near_share)
            full_lse -= tl.log2(z)
            tl.store(terms + 2 * apart + term, full_lse, mask=valid)
            tl.store(terms + 3 * apart + term, full_delta, mask=valid)
        else:
            near_lse -= tl.log2(1 - z)
            dfull += (place // full_heads).to(tl.int64) * dfull_strides[0]
            full_head = place % full_heads * GROUP + packed % GROUP
            dfull_tile = z * dout_tile.to(tl.float32)
            _put(dfull, dfull_tile, token, full_head, d, dfull_strides[2], dfull_strides[1], valid, HEAD_DIM)
    tl.store(terms + term, near_lse, mask=valid)
    tl.store(terms + apart + term, near_delta, mask=valid)

    k += sequence * k_strides[0] + kv_head * k_strides[1]
    v += sequence * v_strides[0] + kv_head * v_strides[1]
    keys = (k, v, k_strides[2], v_strides[2], d, num_keys, window, sinks, scale)
    here = (near_lse, near_delta, full_lse, full_delta)
    dq_tile = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    dq_tile = _gradient_q(
        dq_tile, q_tile, dout_tile, query, here, keys, 0, tl.minimum(sinks, last + 1),
        HEAD_DIM, SINK_KEYS, SINKS, PRECISION,
    )  # fmt: skip
    if MODE == ONE_PASS:
        edge = sinks + tl.maximum(first - window + 1 - sinks, 0) // KEYS * KEYS
        dq_tile = _gradient_q(
            dq_tile, q_tile, dout_tile, query, here, keys, sinks, edge,
            HEAD_DIM, KEYS, DISTANT, PRECISION,
        )  # fmt: skip
        dq_tile = _gradient_q(
            dq_tile, q_tile, dout_tile, query, here, keys, edge, last + 1,
            HEAD_DIM, KEYS, MIXED, PRECISION,
        )  # fmt: skip
    else:
        dq_tile = _gradient_q(
            dq_tile, q_tile, dout_tile, query, here, keys, tl.maximum(sinks, first - window + 1), last + 1,
            HEAD_DIM, KEYS, NEAR, PRECISION,
        )  # fmt: skip
    dq += sequence * dq_strides[0]
    _put(dq, dq_tile * scaling, token, head, d, dq_strides[2], dq_strides[1], valid, HEAD_DIM)


@triton.jit
def _gradient_kv(
    dk, dv, k, v, key, queries, lo, hi, GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what packed queries lo to hi contribute to dk and dv of a block of keys. Products are keys x queries."""
    q, dout, q_strides, dout_strides, terms, apart, d, num_packed, offset, window, sinks, scale = queries
    for start in range(lo, hi, BLOCK):
        packed = start + tl.arange(0, BLOCK)
        token, head = packed // GROUP, packed % GROUP
        exists = packed < num_packed
        q_tile = _tile(q, token, head, d, q_strides[2], q_strides[1], exists, HEAD_DIM)
        dout_tile = _tile(dout, token, head, d, dout_strides[2], dout_strides[1], exists, HEAD_DIM)
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale
        dweights = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        term = terms + packed  # of queries that do not exist, an infinite log-sum-exp makes the weights 0
        if KEYS == DISTANT:
            lse = tl.load(term + 2 * apart, mask=exists, other=float("inf"))[None, :]
            delta = tl.load(term + 3 * apart, mask=exists, other=0.0)[None, :]
            weights = tl.exp2(scores - lse)
        else:
            query = (offset + token)[None, :]
            lse = tl.load(term, mask=exists, other=float("inf"))[None, :]
            delta = tl.load(term + apart, mask=exists, other=0.0)[None, :]
            if KEYS == MIXED:
                near = (query - key[:, None] < window) | (key < sinks)[:, None]
                full_lse = tl.load(term + 2 * apart, mask=exists, other=float("inf"))[None, :]
                full_delta = tl.load(term + 3 * apart, mask=exists, other=0.0)[None, :]
                lse, delta = tl.where(near, lse, full_lse), tl.where(near, delta, full_delta)
            visible = _visible(query, key[:, None], window, sinks, KEYS)
            weights = tl.where(visible, tl.exp2(scores - lse), 0.0)
        dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        dscores = weights * (dweights - delta)
        dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def _backward_kv(
    q, k, v, dout, dk, dv, terms, sink_sums, order,
    q_strides, k_strides, v_strides, dout_strides, dk_strides, dv_strides,
    kv_heads, num_queries, num_keys, window, sinks, scaling, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys of a row, from the terms of its queries."""
    rows, place = tl.num_programs(1), tl.program_id(1)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    first = tl.program_id(0) * KEYS
    key = first + tl.arange(0, KEYS)
    exists = key < num_keys
    no_head = tl.zeros_like(key)
    d = tl.arange(0, BLOCK_D)
    k += sequence * k_strides[0] + kv_head * k_strides[1]
    v += sequence * v_strides[0] + kv_head * v_strides[1]
    k_tile = _tile(k, key, no_head, d, k_strides[2], 0, exists, HEAD_DIM)
    v_tile = _tile(v, key, no_head, d, v_strides[2], 0, exists, HEAD_DIM)
    q += sequence * q_strides[0] + kv_head * GROUP * q_strides[1]
    dout += sequence * dout_strides[0] + kv_head * GROUP * dout_strides[1]
    num_packed = num_queries * GROUP
    terms += place.to(tl.int64) * num_packed
    apart = rows.to(tl.int64) * num_packed
    offset = num_keys - num_queries
    queries = (q, dout, q_strides, dout_strides, terms, apart, d, num_packed, offset, window, sinks, scale)

    begin = tl.maximum(first - offset, 0) * GROUP
    near_end = tl.minimum(tl.maximum(first + KEYS - 1 + window - offset, 0) * GROUP, num_packed)
    if MODE == ONE_PASS:
        dk_tile = tl.zeros([KEYS, BLOCK_D], tl.float32)
        dv_tile = tl.zeros([KEYS, BLOCK_D], tl.float32)
        near_end = tl.where(first < sinks, num_packed, near_end)
        distant = begin + tl.cdiv(near_end - begin, QUERIES) * QUERIES
        dk_tile, dv_tile = _gradient_kv(
            dk_tile, dv_tile, k_tile, v_tile, key, queries, begin, distant, GROUP,
            HEAD_DIM, QUERIES, MIXED, PRECISION,
        )  # fmt: skip
        dk_tile, dv_tile = _gradient_kv(
            dk_tile, dv_tile, k_tile, v_tile, key, queries, distant, num_packed, GROUP,
            HEAD_DIM, QUERIES, DISTANT, PRECISION,
        )  # fmt: skip
    else:
        sink_sums += place * sinks * HEAD_DIM
        dk_tile = _tile(sink_sums, key, no_head, d, HEAD_DIM, 0, key < sinks, HEAD_DIM)
        sink_sums += rows * sinks * HEAD_DIM
        dv_tile = _tile(sink_sums, key, no_head, d, HEAD_DIM, 0, key < sinks, HEAD_DIM)
        dk_tile, dv_tile = _gradient_kv(
            dk_tile, dv_tile, k_tile, v_tile, key, queries, begin, near_end, GROUP,
            HEAD_DIM, QUERIES, NEAR, PRECISION,
        )  # fmt: skip
    dk += sequence * dk_strides[0] + kv_head * dk_strides[1]
    dv += sequence * dv_strides[0] + kv_head * dv_strides[1]
    _put(dk, dk_tile * scaling, key, no_head, d, dk_strides[2], 0, exists, HEAD_DIM)
    _put(dv, dv_tile, key, no_head, d, dv_strides[2], 0, exists, HEAD_DIM)


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def _backward_sinks(
    q, k, v, dout, parts, terms, order, q_strides, k_strides, v_strides, dout_strides, kv_heads, num_queries, num_keys,
    sinks, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, QUERIES: tl.constexpr,
    KEYS: tl.constexpr, CHUNK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """What a chunk of a row's queries contributes to dk and dv of a block of sinks, which all queries see."""
    rows, place = tl.num_programs(2), tl.program_id(2)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    first = tl.program_id(1) * KEYS
    key = first + tl.arange(0, KEYS)
    exists = key < sinks
    no_head = tl.zeros_like(key)
    d = tl.arange(0, BLOCK_D)
    k += sequence * k_strides[0] + kv_head * k_strides[1]
    v += sequence * v_strides[0] + kv_head * v_strides[1]
    k_tile = _tile(k, key, no_head, d, k_strides[2], 0, exists, HEAD_DIM)
    v_tile = _tile(v, key, no_head, d, v_strides[2], 0, exists, HEAD_DIM)
    q += sequence * q_strides[0] + kv_head * GROUP * q_strides[1]
    dout += sequence * dout_strides[0] + kv_head * GROUP * dout_strides[1]
    num_packed = num_queries * GROUP
    terms += place.to(tl.int64) * num_packed
    apart = rows.to(tl.int64) * num_packed
    offset = num_keys - num_queries
    queries = (q, dout, q_strides, dout_strides, terms, apart, d, num_packed, offset, 0, sinks, scale)
    begin = tl.program_id(0) * CHUNK
    end = tl.minimum(begin + CHUNK, num_packed)
    dk_tile = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dv_tile = tl.zeros([KEYS, BLOCK_D], tl.float32)
    dk_tile, dv_tile = _gradient_kv(
        dk_tile, dv_tile, k_tile, v_tile, key, queries, begin, end, GROUP,
        HEAD_DIM, QUERIES, SINKS, PRECISION,
    )  # fmt: skip
    parts += (tl.program_id(0) * 2 * rows + place).to(tl.int64) * sinks * HEAD_DIM
    _put(parts, dk_tile, key, no_head, d, HEAD_DIM, 0, exists, HEAD_DIM)
    parts += rows.to(tl.int64) * sinks * HEAD_DIM
    _put(parts, dv_tile, key, no_head, d, HEAD_DIM, 0, exists, HEAD_DIM)


class Problem(NamedTuple):
    """What all kernels of a call need to know."""

    kv_heads: int
    group: int
    queries: int
    keys: int
    head_dim: int
    window: int
    num_sink_tokens: int
    scaling: float

    @property
    def packed(self) -> int:
        """Packed queries of a row."""
        return self.queries * self.group

    def settings(self, q: Tensor, blocks: Blocks, mode: int) -> dict[str, Any]:
        """The keyword arguments of a launch that both passes share."""
        return {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": max(16, triton.next_power_of_2(self.head_dim)),
            "QUERIES": blocks.queries,
            "KEYS": blocks.keys,
            "MODE": mode,
            "PRECISION": "tf32x3" if q.dtype == torch.float32 else "tf32",
            "num_warps": blocks.warps,
            "num_stages": blocks.stages,
        }


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    order: Tensor,
    gates: Tensor | None,
    full: Tensor | None,
    problem: Problem,
    mode: int,
    *,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """Write the rows `order` of `out`.

    Returns:
        Their log-sum-exps, `(near and perhaps full, rows, packed queries)`, and FA less SWA, `(rows, packed queries,
        head_dim)`, if `training` on gated rows.
    """
    rows, p = len(order), problem
    lse = q.new_empty((2 if mode == ONE_PASS else 1, rows, p.packed), dtype=torch.float32)
    difference = None
    if training and mode != SLIDING:
        difference = q.new_empty((rows, p.packed, p.head_dim))
    blocks = blocks_for("forward", q)
    _forward[triton.cdiv(p.packed, blocks.queries), rows](
        q, k, v, out, difference, lse, full, order, gates, *map(_strides, (q, k, v, out, full)), p.kv_heads,
        _heads(full, p), p.queries, p.keys, p.window, p.num_sink_tokens, p.scaling / math.log(2), SINK_KEYS=SINK_BLOCK,
        TRAINING=difference is not None, **p.settings(q, blocks, mode),
    )  # fmt: skip
    return lse, difference


def backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    dout: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    order: Tensor,
    gates: Tensor | None,
    dfull: Tensor | None,
    lse: Tensor,
    difference: Tensor | None,
    problem: Problem,
    mode: int,
) -> Tensor | None:
    """Write the rows `order` of dq, dk and dv, and dfull if FA was given.

    Returns:
        The gradient of the rows' gates, if they have any.
    """
    rows, p = len(order), problem
    scale = p.scaling / math.log(2)
    terms = q.new_empty((4 if mode == ONE_PASS else 2, rows, p.packed), dtype=torch.float32)
    blocks = blocks_for("backward_q", q)
    num_blocks = triton.cdiv(p.packed, blocks.queries)
    dgates = None if mode == SLIDING else terms.new_empty((rows, num_blocks))
    _backward_q[num_blocks, rows](
        q, k, v, out, difference, dout, dq, dfull, dgates, lse, terms, order, gates,
        *map(_strides, (q, k, v, out, dout, dq, dfull)), p.kv_heads, _heads(dfull, p), p.queries, p.keys, p.window,
        p.num_sink_tokens, p.scaling, scale, SINK_KEYS=SINK_BLOCK, **p.settings(q, blocks, mode),
    )  # fmt: skip
    blocks = blocks_for("backward_kv", q)
    settings = p.settings(q, blocks, mode)
    sink_sums = terms  # not looked at without sinks
    if mode != ONE_PASS and p.num_sink_tokens:
        chunks = triton.cdiv(p.packed, SINK_CHUNK)
        parts = terms.new_empty((chunks, 2, rows, p.num_sink_tokens, p.head_dim))
        _backward_sinks[chunks, triton.cdiv(p.num_sink_tokens, SINK_BLOCK), rows](
            q, k, v, dout, parts, terms, order, *map(_strides, (q, k, v, dout)), p.kv_heads, p.queries, p.keys,
            p.num_sink_tokens, scale, CHUNK=SINK_CHUNK, **_sinks_settings(settings),
        )  # fmt: skip
        sink_sums = parts.sum(0)
    _backward_kv[triton.cdiv(p.keys, blocks.keys), rows](
        q, k, v, dout, dk, dv, terms, sink_sums, order, *map(_strides, (q, k, v, dout, dk, dv)), p.kv_heads, p.queries,
        p.keys, p.window, p.num_sink_tokens, p.scaling, scale, **settings,
    )  # fmt: skip
    return None if dgates is None else dgates.sum(1)


def _sinks_settings(settings: dict[str, Any]) -> dict[str, Any]:
    kept = {name: value for name, value in settings.items() if name != "MODE"}
    return kept | {"KEYS": SINK_BLOCK, "num_warps": 4}


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, heads and tokens."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _heads(full: Tensor | None, problem: Problem) -> int:
    """Rows per sequence of a given FA, which holds them in sorted order."""
    return 1 if full is None else full.shape[1] // problem.group
