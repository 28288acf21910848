"""How much of the dense model's quality does each allocation keep? Rules and learned ones, on the same held-out text.

    python -m research.allocations --train TRAIN.npy --heldout HELDOUT.npy --granularity kv_head,layer --seeds 3 \
        --rules --out research/results/allocations.json

TRAIN and HELDOUT are token files of research/tokens.py. A learned allocation has a second row, `gates alone`: the
decision before refinement. `--set name=value` overrides any field of LearnConfig.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from itertools import product
from typing import Any

import torch

from benchmarks.common import environment, print_table, write_json
from consa import rules
from consa.allocation import Allocation, Granularity
from consa.config import LearnConfig
from consa.model.load import load_model
from consa.training.learning import learn
from research.records import Heldout, digits_of, gates_alone, overrides, study_parser, tokens_of

COLUMNS = ["name", "sparsity", "loss", "recovered", "seconds", "expected_sparsity", "fractional"]


def main() -> None:
    options = _options()
    loaded, train = load_model(options.model), tokens_of(options.train)
    settings = overrides(options.set)
    config = LearnConfig(**settings)
    heldout = Heldout.of(options, at_once=4 if torch.cuda.is_available() else 1)
    layout = loaded.layout
    limits: dict[str, Any] = {"window": config.window, "num_sink_tokens": config.num_sink_tokens}
    limits["native_windows"] = layout.native_windows
    floor, dense = (
        float(heldout.losses(loaded.model, end).mean()) for end in (rules.all_swa(*layout.shape, **limits), None)
    )
    rows: list[dict[str, Any]] = []

    def add(name: str, allocation: Allocation, seconds: float = 0.0, last: dict[str, float] | None = None) -> None:
        each = heldout.losses(loaded.model, allocation)
        row = {
            "name": name,
            "sparsity": round(allocation.sparsity, 4),
            "loss": round(float(each.mean()), 4),
            "recovered": round((floor - float(each.mean())) / (floor - dense), 4),
            "seconds": round(seconds, 1),
            "expected_sparsity": round(last["expected_sparsity"], 4) if last else None,
            "fractional": round(last["fractional"], 3) if last else None,
        }
        print(row, flush=True)
        scores = None if allocation.scores is None else allocation.scores.round(2).tolist()
        rows.append(row | {"allocation": digits_of(allocation), "scores": scores, "losses": each.round(5).tolist()})
        record: dict[str, Any] = {"model": options.model, "settings": asdict(config), "dense": dense, "all_swa": floor}
        record |= {"start": options.start, "heldout_sequences": len(heldout.tokens), "rows": rows}
        write_json(options.out, environment() | record)

    granularities: list[Granularity] = options.granularity.split(",")
    for sparsity, granularity in product(map(float, options.sparsity.split(",")), granularities):
        if options.rules:
            of_rules = rules.every_rule(*layout.shape, sparsity=sparsity, granularity=granularity, **limits)
            for name, allocation in of_rules.items():
                add(f"{name}/{granularity}", allocation)
        for constraint, seed in product(options.full_heads_per_layer.split(","), range(options.seeds)):
            chosen = {"sparsity": sparsity, "granularity": granularity, "seed": settings.get("seed", seed)}
            config = LearnConfig(**settings | chosen | {"full_heads_per_layer": constraint})
            began = time.perf_counter()
            result = learn(loaded.model, train, config)
            took, last = time.perf_counter() - began, result.history[-1] if result.history else None
            name = f"consa/{granularity}/seed{config.seed}"
            name += "" if constraint == "any" else f"/{constraint}"
            add(name, result.allocation, took, last)
            if config.refine_evaluations and constraint == "any":
                add(f"{name}, gates alone", gates_alone(result.allocation), took, last)
    print_table(COLUMNS, [[row[column] for column in COLUMNS] for row in rows])


def _options() -> argparse.Namespace:
    parser = study_parser(__doc__, resumes=False)
    parser.add_argument("--sparsity", default="0.733")
    parser.add_argument("--granularity", default="kv_head,layer")
    parser.add_argument("--full-heads-per-layer", default="any", help="constraints to learn under: any,even,uniform")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rules", action="store_true", help="also evaluate every rule")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    return parser.parse_args()


if __name__ == "__main__":
    main()
