"""Measure prefill, decoding, KV cache and memory of a hybrid and of the dense model with the same weights."""

from __future__ import annotations

import copy
import ctypes
import gc
import json
import platform
import re
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedModel

from consa.cache.hybrid import allocated_bytes, cache_argument
from consa.errors import ConsaError
from consa.files import png, write_atomically
from consa.model import interface
from consa.model.attach import make_dense
from consa.model.layout import max_positions
from consa.provenance import hardware, versions

MEASURED = ("prefill_seconds", "decode_tokens_per_second", "cache_bytes", "peak_bytes")


@dataclass(frozen=True)
class Measurement:
    """One model at one context length and batch size.

    Attributes:
        model: "dense" or "hybrid".
        context: tokens in the cache when decoding starts.
        batch_size: sequences.
        prefill_seconds: median time to process the whole context at once.
        decode_tokens_per_second: throughput of all sequences together, from the median time of a step.
        cache_bytes: measured memory of the cache after prefill and decoding.
        peak_bytes: peak memory during prefill and decoding, including weights: resident memory of the process on a
            CPU, allocated memory on a GPU.
    """

    model: str
    context: int
    batch_size: int
    prefill_seconds: float
    decode_tokens_per_second: float
    cache_bytes: int
    peak_bytes: int


@dataclass(frozen=True)
class Benchmark:
    """Measurements in pairs, dense and hybrid, by context and batch size.

    Attributes:
        sparsity: sparsity of the hybrid.
        measurements: dense before hybrid, for each context and batch size in turn.
        where: hardware, versions and settings of the run.
    """

    sparsity: float
    measurements: tuple[Measurement, ...]
    where: dict[str, Any]

    def pairs(self) -> list[tuple[Measurement, Measurement]]:
        """(dense, hybrid) for each context and batch size."""
        return list(zip(self.measurements[::2], self.measurements[1::2], strict=True))

    def table(self) -> tuple[list[str], list[list[str]]]:
        """Heading and rows of text; ratios are hybrid / dense."""
        rows = []
        for dense, hybrid in self.pairs():
            for m in (dense, hybrid):
                row = [f"{m.prefill_seconds:.3f}", f"{m.decode_tokens_per_second:.1f}"]
                row += [f"{m.cache_bytes / 1e6:.2f}", f"{m.peak_bytes / 1e6:.0f}"]
                rows.append([str(m.context), str(m.batch_size), m.model, *row])
            ratios = (f"{getattr(hybrid, name) / getattr(dense, name):.3f}" for name in MEASURED)
            rows.append(["", "", "ratio", *ratios])
        return ["context", "batch", "model", "prefill s", "decode tok/s", "KV cache MB", "peak MB"], rows


def benchmark(
    model: PreTrainedModel,
    *,
    contexts: list[int],
    batch_sizes: list[int],
    decode_tokens: int = 32,
    repeats: int = 3,
    on_run: Callable[[int, str], None] | None = None,
) -> Benchmark:
    """Measure a hybrid and its dense model in turn.

    Args:
        model: from `consa.load`, a hybrid.
        contexts: context lengths, in tokens.
        batch_sizes: numbers of sequences.
        decode_tokens: decoding steps after each prefill.
        repeats: runs of each model; dense and hybrid alternate, so that both see the same load of the machine.
        on_run: called after each run with the number of runs so far and a description.

    Raises:
        ConsaError: the model is not a hybrid, or has too few positions.
    """
    allocation = interface.allocation_of(model.config)
    if allocation is None:
        raise ConsaError(
            "there is nothing to compare: the model is not a hybrid; make one with consa convert --kind hybrid"
        )
    check_settings(contexts, batch_sizes, decode_tokens, repeats, max_positions(model.config))
    models = {"dense": dense_twin(model), "hybrid": model}
    measurements, done = [], 0
    for context in contexts:
        for batch_size in batch_sizes:
            runs: dict[str, list[_Run]] = {name: [] for name in models}
            for _ in range(repeats):
                for name, candidate in models.items():
                    runs[name].append(_measure(candidate, context, batch_size, decode_tokens))
                    done += 1
                    if on_run:
                        on_run(done, f"{name}, {context} tokens, batch {batch_size}")
            for name in models:
                steps = [seconds for run in runs[name] for seconds in run.steps]
                prefill = statistics.median(run.prefill for run in runs[name])
                speed = batch_size / statistics.median(steps)
                cache, peak = (max(getattr(run, kind) for run in runs[name]) for kind in ("cache_bytes", "peak_bytes"))
                measurements.append(Measurement(name, context, batch_size, prefill, speed, cache, peak))
    where = {"hardware": hardware(), "versions": versions(), "dtype": str(model.dtype).removeprefix("torch.")}
    where |= {"decode_tokens": decode_tokens, "repeats": repeats}
    return Benchmark(allocation.sparsity, tuple(measurements), where)


def check_settings(
    contexts: list[int], batch_sizes: list[int], decode_tokens: int, repeats: int, longest: int | None
) -> None:
    """Raise a ConsaError unless a model of `longest` positions, or None for any number, can run the benchmark."""
    if decode_tokens < 1 or repeats < 1 or not contexts or not batch_sizes or min(contexts + batch_sizes) < 1:
        raise ConsaError("contexts, batch sizes, decoded tokens and repeats must all be at least 1")
    if longest is not None and max(contexts) + decode_tokens > longest:
        raise ConsaError(
            f"context {max(contexts)} and {decode_tokens} decoded tokens exceed the {longest} positions of the model;"
            " choose shorter contexts"
        )


def dense_twin(model: PreTrainedModel) -> PreTrainedModel:
    """The dense model with the same weights in the same memory, under transformers' attention and cache."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    twin = copy.deepcopy(model, shared)
    make_dense(twin)
    return twin


def write(result: Benchmark, folder: Path) -> tuple[Path, Path]:
    """Write bench.json and bench.png, and return their paths."""
    paths = folder / "bench.json", folder / "bench.png"
    write_atomically(paths[0], (json.dumps(asdict(result), indent=1) + "\n").encode())
    write_atomically(paths[1], figure(result))
    return paths


def figure(result: Benchmark) -> bytes:
    """Decoding speed, prefill time and cache by context, dense and hybrid, for each batch size, as PNG."""
    from matplotlib.figure import Figure

    drawing = Figure(figsize=(11, 3.6), layout="constrained")
    panels = (
        ("decode_tokens_per_second", "decoding, tokens per second", 1),
        ("prefill_seconds", "prefill, seconds", 1),
        ("cache_bytes", "KV cache, MB", 1e6),
    )
    for axes, (name, label, unit) in zip(drawing.subplots(1, len(panels)), panels, strict=True):
        for kind, colour in (("dense", "#888888"), ("hybrid", "#1f6fb4")):
            for batch_size in sorted({m.batch_size for m in result.measurements}):
                rows = [m for m in result.measurements if (m.model, m.batch_size) == (kind, batch_size)]
                style: dict[str, Any] = {"color": colour, "marker": "o", "linewidth": 1 + 0.5 * batch_size**0.5}
                values = [getattr(m, name) / unit for m in rows]
                axes.plot([m.context for m in rows], values, label=f"{kind}, batch {batch_size}", **style)
        axes.set(xlabel="context, tokens", ylabel=label, ylim=(0, None))
        axes.set_xscale("log", base=2)
    drawing.axes[0].legend(frameon=False, fontsize="small")
    drawing.suptitle(f"Hybrid at sparsity {result.sparsity:.3f} and dense model, {result.where['hardware']}")
    return png(drawing)


@dataclass(frozen=True)
class _Run:
    prefill: float
    steps: list[float]
    cache_bytes: int
    peak_bytes: int


@torch.no_grad()
def _measure(model: PreTrainedModel, context: int, batch_size: int, decode_tokens: int) -> _Run:
    generator = torch.Generator().manual_seed(context)
    tokens = torch.randint(model.config.vocab_size, (batch_size, context), generator=generator).to(model.device)
    cache = DynamicCache(config=model.config)
    _reset_peak(model.device)

    def forward(tokens: torch.Tensor) -> tuple[torch.Tensor, float]:
        _wait(model.device)
        start = time.perf_counter()
        logits = model(tokens, **{cache_argument(model): cache}, logits_to_keep=1).logits
        _wait(model.device)
        return logits.argmax(-1), time.perf_counter() - start

    token, prefill = forward(tokens)
    steps = []
    for _ in range(decode_tokens):
        token, seconds = forward(token)
        steps.append(seconds)
    return _Run(prefill, steps, allocated_bytes(cache), peak_bytes(model.device))


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _reset_peak(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif Path("/proc/self/clear_refs").exists():
        gc.collect()
        libc = ctypes.CDLL(None)
        # glibc keeps memory freed by an earlier run, which would count in this one.
        if hasattr(libc, "malloc_trim"):
            libc.malloc_trim(0)
        Path("/proc/self/clear_refs").write_text("5")  # Linux: resets the high-water mark


def peak_bytes(device: torch.device) -> int:
    """Peak memory in bytes, since `_reset_peak` or, where that is not possible, since the process started."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    status = Path("/proc/self/status")
    match = re.search(r"VmHWM:\s+(\d+) kB", status.read_text()) if status.exists() else None
    if match:
        return int(match[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    highest = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return highest if platform.system() == "Darwin" else highest * 1024
