"""The record of a finished run: summary.json, and the same as Markdown."""

from __future__ import annotations

import time
from pathlib import Path
from typing import NotRequired, TypedDict, cast

import numpy as np

from consa.allocation import Allocation
from consa.config import AdaptConfig, LearnConfig
from consa.data.sequences import SequenceSet
from consa.evaluation.losses import buckets_of
from consa.evaluation.table import Table
from consa.files import JsonObject, write_atomically, write_json
from consa.runs.verdict import advice, next_step, questions, verdict


class Summary(TypedDict):
    """What summary.json holds.

    Attributes:
        model: its identity.
        start: first position whose loss counts.
        buckets: ranges of positions `[first, end)`.
        rows: the losses of every allocation in nats: from `start` on, and in each of the buckets.
        table: as of `Table.to_record`, with confidence intervals.
        seconds: that this process took for training and for evaluation.
        run: the settings of the run; "learn", or "adapt" and "allocation", hold the others.
        losses: of learning, in nats: "dense", "stochastic" with gates drawn for each sequence (None if none were
            learned), "final" with the decision. "expected_sparsity" and "fractional" are of learning's last step;
            "margin" is the distance of the lowest score of FA from the highest of SWA; "best_rule" is what
            `verdict.against_best_rule` returned.
    """

    model: dict[str, str]
    granularity: str
    sparsity: float
    window: int
    num_sink_tokens: int
    seq_len: int
    seed: int
    heldout_sequences: int
    heldout_documents: int
    start: int
    buckets: list[list[int]]
    rows: list[JsonObject]
    table: JsonObject
    seconds: dict[str, float]
    run: JsonObject
    command: str
    hardware: str
    versions: dict[str, str]
    learn: NotRequired[JsonObject]
    losses: NotRequired[dict[str, float | None]]
    expected_sparsity: NotRequired[float | None]
    fractional: NotRequired[float | None]
    margin: NotRequired[float | None]
    best_rule: NotRequired[JsonObject | None]
    adapt: NotRequired[JsonObject]
    allocation: NotRequired[JsonObject]


def summarise(
    model: dict[str, str],
    allocation: Allocation,
    config: LearnConfig | AdaptConfig,
    heldout: SequenceSet,
    table: Table,
    seconds: dict[str, float],
    record: JsonObject,
) -> Summary:
    """Make the summary of a run from its parts, without what only learning adds; `record` is what config.json holds."""
    own = {
        "model": model,
        "granularity": allocation.granularity,
        "sparsity": allocation.sparsity,
        "window": allocation.window,
        "num_sink_tokens": allocation.num_sink_tokens,
        "seq_len": config.seq_len,
        "seed": config.seed,
        "heldout_sequences": len(heldout.tokens),
        "heldout_documents": len(np.unique(heldout.documents)),
        "start": table.start,
        "buckets": [list(bucket) for bucket in buckets_of(config.seq_len - 1)],
        "rows": [
            {
                "name": line.name,
                "sparsity": line.sparsity,
                "loss": line.loss.mean,
                "recovered": line.recovered if np.isfinite(line.recovered) else None,
                "by_position": [estimate.mean for estimate in line.by_position.values()],
            }
            for line in table.lines
        ],
        "table": {name: value for name, value in table.to_record().items() if name != "how"},
        "seconds": seconds,
    }
    return cast(Summary, own | record)


def seconds_since(name: str, began: float, ended: float) -> dict[str, float]:
    """How long this process took for the loop `name`, and for the evaluation since the loop's end."""
    return {name: round(ended - began, 1), "evaluation": round(time.monotonic() - ended, 1)}


def write(summary: Summary, markdown: str, folder: Path) -> None:
    """Write summary.json and summary.md; a path in them may hold bytes that are not text."""
    write_json(folder / "summary.json", summary)
    write_atomically(folder / "summary.md", markdown.encode(errors="backslashreplace"))


def losses(summary: Summary) -> tuple[list[str], list[list[str]]]:
    """Columns and rows of the losses from `start` on, as text that fits 80 columns: without the KV cache."""
    _, columns, rows = next(Table.from_record(summary["table"]).sections())
    cache = columns.index("cache")
    without = [[*cells[:cache], *cells[cache + 1 :]] for cells in (columns, *rows)]
    return without[0], without[1:]


def of_learning(summary: Summary, folder: Path) -> str:
    """Markdown of the summary of a learning run in `folder`."""
    assert "losses" in summary and "learn" in summary and "fractional" in summary
    kinds = {
        "dense": "dense",
        "stochastic": "stochastic gates, drawn for each sequence from the averaged log_alpha",
        "final": "final allocation",
    }
    rows = [[text, f"{loss:.4f}"] for key, text in kinds.items() if (loss := summary["losses"][key]) is not None]
    fractional = "none learned" if summary["fractional"] is None else f"{summary['fractional']:.1%}"
    margin = "none" if (value := summary.get("margin")) is None else f"{value:.2f}"
    joint = summary["learn"]["mode"] == "joint"
    title, _, measured = _measured(summary, "learned allocation").partition("\n\n")
    said = [verdict(summary), *advice(summary), *questions(summary, folder)]
    outcome = "\n\n".join([*said, f"    {next_step(summary, folder)}"])
    return f"""{title}

{outcome}

{measured}
{JOINT if joint else ""}\
## From gates to a decision

Losses on the same text and positions. Share of gates that were still fractional at the end: {fractional}. \
Margin between the last FA and the first SWA unit, in log_alpha: {margin}.

{markdown_table(["", "loss"], rows)}

{_how(summary, "learned", "learning")}

![which units keep full attention](heatmap.png)
"""


def of_adaptation(summary: Summary) -> str:
    """Markdown of an adaptation's summary."""
    assert "adapt" in summary
    config = summary["adapt"]
    return f"""{_measured(summary, "hybrid adapted")}
`hybrid` is the allocation with the original weights, `adapted` the allocation with the trained weights. Settings of \
the training: method {config["method"]}, {config["num_steps"]} steps of {config["sequences_per_step"]} sequences; \
weights of the loss: cross-entropy {config["cross_entropy"]:g}, distillation {config["distillation"]:g}, hidden \
states {config["hidden_loss"]:g}; share of retrieval {config["retrieval"]:g}. The folder `model` holds the trained \
hybrid.

{_how(summary, "trained", "adapting")}

![losses and learning rate by step](curves.png)
"""


JOINT = """\
All rows are of the weights that this run trained along with the gates; the folder `model` holds them. `dense` is full
attention with these weights.

"""


def _measured(summary: Summary, title: str) -> str:
    buckets = [f"{first}-{end - 1}" for first, end in summary["buckets"]]
    absolute = [[row["name"], *(f"{value:.3f}" for value in row["by_position"])] for row in summary["rows"]]
    first, _, *others = Table.from_record(summary["table"]).sections()
    parts = "\n\n".join(f"{part.title}:\n\n{markdown_table(part.columns, part.rows)}" for part in (first, *others))
    return f"""# {Path(summary["model"]["model"]).name}: {title} at sparsity {summary["sparsity"]:.4g}

Granularity {summary["granularity"]}, window {summary["window"]}, {summary["num_sink_tokens"]} sink tokens, \
seed {summary["seed"]}. Measured on {summary["heldout_sequences"]} held-out sequences of {summary["seq_len"]} tokens \
from {summary["heldout_documents"]} document{"s" * (summary["heldout_documents"] != 1)}.

## Loss on held-out text

{parts}

`recovered` is the share of the gap from all-SWA to dense that is closed.

## By position

Mean cross-entropy (nats) in each range of positions:

{markdown_table(["allocation", *buckets], absolute)}
"""


def _how(summary: Summary, done: str, timed: str) -> str:
    used = ", ".join(f"{name} {version}" for name, version in summary["versions"].items())
    seconds = summary["seconds"]
    return f"""## How

    {summary["command"]}

{summary["hardware"]}; {used}. The process that finished the run {done} for {seconds[timed]:.0f} s and measured \
for {seconds["evaluation"]:.0f} s."""


def markdown_table(columns: list[str], rows: list[list[str]]) -> str:
    """A table in Markdown, whose first column is text and whose others are numbers."""
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
