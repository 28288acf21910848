"""Attention on a GPU: what gates and sliding windows cost or save beside the library's causal attention.

    python benchmarks/attention.py --out benchmarks/results/attention.json

Each attention is first compared with the reference on a shorter sequence. Times are GPU times: the median over batches
of calls that are queued back to back while the GPU waits. "CPU ms" is the time to queue one forward and backward pass;
it matters in a model where it exceeds the GPU's time. Inputs are random and rotate, so that none stay in the L2 cache.
`ratio` is to the faster of the library's two causal attentions. "one pass" repeats bit for bit and is what learning
uses. Qwen3-0.6B and Qwen3-1.7B have the heads of all shapes with head_dim 128.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from itertools import cycle, product
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import environment, parser_of, print_table, write_json
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from consa.attention.ops import hybrid_attention
from consa.attention.reference import reference_attention
from consa.attention.rows import Rows
from consa.attention.triton import autograd

DEVICE = torch.device("cuda")
SINKS = (4, 0)
CACHE_BYTES = 256 * 2**20  # rotating inputs are larger than any L2 cache
TRAINING = [  # batch, query heads, KV heads, tokens, head_dim, window
    (8, 9, 3, 4096, 64, 256),
    (2, 16, 8, 8192, 128, 512),
    (1, 16, 8, 32768, 128, 512),
]
PREFILL = [(1, 16, 8, 32768, 128, 512), (1, 16, 8, 131072, 128, 512)]
COLUMNS = ["shape", "window", "sinks", "attention", "forward ms", "ratio", "forward + backward ms", "ratio", "CPU ms"]
QUEUE_CYCLES = 100_000_000  # about 50 ms in which the GPU waits while calls are queued

Shape = tuple[int, int, int, int, int, int]
Attention = Callable[[Tensor, Tensor, Tensor], Tensor]


def inputs(shape: Shape, seed: int, dtype: torch.dtype = torch.bfloat16) -> list[Tensor]:
    """q, k, v and the output's gradient, in the memory layout of a model's projections."""
    batch, q_heads, kv_heads, tokens, head_dim, _ = shape
    generator = torch.Generator(DEVICE).manual_seed(seed)
    return [
        torch.randn(batch, tokens, heads, head_dim, device=DEVICE, dtype=dtype, generator=generator)
        .transpose(1, 2)
        .requires_grad_(leaf)
        for heads, leaf in ((q_heads, True), (kv_heads, True), (kv_heads, True), (q_heads, False))
    ]


def library(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Causal attention of all rows."""
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])


def library_cudnn(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        return library(q, k, v)


def gates(shape: Shape, closed: float, rest: str) -> Tensor:
    """z of all rows: 0 for a share of them, evenly spread; 1 or random for the rest."""
    count = shape[0] * shape[2]
    row = torch.arange(count)
    is_closed = ((row + 1) * closed).floor() > (row * closed).floor()
    z = torch.rand(count, generator=torch.Generator().manual_seed(0)).clamp(0.01, 0.99)
    return torch.where(is_closed, 0.0, z if rest == "open" else torch.ones(count)).reshape(shape[0], -1)


def hybrid(shape: Shape, sinks: int, z: Tensor, *, one_pass: bool) -> Attention:
    """consa's attention; rows are sorted in advance, as in learning."""
    rows = Rows.sort(z, z.to(DEVICE).requires_grad_())
    options = {"window": shape[5], "num_sink_tokens": sinks, "scaling": shape[4] ** -0.5}

    def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        autograd.ONE_PASS_KEYS = 10**6 if one_pass else 0
        return hybrid_attention(q, k, v, rows, **options)

    return attention


def error(shape: Shape, sinks: int, z: Tensor, attention: Attention) -> float:
    """The largest difference from the reference on 1,000 tokens, relative to the largest value."""
    batch, q_heads, kv_heads, _, head_dim, window = shape
    *leaves, upstream = inputs((batch, q_heads, kv_heads, 1000, head_dim, window), 0)
    q, k, v = leaves
    mine = [attention(q, k, v)]
    mine += torch.autograd.grad(mine[0], leaves, upstream)
    options = {"window": window, "num_sink_tokens": sinks, "scaling": head_dim**-0.5}
    truth = [reference_attention(q, k, v, z.to(DEVICE), **options)]
    truth += torch.autograd.grad(truth[0], leaves, upstream.float())
    return max(
        float(((a.float() - b.float()).abs().max() / b.abs().max()).detach()) for a, b in zip(mine, truth, strict=True)
    )


def median_ms(step: Callable[..., Any], shape: Shape, batches: int, calls: int) -> tuple[float, float]:
    """Median milliseconds of `step(q, k, v, gradient)` on the GPU, and of queueing it on the CPU."""
    q_bytes = 2 * shape[0] * shape[1] * shape[3] * shape[4]
    sets = cycle([inputs(shape, seed) for seed in range(2 + CACHE_BYTES // (3 * q_bytes))])
    for _ in range(3):
        step(*next(sets))
    times, queueing = [], []
    for _ in range(batches):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        torch.cuda.synchronize()
        torch.cuda._sleep(QUEUE_CYCLES)
        start.record()
        began = time.perf_counter()
        for _ in range(calls):
            step(*next(sets))
        queueing.append((time.perf_counter() - began) * 1e3 / calls)
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times), statistics.median(queueing)


def measure(attention: Attention, shape: Shape, batches: int, calls: int, training: bool) -> list[float]:
    """Milliseconds of the forward pass; if `training`, also of both passes, and of queueing both."""

    def forward(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> None:
        with torch.no_grad():
            attention(q, k, v)

    def both(q: Tensor, k: Tensor, v: Tensor, upstream: Tensor) -> None:
        torch.autograd.grad(attention(q, k, v), (q, k, v), upstream)

    (ms, _), *rest = [median_ms(step, shape, batches, calls) for step in ([forward, both] if training else [forward])]
    return [ms, *(x for pair in rest for x in pair)]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help="fewer batches, no sequences beyond 8,192 tokens")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    cases = [(shape, True) for shape in TRAINING] + [(shape, False) for shape in PREFILL]
    if options.quick:
        cases = [(shape, training) for shape, training in cases if shape[3] <= 8192]
    rows, errors = [], {}
    for shape, training in cases:
        name = "x".join(map(str, shape[:5]))
        settings = {"75 % z = 0, rest 1": gates(shape, 0.75, "full")}
        if training:
            settings["all open"] = gates(shape, 0, "open")
            settings["75 % z = 0, rest open"] = gates(shape, 0.75, "open")
        attentions: dict[tuple[Any, str], Attention] = {
            ("", "causal, cuDNN"): library_cudnn,
            ("", "causal, default"): library,
        }
        for (setting, z), sinks, kind in product(settings.items(), SINKS, ("one pass", "library's FA and SWA")):
            label, attention = f"{setting}, {kind}", hybrid(shape, sinks, z, one_pass=kind == "one pass")
            attentions[sinks, label] = attention
            errors[f"{name}, {sinks} sinks, {label}"] = largest = error(shape, sinks, z, attention)
            assert largest < 0.02, f"{label} at {name}: error {largest:.3g}"
        batches, calls = (3 if options.quick else 7), (20 if shape[3] <= 8192 else 3)
        times = {}
        for label, attention in attentions.items():
            times[label] = measure(attention, shape, batches, calls, training)
            print(name, *label, *times[label], flush=True)
        dense = [min(causal, default) for causal, default, *_ in zip(*times.values(), strict=True)]
        for label, measured in times.items():
            row: list[Any] = [name, shape[5], *label]
            for ms, dense_ms in zip(measured[:2], dense[:2], strict=True):
                row += [round(ms, 3), round(ms / dense_ms, 3)]
            row += [round(ms, 3) for ms in measured[2:]]
            rows.append(row + [""] * (len(COLUMNS) - len(row)))
        if options.out:
            write_json(options.out, environment() | {"columns": COLUMNS, "rows": rows, "errors": errors})
    print_table(COLUMNS, rows)


if __name__ == "__main__":
    main()
