"""Write docs/RESULTS.md and README.md's table from benchmarks/results; no number there is typed by hand.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median
from typing import Any

from consa.files import write_atomically

HERE = Path(__file__).parent
PAGE = HERE.parent / "docs" / "RESULTS.md"
README = HERE.parent / "README.md"
BEGIN, END = "<!-- results: written by benchmarks/results_page.py -->\n", "<!-- end of results -->\n"


def main() -> None:
    sections = [
        "# Results",
        "",
        "Written by `python benchmarks/results_page.py` from `benchmarks/results/`.",
        "",
    ]
    for name, render in SECTIONS.items():
        path = HERE / "results" / f"{name}.json"
        if path.exists():
            sections += render(json.loads(path.read_text()))
    write_atomically(PAGE, ("\n".join(sections).rstrip() + "\n").encode())
    before, rest = README.read_text().split(BEGIN)
    after = rest.split(END)[1]
    record = json.loads((HERE / "results" / "demo.json").read_text())
    table = [*_recovered(record), "", *_source(record)]
    write_atomically(README, (before + BEGIN + "\n".join(table) + END + after).encode())


def _recovered(record: dict[str, Any]) -> list[str]:
    runs = record["runs"]
    rows = [
        [name, *(f"{value:.3f}" for value in values), f"{median(values):.3f}"]
        for name, values in sorted(record["recovered"].items(), key=lambda item: -median(item[1]))
    ]
    return [
        "SmolLM2-135M-Instruct, weights frozen, KV heads at target sparsity 0.75, window 64, 4 sinks, sequences of"
        f" 1,024 tokens of Python's standard library, {runs[0]['heldout_sequences']} held-out sequences. `recovered` is"
        " the share of the loss between all-SWA (0) and dense (1) that an allocation keeps, from position 256 on.",
        "",
        *_table(["recovered", *(f"seed {run['seed']}" for run in runs), "median"], rows),
    ]


def demo(record: dict[str, Any]) -> list[str]:
    runs = record["runs"]
    facts = [
        ["hardware", *(run["hardware"] for run in runs)],
        ["seconds of learning", *(f"{run['seconds']['learning']:.0f}" for run in runs)],
        ["seconds of evaluation", *(f"{run['seconds']['evaluation']:.0f}" for run in runs)],
        ["loss of dense, nats", *(f"{run['losses']['dense']:.4f}" for run in runs)],
        ["loss under sampled gates", *(f"{run['losses']['stochastic']:.4f}" for run in runs)],
        ["loss of the final allocation", *(f"{run['losses']['final']:.4f}" for run in runs)],
        ["expected sparsity at the end", *(f"{run['expected_sparsity']:.4f}" for run in runs)],
        ["gates still fractional", *(f"{run['fractional']:.3f}" for run in runs)],
    ]
    return [
        "## The demo: learned against every rule, on a laptop CPU",
        "",
        *_recovered(record),
        "",
        *_table(["", *(f"seed {run['seed']}" for run in runs)], facts),
        "",
        *_source(record),
    ]


def control(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    return [
        "## Control: does learning end where it was told to?",
        "",
        f"SmolLM2-135M-Instruct, {settings['num_steps']} steps of {settings['sequences_per_step']} sequence of"
        f" {settings['seq_len']} tokens, window {settings['window']}. Expected sparsity is that of the gates before the"
        " allocation is rounded; `fractional` is the share of gates whose noiseless setting is neither 0 nor 1.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


def allocations(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    columns = ["allocation", "sparsity", "loss", "recovered", "expected sparsity", "fractional", "seconds"]
    names = ["name", "sparsity", "loss", "recovered", "expected_sparsity", "fractional", "seconds"]
    rows = [["" if row[name] is None else row[name] for name in names] for row in record["rows"]]
    unit = {"kv_head": "KV heads", "layer": "layers"}[settings["granularity"]]
    return [
        f"## {unit[0].upper()}{unit[1:]} learned on a GPU, against every rule",
        "",
        f"SmolLM2-135M-Instruct, weights frozen, window {settings['window']}, {settings['num_sink_tokens']} sinks;"
        f" {settings['num_steps']} steps of {settings['sequences_per_step']} sequences of {settings['seq_len']:,}"
        f" tokens; {record['heldout_sequences']} held-out sequences, positions from {record['start']:,} on: dense"
        f" {record['dense']:.3f}, all-SWA {record['all_swa']:.3f} nats.",
        "",
        *_table(columns, rows),
        "",
        *_source(record),
    ]


def inference(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    return [
        "## Inference: what a hybrid saves beside the dense model",
        "",
        f"{settings['model']}, {settings['dtype']}, one sequence, window {settings['window']},"
        f" {settings['num_sink_tokens']} sinks; medians over {settings['repeats']} runs, each a prefill and"
        f" {settings['decode_tokens']} decoded tokens, dense and hybrid in turn on the same weights. Prefill: seconds;"
        " decode: tokens per second; KV cache: bytes that it holds; all hybrid over dense. Peaks of memory are with"
        " the weights.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


SECTIONS = {
    "demo": demo,
    "allocations-kv_head": allocations,
    "allocations-layer": allocations,
    "control": control,
    "inference": inference,
}


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _source(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    return [f"`{record['command']}` on {record['hardware']}, {record['date']}; {versions}.", ""]


if __name__ == "__main__":
    main()
