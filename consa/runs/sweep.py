"""A sweep: several methods at several sparsities on one model and text, and the quality of each for its KV cache."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from consa import rules
from consa.allocation import Allocation
from consa.config import EvalConfig, LearnConfig, RunConfig, SweepConfig, at_once
from consa.errors import ConsaError
from consa.evaluation.suite import Suite
from consa.evaluation.table import Line, Table, csv_of, number
from consa.files import png, read_json, write_files, write_json
from consa.methods.choice import Choice, choices, make
from consa.model.load import LoadedModel, read_layout
from consa.progress import progress
from consa.runs import evaluation, inputs
from consa.runs.folder import CONFIG, MAX_CONFIG_BYTES, Settings, check_same, claimed
from consa.training.learning import learn
from consa.training.loop import is_automatic

# Columns of frontier.csv: attributes of a point.
COLUMNS = (*("method", "granularity", "sparsity", "seeds"), *("cache", "recovered", "spread", "retrieved", "seconds"))


@dataclass(frozen=True, kw_only=True)
class Point:
    """One method at one granularity and sparsity, over its seeds.

    Attributes:
        method: its name.
        granularity: the unit that was decided on.
        sparsity: as asked for.
        lines: the measurements, one for each seed.
        seconds: mean duration of the runs that made the allocations; one run may have made those of all sparsities.
        cache: KV cache as a share of the dense model's.
    """

    method: str
    granularity: str
    sparsity: float
    lines: tuple[Line, ...]
    seconds: float
    cache: float

    @property
    def seeds(self) -> int:
        """Number of seeds."""
        return len(self.lines)

    @property
    def recovered(self) -> float:
        """Mean over the seeds; NaN if dense is no better than all-SWA."""
        return float(np.mean([line.recovered for line in self.lines]))

    @property
    def spread(self) -> float:
        """Largest minus smallest `recovered` of the seeds."""
        values = [line.recovered for line in self.lines]
        return max(values) - min(values)

    @property
    def retrieved(self) -> float:
        """Share of hidden answers found, mean over tasks, lengths and seeds; NaN without retrieval tasks."""
        return float(np.mean([line.retrieved for line in self.lines]))


@dataclass(frozen=True, kw_only=True)
class Frontier:
    """The result of a sweep.

    Attributes:
        points: by granularity, sparsity and method.
        table: all lines, including dense and all-SWA.
    """

    points: tuple[Point, ...]
    table: Table

    def rows(self) -> list[dict[str, object]]:
        """One row of frontier.csv for each point."""
        return [{name: getattr(point, name) for name in COLUMNS} for point in self.points]

    def for_terminal(self) -> tuple[list[str], list[list[str]]]:
        """Columns and rows as text, without those that a terminal has no room for."""
        formats: dict[str, Callable[[Any], str]] = {"method": str, "granularity": str, "sparsity": "{:g}".format}
        formats |= {"cache": "{:.1%}".format, "recovered": number}
        formats |= {"retrieved": number} if self.table.lines[0].retrieval else {}
        formats |= {"seconds": "{:.0f}".format}
        return list(formats), [[text(row[name]) for name, text in formats.items()] for row in self.rows()]

    def write(self, folder: Path) -> list[Path]:
        """Write frontier.csv and frontier.png, and the table as eval.*; returns their paths."""
        content = {"frontier.csv": csv_of(self.rows()).encode(), "frontier.png": self.figure()}
        return [*write_files(folder, content), *self.table.write(folder)]

    def figure(self) -> bytes:
        """Plot quality over KV cache, with a line for each method and granularity, as PNG."""
        from matplotlib.figure import Figure

        panels = [("recovered", "share of the gap from all-SWA to dense recovered")]
        if self.table.lines[0].retrieval:
            panels.append(("retrieved", "share of hidden answers found"))
        drawing = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
        kinds = dict.fromkeys((point.method, point.granularity) for point in self.points)
        for axes, (quality, label) in zip(drawing.subplots(1, len(panels), squeeze=False)[0], panels, strict=True):
            for method, granularity in kinds:
                alike = (p for p in self.points if (p.method, p.granularity) == (method, granularity))
                chosen = sorted(alike, key=lambda point: point.cache)
                axes.plot(
                    [point.cache for point in chosen],
                    [getattr(point, quality) for point in chosen],
                    "o-" if method not in rules.RULES else ".:",
                    label=f"{method}, {granularity}",
                )
            axes.axhline(1 if quality == "recovered" else self.table.lines[0].retrieved, color="#888888", ls="--")
            axes.set(xlabel=f"KV cache with {self.table.cache_tokens} tokens, share of dense", ylabel=label)
        drawing.axes[0].legend(frameon=False, fontsize="small")
        return png(drawing)


def sweep(
    where: RunConfig, config: SweepConfig, measured: EvalConfig, folder: Path, *, command: str
) -> tuple[Frontier, list[Path]]:
    """Choose and measure what is missing in `folder`, then draw the frontier.

    Args:
        where: model and text.
        config: what is chosen.
        measured: how the allocations are measured; its window and sinks are those of all choices.
        folder: for allocations, cells and results. A later sweep may ask for more sparsities, granularities, methods,
            seeds and measurements in it; a ranking method then runs again for what is added.
        command: the command line that does the same again, for the record.

    Returns:
        The frontier and the files it was written to.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    wanted = list(choices(config, measured))
    if not wanted:
        raise ConsaError(f"methods must be some that choose by {config.granularity}, got {config.methods!r}")
    inputs.check(where)
    start = where.start_for(measured)
    layout = read_layout(where.model)
    for choice in wanted:
        choice.method.check(layout, choice.config)
    settings = {"run": asdict(where), "sweep": asdict(config), "eval": asdict(measured), "command": command}
    with claimed(folder):
        is_given = isinstance(config.micro_batch, int)
        check_same(folder, settings, partial(_decisive, with_micro_batch=is_given), kind="sweep")
        suite = evaluation.suite_for(where, measured, folder, start=start)
        if not is_given:
            config = replace(config, micro_batch=_recorded_micro_batch(folder) or _fitting_micro_batch(suite, config))
            settings["sweep"] = asdict(config)
            wanted = list(choices(config, measured))
        write_json(folder / CONFIG, settings)
        allocations = _choose(wanted, suite.loaded, where, measured.seq_len, folder)
        table = suite.evaluate(allocations, settings)
        frontier = Frontier(points=tuple(_points(wanted, allocations, table)), table=table)
        return frontier, frontier.write(folder)


def _decisive(settings: Settings, *, with_micro_batch: bool) -> Settings:
    """The settings that all allocations of a folder have in common."""
    asked = ("sparsity", "granularity", "methods", "seeds", *(() if with_micro_batch else ("micro_batch",)))
    free = {"run": ("num_heldout", "start"), "sweep": asked}
    fixed = {part: {k: v for k, v in settings[part].items() if k not in left} for part, left in free.items()}
    return fixed | {"eval": {name: settings["eval"][name] for name in ("seq_len", "window", "num_sink_tokens")}}


def _recorded_micro_batch(folder: Path) -> int | None:
    """The number with which a sweep in this folder has begun."""
    path = folder / CONFIG
    return read_json(path, max_bytes=MAX_CONFIG_BYTES)["sweep"]["micro_batch"] if path.exists() else None


def _fitting_micro_batch(suite: Suite, config: SweepConfig) -> int:
    """The number that one step of learning on the held-out text ends up with; other methods need no more memory."""
    if not is_automatic(config.micro_batch, suite.loaded.model.device):
        return at_once(config.micro_batch)
    measured = suite.config
    step = LearnConfig(
        num_steps=1,
        refine_evaluations=0,
        sequences_per_step=config.sequences_per_step or LearnConfig.sequences_per_step,
        micro_batch=config.micro_batch,
        compile=config.compile,
        window=measured.window,
        num_sink_tokens=measured.num_sink_tokens,
    )
    history = learn(suite.loaded.model, suite.heldout.tokens, step).history
    return int(history[0]["micro_batch"]) if history else 1


def _choose(
    wanted: list[Choice], loaded: LoadedModel, where: RunConfig, seq_len: int, folder: Path
) -> dict[str, Allocation]:
    """Return all allocations; those that the folder does not hold are made."""
    paths = {choice.name: folder / "allocations" / f"{choice.name}.json" for choice in wanted}
    missing = [choice for choice in wanted if not paths[choice.name].exists()]
    if missing:
        train = inputs.training_text(where, seq_len, loaded)
        runs = {choice.origin: choice for choice in missing}
        with progress("Choosing", len(runs)) as update:
            for done, (origin, choice) in enumerate(runs.items()):
                update(done, choice.name)
                alike = [other for other in wanted if other.origin == origin]
                for other, allocation in zip(alike, make(alike, loaded, train.tokens), strict=True):
                    if not paths[other.name].exists():
                        allocation.save(paths[other.name])
            update(len(runs), "done")
    return {name: _chosen(path) for name, path in paths.items()}


def _chosen(path: Path) -> Allocation:
    try:
        allocation = Allocation.load(path)
        if not isinstance(allocation.provenance.get("seconds"), (int, float)):
            raise ConsaError(f"{path}: provenance must hold the seconds that choosing took")
    except ConsaError as error:
        raise ConsaError(f"{error}; delete the file to have the allocation chosen again") from error
    return allocation


def _points(wanted: list[Choice], allocations: dict[str, Allocation], table: Table) -> Iterator[Point]:
    groups: dict[tuple[str, str, float], list[str]] = {}
    for choice in wanted:
        key = choice.method.name, choice.config.granularity, choice.config.sparsity
        groups.setdefault(key, []).append(choice.name)
    for (method, granularity, sparsity), names in groups.items():
        lines = tuple(table.line(name) for name in names)
        seconds = float(np.mean([allocations[name].provenance["seconds"] for name in names]))
        cache = float(np.mean([line.cache_bytes for line in lines])) / table.lines[0].cache_bytes
        yield Point(
            method=method, granularity=granularity, sparsity=sparsity, lines=lines, seconds=seconds, cache=cache
        )
