"""Write docs/RESULTS.md and README.md's table from benchmarks/results; no number there is typed by hand.

python benchmarks/results_page.py
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from statistics import median
from typing import Any

from consa.evaluation.table import png
from consa.files import write_atomically
from consa.methods import METHODS

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
            record = json.loads(path.read_text())
            sections += render(record)
            if name in FIGURES:
                write_atomically(PAGE.parent / f"{name}.png", FIGURES[name](record))
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
    unit = UNITS[settings["granularity"]]
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


def constraints(record: dict[str, Any]) -> list[str]:
    settings, rows = record["settings"], record["rows"]
    return [
        "## The price of a constraint for serving",
        "",
        f"SmolLM2-135M-Instruct, weights frozen, KV heads, window {settings['window']},"
        f" {settings['num_sink_tokens']} sinks; {settings['num_steps']} steps of {settings['sequences_per_step']}"
        f" sequences of {settings['seq_len']:,} tokens of Python's standard library, one of each file (its own file of"
        f" tokens, not that of the other sections); {record['heldout_sequences']} held-out sequences, positions"
        f" from {record['start']:,} on: dense {record['dense']:.3f}, all-SWA {record['all_swa']:.3f} nats."
        " `uniform` has as many FA heads in every layer; a layer has three KV heads here, so `even` has no meaning.",
        "",
        *_table(
            ["learned", "sparsity", "loss", "recovered"],
            [[row["name"], row["sparsity"], row["loss"], row["recovered"]] for row in rows],
        ),
        "",
        *_source(record),
    ]


def methods(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    ends, rows = (
        [row for name, row in record["rows"].items() if (name in ("dense", "all_swa")) == is_end]
        for is_end in (True, False)
    )
    processes = sorted({row["processes"] for row in rows})
    page = [
        "## Every other way to choose an allocation, beside ConSA",
        "",
        f"SmolLM2-135M-Instruct, weights frozen, window {settings['budget']['window']},"
        f" {settings['budget']['num_sink_tokens']} sinks, sequences of {settings['seq_len']:,} tokens."
        f" `recovered`: of {settings['num_heldout']} held-out sequences, positions from {settings['start']:,} on, the"
        " median over the seeds, and their range where a method draws. Retrieval: share of"
        f" {settings['examples']} single needles found at {' / '.join(settings['lengths'].split(','))} tokens, mean"
        " over the seeds. Best of a sparsity in bold. Seconds are those of choosing alone, wall-clock, "
        + (
            "the process alone on its GPU"
            if processes == [1]
            else f"beside others: {' or '.join(map(str, processes))} processes shared the GPU"
        )
        + f", {settings['budget']['micro_batch']} sequences at once; Mtokens went forward / of them backward too."
        " * one run for all sparsities.",
        "",
        "`nll_guided`, `duo_attention` and `retrieval_score` choose by questions for several numbers hidden in the text"
        " that the needles are hidden in too, a sibling of what the retrieval columns score; no other method sees any"
        " of it.",
        "",
        "![Quality over KV cache](methods.png)",
        "",
        *_table(
            ["", "loss, nats", "retrieval"],
            [[row["method"], f"{row['loss']:.3f}", _retrieval([row])] for row in ends],
        ),
        "",
    ]
    for sparsity in sorted({row["sparsity"] for row in rows}):
        groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
        for row in rows:
            if row["sparsity"] == sparsity:
                groups.setdefault((row["method"], row["granularity"]), []).append(row)
        ordered = sorted(groups.values(), key=lambda group: -_median(group, "recovered"))
        best = _median(ordered[0], "recovered")
        table = [_method(group, is_best=_median(group, "recovered") == best) for group in ordered]
        columns = ["method", "unit", "recovered", "range", "retrieval", "seconds", "Mtokens"]
        page += [f"Sparsity {sparsity:g}:", "", *_table(columns, table), ""]
    return page + _source(record)


def _method(group: list[dict[str, Any]], *, is_best: bool) -> list[str]:
    """A line of the table: one method at one granularity and sparsity, over its seeds."""
    values = [row["recovered"] for row in group]
    spent = [statistics.mean(row["cost"][name] for row in group) / 1e6 for name in COSTS]
    cells = [
        group[0]["method"],
        group[0]["granularity"],
        f"{median(values):.3f}",
        f"{min(values):.3f} to {max(values):.3f}" if len(group) > 1 else "",
        _retrieval(group),
        f"{_median(group, 'seconds'):.0f}" + ("*" if group[0]["of_one_run"] > 1 else ""),
        " / ".join(f"{value:.1f}" for value in spent),
    ]
    return [f"**{cell}**" if cell and is_best else cell for cell in cells]


COSTS = ("forward_tokens", "backward_tokens")


def _median(group: list[dict[str, Any]], name: str) -> float:
    return median(row[name] for row in group)


def _retrieval(group: list[dict[str, Any]]) -> str:
    lengths = group[0]["retrieval"]
    return " / ".join(
        f"{statistics.mean(row['retrieval'][length] for row in group):.2f}" for length in lengths
    )


def frontier(record: dict[str, Any]) -> bytes:
    """Quality over KV cache, a line per method and granularity, as PNG."""
    from matplotlib.figure import Figure

    dense = record["rows"]["dense"]["cache_bytes"]
    rows = [row for row in record["rows"].values() if "recovered" in row]
    kinds = dict.fromkeys((row["method"], row["granularity"]) for row in rows)
    drawing = Figure(figsize=(9, 5), layout="constrained")
    axes = drawing.subplots()
    peers = [name for name in METHODS if name in {method for method, _ in kinds}]
    colours = {name: f"C{place}" for place, name in enumerate(peers)}
    for method, granularity in kinds:
        own = [row for row in rows if (row["method"], row["granularity"]) == (method, granularity)]
        points = sorted(
            (
                statistics.mean(row["cache_bytes"] for row in at) / dense,
                _median(at, "recovered"),
            )
            for sparsity in {row["sparsity"] for row in own}
            for at in [[row for row in own if row["sparsity"] == sparsity]]
        )
        axes.plot(
            *zip(*points, strict=True),
            color=colours.get(method, "#bbbbbb"),
            linestyle="-" if granularity == "kv_head" else "--",
            marker="o",
            markersize=5 if method == "consa" else 3,
            linewidth=2.5 if method == "consa" else 1,
            label=f"{method}, {granularity}" if method in colours else None,
        )
    axes.plot([], [], color="#bbbbbb", marker="o", markersize=3, linewidth=1, label="rules")
    axes.set(
        xlabel=f"KV cache at {record['settings']['seq_len']:,} tokens, share of the dense model's",
        ylabel="recovered, median over the seeds",
        ylim=(-0.1, 1.02),
    )
    axes.legend(frameon=False, fontsize="small", loc="center left", bbox_to_anchor=(1.01, 0.5))
    return png(drawing)


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


def adaptation(record: dict[str, Any]) -> list[str]:
    settings, rows = record["settings"], record["rows"]
    dense = rows["dense"]
    tokens = record["steps"] * settings["sequences_per_step"] * record["seq_len"]
    lines = [
        f"## Adaptation on {tokens / 1e6:.1f} M tokens: hybrids and the dense model, trained equally long",
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
    for sinks in (4, 0):
        chosen = {name: row for name, row in rows.items() if row["sinks"] in (None, sinks)}
        if len(chosen) > 1:
            table = [_adapted(ADAPTED[name.partition("/")[0]], row) for name, row in chosen.items()]
            lines += [f"With {sinks or 'no'} sinks:", "", *_table(columns, table), ""]
        if hybrid := rows.get(f"kv_head/{sinks}"):
            found = ((n, s - dense["after"]["retrieval"][n]) for n, s in hybrid["after"]["retrieval"].items())
            needles = ", ".join(f"{100 * less:+.0f} points at {int(n):,} tokens" for n, less in found)
            lines += [
                f"Learned KV heads end {hybrid['behind_dense']:+.4f} nats from the dense model trained as long; needles"
                f" found, against it: {needles}.",
                "",
            ]
    return lines + _joint(record) + _source(record)


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
        f"Runs of {settings['steps']} steps of {settings['tokens_per_step']:,} tokens, whatever the number of"
        " processes, one GPU each. `speed-up` is to one process, over how many there are; `memory` is the most that any"
        " GPU had allocated; `largest difference` is that of the losses to those of one process, relative. Adapting"
        " keeps its allocation; of Qwen3-0.6B the weights are random.",
        "",
        *_table(record["columns"], record["table"]),
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
    return lines + _source(record)


def behaviour(record: dict[str, Any]) -> list[str]:
    settings, sets = record["settings"], record["sets"]
    kinds = [UNITS[found["granularity"]] for found in sets]
    rows = [
        [
            name.replace("_", " "),
            *(_spread(found["measures"][name]["auc"]) for found in sets),
            *(_spread(found["measures"][name]["with_scores"]) for found in sets),
            "" if name == "causal_effect" else _spread([record["with_causal_effect"].get(name)]),
        ]
        for name in sorted(
            sets[0]["measures"], key=lambda name: -abs(median(sets[0]["measures"][name]["auc"]) - 0.5)
        )
    ]
    chances = [
        "{:.2f} to {:.2f}".format(*_chance(found))
        + f" for {found['num_full']} of {found['num_units']} {kind}"
        for found, kind in zip(sets, kinds, strict=True)
    ]
    places = [
        [
            seed,
            *(f"{share:.0%}" for share in found["thirds"]),
            f"{found['bare']} (p {found['p_bare']:.3f})",
            f"{found['mean_run']:.2f} / {found['expected_run']:.2f} (p {found['p_run']:.3f})",
            ", ".join(f"{first}" if first == last else f"{first}-{last}" for first, last in found["blocks"]),
        ]
        for of_kind in sets
        for seed, found in zip(of_kind["seeds"], of_kind["depth"], strict=True)
    ]
    pairs = {kind: found["agreement"] for kind, found in zip(kinds, sets, strict=True)}
    alike = [
        [kind, *(_spread([pair[name] for pair in found]) for name in AGREEMENT)]
        for kind, found in (pairs | {" against ".join(kinds): record["across"]}).items()
    ]
    return [
        "## What the heads do: which behaviour predicts the learned decision",
        "",
        f"SmolLM2-135M-Instruct under full attention, {settings['dtype']}, {settings['num_sequences']} held-out"
        f" sequences of {settings['seq_len']:,} tokens, {settings['causal_sequences']} of them for the causal effect;"
        f" window {settings['window']}, {settings['num_sink_tokens']} sinks; measured in {record['seconds']:.0f}"
        " seconds. The decisions are those of the learned allocations above. AUC is the chance that a unit on FA"
        " measures higher than one on SWA; a measure that has nothing to do with the decision lies, 19 times of 20, at"
        f" {' and '.join(chances)}. Rank correlations are Spearman's. Medians over seeds, lowest and highest in"
        " brackets; of a layer, the mean of its heads counts.",
        "",
        *_table(
            [
                "measure",
                *(f"AUC, {kind}" for kind in kinds),
                *(f"rank with log_alpha, {kind}" for kind in kinds),
                "rank with causal effect",
            ],
            rows,
        ),
        "",
        *(_predictors(found, kind) for found, kind in zip(sets, kinds, strict=True)),
        "",
        "### Where full attention lies",
        "",
        "Share of the FA heads in each third of the layers; layers at the bottom without any FA; mean length of blocks"
        " of layers with more FA than average, beside that of 1,000 random orders of the same layers. p is the share of"
        " orders that are as extreme.",
        "",
        *_table(["", "bottom", "middle", "top", "bare bottom", "run / by chance", "blocks"], places),
        "",
        *(_picture(found, kind) for found, kind in zip(sets, kinds, strict=True)),
        "",
        "Agreement between any two seeds, and between the granularities, head by head:",
        "",
        *_table(["", "Jaccard of FA heads", "by chance", "rank correlation of log_alpha"], alike),
        "",
        *_source(record),
    ]


def behaviour_cost(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    return [
        "## What measuring behaviour costs",
        "",
        f"SmolLM2-135M-Instruct in float32 on a CPU, window {settings['window']}: one sequence of text, the repeated"
        " random sequence and four needles. Seconds by the clock, and those of all cores together. Memory is the rise"
        " of the process's peak over that of the loaded model; the last column is what the scores of one layer would"
        " take if they existed at once.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


AGREEMENT = ("jaccard", "expected_jaccard", "rank_correlation")
UNITS = {"kv_head": "KV heads", "layer": "layers"}


def _chance(found: dict[str, Any]) -> tuple[float, float]:
    """Where 19 of 20 unrelated measures' AUC lies; Mann and Whitney's variance, without ties."""
    full, units = found["num_full"], found["num_units"]
    half = 1.96 * ((units + 1) / (12 * full * (units - full))) ** 0.5
    return 0.5 - half, 0.5 + half


def _predictors(found: dict[str, Any], kind: str) -> str:
    """Which measures tell FA from SWA better than chance, best first, as a sentence."""
    low, high = _chance(found)
    aucs = {name.replace("_", " "): median(values["auc"]) for name, values in found["measures"].items()}
    order = sorted(aucs, key=lambda name: -abs(aucs[name] - 0.5))

    def listed(names: list[str]) -> str:
        return ", ".join(f"{name} ({aucs[name]:.2f})" for name in names) or "nothing"

    more, less = ([n for n in order if aucs[n] > high], [n for n in order if aucs[n] < low])
    rest = [name for name in order if name not in more + less]
    return (
        f"- {kind[0].upper()}{kind[1:]} on FA, beyond chance: more {listed(more)}; less {listed(less)}. Not beyond"
        f" chance: {listed(rest)}."
    )


def _picture(found: dict[str, Any], kind: str) -> str:
    """Whether FA leaves the bottom to SWA and gathers in blocks in the middle, as the paper has it, as a sentence."""
    depths = found["depth"]

    def tested(name: str) -> str:
        below = sum(depth[name] < 0.05 for depth in depths)
        return f"p < 0.05 in {below} of {len(depths)} seeds"

    def among(values: list[float], form: str) -> str:
        low, high = (format(value, form) for value in (min(values), max(values)))
        return low if low == high else f"{low} to {high}"

    bottom, middle, _ = zip(*(depth["thirds"] for depth in depths), strict=True)
    runs, expected = ([depth[name] for depth in depths] for name in ("mean_run", "expected_run"))
    return (
        f"- {kind[0].upper()}{kind[1:]}. SWA at the bottom: {_verdict(depths, 'p_bare', 'p_bottom')}. The lowest"
        f" {among([depth['bare'] for depth in depths], '')} layers have no FA ({tested('p_bare')}); the bottom third"
        f" holds {among(list(bottom), '.0%')} of it ({tested('p_bottom')}). FA in the middle:"
        f" {_verdict(depths, 'p_middle')}. The middle third holds {among(list(middle), '.0%')} of it"
        f" ({tested('p_middle')}). FA in contiguous blocks: {_verdict(depths, 'p_run')}. They are"
        f" {among(runs, '.1f')} layers long, {among(expected, '.1f')} by chance ({tested('p_run')})."
    )


def _verdict(depths: list[dict[str, Any]], *names: str) -> str:
    """What the p values say of a claim about every allocation."""
    shown = [depth[name] < 0.05 for depth in depths for name in names]
    return "holds here" if all(shown) else "holds in part" if any(shown) else "not shown here"


def attention(record: dict[str, Any]) -> list[str]:
    return [
        "## Attention on a GPU: gates and windows beside the library's causal attention",
        "",
        "bf16, forward alone and forward + backward; shape is batch x query heads x KV heads x tokens x head_dim, a"
        " gate for each KV head of each sequence. Times are the GPU's; `ratio` is to the library's faster causal"
        " attention, in the same run. 75 % of the gates at 0 and the rest at 1 is the prefill of a hybrid; all open is"
        " the start of learning. One pass gives FA and SWA from the same scores, and repeats bit for bit.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


def learning(record: dict[str, Any]) -> list[str]:
    return [
        "## Learning on a GPU: tokens per second",
        "",
        "Forward and backward, bf16, frozen random weights. `dense` is the same loss and backward pass through the"
        " library's causal attention; `two attentions` computes both branches of every head; `consa` is a whole run of"
        f" {record['steps']} steps, from gates almost all open to the target, with deterministic kernels. `at once` is"
        " the micro-batch.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


def decode(record: dict[str, Any]) -> list[str]:
    return [
        "## Decoding on a GPU: a step of a Qwen3-0.6B-shaped model",
        "",
        f"bf16, random weights, sparsity {record['sparsity']}, window {record['window']}, 4 sinks; the compiled model"
        " as one CUDA graph per step; dense is the library's attention over a cache of fixed size. `of copy` is what"
        " attention reads per second over what a large copy on the device moves"
        f" ({record['copy_bytes_per_second'] / 1e12:.2f} TB/s); `fits` is the largest batch in 80 GB.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


def serving(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    return [
        "## Serving: what vLLM plans",
        "",
        f"{settings['layers']} layers of the shape of Qwen3-0.6B's ({settings['kv_heads']} KV heads of"
        f" {settings['head_dim']}), bfloat16, sparsity {settings['sparsity']}, window {settings['window']}, requests of"
        f" {settings['context']:,} tokens, {settings['pool_bytes'] / 2**30:.0f} GiB for the cache, random allocations."
        " `tokens at once` is `--max-num-batched-tokens`: vLLM keeps room for so many new tokens in every request."
        " `decoding, of ideal` is what vLLM plans for a request with one new token at a time, over the bytes of the"
        " allocation itself, without pages.",
        "",
        *_table(record["columns"], record["rows"]),
        "",
        *_source(record),
    ]


SECTIONS = {
    "demo": demo,
    "allocations-kv_head": allocations,
    "allocations-layer": allocations,
    "adaptation": adaptation,
    "adaptation-long": adaptation,
    "distributed": distributed,
    "constraints": constraints,
    "control": control,
    "methods": methods,
    "behaviour": behaviour,
    "behaviour_cost": behaviour_cost,
    "inference": inference,
    "serving": serving,
    "attention": attention,
    "learning": learning,
    "decode": decode,
}

FIGURES = {"methods": frontier}


def _table(columns: list[str], rows: list[list[Any]]) -> list[str]:
    lines = [columns, ["---"] + ["---:"] * (len(columns) - 1), *rows]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def _spread(values: list[float | None]) -> str:
    """Median, lowest and highest of what is known."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    low, middle, high = (f"{value:.2f}" for value in (min(known), median(known), max(known)))
    return middle if low == high else f"{middle} ({low} to {high})"


def _source(record: dict[str, Any]) -> list[str]:
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    remark = f" {record['remark']}" if "remark" in record else ""
    return [f"`{record['command']}` on {record['hardware']}, {record['date']}; {versions}.{remark}", ""]


if __name__ == "__main__":
    main()
