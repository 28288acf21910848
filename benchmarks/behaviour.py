"""Which attention behaviour predicts what was learned, and where do the FA units lie?

    python benchmarks/behaviour.py --text heldout.npy --allocations benchmarks/results/allocations-kv_head.json \
        benchmarks/results/allocations-layer.json --out benchmarks/results/behaviour.json

TEXT is a file that benchmarks/tokens.py wrote; allocations come from benchmarks/allocations.py. `--keep FILE` also
keeps the measures themselves, as `consa behaviour` does.
"""

from __future__ import annotations

import argparse
import json
import time
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from common import environment, print_table, write_json

from consa.allocation import Allocation
from consa.behaviour import measure
from consa.model import load_model
from consa.relations import agreement, contiguity, relate, thirds


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--num-sequences", type=int, default=8)
    parser.add_argument("--causal-sequences", type=int, default=4)
    parser.add_argument("--allocations", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    learned = {path: _learned(json.loads(path.read_text())) for path in options.allocations}
    example = next(iter(learned[options.allocations[0]].values()))
    loaded = load_model(options.model)
    text = np.load(options.text, allow_pickle=False)
    chosen = text[np.linspace(0, len(text) - 1, options.num_sequences).round().astype(int)]
    began = time.perf_counter()
    behaviour = measure(
        loaded.model,
        chosen,
        window=example.window,
        num_sink_tokens=example.num_sink_tokens,
        tokenizer=loaded.tokenizer,
        causal_sequences=options.causal_sequences,
        identity=loaded.identity,
    )
    seconds = time.perf_counter() - began
    if options.keep:
        behaviour.save(options.keep)
    sets = {}
    for path, allocations in learned.items():
        predicted: dict[str, list[list[float | None]]] = {}
        for allocation in allocations.values():
            for relation in relate(behaviour, allocation):
                values = [relation.auc, relation.with_decision, relation.with_scores]
                predicted.setdefault(relation.measure, []).append(values)
        sets[path.stem] = {
            "seeds": list(allocations),
            "measures": predicted,
            "thirds": [thirds(allocation) for allocation in allocations.values()],
            "contiguity": [vars(contiguity(allocation)) for allocation in allocations.values()],
            "agreement": [vars(agreement(*pair)) for pair in combinations(allocations.values(), 2)],
        }
        rows = []
        for name, values in predicted.items():
            columns = [
                [value for value in column if value is not None] for column in zip(*values, strict=True)
            ]
            rows.append([name, *(f"{median(column):.3f}" if column else "" for column in columns)])
        print_table([path.stem, "AUC", "rank with FA", "rank with log_alpha"], rows)
    settings = {"num_sequences": len(chosen), "seq_len": chosen.shape[1], "window": behaviour.window}
    settings |= {"num_sink_tokens": behaviour.num_sink_tokens, "causal_sequences": options.causal_sequences}
    write_json(
        options.out, environment() | {"settings": settings, "seconds": round(seconds, 1), "sets": sets}
    )


def _learned(record: dict[str, Any]) -> dict[str, Allocation]:
    """What was learned, by name, with its scores."""
    settings = record["settings"]
    return {
        row["name"]: Allocation(
            full_attention=np.array([[unit == "1" for unit in layer] for layer in row["allocation"]]),
            granularity=settings["granularity"],
            window=settings["window"],
            num_sink_tokens=settings["num_sink_tokens"],
            scores=np.array(row["scores"]),
        )
        for row in record["rows"]
        if row["scores"] is not None and not row["name"].endswith("gates alone")
    }


if __name__ == "__main__":
    main()
