"""Measure several allocations of one model on the same text, beside dense and all-SWA; nothing is measured twice."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from consa import published, rules
from consa.allocation import Allocation
from consa.config import EvalConfig, RunConfig
from consa.data.sequences import SequenceSet
from consa.data.tsv import read_tsv
from consa.errors import ConsaError
from consa.evaluation import answers, harness, losses
from consa.evaluation.cells import Cell, Measure, Results, run_cells
from consa.evaluation.intervals import Estimate, bootstrap
from consa.evaluation.losses import LOSSES, recovered
from consa.evaluation.table import NOTHING, Line, Table
from consa.model.layout import AttentionLayout, check_fits
from consa.model.load import LoadedModel, read_config, read_layout
from consa.provenance import environment, versions

DENSE = "dense"
ALL_SWA = "all_swa"

Allocations = Mapping[str, Allocation | None]
"""Allocations by name; None is the model as it is."""


def named(name: str, model: str, layout: AttentionLayout, config: EvalConfig) -> Allocation | None:
    """Return the allocation that a name stands for; None is the model as it is.

    Args:
        name: "dense", "all_swa", a rule, an allocation's file, a run's folder, a published allocation, or a .tsv file
            of DuoAttention or PruLong.
        model: as `load_model` takes it.
        layout: of the model.
        config: settings of rules and .tsv files.

    Raises:
        ConsaError: there is no such allocation, or it does not fit the model.
    """
    shape = layout.shape
    limits = {"window": config.window, "num_sink_tokens": config.num_sink_tokens}
    options = limits | {"granularity": config.granularity, "native_windows": layout.native_windows}
    if name == DENSE:
        return None
    if name == ALL_SWA:
        return rules.all_swa(*shape, **options)
    if name in rules.RULES:
        return rules.by_name(name, *shape, sparsity=config.sparsity, seed=config.seed, **options)
    path = file_of(name, model)
    assert path is not None
    if path.suffix == ".tsv":
        allocation = read_tsv(path, num_layers=shape[0], num_kv_heads=shape[1], **limits)
    else:
        allocation = Allocation.load(path)
    try:
        check_fits(allocation, layout, model)
    except ConsaError as error:
        raise ConsaError(f"{name}: {error}") from error
    return allocation


def file_of(name: str, model: str) -> Path | None:
    """The file of a named allocation; None for rules, dense and all-SWA.

    Raises:
        ConsaError: there is no such file; the message gives the names that `model` can have instead.
    """
    if name in (DENSE, ALL_SWA, *rules.RULES):
        return None
    path = published.resolve(name)
    if not os.path.isfile(path):
        raise ConsaError(f"allocation {name!r} is neither a file nor one of {', '.join(names_for(model))}")
    return path


def names_for(model: str) -> list[str]:
    """Names of allocations for a model, files apart; the published ones are of its type and shape."""
    published_ones = published.fitting(read_config(model).model_type, read_layout(model).shape)
    return [DENSE, ALL_SWA, *rules.RULES, *published_ones]


def start_of(where: RunConfig, config: EvalConfig, allocations: Allocations) -> int:
    """Return the first position whose loss counts, which the largest window decides; raises as `start_for`."""
    return max(
        where.start_for(replace(config, window=window, num_sink_tokens=sinks))
        for window, sinks in _all_limits(allocations, config)
    )


@dataclass(frozen=True, kw_only=True)
class Suite:
    """What the allocations of one model are measured on; every verb that measures uses it.

    Attributes:
        loaded: the model.
        heldout: the text.
        config: what is measured.
        folder: keeps the results; what it holds is not measured again.
        start: first position whose loss counts.
        manager: what `harness.find` returned, if lm-eval's tasks are asked for.
    """

    loaded: LoadedModel
    heldout: SequenceSet
    config: EvalConfig
    folder: Path
    start: int
    manager: Any = None

    def evaluate(self, allocations: Allocations, how: Mapping[str, object]) -> Table:
        """Measure allocations beside dense and all-SWA at each of their windows; `how` joins the table's record."""
        whole = self.with_ends(allocations)
        return self.table(whole, self.measure(whole), how=how)

    def with_ends(self, allocations: Allocations) -> Allocations:
        """Dense first, all-SWA at every window and number of sinks that occur, then the others as given.

        If several windows or numbers of sinks occur, they become part of the names: "all_swa 128+4".
        """
        config, layout = self.config, self.loaded.layout
        limits = _all_limits(allocations, config)
        ends = [
            (ALL_SWA, named(ALL_SWA, "", layout, replace(config, window=window, num_sink_tokens=sinks)))
            for window, sinks in limits
        ]
        others = [(name, allocation) for name, allocation in allocations.items() if name != ALL_SWA]
        return {DENSE: None} | {
            name if len(limits) == 1 else f"{name} {allocation.window}+{allocation.num_sink_tokens}": allocation
            for name, allocation in (*ends, *others)
            if allocation
        }

    def measure(
        self,
        allocations: Allocations,
        *,
        also: Mapping[str, Measure] | None = None,
        trained: Mapping[str, object] | None = None,
    ) -> Results:
        """Measure allocations, and return the results by names of allocation and measure.

        Args:
            allocations: by name.
            also: one more measure for some of the allocations, by name.
            trained: JSON-able settings by which the model was trained since it was loaded; None if it was not.
        """
        computed = [str(self.loaded.model.dtype), str(self.loaded.model.device.type), versions()]
        model = {"model": self.loaded.identity, "computed": computed, "trained": trained}
        config, loaded, also = self.config, self.loaded, also or {}
        shared = [
            losses.heldout(loaded, self.heldout.tokens, start=self.start, batch_size=config.batch_size),
            *answers.measures(loaded, config),
            *harness.measures(loaded, config, self.manager),
        ]
        cells = [
            Cell(
                allocation=name,
                measure=measure.name,
                depends_on=model | {"allocation": allocation and allocation.decision(), "settings": measure.settings},
                size=measure.size,
                compute=partial(measure.compute, allocation),
            )
            for name, allocation in allocations.items()
            for measure in (*shared, *([also[name]] if name in also else []))
        ]
        return run_cells(cells, self.folder)

    def table(
        self, allocations: Allocations, results: Results, *, how: Mapping[str, object], made: str | None = None
    ) -> Table:
        """Make the table of measured allocations.

        Args:
            allocations: dense first, then all-SWA, then the others, by name.
            results: what `measure` returned for them.
            how: joins the table's record.
            made: name of the allocation that this run made, if it made one.
        """
        counts = {
            "heldout_sequences": len(self.heldout.tokens),
            "heldout_documents": len(np.unique(self.heldout.documents)),
            "seq_len": self.config.seq_len,
        }
        return Table(
            start=self.start,
            cache_tokens=self.config.cache_tokens,
            lines=tuple(self._lines(allocations, results, made)),
            how={**how, "model": self.loaded.identity, **counts, **environment()},
        )

    def _lines(self, allocations: Allocations, results: Results, made: str | None) -> Iterator[Line]:
        config, layout, documents = self.config, self.loaded.layout, self.heldout.documents
        dense_cache = rules.dense(*layout.shape, native_windows=layout.native_windows)
        domains = np.array(self.heldout.domains)
        several = names if len(names := sorted(set(self.heldout.domains))) > 1 else []
        measured = {
            name: {part: np.array(values) for part, values in results[name, LOSSES].items()} for name in allocations
        }
        floors: dict[tuple[int, int], float] = {}  # loss of all-SWA, by window and sinks
        for name, allocation in allocations.items():
            if allocation and not allocation.full_attention.any():
                floors.setdefault(_limits(allocation), measured[name]["all"].mean())

        def estimate(values: np.ndarray, chosen: Any = slice(None)) -> Estimate:
            return bootstrap(values[chosen], documents[chosen], seed=config.seed)

        dense = measured[DENSE]
        given = [name for name, allocation in allocations.items() if allocation and allocation.full_attention.any()]
        for name, allocation in allocations.items():
            own = measured[name]
            compared = not made and name in given[1:]
            rise = {part: own[part] - dense[part] for part in own}
            firsts = [part for part in own if part != "all"]
            floor = max(floors.values()) if allocation is None else floors[_limits(allocation)]
            retrieval: dict[str, dict[int, float]] = {}
            for task, length in answers.tasks_of(config):
                scores = results[name, f"{task} {length}"]["scores"]
                retrieval.setdefault(task, {})[length] = float(np.mean(scores))
            yield Line(
                name=name,
                kind=name if name == made else _kind_of(allocation, learned="other" if made else "learned"),
                sparsity=allocation.sparsity if allocation else 0.0,
                cache_bytes=(allocation or dense_cache).kv_cache_bytes(config.cache_tokens, head_dim=layout.head_dim),
                loss=estimate(own["all"]),
                difference=estimate(rise["all"]),
                to_first=estimate(own["all"] - measured[given[0]]["all"]) if compared else NOTHING,
                recovered=recovered(own["all"].mean(), dense=dense["all"].mean(), floor=floor),
                by_position={int(part): estimate(own[part]) for part in firsts},
                differences_by_position={int(part): estimate(rise[part]) for part in firsts},
                by_domain={domain: estimate(own["all"], domains == domain) for domain in several},
                differences_by_domain={domain: estimate(rise["all"], domains == domain) for domain in several},
                retrieval=retrieval,
                tasks={
                    metric: value
                    for task in config.harness_tasks
                    for metric, value in results[name, harness.measure_name(task)].items()
                },
            )


def _kind_of(allocation: Allocation | None, *, learned: str = "learned") -> str:
    if allocation is None:
        return "dense"
    if not allocation.full_attention.any():
        return "all-SWA"
    return learned if allocation.provenance.get("method") == "consa" else "other"


def _all_limits(allocations: Allocations, config: EvalConfig) -> tuple[tuple[int, int], ...]:
    """Every window and number of sinks that occurs; those of the config if there is no allocation."""
    given = dict.fromkeys(_limits(allocation) for allocation in allocations.values() if allocation)
    return tuple(given) or ((config.window, config.num_sink_tokens),)


def _limits(allocation: Allocation) -> tuple[int, int]:
    return allocation.window, allocation.num_sink_tokens
