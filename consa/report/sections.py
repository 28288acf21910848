"""What the page shows: the numbers, charts and tables of each run, and of all runs beside each other."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from itertools import chain, combinations, count
from typing import Any

from consa import rules
from consa.allocation import Allocation
from consa.behaviour.record import MEASURES, Behaviour
from consa.behaviour.relate import agreement, depth, depth_correlation, relate
from consa.errors import ConsaError
from consa.evaluation.table import Line, Section, Table
from consa.files import JsonObject
from consa.report import charts
from consa.report.folder import Run, naming
from consa.report.vega import Chart, Columns
from consa.runs.verdict import verdict as paired_verdict

CACHE_TOKENS = 32768  # in the KV cache of the headline
NOT_SHOWN = ("rows", "buckets", "allocation", "table")  # fields of a record that tables and charts show
DASH = "\N{EN DASH}"
RHO = "\N{GREEK SMALL LETTER RHO}"


class Sections:
    """What sections.html renders: a view of each run, the comparison of runs, and the origin of everything.

    Raises:
        ConsaError: the given behaviour fits no run, or a run's records are not as consa writes them.
    """

    def __init__(self, runs: list[Run], behaviour: Behaviour | None) -> None:
        self.runs = runs
        self.names = _distinct([run.name for run in runs])
        self.files = _distinct(["".join(c if c.isalnum() or c in "._-" else "-" for c in run.name) for run in runs])
        self.given = behaviour
        if behaviour and not any(_fits(behaviour, run) for run in runs):
            shape = " x ".join(map(str, behaviour.by_distance.shape[:2]))
            raise ConsaError(
                f"the behaviour is of {shape} KV heads, which no run has; give the behaviour of the runs' model"
            )
        self.charts: list[Chart] = []
        self.data: dict[str, Columns] = {}
        self.views: list[JsonObject] = []
        for index, run in enumerate(runs):
            with naming(self.names[index]):
                self.views.append(self._view(index, run))
        named = zip(self.names, runs, strict=True)
        self.allocations = {name: run.allocation for name, run in named if run.allocation}
        self.shapes: dict[Any, dict[str, Allocation]] = {}  # runs of models of one shape
        for name, allocation in self.allocations.items():
            key = (allocation.full_attention.shape, tuple(allocation.layers))
            self.shapes.setdefault(key, {})[name] = allocation
        self.side_by_side = list(self._side_by_side())

    @property
    def is_series(self) -> bool:
        """Whether the runs are of one model and differ in their sparsity alone."""
        alike = {
            (run.model, one.granularity, one.window, one.num_sink_tokens) if (one := run.allocation) else None
            for run in self.runs
        }
        return len(alike) == 1 and 2 < len(self.runs) == len({one.sparsity for one in self.allocations.values()})

    def _view(self, index: int, run: Run) -> JsonObject:
        """The numbers, tables and numbers of charts of a run, in the order of the page."""
        behaviour = run.behaviour or (self.given if self.given and _fits(self.given, run) else None)
        behaviour = behaviour if run.allocation else None
        view: JsonObject = {"index": index, "name": self.names[index], "run": run, "behaviour": behaviour}
        view |= {"model": run.model or "model unknown", "label": view["name"], "first": []}
        view |= dict.fromkeys(("depth", "made", "verdict", "measured", "evaluation"))
        if run.allocation is not None:
            allocation, name = run.allocation, self.files[index]
            dense = rules.dense(*allocation.full_attention.shape, native_windows=allocation.native_windows)
            caches = [one.kv_cache_bytes(CACHE_TOKENS, head_dim=1) for one in (allocation, dense)]
            data = self._add_data(f"units {index}", charts.units(allocation, behaviour))
            view["cache"], view["cache_tokens"] = caches[0] / caches[1], CACHE_TOKENS
            view["outlines"] = charts.outlines(self.data[data])
            view["heatmap"] = self._add_chart(charts.heatmap(name, data, allocation, behaviour))
            view["label"] += f" (sparsity {allocation.sparsity:.4g})"
            view["depth"] = depth(allocation) if allocation.full_attention.any() else None
            if behaviour is not None:
                view |= self._behaviour(index, allocation, behaviour)
        if table := run.measured or run.evaluation:
            best = charts.best_rule(table.lines)
            view["made"] = next((line for line in table.lines if line.kind in charts.MADE_KINDS), None)
            if run.summary and run.summary.get("best_rule"):
                view["verdict"] = paired_verdict(run.summary)
            elif view["made"]:
                view["verdict"] = verdict(view["made"], next((o for o in table.lines if o.name == best), None))
            data = self._add_data(f"frontier {index}", charts.frontier(table.lines, best))
            chart = charts.loss_by_cache(self.files[index], data, table.cache_tokens, intervals=table.has_intervals)
            view["first"].append(self._add_chart(chart))
            view["measured"] = self._measured(index, run.measured, best, run.summary, "", "")
            view["evaluation"] = self._measured(index, run.evaluation, best, None, "evaluated ", "-eval")
            parts = filter(None, (view["evaluation"], view["measured"]))
            view["first"] += [number for part in parts for number in part["retrieval"]][:1]
        if run.benchmark is not None:
            view |= self._benchmark(index, run.benchmark)
        if run.history:
            losses = (run.summary or {}).get("losses")
            view["losses"] = losses if losses and losses["stochastic"] is not None else None
            view["fractional"] = (run.summary or {}).get("fractional")
            data = self._add_data(f"history {index}", charts.history(run.history, adapted=run.adapted))
            curves = charts.curves(self.files[index], data, adapted=run.adapted)
            view["curves"] = [self._add_chart(chart) for chart in curves]
        return view

    def _behaviour(self, index: int, allocation: Allocation, behaviour: Behaviour) -> JsonObject:
        relations, name = relate(behaviour, allocation), self.files[index]
        aucs = {one.measure: 0.5 if one.auc is None else one.auc for one in relations}
        order = sorted(relations, key=lambda one: -aucs[one.measure])
        telling = max(aucs, key=lambda measure: abs(aucs[measure] - 0.5))
        spectrum = self._add_chart(charts.spectrum(name, f"units {index}", behaviour, telling))
        columns = {"measure": [_words(one.measure) for one in order], "auc": [one.auc for one in order]}
        by_measure = self._add_data(f"relations {index}", columns)
        by_distance = self._add_data(f"distances {index}", charts.distances(allocation, behaviour))
        both = charts.predictors(name, by_measure, len(order)), charts.by_distance(name, by_distance)
        measures = Section(
            "AUC is the probability that an FA unit has a higher value than an SWA unit; 0.5 means that the measure"
            f" does not separate them. {RHO} is Spearman's rank correlation with the decision and with the score.",
            ["measure", "AUC", f"{RHO} FA", f"{RHO} score", "meaning"],
            [
                [_words(r.measure), number(r.auc), number(r.with_decision), number(r.with_scores), MEASURES[r.measure]]
                for r in relations
            ],
        )
        return {"spectrum": spectrum, "relations": [self._add_chart(chart) for chart in both], "measures": measures}

    def _measured(
        self, index: int, table: Table | None, best: str | None, summary: Mapping[str, Any] | None, data: str, file: str
    ) -> JsonObject | None:
        """What was measured of allocations, by a run or by `consa eval`; `data` and `file` go into names."""
        if table is None:
            return None
        lines, name, counts = table.lines, self.files[index] + file, summary or table.how
        rises = self._add_data(f"{data}positions {index}", charts.positions(lines, best))
        rise = charts.by_position(name, rises, intervals=table.has_intervals)
        part: JsonObject = {"rise": self._add_chart(rise), "retrieval": [], "intervals": table.has_intervals}
        part["colours"] = charts.colours(lines, best)
        fields = ("heldout_sequences", "seq_len", "heldout_documents")
        part["counts"] = {field: counts[field] for field in fields} if "seq_len" in counts else None
        for task in lines[0].retrieval:
            found = self._add_data(f"{data}{task} {index}", charts.answers(lines, best, task))
            part["retrieval"].append(self._add_chart(charts.retrieval(name, found, task)))
        losses = table.section(
            f"Loss from position {table.start:,} on. Recovered is the share of the gap from all-SWA to dense that is"
            " closed.",
            ["sparsity", "loss", "difference to dense", "95 % interval", "recovered"],
            _losses,
        )
        by_position = table.section(
            "Loss by position.",
            [f"from {first:,}" for first in lines[0].by_position],
            lambda line: [f"{estimate.mean:.3f}" for estimate in line.by_position.values()],
        )
        part["tables"] = [losses, by_position, *list(table.sections())[2:]]
        return part

    def _benchmark(self, index: int, benchmark: JsonObject) -> JsonObject:
        measured = benchmark["measurements"]
        dense, hybrid = measured[-2:]
        data = self._add_data(f"benchmark {index}", charts.speeds(measured))
        rows = [
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
        ]
        headings = ["model", "context", "batch", "prefill s", "decode tok/s", "KV cache MB", "peak MB"]
        return {
            "faster": hybrid["decode_tokens_per_second"] / dense["decode_tokens_per_second"],
            "context": dense["context"],
            "benchmark": [self._add_chart(chart) for chart in charts.benchmark(self.files[index], data)],
            "benchmarked": Section("", headings, rows),
        }

    def _side_by_side(self) -> Iterator[tuple[str, list[int], Section]]:
        """Names of the models, charts and the agreement of runs of models of one shape."""
        for number, allocations in enumerate(group for group in self.shapes.values() if len(group) > 1):
            data = self._add_data(f"layers {number}", charts.layer_shares(allocations))
            values: dict[tuple[str, ...], float | None] = {}
            expected: list[float] = []
            for pair in combinations(allocations, 2):
                alike = agreement(*(allocations[name] for name in pair))
                values |= {pair: alike.jaccard, pair[::-1]: alike.rank_correlation}
                expected.append(alike.expected_jaccard)
            matrix = _matrix(
                list(allocations),
                values,
                "Above the diagonal is the Jaccard index: the number of FA heads that both allocations have, divided by"
                f" the number that either has; for random allocations of these sizes it is {_range(expected)}. Below"
                f" the diagonal is {RHO}, Spearman's rank correlation of the scores.",
            )
            runs = [run for name, run in zip(self.names, self.runs, strict=True) if name in allocations]
            shown = [charts.side_by_side(data, allocations)]
            tables = [run.measured for run in runs if run.measured]
            tables = [table for table in tables if table.cache_tokens == tables[0].cache_tokens]
            if len(tables) > 1:
                losses = self._add_data(f"frontiers {number}", charts.frontiers(tables))
                intervals = any(table.has_intervals for table in tables)
                chart = charts.loss_by_cache(f"runs-{number}", losses, tables[0].cache_tokens, intervals=intervals)
                shown.append(chart)
            models = ", ".join(dict.fromkeys(run.model for run in runs if run.model))
            yield models, [self._add_chart(chart) for chart in shown], matrix

    @property
    def across(self) -> Section | None:
        """The correlation by depth of models of different shapes."""
        if len(self.shapes) < 2:
            return None
        values = {
            pair: depth_correlation(*(self.allocations[name] for name in pair))
            for pair in combinations(self.allocations, 2)
        }
        caption = (
            "Spearman's rank correlation of the share of FA heads by relative depth, from the bottom of a model to its"
            " top."
        )
        return _matrix(list(self.allocations), values, caption)

    def origins(self) -> Iterator[tuple[str, list[str], list[tuple[str, str]]]]:
        """The name of each run, its commands, and its records by title as text."""
        for name, run in zip(self.names, self.runs, strict=True):
            records: JsonObject = {
                "Summary": run.summary,
                "Allocation": run.allocation and run.allocation.provenance,
                "Evaluation": run.evaluation and run.evaluation.how,
                "Benchmark": (run.benchmark or {}).get("where"),
                "Behaviour": run.behaviour and run.behaviour.provenance,
            }
            commanded = (records[title] for title in ("Summary", "Evaluation", "Benchmark"))
            commands = [str(record["command"]) for record in commanded if record and record.get("command")]
            shown = [
                (title, {key: value for key, value in record.items() if key not in NOT_SHOWN})
                for title, record in records.items()
                if record
            ]
            yield name, commands, [(t, json.dumps(record, indent=1, ensure_ascii=False)) for t, record in shown]

    def _add_data(self, name: str, columns: Columns) -> str:
        self.data[name] = columns
        return name

    def _add_chart(self, chart: Chart) -> int:
        self.charts.append(chart)
        return len(self.charts) - 1


def verdict(made: Line, best: Line | None) -> str:
    """One sentence: what a run has made beside the best of the other allocations, or dense."""
    if best is None:
        return f"The loss is {made.difference} nats per token above the dense model's."
    gain, other = best.loss.mean - made.loss.mean, "rule" if best.name in rules.RULES else "other allocation"
    overlap = made.difference.low <= best.difference.high and best.difference.low <= made.difference.high
    doubt = "; the 95 % intervals of both overlap" if overlap else ""
    if gain > 0:
        return f"Beats the best {other} ({best.name}) by {gain:.3f} nats per token{doubt}."
    return f"Does not beat the best {other} ({best.name}), whose loss is {-gain:.3f} nats per token lower{doubt}."


def _losses(line: Line) -> list[str]:
    low, high = line.difference.low, line.difference.high
    interval = DASH if math.isnan(low) else f"{low:+.4f} to {high:+.4f}"
    loss = [f"{line.sparsity:.4f}", f"{line.loss.mean:.4f}", f"{line.difference.mean:+.4f}"]
    return [*loss, interval, number(line.recovered)]


def _matrix(names: list[str], values: Mapping[tuple[str, ...], float | None], caption: str) -> Section:
    """A table of pairs, whose columns are numbered as the rows are."""
    rows = [
        [f"{i}. {row}", *(number(values[row, column], 2) if (row, column) in values else "" for column in names)]
        for i, row in enumerate(names, 1)
    ]
    return Section(caption, ["allocation", *(str(i) for i in range(1, len(names) + 1))], rows)


def _fits(behaviour: Behaviour, run: Run) -> bool:
    return bool(run.allocation) and run.allocation.full_attention.shape == behaviour.by_distance.shape[:2]


def _words(name: str) -> str:
    return name.replace("_", " ")


def number(value: float | None, digits: int = 3) -> str:
    """Format a number; a dash stands for None and NaN."""
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def percent(value: float, digits: int = 1) -> str:
    """Format a share; a dash stands for NaN."""
    return DASH if math.isnan(value) else f"{value:.{digits}%}"


def _distinct(names: list[str]) -> list[str]:
    """The names; a name that occurs again gets a number."""
    found: list[str] = []
    for name in names:
        numbered = (f"{name} ({n})" for n in count(2))
        found.append(next(new for new in chain([name], numbered) if new not in found))
    return found


def _range(values: list[float]) -> str:
    low, high = f"{min(values):.2f}", f"{max(values):.2f}"
    return low if low == high else f"{low} to {high}"
