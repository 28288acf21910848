"""What does a hybrid save in prefill, decoding, cache and memory, beside the dense model with the same weights?

    python benchmarks/inference.py --out benchmarks/results/inference.json

Converts the model into a temporary folder, for each sparsity of a rule or for each of some allocation files, and runs
the measurement of `consa bench`. Sparsity 0 shows what consa's own attention and cache cost when nothing slides. Run it
alone on the machine, because it measures time.
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import environment, parser_of, print_table, write_json

from consa.allocation import Allocation
from consa.bench.measure import Benchmark, benchmark
from consa.model.convert import convert, load
from consa.model.layout import AttentionLayout
from consa.model.load import load_model
from consa.rules import RULES

TAKEN_BY_RULES = ("granularity", "window", "num_sink_tokens")
COLUMNS = ["allocation", "sparsity", "context", "prefill", "decode", "KV cache", "peak MB dense", "hybrid"]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--rule", choices=list(RULES), default="interleaved")
    parser.add_argument("--sparsity", default="0,0.75")
    parser.add_argument("--granularity", default="kv_head")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--num-sink-tokens", type=int, default=4)
    parser.add_argument("--allocation", action="append", type=Path, default=[], help="instead of a rule")
    parser.add_argument("--contexts", default="1024,8160")
    parser.add_argument("--decode-tokens", type=int, default=32)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    contexts = [int(context) for context in options.contexts.split(",")]
    loaded = load_model(options.model)
    allocations = _allocations(options, loaded.layout)
    rows: list[list[Any]] = []
    results = []
    with tempfile.TemporaryDirectory() as folder:
        for place, (_, allocation) in enumerate(allocations):
            convert(loaded.model, allocation, Path(folder, str(place)), kind="hybrid")
        del loaded  # its weights would count in the peaks
        for place, (name, allocation) in enumerate(allocations):
            result = benchmark(
                load(Path(folder, str(place))),
                contexts=contexts,
                batch_sizes=[1],
                decode_tokens=options.decode_tokens,
                repeats=options.repeats,
            )
            settings = {"model": options.model, "window": allocation.window}
            settings |= {"num_sink_tokens": allocation.num_sink_tokens, "decode_tokens": options.decode_tokens}
            settings |= {"repeats": options.repeats, "dtype": result.where["dtype"]}
            measured = [asdict(measurement) for measurement in result.measurements]
            results.append({"allocation": name, "sparsity": result.sparsity, "measurements": measured})
            rows += _rows(name, result)
            print(rows[-1], flush=True)
            record = {"settings": settings, "columns": COLUMNS, "rows": rows, "results": results}
            write_json(options.out, environment() | record)
    print_table(COLUMNS, rows)


def _allocations(options: argparse.Namespace, layout: AttentionLayout) -> list[tuple[str, Allocation]]:
    if options.allocation:
        return [(path.stem, Allocation.load(path)) for path in options.allocation]
    rule, settings = RULES[options.rule], {name: getattr(options, name) for name in TAKEN_BY_RULES}
    settings["native_windows"] = layout.native_windows
    sparsities = map(float, options.sparsity.split(","))
    return [(options.rule, rule(*layout.shape, sparsity=sparsity, **settings)) for sparsity in sparsities]


def _rows(name: str, result: Benchmark) -> list[list[Any]]:
    """Hybrid over dense in time of prefill, decoded tokens per second and bytes of cache; peaks in MB."""
    return [
        [
            name,
            round(result.sparsity, 4),
            hybrid.context,
            round(hybrid.prefill_seconds / dense.prefill_seconds, 3),
            round(hybrid.decode_tokens_per_second / dense.decode_tokens_per_second, 3),
            round(hybrid.cache_bytes / dense.cache_bytes, 3),
            round(dense.peak_bytes / 1e6),
            round(hybrid.peak_bytes / 1e6),
        ]
        for dense, hybrid in result.pairs()
    ]


if __name__ == "__main__":
    main()
