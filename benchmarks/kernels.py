"""Block sizes, warps and stages of the Triton kernels on a GPU: the time of each kernel by setting and shape.

    python benchmarks/kernels.py --out benchmarks/results/kernels.json

All settings are compiled first, by processes side by side, into Triton's cache on disk, where the launches find them.
The first row of a shape is the setting that consa ships, and `ratio` is to its time. A time is the median of single
launches, queued so that the CPU's work does not show; for decoding, of the two launches of a layer, within a graph.
TFLOPS count the products that a kernel does, of half the keys for causal attention and of the window's for SWA; GB/s
count the keys and values that decoding reads. Inputs are random, bf16. Rows are "one pass" (FA and SWA, mixed),
"sliding" (SWA alone), or "given full" (SWA, mixed with an FA computed elsewhere).
"""

from __future__ import annotations

import os
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from itertools import cycle
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple
from unittest.mock import patch

import torch
from common import environment, parser_of, print_table, write_json
from torch import Tensor
from triton import JITFunction
from triton.backends.compiler import GPUTarget
from triton.errors import TritonError
from triton.runtime.driver import driver

from consa.attention.triton import decode, kernels, launch
from consa.attention.triton.launch import Blocks, Problem

NUM_SINK_TOKENS = 4
FULL_HEADS = 2  # of the KV heads, in decoding
CACHE_BYTES = 256 * 2**20  # storages in rotation are larger than any L2 cache
QUEUE_CYCLES = 50_000_000  # for so long, some 25 ms, the GPU waits while launches queue up
ROWS = {
    "one pass": kernels.ONE_PASS.value,
    "sliding": kernels.SLIDING.value,
    "given full": kernels.GIVEN_FULL.value,
}
TRAINING = [  # batch, query heads, KV heads, tokens, head_dim, window
    (8, 9, 3, 4096, 64, 256),
    (2, 16, 8, 8192, 128, 512),
]
DECODING = [
    (16, 16, 8, 32768, 128, 512),
    (4, 16, 8, 131072, 128, 512),
    (1, 16, 8, 2048, 128, 512),
]
PRODUCTS = {"forward": 2, "backward_q": 3, "backward_kv": 4}  # of matrices, per block of scores

# What is tried beside the settings shipped, by kernel and head_dim: the fields of `Blocks`.
BLOCKS = {
    ("forward", 64): [
        (64, 64, 4, 3), (64, 128, 4, 3), (64, 128, 4, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 128, 8, 3),
        (64, 32, 4, 4),
    ],
    ("forward", 128): [(128, 64, 8, 3), (64, 64, 4, 3), (64, 64, 4, 2), (128, 128, 8, 2), (64, 32, 4, 4)],
    ("backward_q", 64): [
        (64, 64, 4, 3), (64, 64, 4, 4), (64, 32, 4, 3), (64, 32, 4, 4), (128, 64, 8, 3), (64, 128, 4, 2),
        (128, 32, 4, 3),
    ],
    ("backward_q", 128): [
        (128, 64, 8, 3), (128, 64, 8, 2), (64, 64, 4, 2), (64, 32, 4, 3), (128, 32, 8, 4), (64, 64, 4, 3),
    ],
    ("backward_kv", 64): [
        (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 4, 4), (64, 128, 8, 3), (32, 64, 4, 4), (32, 128, 4, 3),
        (128, 64, 4, 2),
    ],
    ("backward_kv", 128): [
        (64, 128, 8, 2), (64, 128, 8, 3), (64, 64, 4, 2), (32, 64, 4, 3), (32, 128, 8, 3), (32, 64, 4, 2),
    ],
}  # fmt: skip
DECODE_CONSTANTS = ["STEP_BYTES", "PROGRAMS", "WARPS", "STAGES"]
DECODE = [
    (16384, 2048, 4, 3), (16384, 1024, 4, 3), (16384, 4096, 4, 3), (8192, 2048, 4, 4), (16384, 2048, 4, 4),
    (16384, 2048, 8, 3), (16384, 2048, 4, 2), (8192, 2048, 2, 4),
]  # fmt: skip
LAUNCHED = ["registers", "spills", "shared KiB"]
COLUMNS = {
    kernel: [
        "shape",
        "window",
        "rows",
        "queries",
        "keys",
        "warps",
        "stages",
        "ms",
        "ratio",
        "TFLOPS",
        *LAUNCHED,
    ]
    for kernel in PRODUCTS
}
COLUMNS["decode"] = ["shape", "window", "step bytes", "programs", "warps", "stages", "ms", "ratio", "GB/s"]

Shape = tuple[int, int, int, int, int, int]
Setting = tuple[int, ...]


class Case(NamedTuple):
    """What is timed with one setting after the other."""

    kernel: str
    shape: Shape
    rows: str = ""  # of ROWS; decoding has none

    def settings(self) -> list[Setting]:
        """The one shipped, then the others."""
        if self.kernel == "decode":
            shipped, tried = tuple(getattr(decode, name) for name in DECODE_CONSTANTS), DECODE
        else:
            key = self.kernel, self.shape[4]
            shipped, tried = tuple(launch.BLOCKS[key]), BLOCKS[key]
        return [shipped, *(setting for setting in tried if setting != shipped)]

    def use(self, setting: Setting) -> None:
        """Have the kernel take this setting from now on."""
        if self.kernel == "decode":
            for name, value in zip(DECODE_CONSTANTS, setting, strict=True):
                setattr(decode, name, value)
        else:
            launch.BLOCKS[self.kernel, self.shape[4]] = Blocks(*setting)

    def call(self, device: str) -> Callable[[], Any]:
        """A call that launches the kernel, if others too."""
        return (decode_call if self.kernel == "decode" else attention_call)(self, device)


def draw(device: str, *shape: int) -> Tensor:
    x = torch.empty(shape, device=device, dtype=torch.bfloat16)
    return x.normal_() if device == "cuda" else x  # to compile, nothing is read


def attention_call(case: Case, device: str) -> Callable[[], Any]:
    batch, q_heads, kv_heads, tokens, head_dim, window = case.shape
    group, mode = q_heads // kv_heads, ROWS[case.rows]
    q, dout, k, v = (
        draw(device, batch, tokens, heads, head_dim).transpose(1, 2)
        for heads in (q_heads, q_heads, kv_heads, kv_heads)
    )
    out, dq, dk, dv = (torch.empty_like(x) for x in (q, q, k, v))
    full = torch.randn_like(q) if case.rows == "given full" else None
    dfull = None if full is None else torch.empty_like(full)
    order = torch.arange(batch * kv_heads, device=device)
    gates = None if case.rows == "sliding" else torch.rand(len(order), device=device).clamp(0.01, 0.99)
    problem = Problem(
        kv_heads, group, tokens, tokens, head_dim, window, NUM_SINK_TOKENS, scaling=head_dim**-0.5
    )

    def forward() -> tuple[Tensor, Tensor | None]:
        return launch.forward(q, k, v, out, order, len(order), gates, full, problem, mode, training=True)

    if case.kernel == "forward":
        return forward
    kept = forward()
    return lambda: launch.backward(
        q, k, v, out, dout, dq, dk, dv, order, gates, dfull, *kept, problem, mode
    )  # fmt: skip


def decode_call(case: Case, device: str) -> Callable[[], Any]:
    """The call takes another layer's storage each time."""
    batch, q_heads, kv_heads, context, head_dim, window = case.shape
    q, k, v = (draw(device, batch, heads, 1, head_dim) for heads in (q_heads, kv_heads, kv_heads))
    storages = cycle(
        [
            tuple(
                draw(device, batch, heads, room, head_dim)
                for heads, room in (
                    (FULL_HEADS, context),
                    (FULL_HEADS, context),
                    (kv_heads - FULL_HEADS, NUM_SINK_TOKENS + window),
                    (kv_heads - FULL_HEADS, NUM_SINK_TOKENS + window),
                )
            )
            for _ in range(num_storages(case.shape))
        ]
    )
    heads, length = torch.arange(kv_heads, device=device), torch.tensor(context - 1, device=device)
    return lambda: decode.decode(
        q, k, v, *next(storages), heads, length, NUM_SINK_TOKENS, window, head_dim**-0.5
    )


def decode_bytes(shape: Shape) -> int:
    """Of the keys and values that one layer holds."""
    batch, _, kv_heads, context, head_dim, window = shape
    tokens = FULL_HEADS * context + (kv_heads - FULL_HEADS) * (NUM_SINK_TOKENS + window)
    return 2 * 2 * batch * tokens * head_dim


def num_storages(shape: Shape) -> int:
    return 1 + CACHE_BYTES // decode_bytes(shape)


def start_compiler(target: GPUTarget) -> None:
    """Have this process compile for a GPU that it does not touch."""

    class Driver:
        get_current_target = staticmethod(lambda: target)
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    torch.set_num_threads(1)
    driver.set_active(Driver())  # pyright: ignore[reportArgumentType]


def compile_setting(case: Case, setting: Setting) -> None:
    """Compile the case's kernel into Triton's cache, launching none."""
    wanted = ["_attend_chunks", "_join"] if case.kernel == "decode" else [case.kernel]

    def compiling(kernel: Any, grid: Any) -> Callable[..., Any]:
        return lambda *args, **options: (
            kernel.warmup(*args, grid=grid, **options) if kernel.__name__ in wanted else None
        )

    case.use(setting)
    # What cannot be compiled is told of when it should be timed.
    with patch.object(JITFunction, "__getitem__", compiling), suppress(TritonError):
        case.call("cpu")()


def compile_all(cases: list[Case], workers: int) -> None:
    target = GPUTarget(
        "cuda", 10 * torch.cuda.get_device_capability()[0] + torch.cuda.get_device_capability()[1], 32
    )
    jobs = [(case, setting) for case in cases for setting in case.settings()]
    with ProcessPoolExecutor(workers, get_context("spawn"), start_compiler, (target,)) as pool:
        list(pool.map(compile_setting, *zip(*jobs, strict=True)))


def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
    return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)


def time_attention(case: Case, call: Callable[[], Any], repeats: int) -> tuple[float, list[Any]]:
    """Median milliseconds of the case's kernel among those that `call` launches; what one launch takes, and TFLOPS."""
    launches = []
    launcher = JITFunction.__getitem__

    def timing(kernel: Any, grid: Any) -> Callable[..., Any]:
        launch = launcher(kernel, grid)
        if kernel.__name__ != case.kernel:
            return launch

        def timed(*args: Any, **options: Any) -> None:
            start, end = events()
            start.record()
            compiled = launch(*args, **options)
            end.record()
            launches.append((start, end, compiled))

        return timed

    for _ in range(2):
        call()
    torch.cuda.synchronize()
    torch.cuda._sleep(QUEUE_CYCLES)
    with patch.object(JITFunction, "__getitem__", timing):
        for _ in range(repeats):
            call()
    torch.cuda.synchronize()
    ms = statistics.median(start.elapsed_time(end) for start, end, _ in launches)
    batch, q_heads, _, tokens, head_dim, window = case.shape
    keys = tokens / 2 if case.rows == "one pass" else window
    flop = PRODUCTS[case.kernel] * 2 * batch * q_heads * tokens * keys * head_dim
    compiled = launches[0][2]
    shared = compiled.metadata.shared / 2**10
    return ms, [round(flop / ms / 1e9), compiled.n_regs, compiled.n_spills, round(shared, 1)]


def time_decode(case: Case, call: Callable[[], Any], repeats: int) -> tuple[float, list[Any]]:
    """Median milliseconds of a layer, and GB/s."""
    for _ in range(2):
        call()
    torch.cuda.synchronize()
    calls = max(16, num_storages(case.shape))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(calls):
            call()
    graph.replay()
    times = []
    for _ in range(repeats):
        start, end = events()
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) / calls)
    ms = statistics.median(times)
    return ms, [round(decode_bytes(case.shape) / ms / 1e6)]


def measure(case: Case, repeats: int, until: float) -> list[list[Any]]:
    """The case's rows of its kernel's table: of all settings, or those that the time allows."""
    measured = time_decode if case.kernel == "decode" else time_attention
    call = case.call("cuda")
    shipped, rows, shipped_ms = case.settings()[0], [], None
    for setting in case.settings():
        if time.monotonic() > until:
            break
        row = [
            "x".join(map(str, case.shape[:5])),
            case.shape[5],
            *([case.rows] if case.rows else []),
            *setting,
        ]
        case.use(setting)
        try:
            ms, rest = measured(case, call, repeats)
        except TritonError as error:
            row.append(str(error).splitlines()[0])
        else:
            shipped_ms = shipped_ms or ms
            row += [round(ms, 4), round(ms / shipped_ms, 3), *rest]
        print(case.kernel, *row, flush=True)
        rows.append(row + [""] * (len(COLUMNS[case.kernel]) - len(row)))
    case.use(shipped)
    return rows


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--quick", action="store_true", help='fewer repeats, no "given full"')
    parser.add_argument(
        "--seconds", type=float, default=float("inf"), help="after so many, time no more (default: no limit)"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count(), help="processes that compile (default: %(default)s)"
    )
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    begin = time.monotonic()

    cases = [
        Case(kernel, shape, rows)
        for kernel in PRODUCTS
        for shape in TRAINING
        for rows in ROWS
        if not (options.quick and rows == "given full")
    ]
    cases += [Case("decode", shape) for shape in DECODING]
    compile_all(cases, options.workers)
    print(f"compiled after {time.monotonic() - begin:.0f} s", flush=True)
    tables: dict[str, list[list[Any]]] = {kernel: [] for kernel in COLUMNS}
    for case in cases:
        if time.monotonic() - begin > options.seconds:
            print(f"after {options.seconds:g} s, not timed: {case.kernel} and what follows")
            break
        tables[case.kernel] += measure(case, 5 if options.quick else 15, begin + options.seconds)
        if options.out:
            record = {
                "num_sink_tokens": NUM_SINK_TOKENS,
                "full_heads": FULL_HEADS,
                "tables": {name: {"columns": COLUMNS[name], "rows": rows} for name, rows in tables.items()},
            }
            write_json(options.out, environment() | record)
    for kernel, rows in tables.items():
        print(f"\n{kernel}\n")
        print_table(COLUMNS[kernel], rows)


if __name__ == "__main__":
    main()
