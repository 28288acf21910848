"""A learning run: learn an allocation, measure it beside dense, all-SWA and the rules, write the folder."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np

from consa import rules
from consa.allocation import Allocation
from consa.config import LearnConfig, RunConfig
from consa.data.sequences import SequenceSet
from consa.evaluation.cells import Results
from consa.evaluation.losses import LOSSES, SAMPLED, sampled
from consa.evaluation.suite import Suite
from consa.evaluation.table import Table
from consa.files import JsonObject, png, write_files
from consa.model.convert import convert
from consa.model.load import LoadedModel
from consa.runs import card, figures, inputs, summary
from consa.runs.display import Display, Record, check_boards
from consa.runs.evaluation import as_measured
from consa.runs.folder import opened, record_settings
from consa.runs.summary import Summary
from consa.runs.verdict import LEARNED, against_best_rule
from consa.training import distributed
from consa.training.learning import LearnResult, learn, target_units, units_of


def run_learning(
    where: RunConfig, config: LearnConfig, folder: Path, *, command: str, boards: Collection[str] = ()
) -> Summary | None:
    """Learn an allocation, measure it beside dense, all-SWA and rules, and write all of it to `folder`.

    An interrupted run resumes from its last checkpoint when it is called with the same arguments.

    Args:
        where: model, text and other settings of the run.
        config: settings of learning.
        folder: for the results; one process at a time may use it.
        command: the command line that does the same again, for the record.
        boards: what else takes the metrics, by names in `display.BOARDS`.

    Returns:
        What summary.json holds; None in the other processes of a distributed run.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    measured = as_measured(config, config)
    start = where.start_for(measured)
    check_boards(boards)
    inputs.check(where)
    settings = {"run": asdict(where), "learn": asdict(config)}
    with opened(where, config, folder, settings):
        loaded = inputs.load(where, seq_len=config.seq_len)
        units = units_of(loaded.layout, config.granularity)
        sparsity = 1 - target_units(loaded.layout, config) / units.count  # raises for a budget that is too small
        train = inputs.training_text(where, config.seq_len, loaded)
        heldout = inputs.heldout_text(where, config.seq_len, loaded)
        inputs.warn_if_repeated(len(train.tokens), config)
        record = record_settings(settings, command, folder)
        began = time.monotonic()
        with Display("Learning", config.num_steps, _describe, folder, boards) as shown:
            is_main = distributed.is_main()
            result = learn(
                loaded.model,
                train.tokens,
                config,
                identity=loaded.identity,
                tokenizer=loaded.tokenizer,
                run_dir=folder,
                on_step=shown.on_step if is_main else None,
                on_exchange=partial(shown.on_exchange, config.refine_evaluations) if is_main else None,
            )
        if not distributed.is_main():
            return None
        learned = time.monotonic()
        result.allocation.save(folder / "allocation.json")
        drawn = {"heatmap.png": figures.heatmap(result.allocation)}
        drawn |= {"curves.png": figures.curves(result.history)} if result.history else {}
        write_files(folder, {name: png(figure) for name, figure in drawn.items()})
        suite = Suite(loaded=loaded, heldout=heldout, config=measured, folder=folder, start=start)
        table, results = _measure(suite, result, config, sparsity)
        last = result.history[-1] if result.history else {}
        seconds = summary.seconds_since("learning", began, learned)
        whole = summary.summarise(loaded.identity, result.allocation, config, heldout, table, seconds, record)
        dense, final = table.lines[0].loss.mean, table.line(LEARNED).loss.mean
        stochastic = results.get((LEARNED, SAMPLED))
        whole["losses"] = {
            "dense": dense,
            "stochastic": None if stochastic is None else float(np.mean(stochastic["all"])),
            "final": final,
        }
        whole["expected_sparsity"] = last.get("expected_sparsity")
        whole["fractional"] = last.get("fractional")
        whole["margin"] = result.allocation.margin
        whole["best_rule"] = _against_best_rule(results, heldout)
        summary.write(whole, summary.of_learning(whole, folder), folder)
        if config.mode == "joint" and not (folder / "model").exists():
            convert(loaded.model, result.allocation, folder / "model", tokenizer=loaded.tokenizer, kind="hybrid")
            card.write(folder / "model", where.model, allocation=str(folder))
    return whole


def _measure(suite: Suite, result: LearnResult, config: LearnConfig, sparsity: float) -> tuple[Table, Results]:
    """The table and its results, with the losses of sampled gates if gates were learned."""
    learned, loaded, tokens = result.allocation, suite.loaded, suite.heldout.tokens
    allocations = suite.with_ends(_rules(loaded, config, sparsity) | {LEARNED: learned})
    gates = sampled(loaded, tokens, learned, start=suite.start, batch_size=suite.config.batch_size)
    results = suite.measure(
        allocations,
        also={LEARNED: gates} if result.history else None,
        trained=asdict(config) if config.mode == "joint" else None,
    )
    if config.rules == "best" and (compared := _against_best_rule(results, suite.heldout)):
        others = rules.RULES.keys() - {compared["rule"]}
        allocations = {name: allocation for name, allocation in allocations.items() if name not in others}
    return suite.table(allocations, results, how={}, made=LEARNED), results


def _against_best_rule(results: Results, heldout: SequenceSet) -> JsonObject | None:
    losses = {name: np.array(result["all"]) for (name, measure), result in results.items() if measure == LOSSES}
    return against_best_rule(losses, heldout.documents)


def _rules(loaded: LoadedModel, config: LearnConfig, sparsity: float) -> dict[str, Allocation]:
    """The rule-based allocations that the learned one is compared with."""
    if config.rules == "none":
        return {}
    return rules.every_rule(
        *loaded.layout.shape,
        sparsity=sparsity,
        granularity=config.granularity,
        window=config.window,
        num_sink_tokens=config.num_sink_tokens,
        native_windows=loaded.layout.native_windows,
    )


def _describe(record: Record) -> str:
    return f"sparsity {record['expected_sparsity']:.3f}"
