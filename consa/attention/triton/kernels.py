"""Triton kernels of full and sliding-window attention mixed by a gate, and of sliding-window attention alone.

Both softmaxes of a gated row share their scores. The forward pass first visits the keys that sliding-window attention
(SWA) sees, stores that result and its log-sum-exp, and continues with the same accumulator over the distant keys to
full attention (FA).

For the backward pass, write a query's output as z * FA + (1 - z) * SWA with weights FA_j = exp(s_j - lse_full), and
SWA_j = exp(s_j - lse_near) on near keys. With w = exp(lse_near - lse_full), delta_x = dO . O_x and dP_j = dO . v_j,

    near:     weight_j = SWA_j * a,    dS_j = weight_j * (dP_j - b / a),    a = z w + 1 - z,
                                                                            b = z w delta_full + (1 - z) delta_near
    distant:  weight_j = FA_j * z,     dS_j = weight_j * (dP_j - delta_full)

so each part is the backward pass of ordinary flash attention (Dao, arXiv 2307.08691) with its own log-sum-exp, minus
the logarithm of the factor, and its own delta: the *terms* of a query. SWA alone has only near terms, with a = 1.

A row is one KV head of one sequence. For its output and dq, its query heads are packed query by query: packed query p
is query p // group of head p % group. A block of packed queries spans few positions, so little of its work is masked.
For dk and dv the heads are processed one after the other, because a loop should load contiguous memory. There are no
atomics: results are deterministic. Exponentials have base 2.

Elementwise operations cost as much as matrix products here. So blocks without masked elements skip the mask, and a
window takes one comparison of unsigned integers: 0 <= distance < window.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false, reportGeneralTypeIssues=false
# (The arguments of a launch differ from those of the Python function.)

from __future__ import annotations

import triton
import triton.language as tl

TERM_BLOCK = tl.constexpr(128)  # the terms of a head are padded to whole blocks of it

# Modes: what a kernel computes for its rows.
SLIDING = tl.constexpr(0)
ONE_PASS = tl.constexpr(1)  # FA and SWA, mixed
GIVEN_FULL = tl.constexpr(2)  # SWA, mixed with a given FA

# The keys of a loop, which determine its mask and terms. The block where near and distant keys meet is visited once by
# each loop: selecting terms per element is slower, and so is one loop over both.
SINKS = tl.constexpr(0)
NEAR = tl.constexpr(1)  # the window, without sinks
DISTANT = tl.constexpr(2)


# Arguments that cause no recompilation: lengths, and pointers into the sorted rows.
COUNTS = ["kv_heads", "full_heads", "num_queries", "num_keys", "window", "sinks"]
SLICES = ["order", "gates"]


@triton.jit
def _tile(x, start, num_tokens, d, stride, HEAD_DIM: tl.constexpr, BLOCK: tl.constexpr):
    """Vectors `(BLOCK, BLOCK_D)` of the tokens from `start` on; zero beyond the last token."""
    token = tl.arange(0, BLOCK)
    # The offset of a block in a long sequence needs 64 bits; offsets within a block fit in 32.
    place = x + tl.cast(start, tl.int64) * stride + token[:, None] * stride + d[None, :]
    return tl.load(place, mask=(start + token < num_tokens)[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _block(x, sequence, head, start):
    """A block of tokens of one head, loaded by TMA; the descriptor `x` determines its size."""
    place = [tl.cast(sequence, tl.int32), tl.cast(head, tl.int32), tl.cast(start, tl.int32), 0]
    return x.load(place).reshape(x.block_shape[2], x.block_shape[3])


@triton.jit
def _gather(x, tokens, heads, d, stride_token, stride_head, valid, HEAD_DIM: tl.constexpr):
    """Vectors `(tokens, BLOCK_D)` of packed queries."""
    place = x + tokens[:, None].to(tl.int64) * stride_token + heads[:, None] * stride_head + d[None, :]
    return tl.load(place, mask=valid[:, None] & (d < HEAD_DIM)[None, :], other=0.0)


@triton.jit
def _put(x, value, tokens, heads, d, stride_token, stride_head, valid, HEAD_DIM: tl.constexpr):
    place = x + tokens[:, None].to(tl.int64) * stride_token + heads[:, None] * stride_head + d[None, :]
    tl.store(place, value.to(x.dtype.element_ty), mask=valid[:, None] & (d < HEAD_DIM)[None, :])


@triton.jit
def _in_window(distance, window):
    """0 <= distance < window."""
    return distance.to(tl.uint32, bitcast=True) < window.to(tl.uint32, bitcast=True)


@triton.jit
def _packed(start, num_queries, num_keys, GROUP: tl.constexpr, QUERIES: tl.constexpr):
    """Packed queries from `start` on: index, token, member of the group, position; first and last position."""
    packed = start + tl.arange(0, QUERIES)
    token, member = packed // GROUP, packed % GROUP
    offset = num_keys - num_queries
    first = offset + start // GROUP
    last = offset + (tl.minimum(start + QUERIES, num_queries * GROUP) - 1) // GROUP
    return packed, token, member, offset + token, first, last


@triton.jit
def _attend(
    state, q, query, first, last, keys, lo, hi,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over keys lo to hi; state: weighted sum, sum of weights, maximum.

    The positions of the queries go from `first` to `last`.
    """
    acc, total, top = state
    k, v, sequence, kv_head, window, sinks, scale = keys
    for start in range(lo, hi, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k_tile = _block(k, sequence, kv_head, start)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION)
        if KEYS == SINKS:
            visible = (key < sinks)[None, :] & (key[None, :] <= query[:, None])
            scores = tl.where(visible, scores, float("-inf"))
        elif KEYS == NEAR:
            if (start + BLOCK - 1 > first) | (start + window <= last):
                visible = _in_window(query[:, None] - key[None, :], window)
                scores = tl.where(visible, scores, float("-inf"))
        else:
            if start + BLOCK - 1 > first - window:
                scores = tl.where(key[None, :] <= query[:, None] - window, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v_tile = _block(v, sequence, kv_head, start)
        acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def forward(
    q, k, v, sink_k, sink_v, out, difference, lse, full, order, gates, q_strides, out_strides, full_strides,
    kv_heads, full_heads, num_queries, num_keys, window, sinks, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, QUERIES: tl.constexpr, KEYS: tl.constexpr, SINK_KEYS: tl.constexpr, MODE: tl.constexpr,
    TRAINING: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """The output of a block of packed queries of a row. The last blocks start first: they have the most keys."""
    rows, place = tl.num_programs(1), tl.program_id(1)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    start = (tl.num_programs(0) - 1 - tl.program_id(0)) * QUERIES
    packed, token, member, query, first, last = _packed(start, num_queries, num_keys, GROUP, QUERIES)
    head, num_packed = kv_head * GROUP + member, num_queries * GROUP
    valid = packed < num_packed
    d = tl.arange(0, BLOCK_D)
    q_tile = _gather(q + sequence * q_strides[0], token, head, d, q_strides[2], q_strides[1], valid, HEAD_DIM)
    if MODE != SLIDING:
        z = tl.load(gates + row)
    keys = (k, v, sequence, kv_head, window, sinks, scale)
    sink_keys = (sink_k, sink_v, sequence, kv_head, window, sinks, scale)

    # The maximum starts finite: while no key is visible, exp2(-inf - top) is 0 and not NaN.
    top = tl.full([QUERIES], -1e30, tl.float32)
    state = (tl.zeros([QUERIES, BLOCK_D], tl.float32), tl.zeros([QUERIES], tl.float32), top)
    state = _attend(
        state, q_tile, query, first, last, sink_keys, 0, tl.minimum(sinks, last + 1),
        SINK_KEYS, SINKS, PRECISION,
    )  # fmt: skip
    state = _attend(
        state, q_tile, query, first, last, keys, tl.maximum(sinks, first - window + 1), last + 1,
        KEYS, NEAR, PRECISION,
    )  # fmt: skip
    acc, total, top = state
    result = acc / total[:, None]
    lse += place.to(tl.int64) * num_packed + member * num_queries + token
    tl.store(lse, top + tl.log2(total), mask=valid)
    if MODE != SLIDING:
        near = result.to(q_tile.dtype)  # 16 bits take half the registers during the loop below
        if z > 0:
            if MODE == ONE_PASS:
                end = last - window + 1
                state = _attend(state, q_tile, query, first, last, keys, sinks, end, KEYS, DISTANT, PRECISION)
                acc, total, top = state
                full_tile = acc / total[:, None]
                tl.store(lse + rows.to(tl.int64) * num_packed, top + tl.log2(total), mask=valid)
            else:
                full += (place // full_heads).to(tl.int64) * full_strides[0]
                full_head = place % full_heads * GROUP + member
                full_tile = _gather(full, token, full_head, d, full_strides[2], full_strides[1], valid, HEAD_DIM)
            change = full_tile.to(tl.float32) - near.to(tl.float32)
            result = near.to(tl.float32) + z * change
            if TRAINING:
                difference += place.to(tl.int64) * num_packed * HEAD_DIM
                _put(difference, change, packed, tl.zeros_like(packed), d, HEAD_DIM, 0, valid, HEAD_DIM)
    out += sequence * out_strides[0]
    _put(out, result, token, head, d, out_strides[2], out_strides[1], valid, HEAD_DIM)


@triton.jit
def _write_terms(
    term, apart, lse, difference, dgates, out, dout, z, row, place, block, packed, token, member, valid, num_queries, d,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Write the terms of a block of packed queries, and its share of the gate's gradient.

    Returns the near log-sum-exps and deltas, then the full ones, which only ONE_PASS uses.
    """
    num_packed = num_queries * GROUP
    lse += place.to(tl.int64) * num_packed + member * num_queries + token
    near_lse = tl.load(lse, mask=valid, other=0.0)
    near_delta = tl.sum(out * dout.to(tl.float32), 1)
    full_lse, full_delta = near_lse, near_delta
    if MODE != SLIDING:
        is_open = packed < tl.where(z > 0, num_packed, 0)
        difference += place.to(tl.int64) * num_packed * HEAD_DIM
        change = _gather(difference, packed, tl.zeros_like(packed), d, HEAD_DIM, 0, is_open, HEAD_DIM)
        dz = tl.sum(change.to(tl.float32) * dout.to(tl.float32), 1)
        if (z > 0) & (z < 1):  # a clipped gate has no gradient
            tl.store(dgates + row * tl.num_programs(0) + block, tl.sum(dz, 0))
        near_delta -= z * dz
        if MODE == ONE_PASS:
            full_delta = near_delta + dz
            full_lse = tl.load(lse + tl.num_programs(1).to(tl.int64) * num_packed, mask=is_open, other=0.0)
            full_share = tl.where(is_open, z * tl.exp2(near_lse - full_lse), 0.0)
            near_share = tl.maximum(full_share + (1 - z), 2**-126)  # at z = 1, w may vanish
            near_delta = (full_share * full_delta + (1 - z) * near_delta) / near_share
            near_lse -= tl.log2(near_share)
            full_lse -= tl.log2(z)
            tl.store(term + 2 * apart, full_lse, mask=is_open)
            tl.store(term + 3 * apart, full_delta, mask=is_open)
        else:
            near_lse -= tl.log2(1 - z)
    tl.store(term, near_lse, mask=valid)
    tl.store(term + apart, near_delta, mask=valid)
    return near_lse, near_delta, full_lse, full_delta


@triton.jit
def _end_terms(terms, apart, num_queries, padded, GROUP: tl.constexpr, KINDS: tl.constexpr):
    """Pad the terms of a row: an infinite log-sum-exp gives queries beyond the last one weights of 0."""
    tail = num_queries + tl.arange(0, TERM_BLOCK)
    for member in range(GROUP):
        for kind in range(0, KINDS, 2):
            place = terms + kind * apart + member * padded + tail
            tl.store(place, tl.full([TERM_BLOCK], float("inf"), tl.float32), mask=tail < padded)
            tl.store(place + apart, tl.zeros([TERM_BLOCK], tl.float32), mask=tail < padded)


@triton.jit
def _gradient_sinks(
    dq, q, dout, query, valid, terms, keys, part, rows,
    SINK_KEYS: tl.constexpr, HEAD_DIM: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of the sinks to dq of a block of queries; write its share of their dk and dv to `part`."""
    lse, delta = terms
    sink_k, sink_v, sequence, kv_head, sinks, scale = keys
    d = tl.arange(0, q.shape[1])
    for first_sink in range(0, sinks, SINK_KEYS):
        sink = first_sink + tl.arange(0, SINK_KEYS)
        k_tile = _block(sink_k, sequence, kv_head, first_sink)
        v_tile = _block(sink_v, sequence, kv_head, first_sink)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
        visible = (sink < sinks)[None, :] & (sink[None, :] <= query[:, None]) & valid[:, None]
        weights = tl.where(visible, tl.exp2(scores - lse[:, None]), 0.0)
        dweights = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        dscores = (weights * (dweights - delta[:, None])).to(q.dtype)
        dq = tl.dot(dscores, k_tile, dq, input_precision=PRECISION)
        dk_tile = tl.dot(tl.trans(dscores), q, input_precision=PRECISION)
        dv_tile = tl.dot(tl.trans(weights.to(q.dtype)), dout, input_precision=PRECISION)
        _put(part, dk_tile, sink, tl.zeros_like(sink), d, HEAD_DIM, 0, sink < sinks, HEAD_DIM)
        of_values = part + (rows * sinks).to(tl.int64) * HEAD_DIM
        _put(of_values, dv_tile, sink, tl.zeros_like(sink), d, HEAD_DIM, 0, sink < sinks, HEAD_DIM)
    return dq


@triton.jit
def _gradient_q(
    dq, q, dout, query, first, last, terms, keys, lo, hi,
    BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add what keys lo to hi contribute to dq of a block of queries, which lie from `first` to `last`."""
    lse, delta = terms
    k, v, sequence, kv_head, window, scale = keys
    for start in range(lo, hi, BLOCK):
        key = start + tl.arange(0, BLOCK)
        k_tile, v_tile = _block(k, sequence, kv_head, start), _block(v, sequence, kv_head, start)
        scores = tl.dot(q, tl.trans(k_tile), input_precision=PRECISION) * scale
        dweights = tl.dot(dout, tl.trans(v_tile), input_precision=PRECISION)
        weights = tl.exp2(scores - lse[:, None])
        if KEYS == NEAR:
            if (start + BLOCK - 1 > first) | (start + window <= last):
                weights = tl.where(_in_window(query[:, None] - key[None, :], window), weights, 0.0)
        else:
            if start + BLOCK - 1 > first - window:
                weights = tl.where(key[None, :] <= query[:, None] - window, weights, 0.0)
        dscores = weights * (dweights - delta[:, None])
        dq = tl.dot(dscores.to(k_tile.dtype), k_tile, dq, input_precision=PRECISION)
    return dq


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def backward_q(
    q, k, v, sink_k, sink_v, out, difference, dout, dq, dfull, dgates, lse, terms, sink_parts, order, gates, q_strides,
    out_strides, dout_strides, dq_strides, dfull_strides, kv_heads, full_heads, num_queries, num_keys, window, sinks,
    scaling, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, SINK_KEYS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dq of a block of packed queries, and intermediate results.

    These are the terms for `backward_kv`, the block's share of the gate's gradient, and its share of dk and dv at the
    sinks, which all queries see.
    """
    rows, place = tl.num_programs(1), tl.program_id(1)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    block = tl.num_programs(0) - 1 - tl.program_id(0)
    start = block * QUERIES
    packed, token, member, query, first, last = _packed(start, num_queries, num_keys, GROUP, QUERIES)
    head, num_packed = kv_head * GROUP + member, num_queries * GROUP
    valid = packed < num_packed
    d = tl.arange(0, BLOCK_D)
    q_tile = _gather(q + sequence * q_strides[0], token, head, d, q_strides[2], q_strides[1], valid, HEAD_DIM)
    out += sequence * out_strides[0]
    out_tile = _gather(out, token, head, d, out_strides[2], out_strides[1], valid, HEAD_DIM).to(tl.float32)
    dout += sequence * dout_strides[0]
    dout_tile = _gather(dout, token, head, d, dout_strides[2], dout_strides[1], valid, HEAD_DIM)

    z = 1.0
    if MODE != SLIDING:
        z = tl.load(gates + row)
    padded = tl.cdiv(num_queries, TERM_BLOCK) * TERM_BLOCK
    terms += place.to(tl.int64) * GROUP * padded
    apart = rows.to(tl.int64) * GROUP * padded  # distance between the kinds of terms
    near_lse, near_delta, full_lse, full_delta = _write_terms(
        terms + member * padded + token, apart, lse, difference, dgates, out_tile, dout_tile, z, row, place, block,
        packed, token, member, valid, num_queries, d, GROUP, HEAD_DIM, MODE,
    )  # fmt: skip
    if MODE == GIVEN_FULL:
        dfull += (place // full_heads).to(tl.int64) * dfull_strides[0]
        full_head = place % full_heads * GROUP + member
        is_open = packed < tl.where(z > 0, num_packed, 0)
        dfull_tile = z * dout_tile.to(tl.float32)
        _put(dfull, dfull_tile, token, full_head, d, dfull_strides[2], dfull_strides[1], is_open, HEAD_DIM)
    if block == tl.num_programs(0) - 1:
        _end_terms(terms, apart, num_queries, padded, GROUP, 4 if MODE == ONE_PASS else 2)

    keys = (k, v, sequence, kv_head, window, scale)
    dq_tile = tl.zeros([QUERIES, BLOCK_D], tl.float32)
    sink_keys = (sink_k, sink_v, sequence, kv_head, sinks, scale)
    part = sink_parts + ((block * 2 * rows + place) * sinks).to(tl.int64) * HEAD_DIM
    dq_tile = _gradient_sinks(
        dq_tile, q_tile, dout_tile, query, valid, (near_lse, near_delta), sink_keys, part, rows,
        SINK_KEYS, HEAD_DIM, PRECISION,
    )  # fmt: skip
    dq_tile = _gradient_q(
        dq_tile, q_tile, dout_tile, query, first, last, (near_lse, near_delta), keys,
        tl.maximum(sinks, first - window + 1), last + 1,
        KEYS, NEAR, PRECISION,
    )  # fmt: skip
    if MODE == ONE_PASS:
        end = tl.where(z > 0, last - window + 1, 0)
        dq_tile = _gradient_q(
            dq_tile, q_tile, dout_tile, query, first, last, (full_lse, full_delta), keys, sinks, end,
            KEYS, DISTANT, PRECISION,
        )  # fmt: skip
    dq += sequence * dq_strides[0]
    _put(dq, dq_tile * scaling, token, head, d, dq_strides[2], dq_strides[1], valid, HEAD_DIM)


@triton.jit
def _gradient_kv(
    dk, dv, k, v, key, first, queries, terms, lo, hi,
    GROUP: tl.constexpr, BLOCK: tl.constexpr, KEYS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Add the contribution of queries lo to hi of all heads of a group to dk and dv of the keys from `first` on.

    `lo` is a multiple of BLOCK. One loop covers all heads, so its pipeline fills once. Products are keys x queries, so
    the weights stay in registers for the products that sum over queries.
    """
    q, dout, sequence, first_head, padded, apart, offset, window, sinks, scale = queries
    blocks = tl.cdiv(tl.maximum(hi - lo, 0), BLOCK)
    for step in range(0, GROUP * blocks):
        member, start = step // blocks, lo + step % blocks * BLOCK
        q_tile = _block(q, sequence, first_head + member, start)
        dout_tile = _block(dout, sequence, first_head + member, start)
        scores = tl.dot(k, tl.trans(q_tile), input_precision=PRECISION) * scale
        dweights = tl.dot(v, tl.trans(dout_tile), input_precision=PRECISION)
        term = terms + member * padded + start + tl.arange(0, BLOCK)
        weights = tl.exp2(scores - tl.load(term)[None, :])
        distance = (offset + start + tl.arange(0, BLOCK))[None, :] - key[:, None]
        if KEYS == NEAR:
            least, most = offset + start - first - (k.shape[0] - 1), offset + start + BLOCK - 1 - first
            if (least < 0) | (most >= window) | (first < sinks):
                weights = tl.where(_in_window(distance, window), weights, 0.0)
        else:
            least = offset + start - first - (k.shape[0] - 1)
            if (least < window) | (first < sinks):
                weights = tl.where(distance >= window, weights, 0.0)
        dv = tl.dot(weights.to(dout_tile.dtype), dout_tile, dv, input_precision=PRECISION)
        dscores = weights * (dweights - tl.load(term + apart)[None, :])
        dk = tl.dot(dscores.to(q_tile.dtype), q_tile, dk, input_precision=PRECISION)
    return dk, dv


@triton.jit(do_not_specialize=COUNTS, do_not_specialize_on_alignment=SLICES)
def backward_kv(
    q, k, v, dout, dk, dv, terms, sink_sums, order, gates, dk_strides, dv_strides, kv_heads, num_queries, num_keys,
    window, sinks, scaling, scale, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    QUERIES: tl.constexpr, KEYS: tl.constexpr, MODE: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """dk and dv of a block of keys of a row, using the terms of its queries."""
    rows, place = tl.num_programs(1), tl.program_id(1)
    row = tl.load(order + place)
    sequence, kv_head = row // kv_heads, row % kv_heads
    first = tl.program_id(0) * KEYS
    key = first + tl.arange(0, KEYS)
    d = tl.arange(0, BLOCK_D)
    k_tile, v_tile = _block(k, sequence, kv_head, first), _block(v, sequence, kv_head, first)
    padded = tl.cdiv(num_queries, TERM_BLOCK) * TERM_BLOCK
    terms += place.to(tl.int64) * GROUP * padded
    apart = rows.to(tl.int64) * GROUP * padded
    offset = num_keys - num_queries
    begin = tl.maximum(first - offset, 0) // QUERIES * QUERIES
    near_end = tl.minimum(tl.maximum(first + KEYS - 1 + window - offset, 0), num_queries)
    here, no_head = key, tl.zeros_like(key)
    key = tl.where(key < sinks, key + 2**30, key)  # no query sees the sinks here: sink_sums holds their part
    sums = sink_sums + place * sinks * HEAD_DIM
    dk_tile = _tile(sums, first, sinks, d, HEAD_DIM, HEAD_DIM, KEYS)
    dv_tile = _tile(sums + rows * sinks * HEAD_DIM, first, sinks, d, HEAD_DIM, HEAD_DIM, KEYS)
    queries = (q, dout, sequence, kv_head * GROUP, padded, apart, offset, window, sinks, scale)
    dk_tile, dv_tile = _gradient_kv(
        dk_tile, dv_tile, k_tile, v_tile, key, first, queries, terms, begin, near_end,
        GROUP, QUERIES, NEAR, PRECISION,
    )  # fmt: skip
    if MODE == ONE_PASS:
        begin = tl.maximum(first + window - offset, 0) // QUERIES * QUERIES
        end = tl.where(tl.load(gates + row) > 0, num_queries, 0)
        dk_tile, dv_tile = _gradient_kv(
            dk_tile, dv_tile, k_tile, v_tile, key, first, queries, terms + 2 * apart, begin, end,
            GROUP, QUERIES, DISTANT, PRECISION,
        )  # fmt: skip
    dk += sequence * dk_strides[0] + kv_head * dk_strides[1]
    dv += sequence * dv_strides[0] + kv_head * dv_strides[1]
    exists = here < num_keys
    _put(dk, dk_tile * scaling, here, no_head, d, dk_strides[2], 0, exists, HEAD_DIM)
    _put(dv, dv_tile, here, no_head, d, dv_strides[2], 0, exists, HEAD_DIM)
