"""Block sizes of the Triton kernels, and arguments of their launches."""

# pyright: reportMissingImports=false

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

SINK_BLOCK = 16  # minimum of tl.dot


class Blocks(NamedTuple):
    """Block sizes of a kernel: packed queries and keys per block, warps, and pipeline stages."""

    queries: int
    keys: int
    warps: int
    stages: int


# By kernel and padded head_dim, for 16-bit dtypes.
BLOCKS = {
    "forward": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 3), 256: Blocks(64, 32, 8, 2)},
    "backward_q": {64: Blocks(64, 64, 4, 3), 128: Blocks(128, 64, 8, 3), 256: Blocks(64, 32, 8, 1)},
    "backward_kv": {64: Blocks(64, 64, 4, 3), 128: Blocks(64, 64, 4, 2), 256: Blocks(32, 64, 8, 1)},
}
BLOCKS_FLOAT32 = {128: Blocks(32, 32, 4, 1), 256: Blocks(16, 16, 4, 1)}


def blocks_for(kernel: str, q: Tensor) -> Blocks:
    """The block sizes of "forward", "backward_q" or "backward_kv"."""
    if q.dtype == torch.float32:
        return BLOCKS_FLOAT32[max(128, padded_dim(q.shape[3]))]
    return BLOCKS[kernel][max(64, padded_dim(q.shape[3]))]


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


def tma_blocks(tokens: int, *tensors: Tensor) -> list[TensorDescriptor]:
    """TMA descriptors of tensors `(batch, heads, tokens, head_dim)`, with blocks of `tokens` tokens of one head."""
    return [
        TensorDescriptor(x, list(x.shape), list(x.stride()), [1, 1, tokens, padded_dim(x.shape[3])]) for x in tensors
    ]


def strides(x: Tensor | None) -> tuple[int, int, int]:
    """Strides of batch, heads and tokens."""
    return (0, 0, 0) if x is None else (x.stride(0), x.stride(1), x.stride(2))


def heads_of(full: Tensor | None, problem: Problem) -> int:
    """KV heads per sequence in a given FA, whose rows are sorted."""
    return 1 if full is None else full.shape[1] // problem.group
