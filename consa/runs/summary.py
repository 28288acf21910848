"""What a run found: the record in summary.json, the same as Markdown, and its losses as a table."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.config import AdaptConfig, LearnConfig
from consa.data.sequences import SequenceSet
from consa.evaluation.losses import Comparison
from consa.evaluation.table import number


def measured(
    model: dict[str, str],
    allocation: Allocation,
    config: LearnConfig | AdaptConfig,
    heldout: SequenceSet,
    comparison: Comparison,
) -> dict[str, Any]:
    """The part of a summary that all kinds of run share, JSON-able.

    Args:
        model: its identity.
        allocation: learned, or adapted to.
        config: the loop's settings.
        heldout: the sequences measured on.
        comparison: of the losses there.
    """
    rows = [
        asdict(row)
        | {
            "recovered": row.recovered if np.isfinite(row.recovered) else None,
            "by_position": list(row.by_position),
        }
        for row in comparison.rows
    ]
    return {
        "model": model,
        "granularity": allocation.granularity,
        "sparsity": allocation.sparsity,
        "window": allocation.window,
        "num_sink_tokens": allocation.num_sink_tokens,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "heldout_sequences": len(heldout.tokens),
        "heldout_documents": len(np.unique(heldout.documents)),
        "start": comparison.start,
        "buckets": [list(bucket) for bucket in comparison.buckets],
        "rows": rows,
    }


def losses(summary: dict[str, Any]) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the losses from `start` on, all as text."""
    rows = [
        [row["name"], f"{row['sparsity']:.4f}", f"{row['loss']:.4f}", number(row["recovered"])]
        for row in summary["rows"]
    ]
    return ["allocation", "sparsity", "loss", "recovered"], rows


def of_learning(summary: dict[str, Any]) -> str:
    """Markdown of a learning run's summary."""
    kinds = {
        "dense": "dense",
        "stochastic": "stochastic gates, drawn per sequence at the averaged log_alpha",
        "final": "final allocation",
    }
    found = [(kinds[key], loss) for key, loss in summary["losses"].items() if loss is not None]
    fractional = "none learned" if summary["fractional"] is None else f"{summary['fractional']:.1%}"
    joint = summary["learn"]["mode"] == "joint"
    return f"""{_measured(summary, "learned allocation")}
{JOINT if joint else ""}\
## From gates to a decision

Losses on the same text and positions. Fractional gates at the end: {fractional}.

{_table(["", "loss"], [[kind, f"{loss:.4f}"] for kind, loss in found])}

{_how(summary, "learned", "learning")}

![which units keep full attention](heatmap.png)
"""


def of_adaptation(summary: dict[str, Any]) -> str:
    """Markdown of an adaptation's summary."""
    config = summary["adapt"]
    return f"""{_measured(summary, "hybrid adapted")}
`hybrid` is the allocation with the weights as they were, `adapted` with those trained: method {config["method"]}, \
{config["num_steps"]} steps of {config["sequences_per_step"]} sequences; cross-entropy {config["cross_entropy"]:g}, \
distillation {config["distillation"]:g}, hidden states {config["hidden_loss"]:g}. `model` loads and generates.

{_how(summary, "trained", "adapting")}

![losses and learning rate by step](curves.png)
"""


JOINT = """\
All rows are of the weights that this run trained along with the gates, which `model` holds; `dense` is full attention
with them.

"""


def _measured(summary: dict[str, Any], title: str) -> str:
    by_position = _table(
        ["allocation", *(f"{first}-{end - 1}" for first, end in summary["buckets"])],
        [[row["name"], *(f"{value:.3f}" for value in row["by_position"])] for row in summary["rows"]],
    )
    return f"""# {Path(summary["model"]["model"]).name}: {title} at sparsity {summary["sparsity"]:.4g}

Granularity {summary["granularity"]}, window {summary["window"]}, {summary["num_sink_tokens"]} sink tokens, \
seed {summary["seed"]}. Measured on {summary["heldout_sequences"]} held-out sequences of {summary["seq_len"]} tokens \
from {summary["heldout_documents"]} documents.

## Loss on held-out text

Mean cross-entropy (nats) from position {summary["start"]} on. `recovered` is the share of the gap from all-SWA to \
dense that is closed.

{_table(*losses(summary))}

## By position

{by_position}
"""


def _how(summary: dict[str, Any], done: str, timed: str) -> str:
    used = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    seconds = summary["seconds"]
    return f"""## How

    {summary["command"]}

{summary["hardware"]}; {used}. The process that finished the run {done} for {seconds[timed]:.0f} s and measured \
for {seconds["evaluation"]:.0f} s."""


def _table(columns: list[str], rows: list[list[str]]) -> str:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
