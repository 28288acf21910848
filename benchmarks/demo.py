"""Run `consa demo` with several seeds: the source of a table in README.md.

python benchmarks/demo.py --seeds 3 --out benchmarks/results/demo.json
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

from common import environment, parser_of, print_table, write_json


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--runs", type=Path, default=Path("runs"))
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    recovered: dict[str, list[float]] = {}
    runs = []
    for seed in range(options.seeds):
        folder = options.runs / f"demo-seed{seed}"
        if not (folder / "summary.json").exists():
            command = [sys.executable, "-m", "consa", "demo", "--seed", str(seed), "--out", str(folder)]
            subprocess.run(command, check=True)
        summary = json.loads((folder / "summary.json").read_text())
        for row in summary["rows"]:
            recovered.setdefault(row["name"], []).append(round(row["recovered"], 4))
        kept = ("sparsity", "losses", "expected_sparsity", "fractional", "seconds", "heldout_sequences")
        runs.append({"seed": seed, "hardware": summary["hardware"]} | {key: summary[key] for key in kept})
        write_json(options.out, environment() | {"runs": runs, "recovered": recovered})
    print_table(["allocation", *(f"seed {run['seed']}" for run in runs)], [[k, *v] for k, v in recovered.items()])


if __name__ == "__main__":
    main()
