"""Training on, and on several processes."""

from __future__ import annotations

from typing import Any

import numpy as np

from consa.evaluation.intervals import bootstrap
from consa.rules import RULES
from sections.text import source, table


def adaptation(record: dict[str, Any]) -> list[str]:
    settings, rows = record["settings"], record["rows"]
    dense = rows["dense"]
    tokens = record["steps"] * settings["sequences_per_step"] * record["seq_len"]
    several = " at several sparsities" if any(name.count("/") == 2 for name in rows) else ""
    lines = [
        f"## Adaptation on {tokens / 1e6:.1f} M tokens: hybrids{several} and the dense model, trained equally long",
        "",
        f"SmolLM2-135M-Instruct, every weight trained by `adapt` on {tokens / 1e6:.2f} M tokens"
        f" ({record['steps']} steps of {settings['sequences_per_step']} sequences of {record['seq_len']:,}),"
        f" cross-entropy, peak learning rate {settings['learning_rate']:g}, window"
        f" {record['window']}; {record['heldout_sequences']} held-out sequences,"
        f" positions from {settings['start']:,} on. The dense model goes from {dense['before']['loss']:.3f} to"
        f" {dense['after']['loss']:.3f} nats and is what `recovered` is 1 at: before the training as it was, after it"
        " as trained. 0 is all-SWA with as many sinks as the row, as it was; for `of trained` it is all-SWA trained"
        " equally long. `behind` is the loss after training less that of the trained dense model. `needles` are the"
        f" shares of {settings['examples']} single needles found at"
        f" {settings['lengths'].replace(',', ' and ')} tokens; `tokens/s` are those of the training."
        " The allocations were learned with 4 sinks, whatever they are trained with.",
        "",
    ]
    columns = [
        "allocation",
        "loss",
        "recovered",
        "needles",
        "trained: loss",
        "recovered",
        "of trained",
        "behind",
        "needles",
        "tokens/s",
    ]
    kinds = dict.fromkeys(name.partition("/")[2] for name in rows if name.count("/") == 2)
    for kind in ("4", "0", *kinds):
        sinks, _, sparsity = kind.partition("/")
        chosen = {name: row for name, row in rows.items() if _belongs(name, kind)}
        if any(name.endswith(kind) for name in chosen if not name.startswith("all_swa")):
            title = f"With {sinks if sinks != '0' else 'no'} sinks" + (
                f", sparsity {sparsity}" if sparsity else ""
            )
            entries = [_adapted(_title(name), row) for name, row in chosen.items()]
            lines += [f"{title}:", "", *table(columns, entries), "", *_paired(rows, chosen, kind)]
        if hybrid := rows.get(f"kv_head/{kind}"):
            found = ((n, s - dense["after"]["retrieval"][n]) for n, s in hybrid["after"]["retrieval"].items())
            needles = ", ".join(f"{100 * less:+.0f} points at {int(n):,} tokens" for n, less in found)
            lines += [
                f"Learned KV heads end {hybrid['behind_dense']:+.4f} nats from the dense model trained as long; needles"
                f" found, against it: {needles}.",
                "",
            ]
    return lines + _joint(record) + source(record)


def from_scratch(record: dict[str, Any]) -> list[str]:
    columns = ["step", "tokens", "loss", "heldout_loss", "needles", "seconds"]
    rows = [[row[name] for name in columns] for row in record["measured"]]
    return [
        f"## A model of {record['parameters'] / 1e6:.1f} M parameters trained from scratch",
        "",
        "Full attention, 16 query heads on 8 KV heads a layer, sequences of 4,096 tokens, one of four with numbers"
        " hidden in it (recipes/from_scratch.py). `needles` are the shares of 20 single needles found at 4,096 tokens.",
        "",
        *table([name.replace("_", " ") for name in columns], rows),
        "",
        *source(record),
    ]


def best_trained_rule(record: dict[str, Any], sparsity: str) -> dict[str, Any] | None:
    """Of the rows of rules with 4 sinks at that sparsity the one of least loss after training, if there are any."""
    rows = [
        row
        for name, row in record["rows"].items()
        if name.split("/")[0].removesuffix("_layer") in RULES and name.endswith(f"/4/{sparsity}")
    ]
    return min(rows, key=lambda row: row["after"]["loss"], default=None)


ADAPTED = {
    "dense": "dense",
    "all_swa": "all-SWA",
    "kv_head": "KV heads, learned",
    "layer": "layers, learned",
    "interleaved": "KV heads, interleaved",
    "middle": "KV heads, middle",
    "joint": "KV heads, learned jointly",
    "distilled": "KV heads, learned; half distillation",
}


def _belongs(name: str, kind: str) -> bool:
    """Whether a row is of these sinks and sparsity, or an end of all."""
    ends = ("dense", f"all_swa/{kind.partition('/')[0]}")
    return name in ends or name.partition("/")[2] == kind


def _title(name: str) -> str:
    kind = name.partition("/")[0]
    unit = "layers" if kind.endswith("_layer") else "KV heads"
    return ADAPTED.get(kind, f"{unit}, {kind.removesuffix('_layer').replace('_', ' ')}")


def _paired(rows: dict[str, Any], chosen: dict[str, Any], kind: str) -> list[str]:
    """What learned KV heads recover more than each other row, once trained, with paired intervals."""
    ours, floor = rows.get(f"kv_head/{kind}"), rows.get(f"all_swa/{kind.partition('/')[0]}")
    if not ours or not floor or "losses" not in ours["after"]:
        return []
    gap = floor["before"]["loss"] - rows["dense"]["after"]["loss"]
    found = []
    for name, row in chosen.items():
        if row is not ours and not name.startswith(("dense", "all_swa")):
            more = np.subtract(row["after"]["losses"], ours["after"]["losses"]) / gap
            found.append(f"{bootstrap(more, np.arange(len(more)))} than {_title(name)}")
    return [
        "Once trained, learned KV heads recover more, with paired 95 % intervals over the held-out documents: "
        + "; ".join(found)
        + ".",
        "",
    ]


def _adapted(name: str, row: dict[str, Any]) -> list[str]:
    def text(key: str, form: str) -> str:
        return "" if row[key] is None else format(row[key], form)

    needles = [" ".join(f"{x:.2f}" for x in row[when]["retrieval"].values()) for when in ("before", "after")]
    before = [f"{row['before']['loss']:.4f}", text("recovered_before", ".3f"), needles[0]]
    after = [f"{row['after']['loss']:.4f}", text("recovered", ".3f"), text("recovered_of_trained", ".3f")]
    return [name, *before, *after, text("behind_dense", "+.4f"), needles[1], f"{row['tokens_per_second']:,}"]


def _joint(record: dict[str, Any]) -> list[str]:
    """Joint learning against masks first, in a sentence, once both are measured."""
    rows = record["rows"]
    if not {"joint/4", "kv_head/4"} <= rows.keys():
        return []
    steps, sequences = record["learn_steps"], record["learn_sequences_per_step"]
    joint, apart = (rows[name]["after"]["loss"] for name in ("joint/4", "kv_head/4"))
    which = "less" if joint < apart else "more"
    return [
        f"Masks and weights learned together ({steps} steps of {sequences} sequences, the weights at a learning rate of"
        f" {record['settings']['joint_rate']:g}), then the weights under the mask they ended with, against masks first"
        f" on the same text and then the weights: {abs(joint - apart):.4f} nats {which} after as many tokens in all."
        " The joint row's loss before is that of the weights which joint learning ended with; these have seen more text"
        " than any other row's.",
        "",
    ]


def distributed(record: dict[str, Any]) -> list[str]:
    settings, killed = record["settings"], record["killed"]
    lines = [
        "## The same run on several processes",
        "",
        f"Runs of {settings['steps']} steps ({4 * settings['steps']} of SmolLM2-135M) of"
        f" {settings['tokens_per_step']:,} tokens, whatever the number of processes, one GPU each. `speed-up` is to one"
        " process, over how many there are; `memory` is the most that any GPU had allocated; `largest difference` is"
        " that of the losses to those of one process, relative. Adapting keeps its allocation; of Qwen3-0.6B the"
        " weights are random. FSDP gathers the layers' weights twice and reduces their gradients once for each"
        " micro-batch: of 32,768 tokens, or 8,192 of Qwen3-0.6B at 8,192. The fewer tokens, the more that costs.",
        "",
        *table(record["columns"], record["table"]),
        "",
    ]
    if killed:
        lines += [
            f"One of {killed['processes']} processes killed at step {killed['at_step']} of {killed['run']}: the job"
            f" ended with exit code {killed['exit_code']}, and `{killed['said'][0]}`. Continued on"
            f" {killed['continued_on']}, its losses differ from those of a run left alone by at most"
            f" {killed['largest_difference']:.1e}, relative.",
            "",
        ]
    return lines + source(record)
