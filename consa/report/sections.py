"""What the page says: the sections of each run, what sets runs apart, and where they come from."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from html import escape
from itertools import chain, combinations, count
from typing import Any

from consa.allocation import Allocation
from consa.behaviour.relate import MEASURES, Behaviour, agreement, depth, depth_correlation, relate
from consa.errors import ConsaError
from consa.report import charts
from consa.report.folder import Run
from consa.report.vega import Chart, Columns

CACHE_TOKENS = 32768  # in the KV cache of the headline
UNTOLD = ("rows", "buckets", "allocation")  # of a record, since they are shown as tables and charts
MADE = ("learned", "adapted")  # rows of what a run made
KINDS = {
    "dense": "dense",
    "all_swa": "all-SWA",
    **{name: name for name in MADE},
}  # of a run's own rows; rules are "other"
DASH = "\N{EN DASH}"
RHO = "\N{GREEK SMALL LETTER RHO}"


class Sections:
    """The page's body as HTML, and the charts and data sets that come to exist with it.

    Raises:
        ConsaError: the given behaviour fits no run, or a run's records are not as consa writes them.
    """

    def __init__(self, runs: list[Run], behaviour: Behaviour | None) -> None:
        self.runs = runs
        self.names = _distinct([run.name for run in runs])
        self.files = _distinct(
            ["".join(c if c.isalnum() or c in "._-" else "-" for c in run.name) for run in runs]
        )
        self.given = behaviour
        if behaviour and not any(_fits(behaviour, run) for run in runs):
            shape = " x ".join(map(str, behaviour.by_distance.shape[:2]))
            raise ConsaError(
                f"the behaviour is of {shape} KV heads, which no run has; give one of the runs' model"
            )
        self.charts: list[Chart] = []
        self.data: dict[str, Columns] = {}
        parts: list[str] = []
        for index, run in enumerate(runs):
            with _saying_where(self.names[index]):
                parts.append("".join(self._run(index, run)))
        self.html = "".join([self._picker(), *parts, *self._comparison(), *self._origins()])

    def _picker(self) -> str:
        """The slider over the runs, from the lowest sparsity to the highest."""
        if len(self.runs) == 1:
            return ""
        labels = [
            f"{name} (sparsity {run.allocation.sparsity:.4g})" if run.allocation else name
            for name, run in zip(self.names, self.runs, strict=True)
        ]
        texts = " ".join(f'data-run{index}="{escape(label)}"' for index, label in enumerate(labels))
        what = (
            "Sparsity" if len({run.allocation.sparsity for run in self.runs if run.allocation}) > 1 else "Run"
        )
        return (
            f'<section class=picker><label for="slider">{what}</label>'
            f'<input id="slider" type="range" min="0" max="{len(self.runs) - 1}" step="1" value="0" {texts}>'
            f'<output id="chosen" for="slider">{escape(labels[0])}</output></section>\n'
        )

    def _run(self, index: int, run: Run) -> Iterator[str]:
        """The sections of one run; the slider shows one run at a time."""
        behaviour = run.behaviour or (self.given if self.given and _fits(self.given, run) else None)
        parts = [
            ("Headline", self._headline(run)),
            ("Allocation", self._allocation(index, run, behaviour)),
            ("What the heads do", self._behaviour(index, run, behaviour)),
            ("Loss on held-out text", self._losses(index, run)),
            ("Evaluation", self._evaluation(index, run)),
            ("Memory and speed", self._benchmark(index, run)),
            ("Training" if run.adapted else "Learning", self._learning(index, run)),
        ]
        for title, part in parts:
            content = "".join(part)
            if content:
                title = self.names[index] if title == "Headline" else title
                yield f'<section data-run="{index}"><h2>{escape(title)}</h2>\n{content}</section>\n'

    def _headline(self, run: Run) -> Iterator[str]:
        cards: list[tuple[str, str]] = []
        if run.allocation is not None:
            allocation, dense = run.allocation, _dense(run.allocation)
            share = allocation.kv_cache_bytes(CACHE_TOKENS, head_dim=1) / dense.kv_cache_bytes(
                CACHE_TOKENS, head_dim=1
            )
            cards.append(("sparsity, share of units on SWA", f"{allocation.sparsity:.1%}"))
            cards.append((f"KV cache of dense at {CACHE_TOKENS:,} tokens", f"{share:.1%}"))
        if run.summary is not None:
            made, dense = _row(run.summary, MADE[run.adapted]), _row(run.summary, "dense")
            cards.append(("of the loss gap recovered, 100% is dense", _percent(made["recovered"])))
            cards.append(("nats per token lost to dense", f"{made['loss'] - dense['loss']:.3f}"))
        if run.benchmark is not None:
            dense, hybrid = run.benchmark["measurements"][-2:]
            faster = hybrid["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
            label = f"decoding speed of dense, {dense['context']:,} tokens"
            cards.append((label, f"{faster:.2f}\N{MULTIPLICATION SIGN}"))
        items = "".join(
            f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in cards
        )
        yield f"<dl class=cards>{items}</dl>\n"

    def _allocation(self, index: int, run: Run, behaviour: Behaviour | None) -> Iterator[str]:
        if run.allocation is None:
            return
        allocation = run.allocation
        unit = "layer" if allocation.granularity == "layer" else "KV head"
        yield (
            f"<p>Decided by {unit}. Window {allocation.window:,} tokens, {allocation.num_sink_tokens} sink tokens."
            " Stronger colours are further from the decision. Point at a unit for its numbers.</p>\n"
        )
        data = self._add_data(f"units {index}", charts.units(allocation, behaviour))
        yield self._figure(charts.heatmap(self.files[index], data, allocation, behaviour))
        if allocation.full_attention.any():
            found = depth(allocation)
            bottom, middle, top = found.thirds
            bare = "1 layer has" if found.bare == 1 else f"{found.bare} layers have"
            yield (
                f"<p>Of the FA units, {bottom:.0%} lie in the bottom third of the layers, {middle:.0%} in the middle"
                f" and {top:.0%} in the top third. The lowest {bare} no FA (p = {found.p_bare:.3f}). Blocks of layers"
                f" with more FA than average are {found.mean_run:.2f} layers long, and {found.expected_run:.2f} where"
                f" the same layers are shuffled (p = {found.p_run:.3f}). p: the share of 1,000 shuffles that are as"
                " extreme.</p>\n"
            )

    def _behaviour(self, index: int, run: Run, behaviour: Behaviour | None) -> Iterator[str]:
        if run.allocation is None or behaviour is None:
            return
        relations = relate(behaviour, run.allocation)
        aucs = {one.measure: 0.5 if one.auc is None else one.auc for one in relations}
        order = sorted(relations, key=lambda one: -aucs[one.measure])
        telling = max(aucs, key=lambda measure: abs(aucs[measure] - 0.5))
        yield (
            f"<p>Measured under full attention; window {behaviour.window:,} tokens, {behaviour.num_sink_tokens} sink"
            " tokens.</p>\n"
        )
        yield self._figure(charts.spectrum(self.files[index], f"units {index}", behaviour, telling))
        yield "<div class=grid>\n"
        told = {"measure": [_words(one.measure) for one in order], "auc": [one.auc for one in order]}
        data = self._add_data(f"relations {index}", told)
        yield self._figure(charts.predictors(self.files[index], data, len(order)))
        data = self._add_data(f"distances {index}", charts.distances(run.allocation, behaviour))
        yield self._figure(charts.by_distance(self.files[index], data))
        yield "</div>\n"
        yield _table(
            [
                "measure",
                "AUC",
                f"{RHO} FA",
                f"{RHO} score",
                "what it is",
            ],
            [
                [
                    _words(relation.measure),
                    _number(relation.auc),
                    _number(relation.with_decision),
                    _number(relation.with_scores),
                    MEASURES[relation.measure],
                ]
                for relation in relations
            ],
            "AUC: the chance that an FA unit measures higher than an SWA unit; 0.5 says nothing."
            f" {RHO}: Spearman's rank correlation with the decision and with the score.",
            kind="told",
        )

    def _losses(self, index: int, run: Run) -> Iterator[str]:
        if run.summary is None:
            return
        summary = run.summary
        yield (
            f"<p>{summary['heldout_sequences']:,} sequences of {summary['seq_len']:,} tokens from"
            f" {summary['heldout_documents']:,} documents; mean from position {summary['start']:,} on.</p>\n"
        )
        dense = _row(summary, "dense")["by_position"]
        lines = {
            (row["name"], KINDS.get(row["name"], "other")): [
                (x - y, None, None) for x, y in zip(row["by_position"], dense, strict=True)
            ]
            for row in summary["rows"]
        }
        places = [first for first, _ in summary["buckets"]]
        data = self._add_data(f"positions {index}", _positions(lines, places))
        made = MADE[run.adapted]
        yield self._figure(charts.by_position(self.files[index], data, intervals=False, made=made))
        buckets = [f"{first:,}{DASH}{end - 1:,}" for first, end in summary["buckets"]]
        yield _table(
            ["allocation", "sparsity", "loss", "recovered", *buckets],
            [
                [row["name"], f"{row['sparsity']:.4f}", f"{row['loss']:.4f}", _number(row["recovered"])]
                + [f"{value:.3f}" for value in row["by_position"]]
                for row in summary["rows"]
            ],
            "Loss overall and by position. Recovered is the share of the gap from all-SWA to dense that is closed.",
        )

    def _evaluation(self, index: int, run: Run) -> Iterator[str]:
        if run.evaluation is None:
            return
        lines, start = run.evaluation["lines"], run.evaluation["start"]
        rises = {
            (line["name"], line["kind"]): [
                (e["mean"], e["low"], e["high"]) for e in line["differences_by_position"].values()
            ]
            for line in lines
        }
        places = [int(first) for first in lines[0]["differences_by_position"]]
        data = self._add_data(f"evaluated positions {index}", _positions(rises, places))
        yield self._figure(charts.by_position(f"{self.files[index]}-eval", data, intervals=True))
        yield _table(
            ["allocation", "sparsity", "loss", "to dense", "95 % interval", "recovered"],
            [
                [
                    line["name"],
                    f"{line['sparsity']:.4f}",
                    f"{line['loss']['mean']:.4f}",
                    f"{line['difference']['mean']:+.4f}",
                    _interval(line["difference"]),
                    _number(line["recovered"]),
                ]
                for line in lines
            ],
            f"Loss from position {start:,} on.",
        )
        if lines[0]["retrieval"]:
            yield from self._retrieval(index, lines)
        if lines[0]["tasks"]:
            yield _table(
                ["allocation", *lines[0]["tasks"]],
                [[line["name"], *(_number(value, 4) for value in line["tasks"].values())] for line in lines],
                "lm-eval.",
            )

    def _retrieval(self, index: int, lines: list[dict[str, Any]]) -> Iterator[str]:
        found, name = lines[0]["retrieval"], f"{self.files[index]}-eval"
        columns: dict[str, list[Any]] = {key: [] for key in ("allocation", "kind", "task", "length", "share")}
        for line in lines:
            for task, lengths in line["retrieval"].items():
                for length, share in lengths.items():
                    row = (line["name"], line["kind"], task, int(length), share)
                    for column, value in zip(columns.values(), row, strict=True):
                        column.append(value)
        data = self._add_data(f"retrieval {index}", columns)
        yield "<div class='grid small'>\n"
        yield from (self._figure(charts.retrieval(name, data, task)) for task in found)
        yield "</div>\n"
        yield _table(
            ["allocation"] + [f"{task} {length}" for task, lengths in found.items() for length in lengths],
            [
                [line["name"]]
                + [_number(share, 2) for lengths in line["retrieval"].values() for share in lengths.values()]
                for line in lines
            ],
            "Share of hidden answers found, by task and tokens of text.",
        )

    def _benchmark(self, index: int, run: Run) -> Iterator[str]:
        if run.benchmark is None:
            return
        measured = run.benchmark["measurements"]
        columns = {name: [m[name] for m in measured] for name in measured[0]}
        columns["cache_mb"] = [m["cache_bytes"] / 1e6 for m in measured]
        data = self._add_data(f"benchmark {index}", columns)
        where = "{hardware}, {dtype}".format_map(run.benchmark["where"])
        yield f"<p>{escape(where)}.</p>\n"
        yield "<div class='grid small'>\n"
        yield from (self._figure(chart) for chart in charts.benchmark(self.files[index], data))
        yield "</div>\n"
        yield _table(
            ["model", "context", "batch", "prefill s", "decode tok/s", "KV cache MB", "peak MB"],
            [
                [
                    m["model"],
                    f"{m['context']:,}",
                    str(m["batch_size"]),
                    f"{m['prefill_seconds']:.3f}",
                    f"{m['decode_tokens_per_second']:.1f}",
                    f"{m['cache_bytes'] / 1e6:.2f}",
                    f"{m['peak_bytes'] / 1e6:.0f}",
                ]
                for m in measured
            ],
        )

    def _learning(self, index: int, run: Run) -> Iterator[str]:
        if not run.history:
            return
        if run.summary is not None and not run.adapted and run.summary["losses"]["stochastic"] is not None:
            losses = run.summary["losses"]
            yield (
                f"<p>Held-out loss: dense {losses['dense']:.4f}, stochastic gates {losses['stochastic']:.4f}, final"
                f" allocation {losses['final']:.4f}; {run.summary['fractional']:.1%} of the gates were still"
                " fractional at the end.</p>\n"
            )
        data = self._add_data(f"history {index}", charts.history(run.history, adapted=run.adapted))
        yield "<div class=grid>\n"
        yield from (
            self._figure(chart) for chart in charts.curves(self.files[index], data, adapted=run.adapted)
        )
        yield "</div>\n"

    def _comparison(self) -> Iterator[str]:
        """Runs of models of one shape side by side, and how those of other shapes go together by depth."""
        groups: dict[Any, dict[str, Allocation]] = {}
        everything = {
            name: run.allocation for name, run in zip(self.names, self.runs, strict=True) if run.allocation
        }
        for name, allocation in everything.items():
            key = (allocation.full_attention.shape, tuple(allocation.layers))
            groups.setdefault(key, {})[name] = allocation
        for number, allocations in enumerate(group for group in groups.values() if len(group) > 1):
            yield "<section><h2>Side by side</h2>\n"
            data = self._add_data(f"layers {number}", charts.layer_shares(allocations))
            yield self._figure(charts.side_by_side(data, allocations))
            found = {
                pair: agreement(*(allocations[name] for name in pair))
                for pair in combinations(allocations, 2)
            }
            yield _matrix(
                list(allocations),
                {pair: _number(alike.jaccard, 2) for pair, alike in found.items()},
                {pair: _number(alike.rank_correlation, 2) for pair, alike in found.items()},
                "Above the diagonal, Jaccard: FA heads that both have, over those that either has; random allocations"
                f" of these sizes would have {_range([alike.expected_jaccard for alike in found.values()])}. Below it,"
                f" {RHO}: Spearman's rank correlation of the scores.",
            )
            yield "</section>\n"
        if len(groups) > 1:
            yield "<section><h2>Across models</h2>\n"
            yield _matrix(
                list(everything),
                {
                    pair: _number(depth_correlation(*(everything[name] for name in pair)), 2)
                    for pair in combinations(everything, 2)
                },
                {},
                "Spearman's rank correlation of the share of FA heads by relative depth, from the bottom of a model to"
                " its top.",
            )
            yield "</section>\n"

    def _origins(self) -> Iterator[str]:
        yield "<section><h2>Where it comes from</h2>\n"
        for name, run in zip(self.names, self.runs, strict=True):
            yield f"<h3>{escape(name)}</h3>\n"
            records = [run.summary, (run.evaluation or {}).get("how"), (run.benchmark or {}).get("where")]
            for command in filter(None, ((record or {}).get("command") for record in records)):
                yield f"<pre><code>{escape(str(command))}</code></pre>\n"
            for title, record in (
                ("Summary", run.summary),
                ("Allocation", None if run.allocation is None else dict(run.allocation.provenance)),
                ("Evaluation", (run.evaluation or {}).get("how")),
                ("Benchmark", (run.benchmark or {}).get("where")),
                ("Behaviour", None if run.behaviour is None else dict(run.behaviour.provenance)),
            ):
                if record:
                    shown = {key: value for key, value in record.items() if key not in UNTOLD}
                    text = escape(json.dumps(shown, indent=1, ensure_ascii=False))
                    yield f"<details><summary>{title}</summary><pre>{text}</pre></details>\n"
        yield "</section>\n"

    def _add_data(self, name: str, columns: Columns) -> str:
        self.data[name] = columns
        return name

    def _figure(self, chart: Chart) -> str:
        self.charts.append(chart)
        return (
            f"<figure><figcaption>{escape(chart.title)}</figcaption>"
            f'<div class=plot data-chart="{len(self.charts) - 1}"></div></figure>\n'
        )


def _table(
    columns: Sequence[str], rows: Iterable[Sequence[str]], caption: str = "", *, kind: str = ""
) -> str:
    """A table that scrolls by itself where the page is narrow; what the run made stands out.

    Of kind "told", its last column is prose.
    """
    head = "".join(f"<th scope=col>{escape(column)}</th>" for column in columns)
    body = "".join(
        f"<tr{' class=made' if row[0] in MADE else ''}><th scope=row>{escape(row[0])}</th>"
        + "".join(f"<td>{escape(cell)}</td>" for cell in row[1:])
        + "</tr>\n"
        for row in rows
    )
    said = f"<p class=quiet>{escape(caption)}</p>\n" if caption else ""
    label = escape(caption or ", ".join(columns))
    return (
        f'{said}<div class="scroll {kind}" role=region aria-label="{label}" tabindex=0><table>'
        f"<thead><tr>{head}</tr></thead>\n<tbody>{body}</tbody></table></div>\n"
    )


def _matrix(
    names: list[str],
    above: dict[tuple[str, str], str],
    below: dict[tuple[str, str], str],
    caption: str,
) -> str:
    """A table of pairs, whose columns are numbered as the rows are."""
    rows = [
        [f"{i + 1}. {row}", *(above.get((row, column), below.get((column, row), "")) for column in names)]
        for i, row in enumerate(names)
    ]
    return _table(["allocation", *(str(i + 1) for i in range(len(names)))], rows, caption)


def _positions(lines: dict[tuple[str, str], list[Any]], places: list[int]) -> Columns:
    """Rises over dense by name and kind, each with the ends of its interval, as `charts.by_position` wants them."""
    columns: dict[str, list[Any]] = {key: [] for key in ("allocation", "kind", "from", "rise", "low", "high")}
    for (name, kind), values in lines.items():
        for place, (mean, low, high) in zip(places, values, strict=True):
            for column, value in zip(columns.values(), (name, kind, place, mean, low, high), strict=True):
                column.append(value)
    return columns


def _fits(behaviour: Behaviour, run: Run) -> bool:
    return bool(run.allocation) and run.allocation.full_attention.shape == behaviour.by_distance.shape[:2]


def _row(summary: dict[str, Any], name: str) -> dict[str, Any]:
    return {row["name"]: row for row in summary["rows"]}[name]


def _dense(allocation: Allocation) -> Allocation:
    full = allocation.full_attention.copy()
    full[allocation.layers] = True
    return Allocation(full_attention=full, window=allocation.window, native_windows=allocation.native_windows)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None else f"{value:.{digits}f}"


def _interval(estimate: dict[str, float | None]) -> str:
    low, high = estimate["low"], estimate["high"]
    return DASH if low is None or high is None else f"{low:+.4f} to {high:+.4f}"


def _percent(value: float | None) -> str:
    return DASH if value is None else f"{value:.1%}"


def _distinct(names: list[str]) -> list[str]:
    """The names, those that come again with a number."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({n})" for n in count(2))
        found.append(next(new for new in chain([name], numbered) if new not in found))
    return found


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"


@contextmanager
def _saying_where(name: str) -> Iterator[None]:
    """Files of other programs or versions may lack whatever the page shows."""
    try:
        yield
    except ConsaError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise ConsaError(
            f"the records of run {name!r} are not as consa writes them ({type(error).__name__}: {error}); make it again"
        ) from error
