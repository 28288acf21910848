"""Every way of choosing at every sparsity, on one model and text: which gives the most quality for its KV cache."""

from __future__ import annotations

import csv
import io
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from consa.runs import inputs
from consa import rules
from consa.allocation import Allocation
from consa.config import ChoiceConfig, EvalConfig, RunConfig, SweepConfig, words_of
from consa.errors import ConsaError
from consa.evaluation import suite
from consa.evaluation.table import Line, Table, number
from consa.files import png, write_atomically, write_json
from consa.methods import METHODS, RANKINGS, check_budget, choose
from consa.model.load import LoadedModel, read_layout
from consa.progress import note
from consa.provenance import hardware
from consa.runs.folder import CONFIG, check_same, claimed


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One allocation of the sweep.

    Attributes:
        method: of `consa.methods.METHODS`, or a rule.
        config: what it is asked for.
    """

    method: str
    config: ChoiceConfig

    @property
    def name(self) -> str:
        """What its file and its line in the table are called."""
        config = self.config
        return f"{self.method}-{config.granularity}-{config.sparsity:g}-seed{config.seed}"

    @property
    def origin(self) -> tuple[str, ChoiceConfig]:
        """Choices for which this is equal come from one run of the method."""
        config = replace(self.config, sparsity=0.0) if self.method in RANKINGS else self.config
        return self.method, config


def make(alike: Sequence[Choice], loaded: LoadedModel, sequences: np.ndarray) -> list[Allocation]:
    """Choose by one run. The provenance says how many seconds that took, and on what.

    Args:
        alike: choices of the same `origin`.
        loaded: the model.
        sequences: the text, int tokens `(num_sequences, seq_len)`.
    """
    method, config = alike[0].method, alike[0].config
    began = time.monotonic()
    if method in METHODS:
        found = choose(method, loaded, sequences, config, [choice.config.sparsity for choice in alike])
    else:
        layout = loaded.layout
        allocation = rules.by_name(
            method,
            *layout.shape,
            seed=config.seed,
            sparsity=config.sparsity,
            granularity=config.granularity,
            window=config.window,
            num_sink_tokens=config.num_sink_tokens,
            native_windows=layout.native_windows,
        )
        found = {config.sparsity: allocation}
    spent = {"seconds": round(time.monotonic() - began, 2), "hardware": hardware()}
    return [
        replace(allocation, provenance=loaded.identity | dict(allocation.provenance) | spent)
        for allocation in found.values()
    ]


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one granularity and sparsity, over its seeds.

    Attributes:
        method: its name.
        granularity: what was decided as one.
        sparsity: as asked for.
        lines: what was measured, one per seed.
        seconds: what the runs took that gave the choices, on average; one run may have given those of all sparsities.
        cache: KV cache as a share of the dense model's.
    """

    method: str
    granularity: str
    sparsity: float
    lines: tuple[Line, ...]
    seconds: float
    cache: float

    @property
    def recovered(self) -> float:
        """Mean over the seeds; NaN where dense is no better than all-SWA."""
        return float(np.mean([line.recovered for line in self.lines]))

    @property
    def spread(self) -> float:
        """Largest minus smallest `recovered` of the seeds."""
        values = [line.recovered for line in self.lines]
        return max(values) - min(values)

    @property
    def retrieved(self) -> float:
        """Share of hidden answers found, mean over tasks, lengths and seeds; NaN if none was asked."""
        return float(np.mean([line.retrieved for line in self.lines]))


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """What a sweep found.

    Attributes:
        points: by granularity, sparsity and method.
        table: all lines, dense and all-SWA included.
    """

    points: tuple[Point, ...]
    table: Table

    def rows(self) -> list[dict[str, Any]]:
        """One record per point."""
        return [
            {
                "method": point.method,
                "granularity": point.granularity,
                "sparsity": point.sparsity,
                "seeds": len(point.lines),
                "cache": point.cache,
                "recovered": point.recovered,
                "spread": point.spread,
                "retrieved": point.retrieved,
                "seconds": point.seconds,
            }
            for point in self.points
        ]

    def for_terminal(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows as text, without what a terminal has no room for."""
        formats: dict[str, Callable[[Any], str]] = {
            "method": str,
            "granularity": str,
            "sparsity": "{:g}".format,
            "cache": "{:.1%}".format,
            "recovered": number,
        }
        formats |= {"retrieved": number} if self.table.lines[0].retrieval else {}
        formats |= {"seconds": "{:.0f}".format}
        rows = [[text(row[name]) for name, text in formats.items()] for row in self.rows()]
        return list(formats), rows

    def write(self, folder: Path) -> list[Path]:
        """Write frontier.csv and frontier.png, and the table as eval.*; returns their paths.

        Raises:
            ConsaError: the folder does not take them.
        """
        text = io.StringIO()
        writer = csv.DictWriter(text, list(self.rows()[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(self.rows())
        content = {"frontier.csv": text.getvalue().encode(), "frontier.png": self.figure()}
        for name, data in content.items():
            write_atomically(folder / name, data)
        return [*(folder / name for name in content), *self.table.write(folder)]

    def figure(self) -> bytes:
        """Quality over KV cache, a line per method and granularity, as PNG."""
        from matplotlib.figure import Figure

        panels = [("recovered", "share of the gap from all-SWA to dense recovered")]
        if self.table.lines[0].retrieval:
            panels.append(("retrieved", "share of hidden answers found"))
        drawing = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
        kinds = dict.fromkeys((point.method, point.granularity) for point in self.points)
        for axes, (quality, label) in zip(
            drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
        ):
            for method, granularity in kinds:
                chosen = [p for p in self.points if (p.method, p.granularity) == (method, granularity)]
                chosen.sort(key=lambda point: point.cache)
                axes.plot(
                    [point.cache for point in chosen],
                    [getattr(point, quality) for point in chosen],
                    "o-" if method not in rules.RULES else ".:",
                    label=f"{method}, {granularity}",
                )
            axes.axhline(
                1 if quality == "recovered" else self.table.lines[0].retrieved, color="#888888", ls="--"
            )
            axes.set(xlabel=f"KV cache at {self.table.cache_tokens} tokens, share of dense", ylabel=label)
        drawing.axes[0].legend(frameon=False, fontsize="small")
        return png(drawing)


def sweep(
    where: RunConfig, config: SweepConfig, measured: EvalConfig, folder: Path, *, command: str
) -> tuple[Frontier, list[Path]]:
    """Choose and measure what is missing in `folder`, then draw the frontier.

    Args:
        where: model and text.
        config: what is chosen.
        measured: what the allocations are measured by; its window and sinks are those of all choices.
        folder: for allocations, cells and results. It may be asked for more sparsities, granularities, methods, seeds
            and measurements later; what a method that ranks adds is then of another run than what is there.
        command: that does the same again, for the record.

    Returns:
        The frontier and the files it was written to.

    Raises:
        ConsaError: something the caller can mend; what is wrong is found before long work where that is possible.
    """
    wanted = list(choices(config, measured))
    if not wanted:
        raise ConsaError(f"methods must be some that choose by {config.granularity}, got {config.methods!r}")
    inputs.check(where)
    start = where.start_for(measured)
    layout = read_layout(where.model)
    for choice in wanted:
        check_budget(choice.method, layout, choice.config)
    settings = {"run": asdict(where), "sweep": asdict(config), "eval": asdict(measured), "command": command}
    with claimed(folder):
        check_same(folder, settings, _decisive, kind="sweep")
        loaded = suite.load(where, measured)
        harness = suite.find_harness(measured, loaded)
        heldout = inputs.heldout_text(where, measured.seq_len, loaded)
        write_json(folder / CONFIG, settings)
        allocations = _choose(wanted, loaded, where, measured.seq_len, folder)
        table = suite.evaluate(
            loaded, allocations, heldout, measured, folder, start=start, harness=harness, how=settings
        )
        frontier = Frontier(points=tuple(_points(wanted, allocations, table)), table=table)
        return frontier, frontier.write(folder)


def choices(config: SweepConfig, measured: EvalConfig) -> Iterator[Choice]:
    """All that a sweep compares.

    Raises:
        ConsaError: there is no such method, or a value is out of range.
    """
    methods: dict[str, None] = {}
    for name in words_of(config.methods):
        if name != "rules" and name not in METHODS and name not in rules.RULES:
            known = ", ".join(["rules", *METHODS, *rules.RULES])
            raise ConsaError(f"method must be one of {known}, got {name!r}")
        methods |= dict.fromkeys(rules.RULES if name == "rules" else [name])
    for granularity in config.granularities:
        for sparsity in config.sparsities:
            for method in methods:
                if method in rules.RULES and method not in rules.names(granularity):
                    continue
                draws = method in METHODS or method in rules.DRAWN
                for seed in range(config.seeds if draws else 1):
                    asked = ChoiceConfig(
                        sparsity=sparsity,
                        granularity=granularity,
                        window=measured.window,
                        num_sink_tokens=measured.num_sink_tokens,
                        seed=seed,
                        **config.budget,
                    )
                    yield Choice(method=method, config=asked)


def _decisive(settings: dict[str, Any]) -> dict[str, Any]:
    """What all allocations of a folder have in common."""
    free = {"run": ("num_heldout", "start"), "sweep": ("sparsity", "granularity", "methods", "seeds")}
    fixed = {part: {k: v for k, v in settings[part].items() if k not in left} for part, left in free.items()}
    return fixed | {
        "eval": {name: settings["eval"][name] for name in ("seq_len", "window", "num_sink_tokens")}
    }


def _choose(
    wanted: list[Choice], loaded: LoadedModel, where: RunConfig, seq_len: int, folder: Path
) -> dict[str, Allocation | None]:
    """All allocations; those that the folder does not hold are made."""
    paths = {choice.name: folder / "allocations" / f"{choice.name}.json" for choice in wanted}
    missing = [choice for choice in wanted if not paths[choice.name].exists()]
    if missing:
        train = inputs.training_text(where, seq_len, loaded)
        for index, choice in enumerate(missing, 1):
            if paths[choice.name].exists():  # it came with another
                continue
            note(f"Choosing {index}/{len(missing)}  {choice.name}")
            alike = [other for other in wanted if other.origin == choice.origin]
            for other, allocation in zip(alike, make(alike, loaded, train.tokens), strict=True):
                if not paths[other.name].exists():
                    allocation.save(paths[other.name])
    return {name: _chosen(path) for name, path in paths.items()}


def _chosen(path: Path) -> Allocation:
    try:
        allocation = Allocation.load(path)
        if not isinstance(allocation.provenance.get("seconds"), (int, float)):
            raise ConsaError(f"{path}: provenance must say in how many seconds it was chosen")
    except ConsaError as error:
        raise ConsaError(f"{error}; delete the file, and the allocation is chosen again") from error
    return allocation


def _points(wanted: list[Choice], allocations: dict[str, Allocation | None], table: Table) -> Iterator[Point]:
    groups: dict[tuple[str, str, float], list[str]] = {}
    for choice in wanted:
        key = choice.method, choice.config.granularity, choice.config.sparsity
        groups.setdefault(key, []).append(choice.name)
    for (method, granularity, sparsity), names in groups.items():
        lines = tuple(table.line(name) for name in names)
        seconds = [chosen.provenance["seconds"] for name in names if (chosen := allocations[name])]
        yield Point(
            method=method,
            granularity=granularity,
            sparsity=sparsity,
            lines=lines,
            seconds=float(np.mean(seconds)),
            cache=float(np.mean([line.cache_bytes for line in lines])) / table.lines[0].cache_bytes,
        )
