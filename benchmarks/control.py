"""Does learning end where it was told to? Final expected sparsity and undecided gates over targets and granularities.

    python benchmarks/control.py --out benchmarks/results/control.json

Runs on the real model with short sequences: the constraint does not depend on their length. `--set name=value`
overrides any field of LearnConfig.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from common import environment, overrides, parser_of, print_table, write_json

from consa.allocation import num_full_units
from consa.config import LearnConfig
from consa.data.sequences import load_sequences
from consa.model.load import load_model
from consa.training.learning import learn, units_of

COLUMNS = [
    "granularity",
    "target",
    "FA units",
    "expected - target",
    "fractional",
    "sparsity",
    "nearest feasible",
]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", default="stdlib")
    parser.add_argument("--targets", default="0.1,0.25,0.5,0.75,0.9,0.95")
    parser.add_argument("--granularity", default="layer,kv_head")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    settings: dict[str, Any] = {"seq_len": 64, "window": 8, "sequences_per_step": 1, "refine_evaluations": 0}
    settings |= overrides(options.set)
    loaded = load_model(options.model)
    sequences = load_sequences(options.data, loaded.tokenizer, settings["seq_len"], max_tokens=2**17).tokens
    rows = []
    for granularity in options.granularity.split(","):
        units = units_of(loaded.layout, granularity)
        for target in map(float, options.targets.split(",")):
            config = LearnConfig(**settings, sparsity=target, granularity=granularity)
            result = learn(loaded.model, sequences, config)
            last = result.history[-1]
            full = num_full_units(units.count, target)
            rows.append(
                [
                    granularity,
                    target,
                    full,
                    round(last["expected_sparsity"] - last["target"], 4),
                    round(last["fractional"], 3),
                    round(result.allocation.sparsity, 4),
                    round(1 - full / units.count, 4),
                ]
            )
            print(rows[-1], flush=True)
            record = {"settings": asdict(config), "columns": COLUMNS, "rows": rows}
            write_json(options.out, environment() | record)
    print_table(COLUMNS, rows)


if __name__ == "__main__":
    main()
