"""Decoding on CUDA, in Triton: attention of one new token per sequence over a hybrid's cache, which takes it up.

Two launches do all heads of a layer. The first spreads what the cache holds over the GPU: a program attends to a chunk
of one KV head's tokens, be it on full (FA) or sliding-window attention (SWA), for all query heads of its group at once,
so that keys and values are read once. The second joins the chunks of a query head, in order, with the new token itself,
and writes that token to the cache. So nothing is read after it was written, and results repeat bit for bit.

The number of tokens is read on the device, and the grid is that of the storage: both fit CUDA graphs. Programs beyond
the last token end at once.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false

from __future__ import annotations

import math

import torch
import triton
import triton.language as tl
from torch import Tensor

from consa.attention.triton.launch import cdiv, padded_dim

STEP_BYTES = 16384  # of keys that a program loads at a time
CHUNKS = (128, 2048)  # the fewest and the most keys per program
PROGRAMS = 2048  # wanted: several waves over any GPU
MIN_ROWS = 16  # the smallest that tl.dot takes
WARPS, STAGES = 4, 3
COUNTS = ["batch", "kv_heads", "num_full", "full_room", "sliding_room", "full_chunks", "sliding_chunks"]
COUNTS += ["sinks", "window"]


@triton.jit
def _slot(position, sinks, window):
    """Where SWA heads keep the token at a position; see `consa.cache.layer`."""
    return tl.where(position < sinks, position, sinks + (position - sinks) % window)


@triton.jit(do_not_specialize=COUNTS)
def _attend_chunks(
    q, full_keys, full_values, sliding_keys, sliding_values, sums, lses, heads, length,
    stride_q_sequence, stride_q_head, batch, kv_heads, num_full, full_room, sliding_room, full_chunks, sliding_chunks,
    sinks, window, scale, GROUP: tl.constexpr, ROWS: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr,
    CHUNK: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Weighted means of a chunk's values and log-sum-exps of its scores, of base 2, for a group's query heads."""
    program = tl.program_id(0)
    seen = tl.load(length).to(tl.int32)
    num_full_programs = batch * num_full * full_chunks
    if program < num_full_programs:
        row, chunk = program // full_chunks, program % full_chunks
        sequence, place = row // num_full, row % num_full
        k, v, room = full_keys, full_values, full_room
        held, replaced = seen, -1
    else:
        num_sliding = kv_heads - num_full
        program_there = program - num_full_programs
        row, chunk = program_there // sliding_chunks, program_there % sliding_chunks
        sequence, place = row // num_sliding, num_full + row % num_sliding
        k, v, room = sliding_keys, sliding_values, sliding_room
        held, replaced = tl.minimum(seen, sinks + window), _slot(seen, sinks, window)
    begin = chunk * CHUNK
    end = tl.minimum(begin + CHUNK, held)
    if begin < end:
        d = tl.arange(0, BLOCK_D)
        member = tl.arange(0, ROWS)
        head = tl.load(heads + place) * GROUP + member
        q += sequence.to(tl.int64) * stride_q_sequence
        q_mask = (member < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        q_tile = tl.load(q + head[:, None] * stride_q_head + d[None, :], mask=q_mask, other=0.0)
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, BLOCK_D], tl.float32)
        offset = (row.to(tl.int64) * room) * HEAD_DIM
        for start in range(begin, end, BLOCK):
            key = start + tl.arange(0, BLOCK)
            here = offset + key.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
            mask = (key < end)[:, None] & (d < HEAD_DIM)[None, :]
            k_tile = tl.load(k + here, mask=mask, other=0.0)
            scores = tl.dot(q_tile, tl.trans(k_tile), input_precision=PRECISION) * scale
            scores = tl.where(((key < end) & (key != replaced))[None, :], scores, float("-inf"))
            new_top = tl.maximum(top, tl.max(scores, 1))
            weights = tl.exp2(scores - new_top[:, None])
            shrink = tl.exp2(top - new_top)
            total = total * shrink + tl.sum(weights, 1)
            v_tile = tl.load(v + here, mask=mask, other=0.0)
            acc = tl.dot(weights.to(v_tile.dtype), v_tile, acc * shrink[:, None], input_precision=PRECISION)
            top = new_top
        # A chunk may hold nothing but the token that is replaced: it counts for nothing, whatever its mean.
        mean = acc / tl.maximum(total, 2**-126)[:, None]
        lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
        result = program.to(tl.int64) * GROUP + member
        tl.store(sums + result[:, None] * HEAD_DIM + d[None, :], mean, mask=q_mask)
        tl.store(lses + result, lse, mask=member < GROUP)


@triton.jit(do_not_specialize=COUNTS)
def _join(
    q, new_k, new_v, out, full_keys, full_values, sliding_keys, sliding_values, sums, lses, heads, length,
    stride_q_sequence, stride_q_head, stride_k_sequence, stride_k_head, stride_v_sequence, stride_v_head,
    batch, kv_heads, num_full, full_room, sliding_room, full_chunks, sliding_chunks, sinks, window, scale,
    GROUP: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, CHUNK: tl.constexpr, CHUNK_BLOCK: tl.constexpr,
):  # fmt: skip
    """The result of a query head of a sequence, from its chunks and the new token, which goes into the cache."""
    sequence, place, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    kv_head = tl.load(heads + place)
    seen = tl.load(length).to(tl.int32)
    if place < num_full:
        row = sequence * num_full + place
        first_program, k, v, room = row * full_chunks, full_keys, full_values, full_room
        held, slot = seen, seen
    else:
        num_sliding = kv_heads - num_full
        row = sequence * num_sliding + place - num_full
        first_program = batch * num_full * full_chunks + row * sliding_chunks
        k, v, room = sliding_keys, sliding_values, sliding_room
        held, slot = tl.minimum(seen, sinks + window), _slot(seen, sinks, window)
    d = tl.arange(0, BLOCK_D)
    exists = d < HEAD_DIM
    head = kv_head * GROUP + member
    q_place = q + sequence.to(tl.int64) * stride_q_sequence + head * stride_q_head + d
    k_place = new_k + sequence.to(tl.int64) * stride_k_sequence + kv_head * stride_k_head + d
    v_place = new_v + sequence.to(tl.int64) * stride_v_sequence + kv_head * stride_v_head + d
    q_vector = tl.load(q_place, mask=exists, other=0.0)
    k_vector, v_vector = tl.load(k_place, mask=exists, other=0.0), tl.load(v_place, mask=exists, other=0.0)
    if member == 0:
        here = (row.to(tl.int64) * room + slot) * HEAD_DIM + d
        tl.store(k + here, k_vector, mask=exists)
        tl.store(v + here, v_vector, mask=exists)
    top = tl.sum(q_vector.to(tl.float32) * k_vector.to(tl.float32), 0) * scale
    acc, total = v_vector.to(tl.float32), 1.0
    num_chunks = tl.cdiv(held, CHUNK)
    for start in range(0, num_chunks, CHUNK_BLOCK):
        chunk = start + tl.arange(0, CHUNK_BLOCK)
        result = (first_program + chunk).to(tl.int64) * GROUP + member
        lse = tl.load(lses + result, mask=chunk < num_chunks, other=float("-inf"))
        mask = (chunk < num_chunks)[:, None] & exists[None, :]
        means = tl.load(sums + result[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        new_top = tl.maximum(top, tl.max(lse, 0))
        weights = tl.exp2(lse - new_top)
        shrink = tl.exp2(top - new_top)
        acc = acc * shrink + tl.sum(weights[:, None] * means, 0)
        total = total * shrink + tl.sum(weights, 0)
        top = new_top
    place_of_out = out + (sequence.to(tl.int64) * kv_heads * GROUP + head) * HEAD_DIM + d
    tl.store(place_of_out, (acc / total).to(out.dtype.element_ty), mask=exists)


@torch.library.custom_op(
    "consa::decode",
    mutates_args=("full_keys", "full_values", "sliding_keys", "sliding_values"),
    schema=(
        "(Tensor q, Tensor k, Tensor v, Tensor(a!)? full_keys, Tensor(b!)? full_values, Tensor(c!)? sliding_keys,"
        " Tensor(d!)? sliding_values, Tensor heads, Tensor length, int num_sink_tokens, int window, float scaling)"
        " -> Tensor"
    ),
)
def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    full_keys: Tensor | None,
    full_values: Tensor | None,
    sliding_keys: Tensor | None,
    sliding_values: Tensor | None,
    heads: Tensor,
    length: Tensor,
    num_sink_tokens: int,
    window: int,
    scaling: float,
) -> Tensor:
    """Attention of one new token per sequence over the cache and itself; writes it to the cache.

    Args:
        q: `(batch, q_heads, 1, head_dim)`.
        k: the same tokens' keys, `(batch, kv_heads, 1, head_dim)`.
        v: as `k`.
        full_keys: contiguous `(batch, FA heads, room, head_dim)`, with room for the token; None without such heads.
        full_values: as `full_keys`.
        sliding_keys: contiguous `(batch, SWA heads, room, head_dim)`, slots as in `consa.cache.layer`, or None.
        sliding_values: as `sliding_keys`.
        heads: `(kv_heads,)`, the FA heads, then the SWA heads.
        length: tokens in the cache, one integer on the device.
        num_sink_tokens: tokens.
        window: tokens.
        scaling: factor on the scores.

    Returns:
        As `q`.
    """
    batch, q_heads, _, head_dim = q.shape
    kv_heads = k.shape[1]
    q, k, v = (x if x.stride(3) == 1 else x.contiguous() for x in (q, k, v))
    num_full, full_room = (0, 0) if full_keys is None else full_keys.shape[1:3]
    num_sliding, sliding_room = (0, 0) if sliding_keys is None else sliding_keys.shape[1:3]
    chunk = chunk_size(batch * (num_full * full_room + num_sliding * sliding_room))
    full_chunks, sliding_chunks = cdiv(full_room, chunk), cdiv(sliding_room, chunk)
    programs = batch * (num_full * full_chunks + num_sliding * sliding_chunks)
    group = q_heads // kv_heads
    sums = q.new_empty((programs, group, head_dim), dtype=torch.float32)
    lses = q.new_empty((programs, group), dtype=torch.float32)
    out = q.new_empty((batch, q_heads, 1, head_dim))
    storage = (full_keys, full_values, sliding_keys, sliding_values)
    if full_keys is None:
        storage = (sliding_keys, sliding_values, sliding_keys, sliding_values)
    elif sliding_keys is None:
        storage = (full_keys, full_values, full_keys, full_values)
    counts = (
        batch, kv_heads, num_full, full_room, sliding_room, full_chunks, max(1, sliding_chunks), num_sink_tokens, window
    )  # fmt: skip
    scale = scaling / math.log(2)
    sizes = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": padded_dim(head_dim), "CHUNK": chunk}
    rows = max(MIN_ROWS, 1 << (group - 1).bit_length())
    precision = "tf32x3" if q.dtype == torch.float32 else "tf32"
    block = max(16, min(64, STEP_BYTES // (padded_dim(head_dim) * q.itemsize)))
    _attend_chunks[(programs,)](
        q, *storage, sums, lses, heads, length, q.stride(0), q.stride(1), *counts, scale,
        ROWS=rows, BLOCK=block, PRECISION=precision, num_warps=WARPS, num_stages=STAGES, **sizes,
    )  # fmt: skip
    _join[batch, kv_heads, group](
        q, k, v, out, *storage, sums, lses, heads, length, q.stride(0), q.stride(1), k.stride(0), k.stride(1),
        v.stride(0), v.stride(1), *counts, scale, CHUNK_BLOCK=16, num_warps=4, **sizes,
    )  # fmt: skip
    return out


@decode.register_fake
def _(q: Tensor, *_: object) -> Tensor:
    return q.new_empty(q.shape)


def chunk_size(keys: int) -> int:
    """Keys per program, a power of 2, for so many keys in all."""
    fewest, most = CHUNKS
    return min(most, max(fewest, 1 << (keys // PROGRAMS).bit_length()))
