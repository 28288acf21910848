"""On a CUDA device: the hybrid equals the reference, and learning is repeatable bit for bit."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from consa.attention.ops import hybrid_attention
from consa.attention.reference import reference_attention
from consa.attention.rows import Rows
from consa.config import LearnConfig
from consa.training.learning import learn
from tests.compare import assert_close
from tests.models import tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
DEVICE = torch.device("cuda")


@pytest.mark.parametrize("softcap", [None, 5.0])
@pytest.mark.parametrize(
    ("batch", "heads", "group", "queries", "keys", "head_dim", "window", "num_sink_tokens"),
    [
        (1, 3, 3, 1037, 1037, 64, 128, 4),
        (2, 2, 1, 515, 700, 128, 63, 0),
        (2, 3, 2, 77, 77, 32, 1, 3),
        (1, 2, 4, 300, 300, 64, 299, 4),
        (3, 1, 2, 1, 257, 64, 100, 5),
    ],
)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.bfloat16, 1e-2), (torch.float32, 1e-4)], ids=str)
def test_hybrid_equals_the_reference(
    dtype: torch.dtype,
    tolerance: float,
    batch: int,
    heads: int,
    group: int,
    queries: int,
    keys: int,
    head_dim: int,
    window: int,
    num_sink_tokens: int,
    softcap: float | None,
):
    generator = torch.Generator().manual_seed(0)

    def draw(heads: int, length: int) -> Tensor:
        return torch.randn(batch, heads, length, head_dim, generator=generator).to(DEVICE, dtype)

    q, upstream = draw(heads * group, queries), draw(heads * group, queries)
    k, v = draw(heads, keys), draw(heads, keys)
    z = torch.linspace(-0.3, 1.3, batch * heads).clamp(0, 1).reshape(batch, heads)  # some 0, some 1, some mixed
    options: dict[str, Any] = {
        "window": window,
        "num_sink_tokens": num_sink_tokens,
        "scaling": head_dim**-0.5,
        "softcap": softcap,
    }
    mine = [x.clone().requires_grad_() for x in (q, k, v, z.to(DEVICE))]
    out = hybrid_attention(*mine[:3], Rows.sort(z, mine[3]), **options)
    out.backward(upstream)
    truth = [x.detach().double().requires_grad_() for x in (q, k, v, z.to(DEVICE))]
    wanted = reference_attention(*truth, **options)
    wanted.backward(upstream.double())
    assert_close(out, wanted, tolerance, "output")
    for name, x, x2 in zip("qkv", mine, truth, strict=False):
        assert_close(x.grad, x2.grad, 2 * tolerance, f"d{name}", floor=0.1)
    mixed = ((z > 0) & (z < 1)).to(DEVICE)
    # A gate's gradient sums over a whole row: the rounding of each output adds up.
    assert_close(mine[3].grad, torch.where(mixed, truth[3].grad, 0), 5 * tolerance, "dz", floor=1.0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_learning_twice_gives_the_same_allocation_bit_for_bit(dtype: torch.dtype):
    text = tokens(8, 256).numpy().astype(np.uint16)
    config = LearnConfig(sparsity=0.5, window=16, seq_len=256, num_steps=12, refine_evaluations=4)
    first, again = (learn(tiny().to(DEVICE, dtype), text, config) for _ in range(2))
    assert first.allocation.to_json() == again.allocation.to_json()
    assert first.history == again.history
