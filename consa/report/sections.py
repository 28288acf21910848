"""The sections of the page: those of each run, the comparison of runs, and the origin of everything."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from itertools import chain, combinations, count
from typing import Any, cast

from consa.allocation import Allocation
from consa.behaviour.record import MEASURES, Behaviour
from consa.behaviour.relate import agreement, depth, depth_correlation, relate
from consa.errors import ConsaError
from consa.evaluation.intervals import Estimate
from consa.evaluation.table import Line
from consa.evaluation.table import Table as Measured
from consa.report import charts
from consa.report.blocks import Block, Cards, Code, Details, Figure, Grid, Heading, Section, Table, Text
from consa.report.folder import Run, naming
from consa.report.vega import Chart, Columns

CACHE_TOKENS = 32768  # in the KV cache of the headline
NOT_SHOWN = ("rows", "buckets", "allocation", "table")  # fields of a record that tables and charts show
LEARNED, ADAPTED = "learned", "adapted"  # rows of what a run made
DASH = "\N{EN DASH}"
RHO = "\N{GREEK SMALL LETTER RHO}"


class Sections:
    """The page's sections, and the charts and data sets that they show.

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
        self.sections: list[Section] = []
        for index, run in enumerate(runs):
            with naming(self.names[index]):
                self.sections += self._run(index, run)
        self.sections += self._comparison()
        self.sections.append(Section("Where it comes from", list(self._origins())))

    @property
    def slider(self) -> str:
        """What the slider over the runs is called."""
        several = len({run.allocation.sparsity for run in self.runs if run.allocation}) > 1
        return "Sparsity" if several else "Run"

    @property
    def labels(self) -> list[str]:
        """The runs as the slider names them."""
        return [
            f"{name} (sparsity {run.allocation.sparsity:.4g})" if run.allocation else name
            for name, run in zip(self.names, self.runs, strict=True)
        ]

    def _run(self, index: int, run: Run) -> Iterator[Section]:
        behaviour = run.behaviour or (self.given if self.given and _fits(self.given, run) else None)
        parts = [
            (self.names[index], self._headline(run)),
            ("Allocation", self._allocation(index, run, behaviour)),
            ("What the heads do", self._behaviour(index, run, behaviour)),
            ("Loss on held-out text", self._measured(index, run.measured, run.summary, "", "")),
            ("Evaluation", self._measured(index, run.evaluation, None, "evaluated ", "-eval")),
            ("Memory and speed", self._benchmark(index, run)),
            ("Training" if run.adapted else "Learning", self._training(index, run)),
        ]
        for title, part in parts:
            if blocks := list(part):
                yield Section(title, blocks, index)

    def _headline(self, run: Run) -> Iterator[Block]:
        cards: list[tuple[str, str]] = []
        if run.allocation is not None:
            allocation, dense = run.allocation, _dense(run.allocation)
            share = allocation.kv_cache_bytes(CACHE_TOKENS, head_dim=1) / dense.kv_cache_bytes(CACHE_TOKENS, head_dim=1)
            cards.append(("sparsity: share of units on SWA", f"{allocation.sparsity:.1%}"))
            cards.append((f"KV cache as a share of dense, at {CACHE_TOKENS:,} tokens", f"{share:.1%}"))
        if run.measured is not None:
            made = run.measured.line(ADAPTED if run.adapted else LEARNED)
            cards.append(("of the loss gap recovered (100% is dense)", _percent(made.recovered)))
            cards.append(("nats per token above the dense loss", f"{made.difference.mean:.3f}"))
        if run.benchmark is not None:
            dense, hybrid = run.benchmark["measurements"][-2:]
            faster = hybrid["decode_tokens_per_second"] / dense["decode_tokens_per_second"]
            label = f"decoding speed relative to dense, at {dense['context']:,} tokens"
            cards.append((label, f"{faster:.2f}\N{MULTIPLICATION SIGN}"))
        yield Cards(cards)

    def _allocation(self, index: int, run: Run, behaviour: Behaviour | None) -> Iterator[Block]:
        if run.allocation is None:
            return
        allocation = run.allocation
        unit = "layer" if allocation.granularity == "layer" else "KV head"
        yield Text(
            f"Each {unit} is one unit. The window has {allocation.window:,} tokens, and there are"
            f" {allocation.num_sink_tokens} sink tokens. The stronger a colour, the further the unit's score is from"
            " the decision. Point at a unit to see its numbers."
        )
        data = self._add_data(f"units {index}", charts.units(allocation, behaviour))
        yield self._figure(charts.heatmap(self.files[index], data, allocation, behaviour))
        if allocation.full_attention.any():
            found = depth(allocation)
            bottom, middle, top = found.thirds
            bare = "1 layer has" if found.bare == 1 else f"{found.bare} layers have"
            yield Text(
                f"Of the FA units, {bottom:.0%} lie in the bottom third of the layers, {middle:.0%} in the middle"
                f" third and {top:.0%} in the top third. The lowest {bare} no FA (p = {found.p_bare:.3f}). Blocks of"
                f" layers with more FA than average are {found.mean_run:.2f} layers long on average; when the layers"
                f" are shuffled, they are {found.expected_run:.2f} layers long (p = {found.p_run:.3f}). Each p is the"
                " share of 1,000 shuffles that are at least as extreme."
            )

    def _behaviour(self, index: int, run: Run, behaviour: Behaviour | None) -> Iterator[Block]:
        if run.allocation is None or behaviour is None:
            return
        relations = relate(behaviour, run.allocation)
        aucs = {one.measure: 0.5 if one.auc is None else one.auc for one in relations}
        order = sorted(relations, key=lambda one: -aucs[one.measure])
        telling = max(aucs, key=lambda measure: abs(aucs[measure] - 0.5))
        yield Text(
            f"Measured under full attention. The window has {behaviour.window:,} tokens, and there are"
            f" {behaviour.num_sink_tokens} sink tokens."
        )
        name = self.files[index]
        yield self._figure(charts.spectrum(name, f"units {index}", behaviour, telling))
        columns = {"measure": [_words(one.measure) for one in order], "auc": [one.auc for one in order]}
        by_measure = self._add_data(f"relations {index}", columns)
        predictors = self._figure(charts.predictors(name, by_measure, len(order)))
        by_distance = self._add_data(f"distances {index}", charts.distances(run.allocation, behaviour))
        yield Grid([predictors, self._figure(charts.by_distance(name, by_distance))])
        yield Table(
            ["measure", "AUC", f"{RHO} FA", f"{RHO} score", "meaning"],
            [
                [
                    _words(one.measure),
                    *(_number(value) for value in (one.auc, one.with_decision, one.with_scores)),
                    MEASURES[one.measure],
                ]
                for one in relations
            ],
            "AUC is the probability that an FA unit has a higher value than an SWA unit; 0.5 means that the measure"
            f" does not separate them. {RHO} is Spearman's rank correlation with the decision and with the score.",
            prose=True,
        )

    def _measured(
        self, index: int, table: Measured | None, summary: Mapping[str, Any] | None, data: str, file: str
    ) -> Iterator[Block]:
        """What was measured of allocations, by a run or by `consa eval`; `data` and `file` go into names."""
        if table is None:
            return
        lines, name = table.lines, self.files[index] + file
        counts = summary or table.how
        if "seq_len" in counts:
            yield Text(
                f"Measured on {counts['heldout_sequences']:,} held-out sequences of {counts['seq_len']:,} tokens from"
                f" {counts['heldout_documents']:,} documents. Intervals are 95 % confidence intervals over documents."
            )
        rises = self._add_data(f"{data}positions {index}", _positions(lines))
        yield self._figure(charts.by_position(name, rises, [line.kind for line in lines]))
        yield _table(
            lines,
            ["sparsity", "loss", "difference to dense", "95 % interval", "recovered"],
            lambda line: [
                f"{line.sparsity:.4f}",
                f"{line.loss.mean:.4f}",
                f"{line.difference.mean:+.4f}",
                _interval(line.difference),
                _number(line.recovered),
            ],
            f"Loss from position {table.start:,} on. Recovered is the share of the gap from all-SWA to dense that is"
            " closed.",
        )
        yield _table(
            lines,
            [f"from {first:,}" for first in lines[0].by_position],
            lambda line: [f"{estimate.mean:.3f}" for estimate in line.by_position.values()],
            "Loss by position.",
        )
        if lines[0].by_domain:
            yield _table(
                lines,
                [domain or "(none)" for domain in lines[0].by_domain],
                lambda line: [f"{rise.mean:+.4f}" for rise in line.differences_by_domain.values()],
                f"Difference to the dense loss from position {table.start:,} on, by domain.",
            )
        if lines[0].retrieval:
            yield from self._retrieval(index, lines, name)
        if lines[0].tasks:
            yield _table(
                lines,
                list(lines[0].tasks),
                lambda line: [_number(value, 4) for value in line.tasks.values()],
                "Tasks of lm-eval.",
            )

    def _retrieval(self, index: int, lines: tuple[Line, ...], name: str) -> Iterator[Block]:
        columns: dict[str, list[Any]] = {key: [] for key in ("allocation", "kind", "task", "length", "share")}
        for line in lines:
            for task, lengths in line.retrieval.items():
                for length, share in lengths.items():
                    _append(columns, (line.name, line.kind, task, length, share))
        data = self._add_data(f"retrieval {index}", columns)
        kinds, tasks = [line.kind for line in lines], lines[0].retrieval
        yield Grid([self._figure(charts.retrieval(name, data, task, kinds)) for task in tasks], small=True)
        yield _table(
            lines,
            [f"{task} {length}" for task, lengths in tasks.items() for length in lengths],
            lambda line: [_number(share, 2) for each in line.retrieval.values() for share in each.values()],
            "Share of hidden answers found, by task and prompt length in tokens.",
        )

    def _benchmark(self, index: int, run: Run) -> Iterator[Block]:
        if run.benchmark is None:
            return
        measured = run.benchmark["measurements"]
        columns = {name: [m[name] for m in measured] for name in measured[0]}
        columns["cache_mb"] = [m["cache_bytes"] / 1e6 for m in measured]
        data = self._add_data(f"benchmark {index}", columns)
        yield Text("{hardware}, {dtype}.".format_map(run.benchmark["where"]))
        yield Grid([self._figure(chart) for chart in charts.benchmark(self.files[index], data)], small=True)
        yield Table(
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

    def _training(self, index: int, run: Run) -> Iterator[Block]:
        if not run.history:
            return
        losses = run.summary.get("losses") if run.summary is not None else None
        if run.summary is not None and losses and losses["stochastic"] is not None:
            yield Text(
                f"Held-out loss: {losses['dense']:.4f} of the dense model, {losses['stochastic']:.4f} with stochastic"
                f" gates, {losses['final']:.4f} with the final allocation. At the end"
                f" {run.summary.get('fractional'):.1%} of the gates were still fractional."
            )
        data = self._add_data(f"history {index}", charts.history(run.history, adapted=run.adapted))
        yield Grid([self._figure(chart) for chart in charts.curves(self.files[index], data, adapted=run.adapted)])

    def _comparison(self) -> Iterator[Section]:
        """Runs of models of one shape side by side, and the correlation by depth across shapes."""
        groups: dict[Any, dict[str, Allocation]] = {}
        everything = {name: run.allocation for name, run in zip(self.names, self.runs, strict=True) if run.allocation}
        for name, allocation in everything.items():
            key = (allocation.full_attention.shape, tuple(allocation.layers))
            groups.setdefault(key, {})[name] = allocation
        for number, allocations in enumerate(group for group in groups.values() if len(group) > 1):
            data = self._add_data(f"layers {number}", charts.layer_shares(allocations))
            found = {pair: agreement(*(allocations[name] for name in pair)) for pair in combinations(allocations, 2)}
            expected = _range([alike.expected_jaccard for alike in found.values()])
            matrix = _matrix(
                list(allocations),
                {pair: _number(alike.jaccard, 2) for pair, alike in found.items()},
                {pair: _number(alike.rank_correlation, 2) for pair, alike in found.items()},
                "Above the diagonal is the Jaccard index: the number of FA heads that both allocations have, divided"
                f" by the number that either has; for random allocations of these sizes it is {expected}. Below the"
                f" diagonal is {RHO}, Spearman's rank correlation of the scores.",
            )
            yield Section("Side by side", [self._figure(charts.side_by_side(data, allocations)), matrix])
        if len(groups) > 1:
            matrix = _matrix(
                list(everything),
                {
                    pair: _number(depth_correlation(*(everything[name] for name in pair)), 2)
                    for pair in combinations(everything, 2)
                },
                {},
                "Spearman's rank correlation of the share of FA heads by relative depth, from the bottom of a model to"
                " its top.",
            )
            yield Section("Across models", [matrix])

    def _origins(self) -> Iterator[Block]:
        for name, run in zip(self.names, self.runs, strict=True):
            yield Heading(name)
            evaluated, benchmark = run.evaluation and run.evaluation.how, (run.benchmark or {}).get("where")
            for record in (run.summary, evaluated, benchmark):
                if record and (command := cast(Mapping[str, Any], record).get("command")):
                    yield Code(str(command))
            for title, record in (
                ("Summary", run.summary),
                ("Allocation", run.allocation and run.allocation.provenance),
                ("Evaluation", evaluated),
                ("Benchmark", benchmark),
                ("Behaviour", run.behaviour and run.behaviour.provenance),
            ):
                if record:
                    shown = {key: value for key, value in record.items() if key not in NOT_SHOWN}
                    yield Details(title, json.dumps(shown, indent=1, ensure_ascii=False))

    def _add_data(self, name: str, columns: Columns) -> str:
        self.data[name] = columns
        return name

    def _figure(self, chart: Chart) -> Figure:
        self.charts.append(chart)
        return Figure(len(self.charts) - 1, chart.title)


def _table(lines: tuple[Line, ...], columns: list[str], row: Callable[[Line], list[str]], caption: str) -> Table:
    """A table with a row for each allocation."""
    made = frozenset(line.name for line in lines if line.name in (LEARNED, ADAPTED))
    return Table(["allocation", *columns], [[line.name, *row(line)] for line in lines], caption, made)


def _matrix(
    names: list[str], above: dict[tuple[str, str], str], below: dict[tuple[str, str], str], caption: str
) -> Table:
    """A table of pairs, whose columns are numbered as the rows are."""
    rows = [
        [f"{i + 1}. {row}", *(above.get((row, column), below.get((column, row), "")) for column in names)]
        for i, row in enumerate(names)
    ]
    return Table(["allocation", *(str(i + 1) for i in range(len(names)))], rows, caption)


def _positions(lines: tuple[Line, ...]) -> Columns:
    """Differences to the dense loss by position with their intervals, as `charts.by_position` wants them."""
    columns: dict[str, list[Any]] = {key: [] for key in ("allocation", "kind", "from", "rise", "low", "high")}
    for line in lines:
        for first, rise in line.differences_by_position.items():
            low, high = (None if math.isnan(value) else value for value in (rise.low, rise.high))
            _append(columns, (line.name, line.kind, first, rise.mean, low, high))
    return columns


def _append(columns: dict[str, list[Any]], row: tuple[Any, ...]) -> None:
    for column, value in zip(columns.values(), row, strict=True):
        column.append(value)


def _fits(behaviour: Behaviour, run: Run) -> bool:
    return bool(run.allocation) and run.allocation.full_attention.shape == behaviour.by_distance.shape[:2]


def _dense(allocation: Allocation) -> Allocation:
    full = allocation.full_attention.copy()
    full[allocation.layers] = True
    return Allocation(full_attention=full, window=allocation.window, native_windows=allocation.native_windows)


def _words(name: str) -> str:
    return name.replace("_", " ")


def _number(value: float | None, digits: int = 3) -> str:
    return DASH if value is None or math.isnan(value) else f"{value:.{digits}f}"


def _interval(estimate: Estimate) -> str:
    return DASH if math.isnan(estimate.low) else f"{estimate.low:+.4f} to {estimate.high:+.4f}"


def _percent(value: float) -> str:
    return DASH if math.isnan(value) else f"{value:.1%}"


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
