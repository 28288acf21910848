"""Launches the Triton kernels and chooses their block sizes."""

# pyright: reportArgumentType=false, reportCallIssue=false, reportMissingImports=false
# (The arguments of a launch differ from those of the Python function.)

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from consa.attention.triton import kernels
from consa.attention.triton.kernels import ONE_PASS, SLIDING, TERM_BLOCK

SINK_BLOCK = 16  # minimum of tl.dot


class Blocks(NamedTuple):
    """Block sizes of a kernel: packed queries and keys per block, warps, and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and padded head_dim, for 16-bit dtypes.
BLOCKS = {
    ("forward", 64): Blocks(64, 64, 4, 3),
    ("forward", 128): Blocks(64, 64, 4, 3),
    ("forward", 256): Blocks(64, 32, 8, 2),
    ("backward_q", 64): Blocks(64, 64, 4, 3),
    ("backward_q", 128): Blocks(128, 64, 8, 3),
    ("backward_q", 256): Blocks(64, 32, 8, 1),
    ("backward_kv", 64): Blocks(64, 64, 4, 3),
    ("backward_kv", 128): Blocks(64, 64, 4, 2),
    ("backward_kv", 256): Blocks(32, 64, 8, 1),
}
BLOCKS_FLOAT32 = {128: Blocks(32, 32, 4, 1), 256: Blocks(16, 16, 4, 1)}


def blocks_for(kernel: str, q: Tensor) -> Blocks:
    """The block sizes of "forward", "backward_q" or "backward_kv"."""
    if q.dtype == torch.float32:
        return BLOCKS_FLOAT32[max(128, padded_dim(q.shape[3]))]
    return BLOCKS[kernel, max(64, padded_dim(q.shape[3]))]


def padded_dim(head_dim: int) -> int:
    """`head_dim` rounded up to a power of 2, at least 16; Triton's own function takes as long as a launch."""
    return max(16, 1 << (head_dim - 1).bit_length())


def cdiv(a: int, b: int) -> int:
    """a / b, rounded up."""
    return -(-a // b)


class Problem(NamedTuple):
    """Sizes that all kernels of a call share."""

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
        """Keyword arguments that all launches share."""
        return {
            "GROUP": self.group,
            "HEAD_DIM": self.head_dim,
            "BLOCK_D": padded_dim(self.head_dim),
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
    num_open: int,
    gates: Tensor | None,
    full: Tensor | None,
    problem: Problem,
    mode: int,
    *,
    training: bool,
) -> tuple[Tensor, Tensor | None]:
    """Write the rows `order` of `out`. `gates` holds all rows; the first `num_open` of `order` have a gate above 0.

    Returns:
        The log-sum-exps, `(near and with ONE_PASS full, rows, group, queries)`, and FA minus SWA of the open rows,
        `(num_open, packed queries, head_dim)`, if `training` with gates, else None.
    """
    rows, p = len(order), problem
    lse = q.new_empty((2 if mode == ONE_PASS.value else 1, rows, p.group, p.queries), dtype=torch.float32)
    difference = None
    if training and mode != SLIDING.value:
        difference = q.new_empty((num_open, p.packed, p.head_dim))
    blocks = blocks_for("forward", q)
    kernels.forward[cdiv(p.packed, blocks.queries), rows](
        q, *_blocks(blocks.keys, k, v), *_blocks(SINK_BLOCK, k, v), out, difference, lse, full, order, gates,
        *map(_strides, (q, out, full)), p.kv_heads, _heads(full, p), p.queries, p.keys, p.window, p.num_sink_tokens,
        p.scaling / math.log(2), SINK_KEYS=SINK_BLOCK,
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
    """Write the rows `order` of dq, dk and dv, and dfull if FA was given to `forward`.

    Returns:
        The gradient of the gates of all rows, zero outside `order`; None without gates.
    """
    rows, p = len(order), problem
    scale = p.scaling / math.log(2)
    padded = cdiv(p.queries, TERM_BLOCK.value) * TERM_BLOCK.value
    terms = lse.new_empty((4 if mode == ONE_PASS.value else 2, rows, p.group, padded))
    blocks = blocks_for("backward_q", q)
    num_blocks = cdiv(p.packed, blocks.queries)
    dgates = None if gates is None else lse.new_zeros((len(gates), num_blocks))
    sink_parts = lse.new_empty((num_blocks, 2, rows, p.num_sink_tokens, p.head_dim))
    kernels.backward_q[num_blocks, rows](
        q, *_blocks(blocks.keys, k, v), *_blocks(SINK_BLOCK, k, v), out, difference, dout, dq, dfull, dgates, lse,
        terms, sink_parts, order, gates, *map(_strides, (q, out, dout, dq, dfull)), p.kv_heads, _heads(dfull, p),
        p.queries, p.keys, p.window, p.num_sink_tokens, p.scaling, scale, SINK_KEYS=SINK_BLOCK,
        **p.settings(q, blocks, mode),
    )  # fmt: skip
    sink_sums = sink_parts.sum(0) if p.num_sink_tokens else sink_parts
    blocks = blocks_for("backward_kv", q)
    (q_blocks, dout_blocks), (k_blocks, v_blocks) = (_blocks(blocks.queries, q, dout), _blocks(blocks.keys, k, v))
    kernels.backward_kv[cdiv(p.keys, blocks.keys), rows](
        q_blocks, k_blocks, v_blocks, dout_blocks, dk, dv, terms, sink_sums, order, gates, *map(_strides, (dk, dv)),
        p.kv_heads, p.queries, p.keys, p.window, p.num_sink_tokens, p.scaling, scale, **p.settings(q, blocks, mode),
    )  # fmt: skip
    return None if dgates is None else dgates.sum(1)


def _blocks(tokens: int, *tensors: Tensor) -> list[TensorDescriptor]:
    """TMA descriptors of tensors `(batch, heads, tokens, head_dim)`, with blocks of `tokens` tokens of one head."""
    return [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tokens, padded_dim(x.shape[3])]) for x in tensors
    ]


def _strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def _heads(full: Tensor | None, problem: Problem) -> int:
    """KV heads per sequence in a given FA, whose rows are sorted."""
    return 1 if full is None else full.shape[1] // problem.group
