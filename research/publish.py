"""Write the allocations that ship with consa from what the study learned, each with its command, seed and numbers.

    python -m research.publish
    python -m research.publish research/results/methods-qwen2.5-coder-1.5b*.json

Without arguments, they are those of SmolLM2-135M: the first seed of research/results/allocations-*.json, and the group
`published` of study.json. A record of research/methods.py, named methods-MODEL.json or methods-MODEL-ANYTHING.json,
gives the first seed of each of its granularities and sparsities. An allocation that has not changed keeps its recorded
origin.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from statistics import mean
from typing import Any

from benchmarks.common import parser_of
from consa.allocation import Allocation
from consa.published import FOLDER, MODELS
from research.analysis import named
from research.page import command
from research.records import allocation_in, learned_allocations, read

MEASURED = ("loss", "recovered", "retrieval")


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("records", nargs="*", type=Path)
    parser.add_argument("--ending", default="", help="of the rows' names, after the seed")
    options = parser.parse_args()
    for path in options.records:
        of_methods(path, options.ending)
    if not options.records:
        of_small_model()


def of_small_model() -> None:
    """Publish what was learned on SmolLM2-135M."""
    for granularity in ("kv_head", "layer"):
        record = read(f"allocations-{granularity}")
        publish(learned_allocations(record)[0], "smollm2-135m", record, record["settings"] | {"seed": 0})
    record = read("study")
    for _, row in named(record, "published"):
        allocation = Allocation.from_json(json.dumps(row["allocation"]))
        publish(allocation, "smollm2-135m", record, dict(allocation.provenance["config"]))


def of_methods(path: Path, ending: str) -> None:
    """Publish ConSA's rows of seed 0 in a record of research/methods.py."""
    (model,) = (model for model in MODELS if path.stem.startswith(f"methods-{model}"))
    record = json.loads(path.read_text())
    settings = record["settings"]
    for name, row in record["rows"].items():
        if name.startswith("consa-") and name.endswith(f"-seed0{ending}"):
            config = settings["budget"] | {key: row[key] for key in ("sparsity", "granularity", "seed")}
            more = {"row": name, "weights": settings["model"], "sha256": settings["weights"]}
            more |= {"measured": {key: row[key] for key in MEASURED}, "quality": quality(row, record["rows"]["dense"])}
            publish(allocation_in(record, name), model, record, config, f"-window{config['window']}", **more)


def quality(row: dict[str, Any], dense: dict[str, Any]) -> str:
    """One line of what a row of research/methods.py measured, beside what the dense model finds."""
    found, of_dense = (mean(of["retrieval"].values()) for of in (row, dense))
    tasks = len({asked.rpartition(" ")[0] for asked in row["retrieval"]})
    asked = f"the answers of {tasks} retrieval tasks" if tasks > 1 else "single needles"
    return f"recovers {row['recovered']:.3f}, finds {found:.2f} of {asked} (dense {of_dense:.2f})"


def publish(
    allocation: Allocation, model: str, record: dict[str, Any], config: dict[str, Any], ending: str = "", **more: Any
) -> None:
    """Save under the name of its granularity and target sparsity, and the ending."""
    path = FOLDER / model / f"{allocation.granularity}-{config['sparsity']:g}{ending}.json"
    if path.exists() and replace(Allocation.load(path), provenance={}) == replace(allocation, provenance={}):
        return  # the record may have grown since, on other days and hardware
    how = {"command": command(record)} | {name: record[name] for name in ("hardware", "date", "versions")} | more
    path.parent.mkdir(parents=True, exist_ok=True)
    replace(allocation, provenance={"method": "consa", "model": model, "config": config, **how}).save(path)
    print(path.relative_to(FOLDER), round(allocation.sparsity, 4))


if __name__ == "__main__":
    main()
