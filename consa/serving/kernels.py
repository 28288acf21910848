"""Triton kernels over an engine's pages: write new tokens, and attend to full or sliding-window context.

The KV heads of a layer lie in different places of one buffer, and their pages are listed in different page tables. A
kernel finds a head by its row of an address table, see `HEAD_COLUMNS`, so one launch does all heads of a layer.

A page table of a sliding-window head begins with the pages of the sinks. The entries between the sinks and the window
are stale: those pages may belong to other requests by now. Loads are therefore masked, not only scores, and masked
values are zero, because 0 * NaN is NaN.

All lengths are read on the device and nothing is tuned at run time, so the kernels can be captured in CUDA graphs.
"""

# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false, reportGeneralTypeIssues=false
# (What a kernel takes is not what its Python function says.)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

HEAD_COLUMNS = 5
"""int64 columns of an address table: the KV head's number; distances, in elements, of its cache, its page table and its
slots from those that are passed to the kernel; and the row stride of its page table."""

SINK_BLOCK = tl.constexpr(16)  # sinks loaded at a time; the fewest keys that tl.dot takes
MIN_ROWS = 16  # the fewest rows that tl.dot takes
WRITE_TOKENS = 16  # per program


class Blocks(NamedTuple):
    """How a kernel cuts its work: rows (queries x query heads) and keys per block, warps, pipeline stages."""

    rows: int
    keys: int
    warps: int
    stages: int


DECODE = Blocks(MIN_ROWS, 64, 4, 4)
# By padded head_dim, for 16-bit elements.
PREFILL = {64: Blocks(128, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 4, 2)}
FLOAT32 = Blocks(32, 32, 4, 1)


@triton.jit(do_not_specialize=["num_tokens"], do_not_specialize_on_alignment=["heads"])
def _write(
    key, value, cache, heads, slots, num_tokens, key_strides, value_strides, page_stride, token_stride,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, TOKENS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """Copy a block of one head's new keys and values to their slots; a negative slot is padding."""
    row = heads + tl.program_id(1) * COLUMNS
    head = tl.load(row)
    token = tl.program_id(0) * TOKENS + tl.arange(0, TOKENS)
    d = tl.arange(0, BLOCK_D)
    slot = tl.load(slots + tl.load(row + 4) + token, mask=token < num_tokens, other=-1)
    mask = (slot >= 0)[:, None] & (d < HEAD_DIM)[None, :]
    source = token[:, None].to(tl.int64)
    k = tl.load(key + source * key_strides[0] + head * key_strides[1] + d[None, :], mask=mask)
    v = tl.load(value + source * value_strides[0] + head * value_strides[1] + d[None, :], mask=mask)
    place = cache + tl.load(row + 1) + slot // PAGE * page_stride + slot % PAGE * token_stride
    tl.store(place[:, None] + d[None, :], k, mask=mask)
    tl.store(place[:, None] + HEAD_DIM + d[None, :], v, mask=mask)


@triton.jit
def _attend(
    state, q, query, first, last, cache, table, lo, hi, window, page_stride, token_stride, scale,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of a block of queries over keys lo to hi; state: weighted sum, weights' sum, maximum.

    The queries' positions go from `first` to `last`. Exponents are of base 2.
    """
    acc, total, top = state
    d = tl.arange(0, BLOCK_D)
    for start in range(lo // BLOCK * BLOCK, hi, BLOCK):
        key = start + tl.arange(0, BLOCK)
        inside = (key >= lo) & (key < hi)
        page = tl.load(table + key // PAGE, mask=inside, other=0).to(tl.int64)
        place = cache + page * page_stride + key % PAGE * token_stride
        mask = inside[:, None] & (d < HEAD_DIM)[None, :]
        k = tl.load(place[:, None] + d[None, :], mask=mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        # Only blocks at an edge need a mask. Of unsigned numbers, one comparison says 0 <= distance < window.
        ends = (start < lo) | (start + BLOCK > hi)
        if ends | (start + BLOCK - 1 > first) | (start + window <= last):
            distance = (query[:, None] - key[None, :]).to(tl.uint32, bitcast=True)
            visible = inside[None, :] & (distance < window.to(tl.uint32, bitcast=True))
            scores = tl.where(visible, scores, float("-inf"))
        new_top = tl.maximum(top, tl.max(scores, 1) * scale)
        weights = tl.exp2(scores * scale - new_top[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(weights, 1)
        v = tl.load(place[:, None] + HEAD_DIM + d[None, :], mask=mask, other=0.0)
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
        top = new_top
    return acc, total, top


@triton.jit(do_not_specialize=["num_requests", "window", "sinks"], do_not_specialize_on_alignment=["heads"])
def _attention(
    query, output, cache, table, heads, seq_lens, query_starts, num_requests, query_strides, output_strides,
    page_stride, token_stride, window, sinks, scale, DECODING: tl.constexpr, GROUP: tl.constexpr,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, SINK_BLOCK: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a block of one request's queries, for the query heads of one KV head.

    Rows are (query, query head) pairs, so that keys and values are loaded once for all query heads. While decoding, a
    block is a request, of one query. Otherwise request r has the blocks from query_starts[r] // QUERIES + r on, at
    least as many as it needs: the number of blocks depends on no request's length.
    """
    QUERIES: tl.constexpr = 1 if DECODING else ROWS // GROUP
    block = tl.program_id(0)
    request = block
    if not DECODING:
        above = num_requests
        request = 0
        while request + 1 < above:  # the last request whose first block is at most this one
            middle = (request + above) // 2
            if tl.load(query_starts + middle) // QUERIES + middle <= block:
                request = middle
            else:
                above = middle
    begin, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    row = begin
    if not DECODING:
        row = begin + (block - begin // QUERIES - request) * QUERIES
    if row < end:
        address = heads + tl.program_id(1) * COLUMNS
        head = tl.load(address)
        cache += tl.load(address + 1)
        table += tl.load(address + 2) + request * tl.load(address + 3)
        length = tl.load(seq_lens + request)
        first = length - (end - row)
        hi = tl.minimum(first + QUERIES, length)
        member = tl.arange(0, ROWS)
        query_row = row + member // GROUP
        position = first + member // GROUP
        d = tl.arange(0, BLOCK_D)
        valid = (member < QUERIES * GROUP) & (query_row < end)
        mask = valid[:, None] & (d < HEAD_DIM)[None, :]
        query_head = head * GROUP + member % GROUP
        place = query_row.to(tl.int64) * query_strides[0] + query_head * query_strides[1]
        q = tl.load(query + place[:, None] + d[None, :], mask=mask, other=0.0)
        # The maximum starts finite: where nothing is visible yet, exp2(-inf - top) is 0, not NaN. (A learned sink would
        # start with its logit as the maximum, a total of 1, and its value as the sum.)
        state = (
            tl.zeros([ROWS, BLOCK_D], tl.float32),
            tl.zeros([ROWS], tl.float32),
            tl.full([ROWS], -1e30, tl.float32),
        )
        everything = tl.maximum(hi, 1)
        state = _attend(
            state, q, position, first, hi - 1, cache, table, 0, tl.minimum(sinks, hi), everything,
            page_stride, token_stride, scale, PAGE, HEAD_DIM, BLOCK_D, SINK_BLOCK, PRECISION,
        )  # fmt: skip
        acc, total, _ = _attend(
            state, q, position, first, hi - 1, cache, table, tl.maximum(sinks, first - window + 1), hi, window,
            page_stride, token_stride, scale, PAGE, HEAD_DIM, BLOCK_D, BLOCK, PRECISION,
        )  # fmt: skip
        # A warm-up's requests may be shorter than their queries: 0, not 0 / 0.
        result = acc / tl.maximum(total, 2**-126)[:, None]
        place = query_row.to(tl.int64) * output_strides[0] + query_head * output_strides[1]
        tl.store(output + place[:, None] + d[None, :], result.to(output.dtype.element_ty), mask=mask)


def write(
    key: Tensor, value: Tensor, cache: Tensor, heads: Tensor, slots: Tensor, *, num_tokens: int
) -> None:
    """Write new tokens into their pages.

    Args:
        key: `(tokens, kv_heads, head_dim)`.
        value: as `key`.
        cache: the pages of one head, `(pages, 1, page tokens, 2 * head_dim)`, keys before values.
        heads: int64 address table, `(heads, HEAD_COLUMNS)`, of the heads to write.
        slots: int64 `(tokens,)`, place of each token counted through all pages; negative for padding.
        num_tokens: rows of `key` to write.
    """
    head_dim = key.shape[2]
    _write[_cdiv(num_tokens, WRITE_TOKENS), len(heads)](
        key, value, cache, heads, slots, num_tokens, key.stride()[:2], value.stride()[:2],
        cache.stride(0), cache.stride(2), PAGE=cache.shape[2], HEAD_DIM=head_dim, BLOCK_D=padded_dim(head_dim),
        TOKENS=WRITE_TOKENS, COLUMNS=HEAD_COLUMNS, num_warps=4,
    )  # fmt: skip


def attention(
    query: Tensor,
    output: Tensor,
    cache: Tensor,
    heads: Tensor,
    table: Tensor,
    *,
    group: int,
    seq_lens: Tensor,
    query_starts: Tensor,
    num_tokens: int,
    decoding: bool,
    window: int,
    num_sink_tokens: int,
    scaling: float,
    blocks: Blocks | None = None,
) -> None:
    """Write the attention of some KV heads' queries to `output`; their keys and values are in their pages.

    Args:
        query: `(tokens, query heads, head_dim)`.
        output: as `query`.
        cache: as in `write`.
        heads: int64 address table, `(heads, HEAD_COLUMNS)`, of the KV heads.
        table: int32 `(requests, pages)`, a page table that `heads` counts from.
        group: query heads per KV head.
        seq_lens: int32 `(requests,)`, tokens of each request, new ones included.
        query_starts: int32 `(requests + 1,)`, rows of `query` at which requests begin; the last is their number.
        num_tokens: rows of `query`, at least query_starts[-1].
        decoding: whether no request has more than one new token.
        window: tokens that a query sees, itself included; `FULL_WINDOW` for full attention.
        num_sink_tokens: first tokens of each request that stay visible.
        scaling: factor on the scores.
        blocks: how the work is cut, for measurements.
    """
    head_dim, num_requests = query.shape[2], len(seq_lens)
    blocks = blocks or blocks_for(query, group, decoding)
    programs = num_requests if decoding else num_tokens // (blocks.rows // group) + num_requests
    _attention[programs, len(heads)](
        query, output, cache, table, heads, seq_lens, query_starts, num_requests, query.stride()[:2],
        output.stride()[:2], cache.stride(0), cache.stride(2), window, num_sink_tokens, scaling / math.log(2),
        DECODING=decoding, GROUP=group, PAGE=cache.shape[2], HEAD_DIM=head_dim, BLOCK_D=padded_dim(head_dim),
        ROWS=blocks.rows, BLOCK=blocks.keys, COLUMNS=HEAD_COLUMNS, SINK_BLOCK=SINK_BLOCK.value,
        PRECISION="tf32x3" if query.dtype == torch.float32 else "tf32",
        num_warps=blocks.warps, num_stages=blocks.stages,
    )  # fmt: skip


FULL_WINDOW = 2**30  # more tokens than any request has


def blocks_for(query: Tensor, group: int, decoding: bool) -> Blocks:
    """How the work is cut."""
    needed = max(MIN_ROWS, 1 << (group - 1).bit_length())
    if query.dtype == torch.float32:
        blocks = FLOAT32
    elif decoding:
        blocks = DECODE
    else:
        blocks = PREFILL[min(256, max(64, padded_dim(query.shape[2])))]
    return blocks._replace(rows=needed if decoding else max(needed, blocks.rows))


def address_table(
    heads: list[int], caches: list[Tensor], tables: list[Tensor], slots: list[Tensor]
) -> Tensor:
    """Where KV heads lie, on their device, counted from the first of each list; see `HEAD_COLUMNS`.

    Args:
        heads: numbers of the KV heads, in the order of `key`.
        caches: pages of each head, all of the same shape and strides.
        tables: page table of each head, `(requests, pages)`.
        slots: slots of the new tokens of each head, `(tokens,)`.
    """

    def distances(tensors: list[Tensor]) -> list[int]:
        start, size = tensors[0].data_ptr(), tensors[0].element_size()
        return [(x.data_ptr() - start) // size for x in tensors]

    columns: Any = (
        heads, distances(caches), distances(tables), [x.stride(0) for x in tables], distances(slots)
    )  # fmt: skip
    return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, device=caches[0].device)


def padded_dim(head_dim: int) -> int:
    """The power of 2 that blocks have room for."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
