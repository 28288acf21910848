"""Write the tables of the pages below from the results, between their markers.

    python -m research.page

A table begins at `<!-- table: NAME -->` and ends at `<!-- end of table -->`; NAME is a key of `TABLES`. Everything
outside the markers is written by hand, and a test checks that each number there also stands in a table.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from statistics import mean, median
from typing import Any, NamedTuple

import numpy as np

from benchmarks.common import parser_of, table
from consa.behaviour.relate import agreement, depth
from consa.evaluation.intervals import bootstrap
from consa.files import write_atomically
from consa.methods import METHODS
from consa.rules import RULES
from research import analysis
from research.analysis import GATES, LARGE, Record
from research.records import allocation_in
from research.sinks import kept

ROOT = Path(__file__).parents[1]
PAGES = (*(ROOT / "docs" / f"{name}.md" for name in ("RESULTS", "STUDY", "SERVING")), ROOT / "README.md")
MARKED = re.compile(r"(<!-- table: (\w+)(, sources in \S+)? -->\n).*?(<!-- end of table -->\n)", re.DOTALL)
UNITS = {"kv_head": "KV heads", "layer": "layers"}
SPARSITIES = (0.5, 0.733, 0.9)
SCRATCH = {"30m": "30 M", "60m": "60 M"}  # models trained from scratch
PEERS = [name for name in METHODS if name not in ("consa", "nested")]  # `nested` is ours too
# What the tables leave to the files: methods behind the best rule at each sparsity, and cells that say nothing new.
WEAK = ("lazy_layers", "attention_mass")
STEPS = ("6", "25", "100", "200", "600")
HIDDEN_PLACES = ("target layer", "window of 256", "window of 512", "sinks: 1", "seed 2")
HIDDEN_RUNS = ("candidates by all steps",)

Rows = list[list[Any]]
Columns = list[str]


def main() -> None:
    parser_of(__doc__).parse_args()
    for path in PAGES:
        write_atomically(path, updated(path.read_text(encoding="utf-8")).encode())


def updated(text: str) -> str:
    """A page with all its tables written anew, each above its sources unless its mark names another page for them."""

    def written(match: re.Match[str]) -> str:
        opening, name, elsewhere, end = match.groups()
        sources = [] if elsewhere else ["", *map(source, TABLES[name].files)]
        return opening + "\n".join([*rendered(name), *sources]) + "\n" + end

    return MARKED.sub(written, text)


@cache
def rendered(name: str) -> list[str]:
    """The lines of a table."""
    return table(*TABLES[name].make())


def read(name: str) -> Record:
    """A record of benchmarks/results or research/results."""
    return json.loads(path_of(f"{name}.json").read_text())


def path_of(file: str) -> Path:
    """A file of benchmarks/results or research/results."""
    (path,) = ROOT.glob(f"*/results/{file}")
    return path


def source(name: str) -> str:
    """File, command, hardware, date and versions of a record."""
    record, path = read(name), path_of(f"{name}.json").relative_to(ROOT)
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    line = f"- {path}: `{command(record)}` on {record['hardware']}, {record['date']}; {versions}."
    for entry in record.get("earlier", []):
        line += f" {entry['rows']} rows on {entry['hardware']}, {entry['date']}."
    return f"{line} {record['remark']}" if "remark" in record else line


def command(record: Record) -> str:
    """The recorded command, with scripts and results where they are now."""

    def script(match: re.Match[str]) -> str:
        moved = (ROOT / "research" / f"{match[1]}.py").exists()
        return f"python -m research.{match[1]}" if moved else match[0]

    def file(match: re.Match[str]) -> str:
        return str(path_of(match[1]).relative_to(ROOT))

    text = re.sub(r"python benchmarks/(\w+)\.py", script, record["command"])
    return re.sub(r"benchmarks/results/([\w.-]+)", file, text)


def _lines(quality: dict[Any, dict[float, float]]) -> list[tuple[str, list[tuple[Any, float]]]]:
    """Titles of methods and of the best rule, each with the method and granularity that it stands for by sparsity."""
    shown = [kind for kind in quality if kind[0] not in RULES and (kind[1] == "kv_head" or kind[0] == "consa")]
    lines = [(f"{kind[0]}, {UNITS[kind[1]]}", [(kind, at) for at in SPARSITIES]) for kind in shown]
    rules = [kind for kind in quality if kind[0] in RULES]
    best = [(max(rules, key=lambda kind, at=at: quality[kind][at]), at) for at in SPARSITIES]
    return [*lines, ("best rule, KV heads or layers", best)]


def demo() -> tuple[Columns, Rows]:
    """What `make demo` ends with."""
    record = read("demo")
    rows = [
        [name, *(f"{value:.3f}" for value in values), f"{median(values):.3f}"]
        for name, values in sorted(record["recovered"].items(), key=lambda item: -median(item[1]))
    ]
    return ["recovered", *(f"seed {run['seed']}" for run in record["runs"]), "median"], rows


def methods() -> tuple[Columns, Rows]:
    """Quality, retrieval and cost of every method, and of the best rule, on SmolLM2-135M."""
    record = read("methods")
    quality = analysis.by_kind(record, lambda row: row["recovered"])
    needles = analysis.by_kind(record, lambda row: mean(row["retrieval"].values()), mean)
    seconds = analysis.by_kind(record, lambda row: row["seconds"])
    tokens = analysis.by_kind(record, lambda row: row["cost"]["forward_tokens"] / 1e6)
    rows = []
    for title, kinds in _lines(quality):
        values = [f"{quality[kind][at]:.3f}" for kind, at in kinds]
        values += [f"{needles[kind][at]:.2f}" for kind, at in kinds]
        kind, at = kinds[1]
        rows.append([title, *values, f"{tokens[kind][at]:.1f}", f"{seconds[kind][at]:.0f}"])
    rows.sort(key=lambda row: -float(row[2]))
    columns = ["method", *(f"recovered at {at}" for at in SPARSITIES), *(f"needles at {at}" for at in SPARSITIES)]
    return [*columns, "M tokens", "seconds"], rows


def differences() -> tuple[Columns, Rows]:
    """How much more ConSA recovers than what else, paired by held-out document."""
    study = analysis.in_order(read("study"))
    rows: dict[str, dict[str, Any]] = {"best rule": analysis.gains(study, "kv_head", None)}
    for method in (*PEERS, "nested"):
        if method not in WEAK:
            rows[method] = analysis.gains(study, "kv_head", ("kv_head", method))
    rows["consa, layers"] = analysis.gains(study, "kv_head", ("layer", "consa"))
    rows["layers, than best rule"] = analysis.gains(study, "layer", None)
    for size, title in SCRATCH.items():
        record = read(f"methods-{size}")
        peers = {method: analysis.gains(record, "kv_head", ("kv_head", method)) for method in PEERS}
        rows[f"{title}: best rule"] = analysis.gains(record, "kv_head", None)
        rows[f"{title}: best other method"] = _least(peers)
    for title, of in analysis.whole_runs(study).items():
        if title not in HIDDEN_RUNS:
            rows[f"changed: {title}"] = of
    sparsities = [str(at) for at in SPARSITIES]
    return ["more than", *sparsities], [[title, *(of[at] for at in sparsities)] for title, of in rows.items()]


def _least(by_method: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The smallest difference at each sparsity, with the name of its method."""
    least = {}
    for at in map(str, SPARSITIES):
        known = {method: of[at] for method, of in by_method.items() if at in of}
        method = min(known, key=lambda method: known[method].mean)
        least[at] = f"{known[method]} {method}"
    return least


def trained() -> tuple[Columns, Rows]:
    """Hybrids and the dense model after equal training."""
    rows = []
    only = {"adaptation": ["joint/4", "kv_head/0"], "adaptation-long": ["kv_head/4"]}
    for name in TABLES["trained"].files:
        record = read(name)
        tokens = record["steps"] * record["settings"]["sequences_per_step"] * record["seq_len"] / 1e6
        shown = {key: record["rows"][key] for key in only.get(name, list(record["rows"]))}
        for key, row in sorted(shown.items(), key=lambda item: item[1]["sparsity"]):
            rows.append([_title(key), f"{tokens:.1f}", *_trained(row)])
    columns = ["trained under", "M tokens", "sparsity", "loss before", "after", "recovered before", "after"]
    return [*columns, "of trained", "needles before", "after"], rows


def _title(key: str) -> str:
    kind, _, rest = key.partition("/")
    titles = {"dense": "dense", "all_swa": "all-SWA", "kv_head": "KV heads, learned", "layer": "layers, learned"}
    titles["joint"] = "KV heads, learned with the weights"
    unit, rule = "layers" if kind.endswith("_layer") else "KV heads", kind.removesuffix("_layer")
    return titles.get(kind, f"{unit}, {rule.replace('_', ' ')}") + (", no sinks" if rest.startswith("0") else "")


def _trained(row: Record) -> list[str]:
    before, after = row["before"], row["after"]
    needles = [f"{mean(when['retrieval'].values()):.2f}" for when in (before, after)]
    shares = [row[key] for key in ("recovered_before", "recovered", "recovered_of_trained")]
    numbers = [f"{value:.3f}" if value is not None else "" for value in (before["loss"], after["loss"], *shares)]
    return [f"{row['sparsity']:g}", *numbers, *needles]


def learning() -> tuple[Columns, Rows]:
    """What gates alone and whole runs recover when learning is changed."""
    study = analysis.in_order(read("study"))
    rows = []
    for steps, row in analysis.named(study, "steps"):
        if steps in STEPS:
            rows.append([f"{steps} steps", *_gates(study, [row]), f"{analysis.recovered(study, row):.3f}"])
    for title, cells in analysis.parts(study).items():
        if "tokens" not in title:  # runs on shorter sequences are among the places
            rows.append([title, *_gates(study, cells), ""])
    return ["learned with", "M tokens", "seeds", "gates alone", "range", "off target", "refined"], rows


def _gates(study: Record, cells: list[Record]) -> list[str]:
    """Tokens, seeds, mean and range of what the gates alone recover, and how far from the target they end."""
    values = [analysis.recovered(study, row, GATES) for row in cells]
    away = [row["expected_sparsity"] - row["allocation"]["provenance"]["target_sparsity"] for row in cells]
    span = f"{min(values):.3f} to {max(values):.3f}" if len(values) > 1 else ""
    number = [f"{cells[0]['tokens'] / 1e6:.1f}", str(len(cells))]
    return [*number, f"{mean(values):.3f}", span, f"{max(away, key=abs):+.3f}"]


def places() -> tuple[Columns, Rows]:
    """Where FA lies, and what moves it."""
    study = analysis.in_order(read("study"))
    cells = analysis.located(study)
    base, rows = analysis.by_gates(cells["base"]), []
    for title, row in cells.items():
        if not title.startswith(HIDDEN_PLACES):
            allocation = analysis.by_gates(row)
            alike = agreement(base, allocation)
            thirds = " / ".join(f"{share:.0%}" for share in depth(allocation).thirds)
            jaccard = f"{alike.jaccard:.2f} / {alike.expected_jaccard:.2f}"
            rows.append([title, thirds, jaccard, f"{analysis.recovered(study, row, GATES):.3f}"])
    return ["learned with", "bottom / middle / top", "Jaccard with base / by chance", "recovered, gates alone"], rows


def behaviour() -> tuple[Columns, Rows]:
    """Which behaviour of a head tells FA from SWA."""
    record = read("behaviour")
    heads, layers = (of["measures"] for of in record["sets"])
    rows = []
    for name in sorted(heads, key=lambda name: -abs(median(heads[name]["auc"]) - 0.5)):
        numbers = [f"{median(of[name][key]):.2f}" for key in ("auc", "with_scores") for of in (heads, layers)]
        causal = "" if name == "causal_effect" else f"{record['with_causal_effect'][name]:.2f}"
        rows.append([name.replace("_", " "), *numbers, causal])
    columns = ["behaviour", "AUC, KV heads", "AUC, layers", "rank with log_alpha, KV heads", "layers"]
    return [*columns, "rank with causal effect"], rows


def large() -> tuple[Columns, Rows]:
    """Quality and retrieval on models of 0.5 B and 1.5 B parameters, beside the best rule over KV heads or layers."""
    rows: Rows = []
    for model, files in LARGE.items():
        record = analysis.joined(*map(read, files))
        losses = analysis.losses_of_methods(record)
        rows.append([model, "dense", *[""] * 4, *_found(record["rows"]["dense"]["retrieval"])])
        for sparsity in sorted({key[0] for key in losses if key[2] == "consa"}, key=float):
            ours = {unit: record["rows"].get(f"consa-{unit}-{sparsity}-seed0") for unit in UNITS}
            recovered = [f"{row['recovered']:.3f}" if row else "" for row in ours.values()]
            rules = filter(None, (analysis.best_rule(losses, sparsity, unit) for unit in UNITS))
            of_rule: Columns = ["", ""]
            if best := min(rules, key=lambda key: losses[key].mean(), default=None):
                rule = record["rows"]["-".join((best[2], best[1], best[0], "seed0"))]
                title = f"{rule['recovered']:.3f} ({best[2].replace('_', ' ')}, {UNITS[best[1]]})"
                of_rule = [title, str(analysis.gain(record, losses[best], losses[sparsity, "kv_head", "consa"]))]
            rows.append([model, sparsity, *recovered, *of_rule, *_found(ours["kv_head"]["retrieval"])])
    columns = ["model", "sparsity", "KV heads recover", "layers recover", "best rule recovers", "KV heads more by"]
    return [*columns, "needles", "all answers"], rows


def _found(retrieval: dict[str, float]) -> list[str]:
    """Mean share of single needles found, and of the answers of all tasks if others were asked."""
    tasks = _tasks(retrieval)
    return [f"{mean(tasks['single']):.2f}", f"{mean(retrieval.values()):.2f}" if len(tasks) > 1 else ""]


def large_places() -> tuple[Columns, Rows]:
    """Where FA lies in the models of 0.5 B and 1.5 B parameters, by layer and third."""
    rows: Rows = []
    for model, files in LARGE.items():
        record = analysis.joined(*map(read, files))
        for unit, at in product(UNITS, ("0.5", "0.75", "0.9")):
            if (name := f"consa-{unit}-{at}-seed0") in record["rows"]:
                allocation = allocation_in(record, name)
                thirds = " / ".join(f"{share:.0%}" for share in depth(allocation).thirds)
                layers = "".join("·▄█"[heads] for heads in allocation.full_attention.sum(1))
                rows.append([model, UNITS[unit], at, thirds, f"`{layers}`"])
    return ["model", "units", "sparsity", "bottom / middle / top", "FA heads in each layer: none, one, both"], rows


def large_trained() -> tuple[Columns, Rows]:
    """Hybrids of a model of 0.5 B parameters and the dense model after equal training."""
    record = read("adaptation-qwen2.5-coder-0.5b")
    dense, rows = record["rows"]["dense"], []
    for key, row in sorted(record["rows"].items(), key=lambda item: item[1]["after"]["loss"]):
        behind = "" if row is dense else _behind(row["after"], dense["after"])
        loss = [f"{row[when]['loss']:.3f}" for when in ("before", "after")]
        shares = [f"{row[name]:.3f}" if row[name] is not None else "" for name in ("recovered_before", "recovered")]
        needles = [f"{share:.2f}" for share in row["after"]["retrieval"].values()]
        rows.append([_title(key), f"{row['sparsity']:g}", *loss, behind, *shares, *needles])
    lengths = [f"needles at {int(length):,}" for length in record["settings"]["lengths"].split(",")]
    columns = ["trained under", "sparsity", "loss before", "after", "nats behind dense", "recovered before", "after"]
    return [*columns, *lengths], rows


def _behind(row: Record, dense: Record) -> str:
    """How many nats more a row loses than the dense model, with an interval over documents."""
    more = np.subtract(row["losses"], dense["losses"])
    return str(bootstrap(more, np.arange(len(more))))


def sinks() -> tuple[Columns, Rows]:
    """What learned sinks keep of what four sink tokens save (loss) and find (answers)."""
    rows: Rows = []
    for name, model in (("sinks-135m-layer", "SmolLM2-135M"), ("sinks-qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B")):
        cells: dict[tuple[int, str], list[Record]] = {}
        measured = read(name)["rows"]
        for key, row in measured.items():
            kind, window, *_ = f"{key}/".split("/")
            if kind not in ("dense", "tokens"):
                of = kept(row, measured[f"tokens/{window}"], measured[f"none/{window}"])
                cells.setdefault((int(window), kind), []).append(of)
        for (window, kind), seeds in sorted(cells.items()):
            objective, _, steps = kind.partition("-")
            spans = [f"{seed['rise'][0]:.3f} [{seed['rise'][1]:.3f}, {seed['rise'][2]:.3f}]" for seed in seeds]
            shares = ["; ".join(f"{seed[what]:.2f}" for seed in seeds) for what in ("loss", "retrieval")]
            rows.append([model, f"{window:,}", objective, steps, shares[0], "; ".join(spans), shares[1]])
    return ["model", "window", "objective", "steps", "loss kept", "nats above tokens", "answers kept"], rows


def retrieval() -> tuple[Columns, Rows]:
    """What answers as a share of the objective change: loss, and answers found by task."""
    rows: Rows = []
    for name, model in (("retrieval-135m", "SmolLM2-135M"), ("methods-qwen2.5-coder-0.5b", "Qwen2.5-Coder-0.5B")):
        record = read(name)
        heads = [row for row in record["rows"].values() if row.get("granularity") == "kv_head"]
        chosen = [row for row in heads if row["method"] not in RULES]
        rows.append([model, "", "dense", "", "", *_by_task(record["rows"]["dense"]["retrieval"])])
        for sparsity in sorted({row["sparsity"] for row in chosen if row["retrieval_share"]}):
            at = [row for row in chosen if row["sparsity"] == sparsity]
            plain = next(row for row in at if row["method"] == "consa" and not row["retrieval_share"])
            same: dict[tuple[float, ...], list[Record]] = {}  # other shares may end at the same heads
            for row in sorted(at, key=lambda row: (row["retrieval_share"], row["loss"])):
                same.setdefault(tuple(row["losses"]), []).append(row)
            for row, *others in same.values():
                shares = " or ".join(f"{each['retrieval_share']:g}" for each in (row, *others))
                title = row["method"] + (f", {shares} of answers" if row["retrieval_share"] else "")
                more = analysis.gain(record, np.array(plain["losses"]), np.array(row["losses"]))
                of = [f"{row['recovered']:.3f}", "" if row is plain else str(more), *_by_task(row["retrieval"])]
                rows.append([model, f"{sparsity:g}", title, *of])
    tasks = [task.replace("_", " ") for task in _tasks(row["retrieval"])]
    return ["model", "sparsity", "chosen by", "recovered", "more than without answers", "found", *tasks], rows


def taught() -> tuple[Columns, Rows]:
    """What training with answers as a share of the loss changes in each task, for the dense model and a hybrid."""
    rows: Rows = []
    record = read("adaptation-retrieval-qwen2.5-coder-0.5b")
    dense = record["rows"]["dense/retrieval0.25"]
    for key, row in record["rows"].items():
        title, _, share = key.partition("/retrieval")
        for when, shares in (("before", ""), ("after", share)):
            of, behind = row[when], "" if row is dense else _behind(row[when], dense[when])
            measured = [f"{of['loss']:.3f}", behind, *_by_task(of["retrieval"])]
            rows.append([_title(title), f"{row['sparsity']:g}", shares, *measured])
    tasks = [task.replace("_", " ") for task in _tasks(of["retrieval"])]
    return ["model", "sparsity", "trained with a share of answers", "loss", "nats behind dense", "found", *tasks], rows


def _by_task(found: dict[str, float]) -> list[str]:
    """Mean share of answers found of all tasks, and of each."""
    shares = [mean(of) for of in _tasks(found).values()]
    return [f"{share:.2f}" for share in (mean(shares), *shares)]


def _tasks(found: dict[str, float]) -> dict[str, list[float]]:
    """Shares of answers found at every length, by task, from a row of research/methods.py."""
    tasks: dict[str, list[float]] = {}
    for asked, share in found.items():
        tasks.setdefault(asked.rpartition(" ")[0] or "single", []).append(share)
    return tasks


def serving() -> tuple[Columns, Rows]:
    """Hybrids in vLLM beside the dense model in stock vLLM."""
    shown = ("workload", "model", "prefill s", "decode ms/step", "tokens/s", "x dense", "at once", "preempted", "fit")
    rows: Rows = []
    for name, title in (("serving", ""), ("serving-1.5b", "1.5 B, ")):
        record = read(name)
        kept = [place for place, column in enumerate(record["columns"]) if column in (*shown, "of dense")]
        rows += [[title + row[0], *(row[place] for place in kept[1:])] for row in record["rows"]]
    return [record["columns"][place] for place in kept], rows


def speed() -> tuple[Columns, Rows]:
    """Time and memory of hybrids beside the dense model, and of two GPUs beside one."""
    rows: Rows = []
    for name in ("decode", "decode-short"):
        dense, hybrid = (read(name)["rows"][place::2] for place in (0, 1))
        for one, other in zip(dense, hybrid, strict=True):
            for column, title in ((3, "decoding, tokens/s"), (5, "KV cache, GB")):
                rows.append([f"{title}, {one[0]}", one[column], other[column]])
    of = [row for row in read("attention")["rows"] if row[0] == "1x16x8x131072x128"]
    ours = next(row[4] for row in of if row[2] == 4 and row[3] == "75 % z = 0, rest 1, one pass")
    causal = min(row[4] for row in of if row[3].startswith("causal"))
    rows.append(["attention of 131072 tokens, forward, ms", causal, ours])
    loops = {tuple(row[:4]): row[4] for row in read("learning")["rows"]}
    for *run, loop in loops:
        if loop == "consa" and (*run, "dense") in loops:
            title = f"learning {run[0]}, micro-batch {run[2]}, tokens/s"
            rows.append([title, loops[(*run, "dense")], loops[(*run, loop)]])
    several = {(row[0], row[1]): row[2] for row in read("distributed")["table"]}
    for run, number in several:
        if number == "2" and run.startswith("adapt qwen3-0.6b, 8,192"):
            rows.append([f"two GPUs, {run}, tokens/s", several[run, "1"], several[run, number]])
    return ["measured", "baseline", "consa", "ratio"], [[*row, f"{row[2] / row[1]:.2f}"] for row in rows]


def processes() -> tuple[Columns, Rows]:
    """What two processes of a CPU end with, beside one; and a run of two that was killed and continued by one."""
    rows: Rows = []
    for name in TABLES["processes"].files:
        record = read(name)
        for run, number, allocation, scores, apart in record["table"]:
            if number == "2":  # where no scores are learned, the allocation was given
                rows.append([run, allocation if scores else "", scores, apart])
        if killed := record["killed"]:
            run, same = f"{killed['run']}, killed in step {killed['at_step']}", killed.get("same", ["", ""])
            rows.append([run, *(same if same[1] else ["", ""]), killed["largest_difference"]])
    return ["run", "same allocation", "same scores", "largest difference of losses"], rows


class Table(NamedTuple):
    """What makes a table, and the records it is made from."""

    make: Callable[[], tuple[Columns, Rows]]
    files: tuple[str, ...]


TABLES = {
    "demo": Table(demo, ("demo",)),
    "methods": Table(methods, ("methods",)),
    "differences": Table(differences, ("study", "methods-30m", "methods-60m")),
    "trained": Table(trained, ("adaptation-sparsity", "adaptation", "adaptation-long")),
    "learning": Table(learning, ("study",)),
    "places": Table(places, ("study",)),
    "behaviour": Table(behaviour, ("behaviour",)),
    "large": Table(large, tuple(name for files in LARGE.values() for name in files)),
    "large_places": Table(large_places, tuple(files[-1] for files in LARGE.values())),
    "large_trained": Table(large_trained, ("adaptation-qwen2.5-coder-0.5b",)),
    "sinks": Table(sinks, ("sinks-135m-layer", "sinks-qwen2.5-coder-0.5b")),
    "retrieval": Table(retrieval, ("retrieval-135m", "methods-qwen2.5-coder-0.5b")),
    "taught": Table(taught, ("adaptation-retrieval-qwen2.5-coder-0.5b",)),
    "serving": Table(serving, ("serving", "serving-1.5b")),
    "speed": Table(speed, ("decode", "decode-short", "attention", "learning", "distributed")),
    "processes": Table(processes, ("distributed-cpu", "distributed-cpu-qwen2.5-coder-0.5b")),
}


if __name__ == "__main__":
    main()
