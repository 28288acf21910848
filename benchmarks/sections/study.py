"""What moves a learned allocation."""

from __future__ import annotations

import json
import re
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.behaviour.relate import agreement, depth
from consa.evaluation.intervals import Estimate, bootstrap
from consa.files import png
from consa.rules import RULES
from sections.text import UNITS, source, table

BASE = "steps/100"
GATES = "gates_losses"  # of what the gates alone decide
PLACES = ("published", "window", "sinks", "length", "domain", "seed")  # cells that say where FA lies
TITLES = {
    "published": "target",
    "window": "window of",
    "sinks": "sinks:",
    "length": "sequences of",
    "domain": "text:",
    "seed": "seed",
}


def study(record: dict[str, Any]) -> list[str]:
    record = in_order(record)
    return [
        "## What moves a learned allocation",
        "",
        "SmolLM2-135M-Instruct, weights frozen. Unless a row says otherwise: KV heads at target sparsity 0.733, window"
        " 128, 4 sinks, 100 steps of 4 sequences of 8,192 tokens, seed 0, and what the gates alone decide. Measured on"
        f" {len(record['domains'])} held-out sequences of 8,192 tokens, positions from"
        f" {int(record['settings']['start']):,} on; `recovered` is relative to all-SWA with the row's own window"
        " and sinks.",
        "",
        *_advantages(record),
        *_budget(record),
        *_places(record),
        *_domains(record),
        *_parts(record),
        *source(record),
    ]


def in_order(record: dict[str, Any]) -> dict[str, Any]:
    """Rows by name, numbers by value: several processes wrote them in any order."""

    def key(name: str) -> list[Any]:
        return [
            float(part) if place % 2 else part
            for place, part in enumerate(re.split(r"(\d+(?:\.\d+)?)", name))
        ]

    return record | {"rows": {name: record["rows"][name] for name in sorted(record["rows"], key=key)}}


def recovered(record: dict[str, Any], name: str, which: str = "losses", only: str = "") -> float | None:
    """Of a cell, on the held-out sequences of a domain or all."""
    rows = record["rows"]
    if name not in rows:
        return None
    row = rows[name]
    settings = row.get("allocation", {"window": 128, "num_sink_tokens": 4})
    floor = rows[f"all_swa/{settings['window']}/{settings['num_sink_tokens']}"]
    chosen = [place for place, domain in enumerate(record["domains"]) if only in ("", domain)]
    low, loss, high = (
        float(np.mean(np.array(x)[chosen])) for x in (floor["losses"], row[which], rows["dense"]["losses"])
    )
    return (low - loss) / (low - high)


def _text(value: float | None, form: str = ".3f") -> str:
    return "" if value is None else format(value, form)


def _budget(record: dict[str, Any]) -> list[str]:
    names = [name for name in record["rows"] if name.startswith("steps/")]
    rows = [
        [
            f"{record['rows'][name]['tokens'] / 1e6:.2f}",
            name.split("/")[1],
            _text(recovered(record, name, GATES)),
            _text(recovered(record, name)),
            f"{record['rows'][name]['fractional']:.2f}",
        ]
        for name in names
    ]
    lengths = [name for name in record["rows"] if name.startswith("length/")]
    shorter = [f"{name.split('/')[1]} tokens: {_text(recovered(record, name, GATES))}" for name in lengths]
    shown = "; ".join([*shorter, f"8192 tokens: {_text(recovered(record, BASE, GATES))}"])
    return [
        "### How much text is needed",
        "",
        "The refinement's 40 evaluations of 8 sequences read 2.6 M tokens more.",
        "",
        "![Recovered over tokens, and where FA lies](study.png)",
        "",
        *table(["M tokens", "steps", "recovered by gates", "refined", "gates fractional"], rows),
        "",
        *(
            [f"Learned on as many tokens in shorter sequences, measured at 8,192: {shown}.", ""]
            if shorter
            else []
        ),
        *_whole(record),
    ]


def _whole(record: dict[str, Any]) -> list[str]:
    rows = whole_runs(record)
    if not rows:
        return []
    return [
        "Whole runs, refined, with something else than the defaults, measured at 8,192 tokens: difference of"
        " `recovered` from the mean of the defaults' seeds, with its paired 95 % interval.",
        "",
        *table(["whole runs with", "sparsity", "recovered more"], [list(row) for row in rows]),
        "",
    ]


def whole_runs(record: dict[str, Any]) -> list[tuple[str, str, Estimate]]:
    """What whole runs with something changed gain over those of the defaults: what, sparsity, gain."""
    of_methods, found = losses_of_methods(record), []
    for name, row in record["rows"].items():
        if name.startswith("whole/"):
            _, title, sparsity = name.split("/")
            defaults = of_methods.get((sparsity, "kv_head", "consa"))
            if defaults is not None:
                found.append((title, sparsity, gain(record, defaults, np.array(row["losses"]))))
    return found


def _by_gates(row: dict[str, Any]) -> Allocation:
    return Allocation.from_json(json.dumps(row["allocation"] | {"full_attention": row["gates_allocation"]}))


def located(record: dict[str, Any]) -> dict[str, Allocation]:
    """Cells that say where FA lies, by what differs in them, the base first."""
    found = {"base": _by_gates(record["rows"][BASE])}
    for group in PLACES:
        for name, row in record["rows"].items():
            if name.startswith(f"{group}/"):
                found[f"{TITLES[group]} {name.partition('/')[2]}"] = _by_gates(row)
    return found


def _places(record: dict[str, Any]) -> list[str]:
    cells = located(record)
    base, rows = cells["base"], []
    names = {
        f"{TITLES[group]} {name.partition('/')[2]}": name
        for group in PLACES
        for name in record["rows"]
        if name.startswith(f"{group}/")
    }
    for title, allocation in cells.items():
        alike, where = agreement(base, allocation), depth(allocation)
        rows.append(
            [
                title,
                f"{allocation.sparsity:.3f}",
                _text(recovered(record, names.get(title, BASE), GATES)),
                f"{alike.jaccard:.2f} / {alike.expected_jaccard:.2f}",
                " / ".join(f"{share:.0%}" for share in where.thirds),
                f"{where.bare} (p {where.p_bare:.3f})",
                f"{where.mean_run:.2f} / {where.expected_run:.2f} (p {where.p_run:.3f})",
            ]
        )
    columns = [
        "learned with",
        "sparsity",
        "recovered",
        "Jaccard with base / by chance",
        "bottom / middle / top",
    ]
    return [
        "### Where full attention lies, and what moves it",
        "",
        "Jaccard of FA heads; shares of the FA heads in each third of the layers; layers at the bottom without FA; mean"
        " length of blocks of layers with more FA than average. p is the share of 1,000 random orders of the same"
        " layers that are as extreme.",
        "",
        *table([*columns, "bare bottom", "run / by chance"], rows),
        "",
    ]


def _domains(record: dict[str, Any]) -> list[str]:
    learned = [name for name in record["rows"] if name.startswith("domain/")]
    if not learned:
        return []
    domains = [name for name in dict.fromkeys(record["domains"]) if record["domains"].count(name) > 2]
    rows = [
        [
            title,
            *(_text(recovered(record, name, GATES, domain)) for domain in domains),
            _text(recovered(record, name, GATES)),
        ]
        for title, name in [("all", BASE), *((name.partition("/")[2], name) for name in learned)]
    ]
    return [
        "Recovered by the text learned on (rows) and measured on (columns):",
        "",
        *table(["learned on", *domains, "all"], rows),
        "",
    ]


def _runs_of_parts(record: dict[str, Any]) -> dict[str, list[str]]:
    """Names of the cells with one part changed, by what changed."""
    runs: dict[str, list[str]] = {"as it is": [BASE, "seed/1", "seed/2"]}
    for name in record["rows"]:
        if name.startswith("part/"):
            runs.setdefault(name.split("/")[1], []).append(name)
    for sinks in ("0", "1", "16"):
        runs[f"{sinks} sinks"] = [f"sinks/{sinks}"]
    measured = {title: [name for name in names if name in record["rows"]] for title, names in runs.items()}
    return {title: names for title, names in measured.items() if names}


def parts(record: dict[str, Any]) -> dict[str, list[float]]:
    """What the gates alone recover, a number for each seed, by the part that was changed."""
    return {
        title: [value for name in names if (value := recovered(record, name, GATES)) is not None]
        for title, names in _runs_of_parts(record).items()
    }


def _parts(record: dict[str, Any]) -> list[str]:
    values, rows = parts(record), []
    for title, names in _runs_of_parts(record).items():
        measured = [record["rows"][name] for name in names]
        away = [
            row["expected_sparsity"] - row["allocation"]["provenance"]["target_sparsity"] for row in measured
        ]
        rows.append(
            [
                title,
                len(measured),
                " ".join(_text(value) for value in values[title]),
                f"{max(away, key=abs):+.3f}",
                f"{max(row['fractional'] for row in measured):.2f}",
            ]
        )
    return [
        "### What each part of the algorithm gives",
        "",
        "One part changed at a time, a number for each seed. `off target` is the averaged gates' expected sparsity less"
        " the target, the largest over seeds; `fractional` the largest share of gates neither 0 nor 1 without noise.",
        "",
        *table(["learned with", "seeds", "recovered", "off target", "fractional"], rows),
        "",
    ]


def losses_of_methods(record: dict[str, Any]) -> dict[tuple[str, ...], np.ndarray]:
    """Of each held-out sequence, mean over seeds, by sparsity, granularity and method."""
    losses: dict[tuple[str, ...], list[np.ndarray]] = {}
    for name, row in record["rows"].items():
        if name.startswith("methods/"):
            method, granularity, sparsity, _ = name.removeprefix("methods/").rsplit("-", 3)
            losses.setdefault((sparsity, granularity, method), []).append(np.array(row["losses"]))
    return {key: np.mean(found, axis=0) for key, found in losses.items()}


def best_rule(losses: dict[tuple[str, ...], np.ndarray], sparsity: str, unit: str) -> tuple[str, ...] | None:
    """Which of the keys is that of the rule with the least loss, if one was measured."""
    rules = [key for key in losses if key[:2] == (sparsity, unit) and key[2] in RULES]
    return min(rules, key=lambda key: float(losses[key].mean())) if rules else None


def _advantages(record: dict[str, Any]) -> list[str]:
    """What ConSA gains over the best rule and every other method, and KV heads over layers."""
    means = losses_of_methods(record)
    rows = []
    for sparsity in sorted({key[0] for key in means}, key=float):
        for unit in ("kv_head", "layer"):
            ours = means.get((sparsity, unit, "consa"))
            best = best_rule(means, sparsity, unit)
            if ours is not None and best:
                more = gain(record, means[best], ours)
                rows.append([sparsity, UNITS[unit], f"{best[2]}, the best rule", more])
                for key, theirs in means.items():
                    if key[:2] == (sparsity, unit) and key[2] not in ("consa", *RULES):
                        rows.append([sparsity, UNITS[unit], key[2], gain(record, theirs, ours)])
        heads, layers = (means.get((sparsity, unit, "consa")) for unit in ("kv_head", "layer"))
        if heads is not None and layers is not None:
            rows.append([sparsity, UNITS["kv_head"], "layers, learned", gain(record, layers, heads)])
    if not rows:
        return []
    return [
        "### ConSA against the best rule and other methods, and KV heads against layers",
        "",
        "Difference of `recovered`, the mean over seeds, with its paired 95 % interval over the held-out documents. Of"
        " rules that draw, the luckiest draw counts.",
        "",
        *table(["sparsity", "ConSA", "against", "recovered more"], rows),
        "",
    ]


def gain(record: dict[str, Any], theirs: np.ndarray, ours: np.ndarray) -> Estimate:
    """What ours recover more than theirs."""
    ends = (np.array(record["rows"][name]["losses"]) for name in ("all_swa/128/4", "dense"))
    gap = float(np.subtract(*ends).mean())
    return bootstrap((theirs - ours) / gap, np.arange(len(ours)))


def places_figure(record: dict[str, Any]) -> bytes:
    """Recovered over tokens, and the share of each layer's KV heads on FA, a line per cell, as PNG."""
    from matplotlib.figure import Figure

    record = in_order(record)
    drawing = Figure(figsize=(11, 5.5), layout="constrained")
    left, right = drawing.subplots(1, 2, width_ratios=(1, 1.6))
    names = [name for name in record["rows"] if name.startswith("steps/")]
    tokens = [record["rows"][name]["tokens"] for name in names]
    for which, label, style in (("losses", "refined", "-"), (GATES, "gates alone", "--")):
        values = [recovered(record, name, which) for name in names]
        left.plot(tokens, values, style, color="C0", marker="o", markersize=4, label=label)
    left.set(xscale="log", xlabel="tokens of learning", ylabel="recovered")
    left.legend(frameon=False)
    cells = located(record)
    shares = np.stack([allocation.full_attention.mean(1) for allocation in cells.values()])
    right.imshow(shares, aspect="auto", cmap="Blues", vmin=0, vmax=1, interpolation="none")
    right.set_yticks(range(len(cells)), list(cells), fontsize=7)
    right.set(xlabel="layer", title="share of KV heads on FA")
    return png(drawing)
