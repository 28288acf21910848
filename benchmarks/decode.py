"""Decoding on a GPU: one step of a model of Qwen3-0.6B's shape, as a hybrid and dense.

    python benchmarks/decode.py --out benchmarks/results/decode.json

Weights and caches are random, bf16. A step replays one CUDA graph of the compiled model, from a token's embedding to
the next token. "dense" is the library's attention over a cache of fixed size. "attention ms" is the attention of all
layers alone; "GB/s" is the keys and values it reads, over that time; "of copy" is their share of the speed of a large
copy on the device. The hybrid is first compared with the portable path. `fits` is the largest batch at that context in
80 GB, computed from measured memory: weights, and cache and buffers per sequence.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import QWEN3_06B, environment, parser_of, print_table, write_json
from torch import Tensor
from transformers import AttentionInterface, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM

from consa import Allocation, HybridCache, attached, rules
from consa.cache.hybrid import allocated_bytes, cache_argument
from consa.cache.static import StaticHybridLayer

DEVICE = torch.device("cuda")
LAYERS, Q_HEADS, KV_HEADS, HEAD_DIM = 28, 16, 8, 128
SIZES = "32768x16,131072x4,2048x1"  # context, batch
STEPS = 24  # timed replays; caches have room for as many warm-up steps
MEMORY = 80e9  # bytes
COLUMNS = ["context x batch", "cache", "ms/step", "tokens/s", "x dense", "cache GB", "attention ms", "GB/s"]
COLUMNS += ["of copy", "fits"]


def random_model() -> PreTrainedModel:
    torch.manual_seed(0)
    with DEVICE:
        model: Any = Qwen3ForCausalLM(Qwen3Config(**QWEN3_06B))
    return model.to(torch.bfloat16).eval()


def filled(allocation: Allocation, context: int, batch: int, length: int) -> HybridCache:
    """A cache with room for `context` tokens, holding `length` random ones per sequence."""
    cache = HybridCache(allocation, max_length=context)
    like = torch.empty(batch, KV_HEADS, 1, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
    for layer in cache.layers:
        assert isinstance(layer, StaticHybridLayer)
        layer.lazy_initialization(like, like)
        for storage in (layer.full_keys, layer.full_values, layer.sliding_keys, layer.sliding_values):
            if storage is not None:
                storage.normal_()
        layer.length = length
    return cache


def graphed(step: Callable[[], Any]) -> torch.cuda.CUDAGraph:
    """`step` as a CUDA graph, after two calls to warm up."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        step()
    return graph


def median_ms(run: Callable[[], Any], repeats: int = 4) -> float:
    """Median over batches of calls, per call; `STEPS` calls in all."""
    run()
    times, calls = [], STEPS // repeats
    for _ in range(repeats):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            run()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    return statistics.median(times)


def step_of(
    model: PreTrainedModel, batch: int, position: int, cache: HybridCache | None, *, compiled: bool = True
) -> Callable[[], Tensor]:
    """Greedy decoding of one token per sequence, all state on the device."""
    torch.compiler.reset()
    forward: Any = torch.compile(model, fullgraph=True, dynamic=False) if compiled else model
    token = torch.zeros(batch, 1, dtype=torch.long, device=DEVICE)
    positions = torch.full((batch, 1), position, device=DEVICE)
    kept: Any = {cache_argument(model): cache}

    def step() -> Tensor:
        out = forward(token, position_ids=positions, use_cache=cache is not None, **kept)
        token.copy_(out.logits[:, -1].argmax(-1, keepdim=True))
        positions.add_(1)
        return out.logits

    return step


@contextmanager
def dense_sdpa(model: PreTrainedModel, context: int, batch: int) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """The library's attention over a full cache of fixed size; each step overwrites its last token."""
    shape = (batch, KV_HEADS, context, HEAD_DIM)
    # Per layer, keys and values.
    storage: Any = [[torch.randn(shape, device=DEVICE, dtype=torch.bfloat16) for _ in range(2)] for _ in range(LAYERS)]

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, mask: Any, **options: Any) -> tuple[Tensor, None]:
        keys, values = storage[module.layer_idx]
        keys[:, :, -1:], values[:, :, -1:] = k, v
        out = F.scaled_dot_product_attention(q, keys, values, scale=options["scaling"], enable_gqa=True)
        return out.transpose(1, 2).contiguous(), None

    AttentionInterface.register("dense_sdpa", attend)
    before = model.config._attn_implementation
    model.config._attn_implementation = "dense_sdpa"
    try:
        yield storage
    finally:
        model.config._attn_implementation = before


def check(model: PreTrainedModel, allocation: Allocation) -> float:
    """The largest difference of logits from the portable path, relative to the largest logit, beyond the window."""
    steps = []
    for portable in (False, True):
        torch.manual_seed(0)
        cache = filled(allocation, 1500, 2, 1000)
        layer: Any
        for layer in cache.layers if portable else []:
            layer.has_kernels = lambda softcap: False
        step = step_of(model, 2, 1000, cache, compiled=False)
        if portable:
            steps.append(torch.stack([step().float() for _ in range(4)]))
        else:
            logits = torch.stack([step().float() for _ in range(2)])  # eagerly, then as a graph
            out: list[Tensor] = []
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                out.append(step())
            for _ in range(2):
                graph.replay()
                logits = torch.cat([logits, out[0].float()[None]])
            steps.append(logits)
    return float((steps[0] - steps[1]).abs().max() / steps[1].abs().max())


def attention_alone(cache: HybridCache, batch: int) -> tuple[Callable[[], Any], int]:
    """The attention of all layers in a step, and the bytes of keys and values it reads."""
    q, k, v = (
        torch.randn(batch, heads, 1, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)
        for heads in (Q_HEADS, KV_HEADS, KV_HEADS)
    )
    read = 0
    for layer in cache.layers:
        assert isinstance(layer, StaticHybridLayer)
        length, split = layer.length, layer.split
        tokens = len(split.full) * length + len(split.sliding) * min(length, split.kept)
        read += 2 * batch * tokens * HEAD_DIM * 2

    def run() -> None:
        for layer in cache.layers:
            layer.decode(q, k, v, HEAD_DIM**-0.5)  # type: ignore[attr-defined]

    return run, read


def sdpa_alone(storage: list[tuple[Tensor, Tensor]], batch: int) -> tuple[Callable[[], Any], int]:
    q = torch.randn(batch, Q_HEADS, 1, HEAD_DIM, device=DEVICE, dtype=torch.bfloat16)

    def run() -> None:
        for keys, values in storage:
            F.scaled_dot_product_attention(q, keys, values, enable_gqa=True)

    return run, sum(2 * keys.nbytes for keys, _ in storage)


def copy_speed() -> float:
    """Bytes read and written per second by a copy within the device."""
    x = torch.empty(2**31, dtype=torch.uint8, device=DEVICE)
    y = torch.empty_like(x)
    return 2 * x.nbytes / (median_ms(lambda: y.copy_(x)) / 1e3)


def measure(
    step: Callable[[], Any], alone: tuple[Callable[[], Any], int], batch: int, weights: int
) -> tuple[float, float, float, int]:
    """Milliseconds of a step and of its attention, the GB/s of the attention, and the largest batch that fits."""
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    ms = median_ms(graphed(step).replay)
    per_sequence = (torch.cuda.max_memory_allocated() - weights) / batch
    attention, read = alone
    attention_ms = median_ms(graphed(attention).replay)
    return ms, attention_ms, read / attention_ms / 1e6, int((MEMORY - weights) // per_sequence)


@torch.no_grad()
def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--sparsity", type=float, default=0.75)
    parser.add_argument("--window", type=int, default=512)
    parser.add_argument("--sizes", default=SIZES, help="contexts and batches (default: %(default)s)")
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()

    kept: dict[str, Any] = {"granularity": "kv_head", "window": options.window, "num_sink_tokens": 4}
    hybrid = rules.random_units(LAYERS, KV_HEADS, sparsity=options.sparsity, **kept)
    copy = copy_speed()
    torch.cuda.empty_cache()
    model = random_model()
    weights = torch.cuda.memory_allocated()
    with attached(model, hybrid):
        error = check(model, hybrid)
    assert error < 0.05, f"decoding differs from the portable path by {error:.3g}"
    print(f"copy {copy / 1e9:.0f} GB/s, error {error:.2g}", flush=True)

    rows: list[list[Any]] = []
    for context, batch in (map(int, size.split("x")) for size in options.sizes.split(",")):
        length = context - 2 * STEPS - 16  # each of two graphs below adds a few more than STEPS
        measured: dict[str, tuple[float, float, float, int]] = {}
        held: dict[str, int] = {}
        with dense_sdpa(model, context, batch) as storage:
            held["dense"] = sum(2 * keys.nbytes for keys, _ in storage)
            step = step_of(model, batch, length, None)
            measured["dense"] = measure(step, sdpa_alone(storage, batch), batch, weights)
            storage.clear()
            del step
        name = f"hybrid, sparsity {hybrid.sparsity:.2f}"
        with attached(model, hybrid):
            cache = filled(hybrid, context, batch, length)
            held[name] = allocated_bytes(cache)
            step = step_of(model, batch, length, cache)
            measured[name] = measure(step, attention_alone(cache, batch), batch, weights)
        del cache, step
        dense_ms = measured["dense"][0]
        for name, (ms, attention_ms, speed, fits) in measured.items():
            row = [f"{context} x {batch}", name, round(ms, 3), round(1e3 * batch / ms), round(dense_ms / ms, 2)]
            row += [round(held[name] / 1e9, 2), round(attention_ms, 3), round(speed)]
            rows.append([*row, round(1e9 * speed / copy, 3), fits])
            print(*rows[-1], flush=True)
        if options.out:
            settings = {"sparsity": options.sparsity, "window": options.window, "copy_bytes_per_second": copy}
            record = settings | {"error": error, "columns": COLUMNS, "rows": rows}
            write_json(options.out, environment() | record)
    print_table(COLUMNS, rows)


if __name__ == "__main__":
    main()
