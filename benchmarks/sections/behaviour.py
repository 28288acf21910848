"""What the heads do."""

from __future__ import annotations

from statistics import median
from typing import Any

from sections.text import UNITS, source, spread, table


def behaviour(record: dict[str, Any]) -> list[str]:
    settings, sets = record["settings"], record["sets"]
    kinds = [UNITS[found["granularity"]] for found in sets]
    rows = [
        [
            name.replace("_", " "),
            *(spread(found["measures"][name]["auc"]) for found in sets),
            *(spread(found["measures"][name]["with_scores"]) for found in sets),
            "" if name == "causal_effect" else spread([record["with_causal_effect"].get(name)]),
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
        *table(
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
        *_where(record, kinds),
        *source(record),
    ]


def _where(record: dict[str, Any], kinds: list[str]) -> list[str]:
    sets = record["sets"]
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
        [kind, *(spread([pair[name] for pair in found]) for name in AGREEMENT)]
        for kind, found in (pairs | {" against ".join(kinds): record["across"]}).items()
    ]
    return [
        "### Where full attention lies",
        "",
        "Share of the FA heads in each third of the layers; layers at the bottom without any FA; mean length of blocks"
        " of layers with more FA than average, beside that of 1,000 random orders of the same layers. p is the share of"
        " orders that are as extreme.",
        "",
        *table(["", "bottom", "middle", "top", "bare bottom", "run / by chance", "blocks"], places),
        "",
        *(_picture(found, kind) for found, kind in zip(sets, kinds, strict=True)),
        "",
        "Agreement between any two seeds, and between the granularities, head by head:",
        "",
        *table(["", "Jaccard of FA heads", "by chance", "rank correlation of log_alpha"], alike),
        "",
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
        *table(record["columns"], record["rows"]),
        "",
        *source(record),
    ]


AGREEMENT = ("jaccard", "expected_jaccard", "rank_correlation")


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
