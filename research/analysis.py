"""What the records of research/results say, as numbers: shares recovered, paired differences, where FA lies."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from itertools import product
from statistics import median
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.evaluation.intervals import Estimate, bootstrap
from consa.rules import RULES

Record = dict[str, Any]
Key = tuple[str, str, str]  # sparsity, granularity, method
BASE = "steps/100"  # the cell of the study that others are compared with
GATES = "gates_losses"  # of the decision before refinement
LARGE = {
    name: tuple(f"{kind}-{name.lower()}" for kind in ("rules", "methods"))
    for name in ("Qwen2.5-Coder-0.5B", "Qwen2.5-Coder-1.5B")
}
"""Records of the large models, which `joined` makes one."""
# Cells that show where FA lies, by group of the study: what a row of the table begins with.
PLACES = {
    "published": "target",
    "window": "window of",
    "sinks": "sinks:",
    "length": "sequences of",
    "domain": "text:",
    "seed": "seed",
}


def in_order(record: Record) -> Record:
    """The record with its rows sorted by name, and numbers in names by value."""

    def key(name: str) -> list[Any]:
        parts = re.split(r"(\d+(?:\.\d+)?)", name)
        return [float(part) if place % 2 else part for place, part in enumerate(parts)]

    return record | {"rows": {name: record["rows"][name] for name in sorted(record["rows"], key=key)}}


def named(record: Record, group: str) -> Iterator[tuple[str, Record]]:
    """The cells of a group of the study: the rest of each name, and the row."""
    for name, row in record["rows"].items():
        if name.startswith(f"{group}/"):
            yield name.partition("/")[2], row


def recovered(record: Record, row: Record, which: str = "losses") -> float:
    """The share of the gap that a cell of the study closes, from all-SWA with its own window and sinks to dense."""
    settings = row["allocation"]
    floor = record["rows"][f"all_swa/{settings['window']}/{settings['num_sink_tokens']}"]
    low, loss, high = (
        float(np.mean(losses)) for losses in (floor["losses"], row[which], record["rows"]["dense"]["losses"])
    )
    return (low - loss) / (low - high)


def by_gates(row: Record) -> Allocation:
    """What the gates of a cell decided, before refinement."""
    return Allocation.from_json(json.dumps(row["allocation"] | {"full_attention": row["gates_allocation"]}))


def located(record: Record) -> dict[str, Record]:
    """The cells that show where FA lies, by what differs from the base, which comes first."""
    cells = {"base": record["rows"][BASE]}
    for group, title in PLACES.items():
        cells |= {f"{title} {name}": row for name, row in named(record, group)}
    return cells


def parts(record: Record) -> dict[str, list[Record]]:
    """The cells with one part of the algorithm changed, a list of seeds for each part; unchanged ones come first."""
    rows = record["rows"]
    cells = {"as it is": [rows[name] for name in (BASE, "seed/1", "seed/2") if name in rows]}
    for name, row in named(record, "part"):
        cells.setdefault(name.split("/")[0], []).append(row)
    return cells


def joined(*records: Record) -> Record:
    """Records of research/methods.py of one model as one: settings and rows of the last win; plain objectives only."""
    rows = {name: row for record in records for name, row in record["rows"].items() if not row.get("retrieval_share")}
    return records[-1] | {"rows": rows}


def losses_of_methods(record: Record) -> dict[Key, np.ndarray]:
    """Loss of each held-out sequence, mean over seeds, from a record of research/methods.py or of the study.

    Rows of methods.py that lack the loss of each sequence count as one sequence: their differences have no interval.
    """
    losses: dict[Key, list[np.ndarray]] = {}
    for name, row in record["rows"].items():
        if match := re.fullmatch(r"(?:methods/)?(\w+)-(kv_head|layer)-([\d.]+)-seed\d+", name):
            method, granularity, sparsity = match.groups()
            losses.setdefault((sparsity, granularity, method), []).append(np.array(losses_of(row)))
    return {key: np.mean(each, axis=0) for key, each in losses.items()}


def losses_of(row: Record) -> list[float]:
    """Loss of each held-out sequence, or of all as one."""
    return row.get("losses", [row.get("loss")])


def best_rule(losses: dict[Key, np.ndarray], sparsity: str, unit: str) -> Key | None:
    """The key of the rule with the least loss, if any was measured."""
    rules = [key for key in losses if key[:2] == (sparsity, unit) and key[2] in RULES]
    return min(rules, key=lambda key: float(losses[key].mean()), default=None)


def gain(record: Record, theirs: np.ndarray, ours: np.ndarray) -> Estimate:
    """How much more ours recover than theirs."""
    rows = record["rows"]
    floor = rows.get("all_swa/128/4") or rows["all_swa"]
    return paired(theirs - ours, float(np.subtract(losses_of(floor), losses_of(rows["dense"])).mean()))


def paired(less: Any, gap: float) -> Estimate:
    """Mean of differences in loss, one for each held-out document, as a share of the gap, with its interval."""
    shares = np.array(less) / gap
    return bootstrap(shares, np.arange(len(shares)))


def gains(record: Record, unit: str, other: tuple[str, str] | None) -> dict[str, Estimate]:
    """How much more ConSA recovers than another granularity and method, or than the best rule, by sparsity."""
    losses, differences = losses_of_methods(record), {}
    for sparsity in sorted({key[0] for key in losses}, key=float):
        theirs = (sparsity, *other) if other else best_rule(losses, sparsity, unit)
        ours = (sparsity, unit, "consa")
        if theirs in losses and ours in losses:
            differences[sparsity] = gain(record, losses[theirs], losses[ours])
    return differences


def whole_runs(record: Record) -> dict[str, dict[str, Estimate]]:
    """How much more whole runs with a changed setting recover than the defaults: by setting, then by sparsity."""
    defaults, differences = losses_of_methods(record), {}
    for name, row in named(record, "whole"):
        title, sparsity = name.split("/")
        more = gain(record, defaults[sparsity, "kv_head", "consa"], np.array(row["losses"]))
        differences.setdefault(title, {})[sparsity] = more
    return differences


def by_kind(
    record: Record, value: Callable[[Record], float], average: Callable[[list[float]], float] = median
) -> dict[tuple[str, str], dict[float, float]]:
    """An average over seeds of `value(row)` in a record of research/methods.py: by method and unit, by sparsity."""
    values: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in record["rows"].values():
        if "recovered" in row:
            of = values.setdefault((row["method"], row["granularity"]), {})
            of.setdefault(row["sparsity"], []).append(value(row))
    return {kind: {sparsity: average(of[sparsity]) for sparsity in sorted(of)} for kind, of in values.items()}


def best_trained_rule(record: Record, sparsity: str) -> tuple[str, Record]:
    """Name and row of the rule (4 sinks) with the least loss after training, from research/adaptation.py."""
    names = [f"{rule}{unit}/4/{sparsity}" for rule, unit in product(RULES, ("", "_layer"))]
    rows = {name: record["rows"][name] for name in names if name in record["rows"]}
    return min(rows.items(), key=lambda item: item[1]["after"]["loss"])
