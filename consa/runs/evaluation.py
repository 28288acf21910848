"""An evaluation run, which `consa eval` starts: load, measure, write the table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from consa.allocation import Allocation
from consa.config import AdaptConfig, EvalConfig, LearnConfig, RunConfig, at_once
from consa.evaluation import harness
from consa.evaluation.suite import Suite, file_of, named, start_of
from consa.evaluation.table import Table
from consa.files import JsonObject, write_json
from consa.model.load import LoadedModel, read_layout
from consa.progress import note
from consa.runs import inputs
from consa.runs.folder import CONFIG, check_free

SETTINGS = "eval-config.json"


def run_evaluation(
    where: RunConfig,
    config: EvalConfig,
    names: Sequence[str],
    folder: Path,
    *,
    command: str,
    follow_files: bool = False,
) -> tuple[Table, list[Path]]:
    """Measure allocations beside dense and all-SWA, and write the table; an interrupted run resumes when called again.

    Args:
        where: model and text.
        config: what is measured.
        names: of allocations, as `suite.named` takes them.
        folder: for the results.
        command: the command line that does the same again, for the record.
        follow_files: measure rules at window and sinks of the allocations' files, if these agree.

    Returns:
        The table and the files it was written to.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    inputs.check(replace(where, data=where.heldout_data or where.data))  # no training text is needed
    layout = read_layout(where.model)
    found = [name for name in names if (file_of(name, where.model) or Path()).suffix == ".json"]
    files = [named(name, where.model, layout, config) for name in found]
    limits = {(one.window, one.num_sink_tokens) for one in files if one}
    if follow_files and len(limits) == 1:
        ((window, sinks),) = limits
        config = replace(config, window=window, num_sink_tokens=sinks)
    elif len(limits | {(config.window, config.num_sink_tokens)}) > 1:
        note("Windows or sink tokens differ: compare only rows whose names end in the same ones")
    allocations = {name: named(name, where.model, layout, config) for name in dict.fromkeys(names)}
    start = start_of(where, config, allocations)
    if not any((folder / name).exists() for name in (SETTINGS, CONFIG)):  # the folder of a run is fine
        check_free(folder)
    settings: JsonObject = {
        "run": asdict(where),
        "eval": asdict(config),
        "allocations": list(names),
        "command": command,
    }
    suite = suite_for(where, config, folder, start=start)
    write_json(folder / SETTINGS, settings)
    table = suite.evaluate(allocations, settings)
    return table, table.write(folder)


def suite_for(where: RunConfig, config: EvalConfig, folder: Path, *, start: int) -> Suite:
    """Load what allocations are measured on."""
    loaded = load(where, config)
    manager = harness.find(config, loaded)
    heldout = inputs.heldout_text(where, config.seq_len, loaded)
    return Suite(loaded=loaded, heldout=heldout, config=config, folder=folder, start=start, manager=manager)


def as_measured(config: LearnConfig | AdaptConfig, limits: LearnConfig | Allocation) -> EvalConfig:
    """How a run with these settings measures allocations with the window and sinks of `limits`."""
    return EvalConfig(
        seq_len=config.seq_len,
        granularity=limits.granularity,
        window=limits.window,
        num_sink_tokens=limits.num_sink_tokens,
        batch_size=at_once(config.micro_batch),
    )


def load(where: RunConfig, config: EvalConfig) -> LoadedModel:
    """Load the model, and check that it has enough positions for what is measured."""
    asked = {"seq_len": config.seq_len}
    if config.retrieval_tasks or any(task.startswith(("niah", "ruler")) for task in config.harness_tasks):
        asked["lengths"] = max(config.retrieval_lengths)
    return inputs.load(where, **asked)
