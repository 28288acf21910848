"""What does measuring behaviour cost, and does memory grow with the square of the length?

    OMP_NUM_THREADS=2 python benchmarks/behaviour_cost.py --text heldout.npy \
        --out benchmarks/results/behaviour_cost.json

TEXT is a file that benchmarks/tokens.py wrote. Each length is measured in a process of its own: one sequence, the
repeated random sequence and the needles, without causal effects.
"""

from __future__ import annotations

import multiprocessing
import resource
import time
from pathlib import Path
from typing import Any

import numpy as np
from common import environment, parser_of, print_table, write_json

from consa.behaviour.measure import measure
from consa.model.load import load_model


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--lengths", default="2048,4096,8192")
    parser.add_argument("--window", type=int, default=128)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    columns = ["tokens", "seconds", "CPU seconds", "MiB beyond the model", "MiB of one layer's S x S scores"]
    rows: list[list[Any]] = []
    for length in map(int, options.lengths.split(",")):
        with multiprocessing.get_context("spawn").Pool(1) as fresh:
            rows.append(fresh.apply(_measured, (options.model, options.text, length, options.window)))
        print(rows[-1], flush=True)
    print_table(columns, rows)
    settings = {"model": options.model, "window": options.window}
    write_json(options.out, environment() | {"settings": settings, "columns": columns, "rows": rows})


def _measured(model: str, text: str, length: int, window: int) -> list[Any]:
    """A row of the table; memory is the rise of the process's peak."""
    loaded = load_model(model, device="cpu")
    sequence = np.load(text, mmap_mode="r", allow_pickle=False)[:1, :length]
    before, began, busy = _peak_mib(), time.perf_counter(), time.process_time()
    measure(loaded.model, sequence, window=window, tokenizer=loaded.tokenizer)
    seconds, busy, rise = time.perf_counter() - began, time.process_time() - busy, _peak_mib() - before
    scores = loaded.model.config.num_attention_heads * length**2 * 4 / 2**20
    return [length, round(seconds, 1), round(busy, 1), round(rise), round(scores)]


def _peak_mib() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10


if __name__ == "__main__":
    main()
