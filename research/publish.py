"""Write the allocations that ship with consa from what the study learned, each with its command and seed.

    python -m research.publish

They are the first seed of research/results/allocations-*.json, and the group `published` of study.json. An allocation
that has not changed keeps its recorded origin.
"""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

from benchmarks.common import parser_of
from consa.allocation import Allocation
from consa.published import FOLDER
from research.analysis import named
from research.records import learned_allocations, read

MODEL = "smollm2-135m"


def main() -> None:
    parser_of(__doc__).parse_args()
    for granularity in ("kv_head", "layer"):
        record = read(f"allocations-{granularity}")
        publish(learned_allocations(record)[0], record, record["settings"] | {"seed": 0})
    record = read("study")
    for _, row in named(record, "published"):
        allocation = Allocation.from_json(json.dumps(row["allocation"]))
        publish(allocation, record, dict(allocation.provenance["config"]))


def publish(allocation: Allocation, record: dict[str, Any], config: dict[str, Any]) -> None:
    """Save under the name of its granularity and target sparsity."""
    path = FOLDER / MODEL / f"{allocation.granularity}-{config['sparsity']:g}.json"
    if path.exists() and replace(Allocation.load(path), provenance={}) == replace(allocation, provenance={}):
        return  # the record may have grown since, on other days and hardware
    how = {name: record[name] for name in ("command", "hardware", "date", "versions")}
    replace(allocation, provenance={"method": "consa", "model": MODEL, "config": config, **how}).save(path)
    print(path.relative_to(FOLDER), round(allocation.sparsity, 4))


if __name__ == "__main__":
    main()
