"""The demo, learned allocations, constraints, control."""

from __future__ import annotations

from statistics import median
from typing import Any

from sections.text import UNITS, model_of, source, table


def recovered(record: dict[str, Any]) -> list[str]:
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
        *table(["recovered", *(f"seed {run['seed']}" for run in runs), "median"], rows),
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
        "## The demo: learned against every rule, on two CPU cores",
        "",
        *recovered(record),
        "",
        *table(["", *(f"seed {run['seed']}" for run in runs)], facts),
        "",
        *source(record),
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
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]


def allocations(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    columns = ["allocation", "sparsity", "loss", "recovered", "expected sparsity", "fractional", "seconds"]
    names = ["name", "sparsity", "loss", "recovered", "expected_sparsity", "fractional", "seconds"]
    rows = [["" if row[name] is None else row[name] for name in names] for row in record["rows"]]
    unit = UNITS[settings["granularity"]]
    return [
        f"## {unit[0].upper()}{unit[1:]} learned on a GPU, against every rule",
        "",
        f"SmolLM2-135M-Instruct, weights frozen, window {settings['window']}, {settings['num_sink_tokens']} sinks;"
        f" {settings['num_steps']} steps of {settings['sequences_per_step']} sequences of {settings['seq_len']:,}"
        f" tokens; {record['heldout_sequences']} held-out sequences, positions from {record['start']:,} on: dense"
        f" {record['dense']:.3f}, all-SWA {record['all_swa']:.3f} nats.",
        "",
        *table(columns, rows),
        "",
        *source(record),
    ]


def constraints(record: dict[str, Any]) -> list[str]:
    settings, rows = record["settings"], record["rows"]
    num_kv_heads = len(rows[0]["allocation"][0])
    odd = f"; with {num_kv_heads} KV heads to a layer `even` has no meaning" if num_kv_heads % 2 else ""
    return [
        f"## The price of a constraint for serving: {model_of(record.get('model', 'smollm2-135m'))},"
        f" {settings['seq_len']:,} tokens",
        "",
        f"Weights frozen, KV heads, window {settings['window']}, {settings['num_sink_tokens']} sinks;"
        f" {settings['num_steps']} steps of {settings['sequences_per_step']} sequences of {settings['seq_len']:,}"
        f" tokens; {record['heldout_sequences']} held-out sequences, positions from {record['start']:,} on: dense"
        f" {record['dense']:.3f}, all-SWA {record['all_swa']:.3f} nats. `uniform` has as many FA heads in every layer,"
        f" `even` an even number{odd}.",
        "",
        *table(
            ["learned", "sparsity", "loss", "recovered"],
            [[row["name"], row["sparsity"], row["loss"], row["recovered"]] for row in rows],
        ),
        "",
        *source(record),
    ]
