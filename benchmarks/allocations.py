"""How much of the dense model's quality does each allocation keep? Rules and learned ones, on the same held-out text.

    python benchmarks/allocations.py --model smollm2-135m --train TRAIN --heldout HELDOUT --sparsity 0.733 \
        --granularity kv_head,layer --seeds 3 --out benchmarks/results/allocations.json

TRAIN and HELDOUT are anything `consa learn --data` takes, or files that benchmarks/tokens.py wrote. A learned
allocation has a second row, `gates alone`: what its gates had decided before the refinement. `--set name=value`
overrides any field of LearnConfig.
"""

from __future__ import annotations

import argparse
import time
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import digits_of, environment, gates_alone, overrides, parser_of, print_table, write_json

from consa import rules
from consa.allocation import Allocation
from consa.config import LearnConfig
from consa.evaluation.losses import Row, compare, heldout_losses
from consa.model.load import load_model
from consa.training.learning import learn


def main() -> None:
    options = _options()

    loaded = load_model(options.model)
    settings = overrides(options.set)
    seq_len = settings.get("seq_len", LearnConfig.seq_len)
    train = _sequences(options.train, loaded.tokenizer, seq_len)
    heldout = _sequences(options.heldout, loaded.tokenizer, seq_len)[: options.num_heldout]
    batch = 4 if torch.cuda.is_available() else 1
    config = LearnConfig(**settings)
    layout = loaded.layout
    limits: dict[str, Any] = {"window": config.window, "num_sink_tokens": config.num_sink_tokens}
    limits["native_windows"] = layout.native_windows
    all_swa = rules.all_swa(*layout.shape, **limits)
    ends = {
        "dense": (0.0, heldout_losses(loaded.model, heldout, batch_size=batch)),
        "all_swa": (1.0, heldout_losses(loaded.model, heldout, all_swa, batch_size=batch)),
    }
    rows = []

    def add(name: str, allocation: Allocation, seconds: float, history: list[dict[str, float]]) -> None:
        losses = heldout_losses(loaded.model, heldout, allocation, batch_size=batch)
        found = compare(ends | {name: (allocation.sparsity, losses)}, start=options.start).rows[2]
        each = losses[:, options.start :].mean(1, dtype=np.float64).round(5).tolist()
        rows.append(_row(found, allocation, seconds, history) | {"losses": each})
        wide = ("allocation", "scores", "losses")
        print({key: value for key, value in rows[-1].items() if key not in wide}, flush=True)
        record: dict[str, Any] = {"model": options.model, "settings": asdict(config)}
        record["dense"] = float(ends["dense"][1][:, options.start :].mean())
        record["all_swa"] = float(ends["all_swa"][1][:, options.start :].mean())
        record["start"] = options.start
        write_json(options.out, environment() | record | {"heldout_sequences": len(heldout), "rows": rows})

    for sparsity in map(float, options.sparsity.split(",")):
        for granularity in options.granularity.split(","):
            if options.rules:
                of_rules = rules.every_rule(
                    *layout.shape, sparsity=sparsity, granularity=granularity, **limits
                )
                for name, allocation in of_rules.items():
                    add(f"{name}/{granularity}", allocation, 0.0, [])
            for constraint, seed in product(options.full_heads_per_layer.split(","), range(options.seeds)):
                config = LearnConfig(
                    **settings
                    | {"sparsity": sparsity, "granularity": granularity, "seed": settings.get("seed", seed)}
                    | {"full_heads_per_layer": constraint}
                )
                began = time.perf_counter()
                result = learn(loaded.model, train, config)
                seconds = time.perf_counter() - began
                name = f"{options.name}/{granularity}/seed{config.seed}"
                name += "" if constraint == "any" else f"/{constraint}"
                add(name, result.allocation, seconds, result.history)
                if config.refine_evaluations and constraint == "any":
                    add(f"{name}, gates alone", gates_alone(result.allocation), seconds, result.history)
    columns = ["name", "sparsity", "loss", "recovered", "seconds", "expected_sparsity", "fractional"]
    print_table(columns, [[row[column] for column in columns] for row in rows])


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__, text=True)
    parser.add_argument("--sparsity", default="0.733")
    parser.add_argument("--granularity", default="kv_head,layer")
    parser.add_argument(
        "--full-heads-per-layer", default="any", help="constraints to learn under, such as any,uniform"
    )
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--rules", action="store_true", help="also evaluate every rule")
    parser.add_argument("--set", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--name", default="consa", help="prefix of the learned rows")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _row(
    found: Row, allocation: Allocation, seconds: float, history: list[dict[str, float]]
) -> dict[str, Any]:
    last = history[-1] if history else {}
    return {
        "name": found.name,
        "sparsity": round(allocation.sparsity, 4),
        "loss": round(found.loss, 4),
        "recovered": round(found.recovered, 4),
        "seconds": round(seconds, 1),
        "expected_sparsity": round(last["expected_sparsity"], 4) if last else None,
        "fractional": round(last["fractional"], 3) if last else None,
        "allocation": digits_of(allocation),
        "scores": None if allocation.scores is None else allocation.scores.round(2).tolist(),
    }


def _sequences(source: str, tokenizer, seq_len: int) -> np.ndarray:
    if source.endswith(".npy"):
        return np.load(source, mmap_mode="r", allow_pickle=False)
    from consa.data.sequences import load_sequences

    found = load_sequences(source, tokenizer, seq_len)
    return found.spread(len(np.unique(found.documents))).tokens


if __name__ == "__main__":
    main()
