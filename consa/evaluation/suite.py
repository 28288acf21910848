"""Measure several allocations of one model on the same text, beside dense and all-SWA; nothing is measured twice."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from consa import published, rules
from consa.allocation import Allocation
from consa.config import EvalConfig, RunConfig
from consa.data import questions
from consa.data.sequences import SequenceSet
from consa.data.tsv import read_tsv
from consa.errors import ConsaError
from consa.evaluation.answers import ask
from consa.evaluation.cells import Cell, run_cells
from consa.evaluation.harness import find_tasks, run_task
from consa.evaluation.intervals import bootstrap
from consa.evaluation.losses import buckets_of, heldout_losses, recovered
from consa.evaluation.table import Line, Table
from consa.files import write_json
from consa.model.layout import AttentionLayout, check_fits
from consa.model.load import LoadedModel, read_layout
from consa.progress import note
from consa.provenance import hardware, versions
from consa.runs import inputs
from consa.runs.folder import CONFIG, check_free

DENSE = "dense"
ALL_SWA = "all_swa"
LOSSES = "losses"
SETTINGS = "eval-config.json"


def run(
    where: RunConfig, config: EvalConfig, names: Sequence[str], folder: Path, *, command: str
) -> tuple[Table, list[Path]]:
    """Load, measure, write the table. Killed and called again, it measures what is missing.

    Args:
        where: model and text.
        config: what is measured.
        names: of allocations, as `named` takes them.
        folder: for the results.
        command: that does the same again, for the record.

    Returns:
        The table and the files it was written to.

    Raises:
        ConsaError: something the caller can mend; what is wrong is found before long work.
    """
    inputs.check(replace(where, data=where.heldout_data or where.data))  # nothing is learned here
    layout = read_layout(where.model)
    allocations = {name: named(name, where.model, layout, config) for name in dict.fromkeys(names)}
    start = start_of(where, config, allocations)
    if not any((folder / name).exists() for name in (SETTINGS, CONFIG)):  # nor in the folder of a run
        check_free(folder)
    settings = {"run": asdict(where), "eval": asdict(config), "allocations": list(names), "command": command}
    loaded = load(where, config)
    harness = find_harness(config, loaded)
    heldout = inputs.heldout_text(where, config.seq_len, loaded)
    write_json(folder / SETTINGS, settings)
    table = evaluate(loaded, allocations, heldout, config, folder, start=start, harness=harness, how=settings)
    return table, table.write(folder)


def named(name: str, model: str, layout: AttentionLayout, config: EvalConfig) -> Allocation | None:
    """The allocation that a name stands for; None is the model as it is.

    Args:
        name: "dense", "all_swa", a rule, an allocation's file, a run's folder, one published, or a .tsv file of
            DuoAttention or PruLong.
        model: its name, for messages.
        layout: of the model.
        config: settings of rules and .tsv files.

    Raises:
        ConsaError: there is none of that name, or it does not fit the model.
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
    path = published.resolve(name)
    if not os.path.isfile(path):
        known = (DENSE, ALL_SWA, *rules.RULES, *published.names())
        raise ConsaError(f"allocation {name!r} is no file, and none of {', '.join(known)}")
    if path.suffix == ".tsv":
        allocation = read_tsv(path, num_layers=shape[0], num_kv_heads=shape[1], **limits)
    else:
        allocation = Allocation.load(path)
    try:
        check_fits(allocation, layout, model)
    except ConsaError as error:
        raise ConsaError(f"{name}: {error}") from error
    return allocation


def start_of(where: RunConfig, config: EvalConfig, allocations: Mapping[str, Allocation | None]) -> int:
    """The first position whose loss counts, for the largest of the windows.

    Raises:
        ConsaError: no position is left from there on, or a window with its sinks covers whole sequences.
    """
    return max(
        where.start_for(replace(config, window=window, num_sink_tokens=sinks))
        for window, sinks in _all_limits(allocations, config)
    )


def find_harness(config: EvalConfig, loaded: LoadedModel) -> Any:
    """lm-eval's task manager if any of its tasks is asked for, else None.

    Raises:
        ConsaError: lm-eval is not installed, or has no such task.
    """
    if not config.harness_tasks:
        return None
    note("Looking up lm-eval's tasks")
    made = {"tokenizer": loaded.tokenizer.name_or_path, "max_seq_lengths": list(config.retrieval_lengths)}
    return find_tasks(config.harness_tasks, metadata=made)


def load(where: RunConfig, config: EvalConfig) -> LoadedModel:
    """The model, if its positions suffice for what is measured.

    Raises:
        ConsaError: they do not, or as `load_model`.
    """
    loaded = inputs.load(where)
    longest = loaded.model.config.get_text_config().max_position_embeddings
    asked = {"seq_len": config.seq_len}
    made = [task for task in config.harness_tasks if task.startswith(("niah", "ruler"))]
    if config.retrieval_tasks or made:
        asked["lengths"] = max(config.retrieval_lengths)
    for name, tokens in asked.items():
        if tokens > longest:
            raise ConsaError(f"{name} must be at most the {longest} positions of {where.model}, got {tokens}")
    return loaded


def evaluate(
    loaded: LoadedModel,
    allocations: Mapping[str, Allocation | None],
    heldout: SequenceSet,
    config: EvalConfig,
    folder: Path,
    *,
    start: int,
    harness: Any,
    how: dict[str, Any],
) -> Table:
    """Measure allocations, dense and all-SWA at each of their windows; what the folder holds is not measured again.

    Args:
        loaded: the model.
        allocations: by name; None is the model as it is.
        heldout: the text.
        config: what is measured.
        folder: for the cells.
        start: first position whose loss counts.
        harness: what `find_harness` returned.
        how: for the table's record.
    """
    allocations = with_ends(allocations, loaded.layout, config)
    common = {
        "model": loaded.identity,
        "computed": [str(loaded.model.dtype), str(loaded.model.device.type), versions()],
    }
    measures = _measures(loaded, heldout.tokens, config, start, harness)
    cells = [
        Cell(
            allocation=name,
            measure=measure.name,
            depends_on=common
            | {"allocation": allocation and allocation.decision(), "settings": measure.settings},
            size=measure.size,
            compute=partial(measure.compute, allocation),
        )
        for name, allocation in allocations.items()
        for measure in measures
    ]
    results = run_cells(cells, folder)
    how = how | {
        "model": loaded.identity,
        "heldout_sequences": len(heldout.tokens),
        "heldout_documents": len(np.unique(heldout.documents)),
        "hardware": hardware(),
        "versions": versions(),
    }
    return Table(
        start=start,
        cache_tokens=config.cache_tokens,
        lines=_lines(loaded.layout, allocations, results, heldout, config),
        how=how,
    )


@dataclass(frozen=True)
class Measure:
    """Something to measure of every allocation.

    Attributes:
        name: unique.
        settings: JSON-able, all that decides the result besides model and allocation.
        size: steps that it takes.
        compute: makes the result of an allocation; its second argument is called with steps done.
    """

    name: str
    settings: dict[str, Any]
    size: int
    compute: Callable[[Allocation | None, Callable[[int], None]], dict[str, Any]]


def _measures(
    loaded: LoadedModel, tokens: np.ndarray, config: EvalConfig, start: int, harness: Any
) -> list[Measure]:
    def losses(allocation: Allocation | None, advance: Callable[[int], None]) -> dict[str, list[float]]:
        """Mean of every sequence: of "all" positions from `start` on, and of each bucket by its first position."""
        found = heldout_losses(
            loaded.model, tokens, allocation, batch_size=config.batch_size, on_batch=advance
        )
        parts = {"all": found[:, start:]}
        parts |= {str(first): found[:, first:end] for first, end in buckets_of(found.shape[1])}
        return {part: values.mean(1, dtype=np.float64).tolist() for part, values in parts.items()}

    measures = [
        Measure(LOSSES, {"tokens": _digest(tokens.tobytes()), "start": start}, len(tokens), losses),
    ]
    for task, length in _questions(config):
        examples = questions.examples(
            task, loaded.tokenizer, length=length, count=config.examples, seed=config.seed
        )
        text = json.dumps([[example.prompt, example.answers] for example in examples])

        def answers(
            allocation: Allocation | None, advance: Callable[[int], None], examples: Any = examples
        ) -> dict[str, Any]:
            return ask(loaded, allocation, examples, batch_size=config.batch_size, on_example=advance)

        measures.append(Measure(f"{task} {length}", {"text": _digest(text.encode())}, len(examples), answers))
    limits: dict[str, Any] = {"limit": config.limit, "seed": config.seed}
    for task in config.harness_tasks:

        def scores(
            allocation: Allocation | None, advance: Callable[[int], None], task: str = task
        ) -> dict[str, float]:
            found = run_task(
                loaded, allocation, task, manager=harness, batch_size=config.batch_size, **limits
            )
            advance(1)
            return found

        settings = limits | {"lengths": config.retrieval_lengths, "lm-eval": version("lm-eval")}
        measures.append(Measure(f"lm-eval {task}", settings, 1, scores))
    return measures


def _questions(config: EvalConfig) -> list[tuple[str, int]]:
    return [(task, length) for task in config.retrieval_tasks for length in config.retrieval_lengths]


def with_ends(
    allocations: Mapping[str, Allocation | None], layout: AttentionLayout, config: EvalConfig
) -> dict[str, Allocation | None]:
    """Dense first, all-SWA at every window and number of sinks that occur, then the others as given.

    Where several occur, names say which: "all_swa 128+4".
    """
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


def _all_limits(
    allocations: Mapping[str, Allocation | None], config: EvalConfig
) -> tuple[tuple[int, int], ...]:
    """Every window and number of sinks that occurs, or those of rules."""
    given = dict.fromkeys(_limits(allocation) for allocation in allocations.values() if allocation)
    return tuple(given) or ((config.window, config.num_sink_tokens),)


def _lines(
    layout: AttentionLayout,
    allocations: Mapping[str, Allocation | None],
    results: Mapping[tuple[str, str], dict[str, Any]],
    heldout: SequenceSet,
    config: EvalConfig,
) -> tuple[Line, ...]:
    losses = {
        name: {part: np.array(values) for part, values in results[name, LOSSES].items()}
        for name in allocations
    }
    domains = np.array(heldout.domains)
    several = sorted(set(heldout.domains)) if len(set(heldout.domains)) > 1 else []
    floors = {
        _limits(allocation): losses[name]["all"].mean()
        for name, allocation in allocations.items()
        if allocation and not allocation.full_attention.any()
    }
    dense_cache = rules.dense(*layout.shape, native_windows=layout.native_windows)

    def estimate(values: np.ndarray, chosen: Any = slice(None)) -> Any:
        return bootstrap(values[chosen], heldout.documents[chosen], seed=config.seed)

    lines = []
    for name, allocation in allocations.items():
        own, dense = losses[name], losses[DENSE]
        firsts = [part for part in own if part != "all"]
        floor = max(floors.values()) if allocation is None else floors[_limits(allocation)]
        found: dict[str, dict[int, float]] = {}
        for task, length in _questions(config):
            scores = results[name, f"{task} {length}"]["scores"]
            found.setdefault(task, {})[length] = float(np.mean(scores))
        line = Line(
            name=name,
            kind=_kind_of(allocation),
            sparsity=allocation.sparsity if allocation else 0.0,
            cache_bytes=(allocation or dense_cache).kv_cache_bytes(
                config.cache_tokens, head_dim=layout.head_dim
            ),
            loss=estimate(own["all"]),
            difference=estimate(own["all"] - dense["all"]),
            recovered=recovered(own["all"].mean(), dense=dense["all"].mean(), floor=floor),
            by_position={int(part): estimate(own[part]) for part in firsts},
            differences_by_position={int(part): estimate(own[part] - dense[part]) for part in firsts},
            by_domain={domain: estimate(own["all"], domains == domain) for domain in several},
            differences_by_domain={
                domain: estimate(own["all"] - dense["all"], domains == domain) for domain in several
            },
            retrieval=found,
            tasks={
                metric: value
                for task in config.harness_tasks
                for metric, value in results[name, f"lm-eval {task}"].items()
            },
        )
        lines.append(line)
    return tuple(lines)


def _kind_of(allocation: Allocation | None) -> str:
    if allocation is None:
        return "dense"
    if not allocation.full_attention.any():
        return "all-SWA"
    return "learned" if allocation.provenance.get("method") == "consa" else "other"


def _limits(allocation: Allocation) -> tuple[int, int]:
    return allocation.window, allocation.num_sink_tokens


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
