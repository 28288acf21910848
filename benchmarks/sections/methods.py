"""Every way to choose, side by side."""

from __future__ import annotations

import json
import statistics
from itertools import combinations
from pathlib import Path
from statistics import median
from typing import Any

from common import mask_of

from consa.allocation import Allocation
from consa.behaviour.relate import agreement, depth
from consa.files import png
from consa.methods import METHODS
from consa.rules import RULES
from sections.adaptation import best_trained_rule
from sections.text import UNITS, model_of, source, spread, table


def methods(record: dict[str, Any]) -> list[str]:
    settings = record["settings"]
    ends, rows = (
        [row for name, row in record["rows"].items() if (name in ("dense", "all_swa")) == is_end]
        for is_end in (True, False)
    )
    processes = sorted({row["processes"] for row in rows})
    page = [
        f"## Every other way to choose an allocation, beside ConSA: {model_of(settings['model'])}",
        "",
        f"Weights frozen, window {settings['budget']['window']},"
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
        + _compiled(rows)
        + " * one run for all sparsities.",
        "",
        "`nll_guided`, `duo_attention` and `retrieval_score` choose by questions for several numbers hidden in the text"
        " that the needles are hidden in too, a sibling of what the retrieval columns score; no other method sees any"
        " of it.",
        "",
        *(["![Quality over KV cache](methods.png)", ""] if settings["model"] == "smollm2-135m" else []),
        *table(
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
        entries = [_method(group, is_best=_median(group, "recovered") == best) for group in ordered]
        columns = ["method", "unit", "recovered", "range", "retrieval", "seconds", "Mtokens"]
        page += [f"Sparsity {sparsity:g}:", "", *table(columns, entries), ""]
    return page + _one_run_for_all(rows) + _places(rows, settings["budget"]["window"]) + source(record)


def headline(record: dict[str, Any], trained: dict[str, Any]) -> list[str]:
    """The page in one table: what each method recovers, frozen, and ConSA and the best rule once trained on.

    Args:
        record: of benchmarks/methods.py.
        trained: of benchmarks/adaptation.py, its rows named by sparsity.
    """
    settings = record["settings"]
    rows = [row for row in record["rows"].values() if "recovered" in row]
    sparsities = sorted({row["sparsity"] for row in rows})
    found: dict[str, dict[float, list[float]]] = {}
    for row in rows:
        if row["method"] not in RULES and (row["granularity"] == "kv_head" or row["method"] == "consa"):
            name = f"{row['method']}, {UNITS[row['granularity']]}"
            found.setdefault(name, {}).setdefault(row["sparsity"], []).append(row["recovered"])
    medians = {name: [median(of[sparsity]) for sparsity in sparsities] for name, of in found.items()}
    of_rules: dict[tuple[str, str], dict[float, list[float]]] = {}
    for row in rows:
        if row["method"] in RULES:
            kind = of_rules.setdefault((row["method"], row["granularity"]), {})
            kind.setdefault(row["sparsity"], []).append(row["recovered"])
    medians["best of the rules, layers or heads"] = [
        max(median(kind[sparsity]) for kind in of_rules.values() if sparsity in kind)
        for sparsity in sparsities
    ]
    lines = sorted(medians.items(), key=lambda line: -line[1][-1])
    learned = [trained["rows"][f"kv_head/4/{sparsity:g}"]["recovered"] for sparsity in sparsities]
    rules = [best_trained_rule(trained, f"{sparsity:g}") for sparsity in sparsities]
    lines += [
        ("trained on: consa, KV heads", learned),
        ("trained on: the rule that was best frozen", [row["recovered"] for row in rules if row]),
        ("trained on: all-SWA, sparsity 1", [trained["rows"]["all_swa/4"]["recovered"] for _ in sparsities]),
    ]
    tokens = trained["steps"] * trained["settings"]["sequences_per_step"] * trained["seq_len"]
    return [
        f"{model_of(settings['model'])}, sequences of {settings['seq_len']:,} tokens, window"
        f" {settings['budget']['window']}, {settings['budget']['num_sink_tokens']} sinks: the share of the loss"
        " between all-SWA (0) and dense (1) that an allocation keeps on held-out text, the median over the seeds of"
        f" what draws. `trained on`: every weight on {tokens / 1e6:.1f} M tokens; 1 is the dense model trained as"
        " long, 0 still all-SWA as it was.",
        "",
        *table(
            ["recovered at sparsity", *(f"{sparsity:g}" for sparsity in sparsities)],
            [[name, *(f"{value:.3f}" for value in values)] for name, values in lines],
        ),
        "",
        *source(record),
        *source(trained),
    ]


def needles(record: dict[str, Any]) -> list[str]:
    """What `consa eval --retrieval single` found of the two ends."""
    settings, lines = record["settings"], record["lines"]
    lengths = settings["lengths"].split(",")
    return [
        "### Are the questions sound?",
        "",
        f"Share of {settings['examples']} single needles that are found in texts of so many tokens, by the dense model"
        f" and with every layer on a window of {settings['window']} ({settings['num_sink_tokens']} sinks), which"
        " reaches some of the needles in the shorter texts.",
        "",
        *table(
            ["", *lengths],
            [
                [line["name"], *(f"{line['retrieval']['single'][length]:.2f}" for length in lengths)]
                for line in lines
            ],
        ),
        "",
        *source(record),
    ]


def rerun(record: dict[str, Any]) -> list[str]:
    """Cells that were run once more on another day, beside what they had given."""
    before = json.loads((Path(__file__).parents[1] / "results" / "methods.json").read_text())["rows"]
    again = {name: row for name, row in record["rows"].items() if "recovered" in row}
    entries = [
        [
            name,
            *(f"{rows[name]['recovered']:.4f}" for rows in (before, again)),
            f"{row['recovered'] - before[name]['recovered']:+.4f}",
            sum(
                one != other
                for one, other in zip(
                    "".join(row["allocation"]), "".join(before[name]["allocation"]), strict=True
                )
            ),
        ]
        for name, row in again.items()
    ]
    return [
        "### Run again",
        "",
        *table(["cell", "recovered", "again", "difference", "KV heads decided otherwise"], entries),
        "",
        *source(record),
    ]


def _places(rows: list[dict[str, Any]], window: int) -> list[str]:
    """Where ConSA puts full attention, by sparsity and granularity, and whether its seeds agree."""
    groups: dict[tuple[str, float], list[Allocation]] = {}
    for row in rows:
        if row["method"] == "consa":
            full = mask_of(row["allocation"])
            allocation = Allocation(full_attention=full, granularity=row["granularity"], window=window)
            groups.setdefault((row["granularity"], row["sparsity"]), []).append(allocation)
    entries = []
    for (granularity, sparsity), found in sorted(groups.items()):
        depths = [depth(allocation) for allocation in found]
        alike = [agreement(*pair).jaccard for pair in combinations(found, 2)]
        entries.append(
            [
                UNITS[granularity],
                f"{sparsity:g}",
                len(found),
                " / ".join(f"{statistics.mean(d.thirds[i] for d in depths):.0%}" for i in range(3)),
                spread([d.bare for d in depths], ".0f"),
                f"{spread([d.mean_run for d in depths])} / {statistics.mean(d.expected_run for d in depths):.2f}",
                spread(alike),
            ]
        )
    columns = ["unit", "sparsity", "seeds", "bottom / middle / top", "bare bottom", "run / by chance"]
    return [
        "Where ConSA puts full attention: shares of the FA heads in each third of the layers, mean over the seeds;"
        " layers at the bottom without FA; mean length of blocks of layers with more FA than average; Jaccard index of"
        " the FA heads of any two seeds. Medians, lowest and highest in brackets.",
        "",
        *table([*columns, "seeds agree"], entries),
        "",
    ]


def _compiled(rows: list[dict[str, Any]]) -> str:
    """Whether layers were compiled where gates learn, and in which rows not."""
    learned = [row for row in rows if row["cost"]["backward_tokens"]]
    plain = [row for row in learned if not row.get("compiled")]
    if len(plain) == len(learned):
        return ""
    uncompiled = sorted({f"{row['method']} with seed {row['seed']}" for row in plain})
    but = f", but for {' and '.join(uncompiled)}" if uncompiled else ""
    return f" Layers are compiled where gates learn on sequences{but}."


def _one_run_for_all(rows: list[dict[str, Any]]) -> list[str]:
    """One run whose target rises through every sparsity, against one run for each."""

    def found(method: str, sparsity: float) -> list[dict[str, Any]]:
        wanted = (method, "kv_head", sparsity)
        return [row for row in rows if (row["method"], row["granularity"], row["sparsity"]) == wanted]

    gained = []
    for sparsity in sorted({row["sparsity"] for row in rows}):
        each, nested = (found(method, sparsity) for method in ("consa", "nested"))
        if each and nested:
            more = _median(nested, "recovered") - _median(each, "recovered")
            gained.append(f"{more:+.3f} at sparsity {sparsity:g}")
    if not gained:
        return []
    return [
        f"`nested`, one run for all sparsities and no refinement, against a run for each, recovered:"
        f" {', '.join(gained)}. It suffices to find the sparsity that a quality needs; then learn at that one.",
        "",
    ]


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
