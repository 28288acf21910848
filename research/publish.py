"""Write the allocations that come with consa from what the benchmarks learned, each with its command and seed.

    python -m research.publish

Of research/results/allocations-*.json the first seed, and of study.json every cell of the group `published`. One that
is there already keeps what it says about where it came from.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.common import parser_of
from consa.allocation import Allocation
from consa.published import FOLDER
from research.records import learned_allocations

RESULTS = Path(__file__).parent / "results"
MODEL = "smollm2-135m"


def main() -> None:
    parser_of(__doc__).parse_args()
    for path in sorted(RESULTS.glob("allocations-*.json")):
        record = json.loads(path.read_text())
        allocation = learned_allocations(record)[0]
        publish(allocation, record, record["settings"] | {"seed": 0})
    path = RESULTS / "study.json"
    record = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    for name, row in record["rows"].items():
        if name.startswith("published/"):
            allocation = Allocation.from_json(json.dumps(row["allocation"]))
            publish(allocation, record, dict(allocation.provenance["config"]))


def publish(allocation: Allocation, record: dict[str, Any], config: dict[str, Any]) -> None:
    """Under the name of its granularity and the sparsity it was learned for."""
    how = {name: record[name] for name in ("command", "hardware", "date", "versions")}
    provenance = {"method": "consa", "model": MODEL, "config": config, **how}
    path = FOLDER / MODEL / f"{allocation.granularity}-{config['sparsity']:g}.json"
    if path.exists() and _decided(Allocation.load(path)) == _decided(allocation):
        return  # the record may have grown since, on other days and hardware
    replace(allocation, provenance=provenance).save(path)
    print(path.relative_to(FOLDER), round(allocation.sparsity, 4))


def _decided(allocation: Allocation) -> str:
    return replace(allocation, provenance={}).to_json()


if __name__ == "__main__":
    main()
