"""What the study asks, each answered in a few sentences from the records of the sections below."""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from statistics import mean, median
from typing import Any

import numpy as np
from common import mask_of

from consa.allocation import Allocation
from consa.behaviour.relate import agreement, depth
from consa.evaluation.intervals import Estimate, bootstrap
from consa.methods import METHODS
from sections.adaptation import best_trained_rule
from sections.study import (
    BASE,
    GATES,
    best_rule,
    gain,
    in_order,
    located,
    losses_of_methods,
    parts,
    recovered,
    whole_runs,
)
from sections.text import UNITS, model_of

Records = dict[str, dict[str, Any]]
SIZES = ("30m", "60m")  # of the models trained from scratch


def answers(records: Records) -> list[str]:
    """A paragraph for each question that something was measured for."""
    if "study" in records:
        records = records | {"study": in_order(records["study"])}
    found = {
        question: answer(records) for question, (needed, answer) in QUESTIONS.items() if needed in records
    }
    paragraphs = [f"**{question}** {' '.join(said)}" for question, said in found.items() if said]
    if not paragraphs:
        return []
    return [
        "## What the study found",
        "",
        "In brief; tables and commands are in the sections below. Intervals are paired, 95 %, over the held-out"
        " documents. SmolLM2-135M-Instruct with a window of 128 and 4 sinks unless another is named.",
        "",
        *(line for paragraph in paragraphs for line in (paragraph, "")),
    ]


def _gains(record: dict[str, Any], unit: str, other: tuple[str, str] | None) -> dict[str, Estimate]:
    """What ConSA recovers more than another granularity and method, or than the best rule, by sparsity."""
    losses = losses_of_methods(record)
    found = {}
    for sparsity in sorted({key[0] for key in losses}, key=float):
        theirs = (sparsity, *other) if other else best_rule(losses, sparsity, unit)
        ours = (sparsity, unit, "consa")
        if theirs in losses and ours in losses:
            found[sparsity] = gain(record, losses[theirs], losses[ours])
    return found


def _beats_rules(records: Records) -> list[str]:
    frozen = {unit: _gains(records["study"], unit, None) for unit in UNITS}
    said = [
        f"{UNITS[unit]} recover {_listed(found)} more than the best rule"
        for unit, found in frozen.items()
        if found
    ]
    if not said:
        return []
    trained = {}
    if "adaptation-sparsity" in records:
        trained = {unit: _trained(records["adaptation-sparsity"], unit) for unit in UNITS}
        more = (f"{UNITS[unit]} {_listed(found)}" for unit, found in trained.items())
        said.append(
            f"all trained on as much text, {' and '.join(more)} more than the rule that was best frozen"
        )
    every = [estimate for found in (*frozen.values(), *trained.values()) for estimate in found.values()]
    verdict = (
        "Yes, at each sparsity measured"
        if all(estimate.low > 0 for estimate in every)
        else "Not at each sparsity"
    )
    return [f"{verdict}. Frozen, {'; '.join(said)}.", *_scales(records)]


def _listed(found: dict[str, Any]) -> str:
    return ", ".join(f"{value} at {sparsity}" for sparsity, value in found.items())


def _trained(record: dict[str, Any], unit: str) -> dict[str, Estimate]:
    """What learned KV heads or layers recover more than the best rule after equal training, by sparsity."""
    rows = record["rows"]
    gap = rows["all_swa/4"]["before"]["loss"] - rows["dense"]["after"]["loss"]
    found = {}
    for sparsity in sorted(name.rpartition("/")[2] for name in rows if name.startswith(f"{unit}/4/")):
        if best := best_trained_rule(record, sparsity):
            more = np.subtract(best["after"]["losses"], rows[f"{unit}/4/{sparsity}"]["after"]["losses"]) / gap
            found[sparsity] = bootstrap(more, np.arange(len(more)))
    return found


def _scales(records: Records) -> list[str]:
    """The same of the models trained from scratch."""
    said = []
    for size, unit in product(SIZES, UNITS):
        if gains := _gains(_of_scale(records, size), unit, None):
            said.append(f"the model of {size.upper()}, {UNITS[unit]}: {_listed(gains)}")
    return [f"Trained from scratch, against the best rule: {'; '.join(said)}."] if said else []


def _of_scale(records: Records, size: str) -> dict[str, Any]:
    """What benchmarks/methods.py measured on a model from scratch, in the form in which the study keeps methods.

    Rows without the loss of each sequence give differences without intervals.
    """
    ends = {"dense": "dense", "all_swa": "all_swa/128/4"}
    rows = records.get(f"methods-{size}", {"rows": {}})["rows"]
    return {
        "rows": {
            ends.get(name, f"methods/{name}"): {"losses": row.get("losses", [row["loss"]])}
            for name, row in rows.items()
        }
    }


def _heads_against_layers(records: Records) -> list[str]:
    gains = _gains(records["study"], "kv_head", ("layer", "consa"))
    if not gains:
        return []
    means = [found.mean for found in gains.values()]
    verdict = "Yes" if all(found.low > 0 for found in gains.values()) else "Not everywhere"
    grows = "grows" if means == sorted(means) else "does not grow steadily"
    return [
        f"{verdict}: KV heads recover {_listed(gains)} more than layers. The margin {grows} with sparsity."
    ]


def _places(records: Records) -> list[str]:
    cells = located(records["study"])
    base = cells.pop("base")
    said = []
    for title in ("window of", "sinks:", "text:", "sequences of", "seed"):
        alike = {name: agreement(base, other) for name, other in cells.items() if name.startswith(title)}
        if alike:
            numbers = ", ".join(
                f"{name.removeprefix(title).strip()} {a.jaccard:.2f}" for name, a in alike.items()
            )
            said.append(f"{title.rstrip(':').removesuffix(' of')} ({numbers})")
    chance = agreement(base, base).expected_jaccard
    thirds = {
        name.rpartition("-")[2]: " / ".join(f"{share:.0%}" for share in depth(allocation).thirds)
        for name, allocation in cells.items()
        if name.startswith("target kv_head")
    }
    return [
        f"It depends on the sparsity: the bottom, middle and top third of the layers hold {_listed(thirds)} of the FA"
        " heads. What moves it, as the Jaccard index of FA heads with those of the base settings"
        f" ({chance:.2f} by chance): {'; '.join(said)}.",
        *_places_of_scales(records),
    ]


def _places_of_scales(records: Records) -> list[str]:
    """The thirds of the models trained from scratch."""
    said = []
    for size in SIZES:
        record, thirds = records.get(f"methods-{size}", {"rows": {}}), {}
        for row in record["rows"].values():
            if (row["method"], row.get("granularity"), row.get("seed")) == ("consa", "kv_head", 0):
                full, window = mask_of(row["allocation"]), record["settings"]["budget"]["window"]
                where = depth(Allocation(full_attention=full, window=window))
                thirds[row["sparsity"]] = " / ".join(f"{share:.0%}" for share in where.thirds)
        if thirds:
            said.append(f"of {size.upper()} {_listed(dict(sorted(thirds.items())))}")
    return [f"The models trained from scratch: {'; '.join(said)}."] if said else []


def _behaviour(records: Records) -> list[str]:
    said = []
    for found in records["behaviour"]["sets"]:
        aucs = {name.replace("_", " "): median(values["auc"]) for name, values in found["measures"].items()}
        first, second, *_ = sorted(aucs, key=lambda name: -abs(aucs[name] - 0.5))
        said.append(
            f"of {UNITS[found['granularity']]}, {first} (AUC {aucs[first]:.2f}), then {second} ({aucs[second]:.2f})"
        )
    return [f"Best {'; '.join(said)}."]


def _text(records: Records) -> list[str]:
    record = records["study"]
    runs = {
        row["tokens"]: (recovered(record, name, GATES), recovered(record, name))
        for name, row in record["rows"].items()
        if name.startswith("steps/")
    }
    most = max(runs)
    enough = min(
        tokens for tokens, (_, refined) in runs.items() if (runs[most][1] or 0) - (refined or 0) < 0.02
    )
    shorter = recovered(record, "length/4096", GATES)
    said = [
        f"{enough / 1e6:.1f} M tokens, refined, come within 0.02 of the {runs[most][1]:.3f} that"
        f" {most / 1e6:.0f} M give; {min(runs) / 1e6:.1f} M give {runs[min(runs)][1]:.3f}."
    ]
    if shorter is not None:
        holds = "holds" if shorter > (recovered(record, BASE, GATES) or 0) - 0.02 else "does not hold"
        said.append(
            f"What is learned on 4,096 tokens {holds} at 8,192: {shorter:.3f} against"
            f" {recovered(record, BASE, GATES):.3f} learned there, gates alone."
        )
    return [*said, *_whole(record, shorter=True)]


def _parts(records: Records) -> list[str]:
    found = parts(records["study"])
    base = found.pop("as it is", None)
    if not base or not found:
        return []
    less = {title: mean(values) - mean(base) for title, values in found.items()}
    order = sorted(less, key=lambda title: less[title])
    noise = max(base) - min(base)
    return [
        f"Recovered by gates alone against the {mean(base):.3f} of all parts as they are, whose seeds lie {noise:.3f}"
        f" apart: {', '.join(f'{title} {less[title]:+.3f}' for title in order)}.",
        *_whole(records["study"], shorter=False),
    ]


def _whole(record: dict[str, Any], *, shorter: bool) -> list[str]:
    """Whole runs with something changed: on shorter sequences, or all others."""
    gains: dict[str, dict[str, Estimate]] = {}
    for title, sparsity, more in whole_runs(record):
        if (" sequences of " in title) == shorter:
            gains.setdefault(title, {})[sparsity] = more
    said = "; ".join(f"with {title} {_listed(found)}" for title, found in gains.items())
    return [f"Whole runs, refined, differ from those of the defaults by: {said}."] if said else []


def _peers(records: Records) -> list[str]:
    against = {method: _gains(records["study"], "kv_head", ("kv_head", method)) for method in PEERS}
    said = [f"{method} {_listed(gains)}" for method, gains in against.items() if gains]
    if not said:
        return []
    every = [found for gains in against.values() for found in gains.values()]
    verdict = "ahead of each" if all(found.low > 0 for found in every) else "not ahead of each"
    return [
        f"In loss, with KV heads, ConSA is {verdict}; it recovers more than {'; than '.join(said)}."
        f"{_needles(records)} What each costs is in the table of methods.",
        *_peers_of_scales(records),
    ]


def _needles(records: Records) -> str:
    """Which other methods find more needles, mean over lengths and seeds, by sparsity."""
    found: dict[float, dict[str, list[float]]] = {}
    for row in records.get("methods", {"rows": {}})["rows"].values():
        if row.get("granularity") == "kv_head" and row["method"] in ("consa", *PEERS):
            at = found.setdefault(row["sparsity"], {})
            at.setdefault(row["method"], []).append(mean(row["retrieval"].values()))
    said = []
    for sparsity, at in sorted(found.items()):
        ours = mean(at.get("consa", [1.0]))
        more = sorted(((mean(x), name) for name, x in at.items() if mean(x) > ours), reverse=True)
        others = ", ".join(f"{name} {value:.2f}" for value, name in more)
        said.append(f"at {sparsity:g} {ours:.2f}, {f'more by {others}' if others else 'the most'}")
    return f" Needles found: {'; '.join(said)}." if said else ""


def _peers_of_scales(records: Records) -> list[str]:
    """The best other method on the models trained from scratch."""
    said = []
    for size in SIZES:
        record = _of_scale(records, size)
        least: dict[str, tuple[float, str]] = {}
        for method in PEERS:
            for sparsity, found in _gains(record, "kv_head", ("kv_head", method)).items():
                this = found.mean, f"{found} ({method})"
                least[sparsity] = min(this, least.get(sparsity, this))
        if least:
            gains = {sparsity: text for sparsity, (_, text) in sorted(least.items())}
            said.append(f"the model of {size.upper()}: {_listed(gains)}")
    return [f"Trained from scratch, against the best of them: {'; '.join(said)}."] if said else []


PEERS = tuple(name for name in METHODS if name not in ("consa", "nested"))  # both of ours


def _constraints(records: Records) -> list[str]:
    said = []
    for name in ("constraints", "constraints-long", "constraints-30m", "constraints-60m"):
        record = records.get(name, {"rows": []})
        rows = {row["name"].split("/")[-1]: row for row in record["rows"]}
        rows = {key: row for key, row in rows.items() if "gates alone" not in row["name"]}
        free = next((row for key, row in rows.items() if key.startswith("seed")), None)
        for key, row in rows.items():
            if free and row is not free:
                model = model_of(record.get("model", "smollm2-135m"))
                of = f"{model} on sequences of {record['settings']['seq_len']:,} tokens"
                said.append(
                    f"{of}, {key} at sparsity {row['sparsity']:g}: {_price(record, row, free)}"
                    f" (from {free['recovered']:.3f})"
                )
    return [f"Recovered less than by free choice: {'; '.join(said)}."] if said else []


def _price(record: dict[str, Any], row: dict[str, Any], free: dict[str, Any]) -> Estimate:
    """What a row recovers less than one that chose freely, with an interval where each sequence's loss was kept."""
    less = np.subtract(*(np.array(of.get("losses", [of["loss"]])) for of in (row, free)))
    return bootstrap(less / (record["all_swa"] - record["dense"]), np.arange(len(less)))


# Each with the record that it cannot do without.
QUESTIONS: dict[str, tuple[str, Callable[[Records], list[str]]]] = {
    "Do learned allocations beat every rule?": ("study", _beats_rules),
    "Do KV heads beat layers, and does the margin grow with sparsity?": ("study", _heads_against_layers),
    "Where do FA and SWA land, and is it stable?": ("study", _places),
    "Which attention behaviour predicts the decision?": ("behaviour", _behaviour),
    "How much text is needed, and do short sequences do?": ("study", _text),
    "What does each part of the algorithm give?": ("study", _parts),
    "Is ConSA ahead of other methods?": ("study", _peers),
    "What do constraints for serving cost?": ("constraints", _constraints),
}
