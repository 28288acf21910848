"""Triton kernels over an engine's pages: write new tokens, and attend to full or sliding-window context.

The KV heads of a layer lie in different places of one buffer, and their pages are listed in different page tables. A
kernel finds a head by its row of an address table, see `HEAD_COLUMNS`, so one launch does all heads of a layer.

A page table of a sliding-window head begins with the pages of the sinks. The entries between the sinks and the window
are stale: those pages may belong to other requests by now. Loads are therefore masked, not only scores, and masked
values are zero, because 0 * NaN is NaN.

A decoding request is little work, most of it waiting for memory: its keys are spread over several programs, whose
results a second launch joins, always in the same order, so that results repeat bit for bit.

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

ALIGNMENT = tl.constexpr(16)
"""Elements of which a distance between caches is a multiple. Loads take 16 bytes at a time, and are pipelined, only
where the compiler knows so much: it cannot see it in a number that is read from memory."""

MIN_ROWS = 16  # the fewest rows that tl.dot takes
WRITE_TOKENS = 16  # per program
MAX_PARTS = 32  # that one program joins


class Blocks(NamedTuple):
    """How a kernel cuts its work: rows (queries x query heads) and keys per block, warps, pipeline stages.

    If there are fewer requests x KV heads than `programs`, decoding spreads each one's keys over several programs.
    Fewer `registers` per thread than the compiler would take may let more programs run at once.
    """

    rows: int
    keys: int
    warps: int
    stages: int
    programs: int = 0
    registers: int | None = None


# Two stages load a block's keys and values while nothing else is done; other programs fill the time.
DECODE = Blocks(MIN_ROWS, 64, 4, 3, programs=400)
# By padded head_dim, for 16-bit elements. An entry of a page table and the keys that it leads to are loaded one after
# the other, so five stages load keys and values two blocks ahead, and three one block.
PREFILL = {
    64: Blocks(64, 32, 4, 5, registers=128),
    128: Blocks(128, 32, 8, 5, registers=128),
    256: Blocks(64, 32, 4, 3),
}
FLOAT32 = Blocks(32, 32, 4, 1, programs=1024)


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
    cache += tl.multiple_of(tl.load(row + 1), ALIGNMENT)
    place = cache + slot // PAGE * page_stride + slot % PAGE * token_stride
    tl.store(place[:, None] + d[None, :], k, mask=mask)
    tl.store(place[:, None] + HEAD_DIM + d[None, :], v, mask=mask)


@triton.jit
def _attend(
    state, q, key, exists, visible, cache, table, page_stride, token_stride, scale, MASKED: tl.constexpr,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax of queries over one more block of keys; state: weighted sum, weights' sum, maximum.

    Keys that do not exist are not loaded. If MASKED, queries see the keys that `visible` says, else all. Exponents are
    of base 2.
    """
    acc, total, top = state
    d = tl.arange(0, BLOCK_D)
    page = tl.load(table + key // PAGE, mask=exists, other=0).to(tl.int64)
    place = cache + (page * page_stride + key % PAGE * token_stride)[:, None] + d[None, :]
    mask = exists[:, None]
    if HEAD_DIM < BLOCK_D:
        mask = mask & (d < HEAD_DIM)[None, :]
    # Both loads come before the first use, so that the values do not wait for the scores.
    k = tl.load(place, mask=mask, other=0.0)
    v = tl.load(place + HEAD_DIM, mask=mask, other=0.0)
    scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_top = tl.maximum(top, tl.max(scores, 1) * scale)
    weights = tl.exp2(scores * scale - new_top[:, None])
    shrink = tl.exp2(top - new_top)
    total = total * shrink + tl.sum(weights, 1)
    acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision=PRECISION)
    return acc, total, new_top


@triton.jit
def _start(ROWS: tl.constexpr, BLOCK_D: tl.constexpr):
    """State before the first key.

    The maximum starts finite: where nothing is visible yet, exp2(-inf - top) is 0, not NaN. (A learned sink would start
    with its logit as the maximum, a total of 1, and its value as the sum.)
    """
    zeros = tl.zeros([ROWS, BLOCK_D], tl.float32)
    return zeros, tl.zeros([ROWS], tl.float32), tl.full([ROWS], -1e30, tl.float32)


@triton.jit
def _spans(first, hi, window, sinks):
    """Which keys are seen by some query from position `first` to before `hi`: the sinks, then the window.

    The sinks and the window are counted together, so that they share blocks: key number i is token i of the sinks, and
    token i + gap of the window. Returns the number of sinks, the gap, and the number of keys.
    """
    held = tl.minimum(sinks, hi)
    gap = tl.maximum(0, first - window + 1 - held)
    return held, gap, hi - gap


@triton.jit(do_not_specialize=["window", "sinks"], do_not_specialize_on_alignment=["heads"])
def _decode(
    query, output, sums, lses, cache, table, heads, seq_lens, query_starts, query_strides, output_strides,
    page_stride, token_stride, window, sinks, scale, SPLIT: tl.constexpr, GROUP: tl.constexpr,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of one query per request, for the query heads of one KV head, over a part of the keys.

    If SPLIT, the result is the mean of the part's values and the log-sum-exp of its scores, of base 2, which `_join`
    takes; an empty part has a log-sum-exp of -inf.
    """
    request, place, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    # A program lives for few loads, one after the other: what does not depend on another load comes first.
    address = heads + place * COLUMNS
    head = tl.load(address)
    cache += tl.multiple_of(tl.load(address + 1), ALIGNMENT)
    table += tl.load(address + 2) + request * tl.load(address + 3)
    length = tl.load(seq_lens + request)
    row, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    if row < end:  # not the padding of a graph
        held, gap, count = _spans(length - 1, length, window, sinks)
        # Parts depend on the length, their number does not. All but one have whole blocks.
        size = tl.cdiv(tl.cdiv(count, tl.num_programs(2)), BLOCK) * BLOCK
        begin = part * size
        stop = tl.minimum(begin + size, count)
        member = tl.arange(0, ROWS)
        d = tl.arange(0, BLOCK_D)
        mask = (member < GROUP)[:, None] & (d < HEAD_DIM)[None, :]
        query_head = head * GROUP + member
        offset = row.to(tl.int64) * query_strides[0] + query_head * query_strides[1]
        q = tl.load(query + offset[:, None] + d[None, :], mask=mask, other=0.0)
        state = _start(ROWS, BLOCK_D)
        for start in range(begin, stop, BLOCK):
            number = start + tl.arange(0, BLOCK)
            key = tl.where(number < held, number, number + gap)
            exists = number < stop
            state = _attend(
                state, q, key, exists, exists[None, :], cache, table, page_stride, token_stride, scale, True,
                PAGE, HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        acc, total, top = state
        # A warm-up's requests may have no token: 0, not 0 / 0.
        mean = acc / tl.maximum(total, 2**-126)[:, None]
        if SPLIT:
            result = ((request * tl.num_programs(1) + place) * GROUP + member) * tl.num_programs(2) + part
            tl.store(sums + result.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], mean, mask=mask)
            lse = tl.where(total > 0, top + tl.log2(total), float("-inf"))
            tl.store(lses + result, lse, mask=member < GROUP)
        else:
            offset = row.to(tl.int64) * output_strides[0] + query_head * output_strides[1]
            tl.store(output + offset[:, None] + d[None, :], mean.to(output.dtype.element_ty), mask=mask)


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["heads"])
def _join(
    output, sums, lses, heads, query_starts, output_strides, parts, GROUP: tl.constexpr, HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr, PARTS: tl.constexpr, COLUMNS: tl.constexpr,
):  # fmt: skip
    """The result of one query head of a request from those of the parts of its keys, always in the same order."""
    request, place, member = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    part, d = tl.arange(0, PARTS), tl.arange(0, BLOCK_D)
    result = ((request * tl.num_programs(1) + place) * GROUP + member) * parts + part
    lse = tl.load(lses + result, mask=part < parts, other=float("-inf"))
    mask = (part < parts)[:, None] & (d < HEAD_DIM)[None, :]
    means = tl.load(sums + result.to(tl.int64)[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
    row, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    head = tl.load(heads + place * COLUMNS)
    weights = tl.exp2(lse - tl.maximum(tl.max(lse, 0), -1e30))
    mean = tl.sum(weights[:, None] * means, 0) / tl.maximum(tl.sum(weights, 0), 2**-126)
    offset = row.to(tl.int64) * output_strides[0] + (head * GROUP + member) * output_strides[1]
    # Padding has no row: what was read for it means nothing. (Triton 3.9's interpreter takes no mask of a scalar.)
    tl.store(output + offset + d, mean.to(output.dtype.element_ty), mask=d < tl.where(row < end, HEAD_DIM, 0))


@triton.jit(do_not_specialize=["num_requests", "window", "sinks"], do_not_specialize_on_alignment=["heads"])
def _prefill(
    query, output, cache, table, heads, seq_lens, query_starts, num_requests, query_strides, output_strides,
    page_stride, token_stride, window, sinks, scale, GROUP: tl.constexpr,
    PAGE: tl.constexpr, HEAD_DIM: tl.constexpr, BLOCK_D: tl.constexpr, ROWS: tl.constexpr, BLOCK: tl.constexpr,
    COLUMNS: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Attention of a block of one request's queries, for the query heads of one KV head.

    Rows are (query, query head) pairs, so that keys and values are loaded once for all query heads. Request r has the
    blocks from query_starts[r] // QUERIES + r on, at least as many as it needs: the number of blocks depends on no
    request's length.
    """
    QUERIES: tl.constexpr = ROWS // GROUP
    block = tl.program_id(0)
    request, above = 0, num_requests
    while request + 1 < above:  # the last request whose first block is at most this one
        middle = (request + above) // 2
        if tl.load(query_starts + middle) // QUERIES + middle <= block:
            request = middle
        else:
            above = middle
    begin, end = tl.load(query_starts + request), tl.load(query_starts + request + 1)
    row = begin + (block - begin // QUERIES - request) * QUERIES
    if row < end:
        address = heads + tl.program_id(1) * COLUMNS
        head = tl.load(address)
        cache += tl.multiple_of(tl.load(address + 1), ALIGNMENT)
        table += tl.load(address + 2) + request * tl.load(address + 3)
        length = tl.load(seq_lens + request)
        first = length - (end - row)
        hi = tl.minimum(first + QUERIES, length)
        held, gap, count = _spans(first, hi, window, sinks)
        member = tl.arange(0, ROWS)
        query_row = row + member // GROUP
        position = first + member // GROUP
        d = tl.arange(0, BLOCK_D)
        valid = (member < QUERIES * GROUP) & (query_row < end)
        mask = valid[:, None] & (d < HEAD_DIM)[None, :]
        query_head = head * GROUP + member % GROUP
        offset = query_row.to(tl.int64) * query_strides[0] + query_head * query_strides[1]
        q = tl.load(query + offset[:, None] + d[None, :], mask=mask, other=0.0)
        state = _start(ROWS, BLOCK_D)
        # All queries see all keys from number `inner` to before `outer`, so these blocks need no mask. Those before and
        # after, which do, share a loop.
        inner = tl.where(hi - window <= held, 0, tl.cdiv(hi - window - gap, BLOCK) * BLOCK)
        outer = tl.maximum(inner, (first + 1 - gap) // BLOCK * BLOCK)
        for edge in range(0, count - (outer - inner), BLOCK):
            start = tl.where(edge < inner, edge, edge + (outer - inner))
            number = start + tl.arange(0, BLOCK)
            key = tl.where(number < held, number, number + gap)
            exists = number < count
            # How far away a key is still seen. Of unsigned numbers, one comparison says 0 <= distance < reach.
            reach = tl.where(exists, tl.where(number < held, hi, window), 0)
            distance = (position[:, None] - key[None, :]).to(tl.uint32, bitcast=True)
            visible = distance < reach.to(tl.uint32, bitcast=True)[None, :]
            state = _attend(
                state, q, key, exists, visible, cache, table, page_stride, token_stride, scale, True,
                PAGE, HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        everything = tl.full([BLOCK], True, tl.int1)
        for start in range(inner, outer, BLOCK):
            key = start + gap + tl.arange(0, BLOCK)
            state = _attend(
                state, q, key, everything, everything[None, :], cache, table, page_stride, token_stride, scale, False,
                PAGE, HEAD_DIM, BLOCK_D, PRECISION,
            )  # fmt: skip
        acc, total, _ = state
        # A warm-up's requests may be shorter than their queries: 0, not 0 / 0.
        result = acc / tl.maximum(total, 2**-126)[:, None]
        offset = query_row.to(tl.int64) * output_strides[0] + query_head * output_strides[1]
        tl.store(output + offset[:, None] + d[None, :], result.to(output.dtype.element_ty), mask=mask)


def write(key: Tensor, value: Tensor, cache: Tensor, heads: Tensor, slots: Tensor, *, num_tokens: int) -> None:
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
    strides = (query.stride()[:2], output.stride()[:2], cache.stride(0), cache.stride(2))
    numbers = (*strides, window, num_sink_tokens, scaling / math.log(2))
    shape = {"GROUP": group, "HEAD_DIM": head_dim, "BLOCK_D": padded_dim(head_dim), "COLUMNS": HEAD_COLUMNS}
    settings = {
        "PAGE": cache.shape[2], "ROWS": blocks.rows, "BLOCK": blocks.keys, "num_warps": blocks.warps,
        "num_stages": blocks.stages, "maxnreg": blocks.registers,
        "PRECISION": "tf32x3" if query.dtype == torch.float32 else "tf32",
    }  # fmt: skip
    if not decoding:
        programs = num_tokens // (blocks.rows // group) + num_requests
        _prefill[programs, len(heads)](
            query, output, cache, table, heads, seq_lens, query_starts, num_requests, *numbers, **shape, **settings
        )  # fmt: skip
        return
    parts = num_parts(blocks, num_requests * len(heads), window + num_sink_tokens)
    results = num_requests * len(heads) * group * parts if parts > 1 else 0
    sums = query.new_empty((results, head_dim), dtype=torch.float32)
    lses = query.new_empty(results, dtype=torch.float32)
    _decode[num_requests, len(heads), parts](
        query, output, sums, lses, cache, table, heads, seq_lens, query_starts, *numbers, SPLIT=parts > 1,
        **shape, **settings,
    )  # fmt: skip
    if parts > 1:
        _join[num_requests, len(heads), group](
            output, sums, lses, heads, query_starts, output.stride()[:2], parts, PARTS=MAX_PARTS, num_warps=4, **shape
        )  # fmt: skip


def num_parts(blocks: Blocks, rows: int, keys: int) -> int:
    """Programs over which decoding spreads the keys of each of `rows` pairs of a request and a KV head.

    No request sees more than `keys`. What a request really sees does not matter, so a CUDA graph holds for all lengths.
    """
    key_blocks = _cdiv(keys, blocks.keys)
    most = max(1, min(MAX_PARTS, blocks.programs // rows))
    return _cdiv(key_blocks, _cdiv(key_blocks, most))  # no more than needed for the same blocks per program


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


def address_table(heads: list[int], caches: list[Tensor], tables: list[Tensor], slots: list[Tensor]) -> Tensor:
    """Where KV heads lie, on their device, counted from the first of each list; see `HEAD_COLUMNS`.

    Args:
        heads: numbers of the KV heads, in the order of `key`.
        caches: pages of each head, all of the same shape and strides, at distances as `ALIGNMENT` says.
        tables: page table of each head, `(requests, pages)`.
        slots: slots of the new tokens of each head, `(tokens,)`.
    """

    def distances(tensors: list[Tensor]) -> list[int]:
        start, size = tensors[0].data_ptr(), tensors[0].element_size()
        return [(x.data_ptr() - start) // size for x in tensors]

    assert not any(distance % ALIGNMENT.value for distance in distances(caches))
    columns: Any = (
        heads, distances(caches), distances(tables), [x.stride(0) for x in tables], distances(slots)
    )  # fmt: skip
    return torch.tensor(list(zip(*columns, strict=True)), dtype=torch.int64, device=caches[0].device)


def padded_dim(head_dim: int) -> int:
    """The power of 2 that blocks have room for."""
    return max(16, 1 << (head_dim - 1).bit_length())


def _cdiv(a: int, b: int) -> int:
    return -(-a // b)
