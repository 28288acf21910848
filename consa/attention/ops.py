"""Full, sliding-window and gated attention: the only place that chooses between PyTorch and the Triton kernels."""

from __future__ import annotations

from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from consa.attention import portable
from consa.attention.rows import Rows

# Requirements of the Triton kernels.
KERNEL_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
MAX_HEAD_DIM = 256
MIN_SHARED_MEMORY = 162 * 1024  # bytes per block; data-centre GPUs since the A100 have them
TMA_BYTES = 16  # TMA requires each head vector to be a multiple of 16 bytes


def kernels_for(q: Tensor, k: Tensor, v: Tensor, softcap: float | None) -> ModuleType | None:
    """`consa.attention.triton.autograd` if its kernels support this device and these arguments, else None."""
    if not q.is_cuda or softcap is not None or q.shape[3] > MAX_HEAD_DIM:
        return None
    if q.shape[3] * q.itemsize % TMA_BYTES:
        return None
    return _kernels_on(q.device) if q.dtype in KERNEL_DTYPES and q.dtype == k.dtype == v.dtype else None


@cache
def _kernels_on(device: torch.device) -> ModuleType | None:
    memory = torch.cuda.get_device_properties(device).shared_memory_per_block_optin
    if memory < MIN_SHARED_MEMORY or find_spec("triton") is None:
        return None
    from consa.attention.triton import autograd

    return autograd


def full_attention(q: Tensor, k: Tensor, v: Tensor, *, scaling: float, softcap: float | None = None) -> Tensor:
    """As `portable.full_attention`.

    PyTorch's CUDA kernels do not guarantee deterministic gradients. If torch is set to be deterministic, the Triton
    kernels compute full attention too, as a window over all keys.
    """
    if portable.must_repeat(q, k, v) and (kernels := kernels_for(q, k, v, softcap)):
        return kernels.sliding_attention(q, k, v, window=k.shape[2], num_sink_tokens=0, scaling=scaling)
    return portable.full_attention(q, k, v, scaling=scaling, softcap=softcap)


def sliding_attention(
    q: Tensor, k: Tensor, v: Tensor, *, window: int, num_sink_tokens: int, scaling: float, softcap: float | None = None
) -> Tensor:
    """As `portable.sliding_attention`."""
    limits = {"window": window, "num_sink_tokens": num_sink_tokens}
    if window + num_sink_tokens >= k.shape[2]:  # every query sees every earlier key
        return full_attention(q, k, v, scaling=scaling, softcap=softcap)
    if kernels := kernels_for(q, k, v, softcap):
        return kernels.sliding_attention(q, k, v, **limits, scaling=scaling)
    return portable.sliding_attention(q, k, v, **limits, scaling=scaling, softcap=softcap)


def hybrid_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    rows: Rows,
    *,
    window: int,
    num_sink_tokens: int,
    scaling: float,
    softcap: float | None = None,
) -> Tensor:
    """As `portable.hybrid_attention`."""
    limits = {"window": window, "num_sink_tokens": num_sink_tokens}
    if rows.num_full == len(rows.order):
        return full_attention(q, k, v, scaling=scaling, softcap=softcap)
    if rows.num_full + rows.num_mixed == 0:
        return sliding_attention(q, k, v, **limits, scaling=scaling, softcap=softcap)
    if kernels := kernels_for(q, k, v, softcap):
        return kernels.hybrid_attention(q, k, v, rows, **limits, scaling=scaling)
    return portable.hybrid_attention(q, k, v, rows, **limits, scaling=scaling, softcap=softcap)
