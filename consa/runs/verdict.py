"""The outcome of a learning run: one line, what to change if the outcome is poor, and the command that comes next."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from consa.evaluation.intervals import Estimate, bootstrap
from consa.evaluation.table import Table
from consa.files import JsonObject
from consa.rules import RULES

Summary = Mapping[str, Any]  # of learning; see consa.runs.summary
LEARNED = "learned"  # name of the result in the table
MIN_MARGIN = 0.1  # of log_alpha, below which another seed may choose other units
MAX_FRACTIONAL = 0.2  # share of undecided gates above which more steps are advised


def against_best_rule(losses: Mapping[str, np.ndarray], documents: np.ndarray) -> JsonObject | None:
    """Compare the learned allocation with the rule of lowest mean loss; None if no rule was measured.

    The rule is chosen on the text that it is compared on, which favours the rule.

    Args:
        losses: name of the allocation -> loss of each held-out sequence in nats, `(num_sequences,)`.
        documents: `(num_sequences,)`, the document that each sequence is from.

    Returns:
        "rule", its name, and "gain": its loss minus the learned one's, with a paired 95 % confidence interval.
    """
    means = {name: float(losses[name].mean(dtype=np.float64)) for name in RULES if name in losses}
    if not means:
        return None
    best = min(means, key=lambda name: means[name])
    gain = bootstrap(losses[best] - losses[LEARNED], documents)
    ends = {end: None if math.isnan(value) else value for end, value in (("low", gain.low), ("high", gain.high))}
    return {"rule": best, "gain": {"mean": gain.mean, **ends}}


def verdict(summary: Summary) -> str:
    """One line: the learned allocation against the best rule, its KV cache, and the needles found if measured."""
    table = Table.from_record(summary["table"])
    dense, learned = table.lines[0], table.line(LEARNED)
    compared = summary.get("best_rule")
    if compared is None:
        outcome = f"The loss is {learned.difference} nats above the dense model's; no rule was measured"
    else:
        gain, rule = _gain(compared), f"the best rule ({compared['rule']})"
        if gain.low > 0:
            outcome = f"Beats {rule} by {gain} nats"
        elif gain.high < 0:
            lost = Estimate(-gain.mean, -gain.high, -gain.low)
            outcome = f"Does not beat {rule}, whose loss is {lost} nats lower"
        elif math.isnan(gain.low):
            better = "lower" if gain.mean > 0 else "higher"
            outcome = (
                f"The loss is {abs(gain.mean):.3f} nats {better} than that of {rule}; all held-out text is of one"
                " document, so there is no confidence interval"
            )
        else:
            outcome = f"Does not clearly beat {rule}: the difference is {gain} nats (positive is better)"
    cache = f"KV cache {learned.cache_bytes / dense.cache_bytes:.1%} of dense at {table.cache_tokens:,} tokens"
    needles = f"; needles found {learned.retrieved:.0%}, by dense {dense.retrieved:.0%}" if learned.retrieval else ""
    return f"{outcome}; {cache}{needles}."


def advice(summary: Summary) -> list[str]:
    """What to change about an undecided or unlucky run, one sentence a line; empty for a clear success."""
    if summary.get("fractional") is None:  # nothing was learned, so nothing can be learned better
        return []
    if summary["command"].startswith("consa demo"):  # which has none of the options
        return []
    steps, lines = summary["learn"]["num_steps"], []
    longer, elsewhere = f"--num-steps {2 * steps}", "another --out"
    if (share := summary["fractional"]) and share > MAX_FRACTIONAL:
        lines.append(f"Undecided: {share:.0%} of the gates are neither open nor closed. Try {longer} with {elsewhere}.")
    if (margin := summary.get("margin")) is not None and 0 <= margin < MIN_MARGIN:  # below 0: refined
        lines.append(
            f"Not separated: the last FA unit and the first SWA unit are {margin:.2f} of log_alpha apart, and another"
            f" --seed may choose others. Try {longer} with {elsewhere}."
        )
    gain = _gain(compared) if (compared := summary.get("best_rule")) else None
    if gain and not (gain.low > 0 or gain.high < 0):
        if summary["heldout_documents"] == 1:
            more = (
                "one document gives no interval. Try several, for example chapters in files of their own, as"
                f" --heldout-data, without them in --data, and {elsewhere}"
            )
        elif summary["heldout_sequences"] < summary["run"]["num_heldout"]:
            more = f"all held-out sequences were measured. Try more --data or --heldout-data with {elsewhere}"
        else:
            more = (
                f"try the same command with --num-heldout {4 * summary['heldout_sequences']}, which learns nothing anew"
            )
        lines.append(f"Too little text to tell which is better: {more}.")
    if gain and gain.high < 0:
        lines.append(
            f"A rule is better here. Try {longer}, a longer --seq-len (it is {summary['seq_len'] // summary['window']}"
            f" windows long now), or more --data that is like the model's task, with {elsewhere}."
        )
    return lines


def next_step(summary: Summary, folder: Path) -> str:
    """The command that uses the result."""
    if summary["learn"]["mode"] == "joint":  # whose weights the run has already written
        return shlex.join(["consa", "generate", str(folder / "model"), "--prompt", "Once upon a time"])
    model = summary["model"]["model"]
    return shlex.join(["consa", "convert", model, "--allocation", str(folder), "--out", str(folder / "hybrid")])


def questions(summary: Summary, folder: Path) -> list[str]:
    """One line with the command that asks for facts in long prompts, where it was not done: losses do not tell."""
    asked = Table.from_record(summary["table"]).line(LEARNED).retrieval
    if asked or summary["learn"]["mode"] == "joint":
        return []
    words = ["consa", "eval", summary["model"]["model"], "--config", str(folder), "--allocation", str(folder)]
    command = shlex.join([*words, "--retrieval", "single,multi_value", "--lengths", str(summary["seq_len"])])
    return [f"Loss does not tell whether facts in long prompts are still found. To ask: {command}"]


def _gain(compared: JsonObject) -> Estimate:
    record = compared["gain"]
    return Estimate(record["mean"], *(math.nan if record[end] is None else record[end] for end in ("low", "high")))
