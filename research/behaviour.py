"""Which attention behaviour predicts what was learned, and where do the FA units lie?

    python -m research.behaviour --text heldout.npy --allocations research/results/allocations-kv_head.json \
        research/results/allocations-layer.json --out research/results/behaviour.json

TEXT is a token file of research/tokens.py. Allocations come from records of research/allocations.py, where decisions
before refinement are left out, or of research/methods.py. `--keep FILE` keeps the measures, as `consa behaviour` does.
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

from benchmarks.common import environment, parser_of, print_table, write_json
from consa.allocation import Allocation
from consa.behaviour.measure import measure
from consa.behaviour.relate import Behaviour, agreement, depth, rank_correlation, relate
from consa.model.load import load_model
from research.records import allocation_in, learned_allocations, tokens_of


def main() -> None:
    options = _options()
    learned = [same for path in options.allocations for same in _sets(json.loads(path.read_text()))]
    example = learned[0][0]
    loaded = load_model(options.model)
    text = tokens_of(options.text)
    places = np.linspace(0, len(text) - 1, options.num_sequences).round().astype(int)
    # shuffled, so that the first ones, on which causal effects are measured, are as spread out as all
    chosen = text[np.random.default_rng(0).permutation(places), : options.seq_len]
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
    sets = []
    for allocations in learned:
        sets.append(_related(behaviour, allocations))
        columns = [allocations[0].granularity, "AUC", "rank with FA", "rank with log_alpha"]
        rows = [[name, *map(_median, values.values())] for name, values in sets[-1]["measures"].items()]
        print_table(columns, rows)
    across = [vars(agreement(first, second)) for a, b in combinations(learned, 2) for first in a for second in b]
    causal = behaviour.measures.get("causal_effect")
    alike = {} if causal is None else {n: rank_correlation(v, causal) for n, v in behaviour.measures.items()}
    record = {
        "settings": {
            "model": options.model,
            "dtype": str(loaded.model.dtype).removeprefix("torch."),
            "num_sequences": len(chosen),
            "seq_len": chosen.shape[1],
            "window": behaviour.window,
            "num_sink_tokens": behaviour.num_sink_tokens,
            "causal_sequences": options.causal_sequences,
        },
        "seconds": round(seconds, 1),
        "sets": sets,
        "across": across,
        "with_causal_effect": alike,
    }
    write_json(options.out, environment() | record)
    print(f"{seconds:.0f} s of measuring")


def _options() -> argparse.Namespace:
    parser = parser_of(__doc__)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--text", required=True)
    parser.add_argument("--seq-len", type=int, help="fewer tokens of each sequence")
    parser.add_argument("--num-sequences", type=int, default=16)
    parser.add_argument("--causal-sequences", type=int, default=8)
    parser.add_argument("--allocations", type=Path, nargs="+", required=True)
    parser.add_argument("--keep", type=Path, help="file for the measures of every head")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _sets(record: dict[str, Any]) -> list[list[Allocation]]:
    """The allocations that ConSA learned in a record, in sets of one granularity and sparsity."""
    if isinstance(record["rows"], list):
        return [learned_allocations(record)]
    sets: dict[Any, list[Allocation]] = {}
    for name, row in record["rows"].items():
        if row["method"] == "consa":
            sets.setdefault((row["granularity"], row["sparsity"]), []).append(allocation_in(record, name))
    return list(sets.values())


def _related(behaviour: Behaviour, allocations: list[Allocation]) -> dict[str, Any]:
    """How the measures go with allocations of one granularity, and these with each other."""
    full = allocations[0].full_attention
    heads = full.shape[1] if allocations[0].granularity == "layer" else 1  # of a unit
    relations = [relate(behaviour, allocation) for allocation in allocations]
    return {
        "granularity": allocations[0].granularity,
        "num_units": full.size // heads,
        "num_full": int(full.sum()) // heads,
        "seeds": [allocation.provenance["name"] for allocation in allocations],
        "measures": {
            of_seeds[0].measure: {
                name: [getattr(relation, name) for relation in of_seeds]
                for name in ("auc", "with_decision", "with_scores")
            }
            for of_seeds in zip(*relations, strict=True)
        },
        "depth": [vars(depth(allocation)) for allocation in allocations],
        "agreement": [vars(agreement(*pair)) for pair in combinations(allocations, 2)],
    }


def _median(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{median(known):.3f}" if known else ""


if __name__ == "__main__":
    main()
