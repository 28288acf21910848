"""What the experiments took on a GPU."""

from __future__ import annotations

from typing import Any

from sections.text import table


def cost(records: dict[str, dict[str, Any]]) -> list[str]:
    """Of the files of results, by name, those that say what choosing or training took on a GPU."""
    entries = []
    for name, record in records.items():
        minutes = gpu_seconds(record) / 60
        if "NVIDIA" in record["hardware"] and minutes:
            entries.append([f"{name}.json", len(record.get("rows", [""])), f"{minutes:.1f}"])
    if not entries:
        return []
    total = sum(float(minutes) for *_, minutes in entries)
    return [
        "## What it cost",
        "",
        "Minutes of one GPU spent on choosing and training: wall-clock seconds of each run, over the processes that"
        " shared the GPU. Loading, measuring, runs for speed and what was thrown away come on top.",
        "",
        *table(["file", "rows", "GPU-minutes"], [*entries, ["total", "", f"{total:.1f}"]]),
        "",
    ]


def gpu_seconds(record: dict[str, Any]) -> float:
    """Seconds of its runs, each over the processes that shared its GPU."""
    if "rows" not in record:  # one long run
        return record["measured"][-1]["seconds"] / record.get("processes", 1)
    rows = record["rows"].values() if isinstance(record["rows"], dict) else record["rows"]
    return sum(
        ((row.get("seconds") or 0) + (row.get("learning_seconds") or 0))
        / (row.get("processes", 1) * row.get("of_one_run", 1))
        for row in rows
        if not row.get("name", "").endswith("gates alone")
    )
