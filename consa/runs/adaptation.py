"""An adaptation run: train a hybrid, measure it beside dense, all-SWA and the untrained hybrid, write the folder."""

from __future__ import annotations

import math
import time
from collections.abc import Collection
from dataclasses import asdict
from functools import partial
from pathlib import Path

import numpy as np
from transformers import PreTrainedModel

from consa.allocation import Allocation
from consa.config import AdaptConfig, RunConfig
from consa.evaluation.losses import LOSSES, heldout_losses, recovered
from consa.evaluation.suite import ALL_SWA, DENSE, Suite
from consa.files import png, write_files
from consa.model.convert import convert
from consa.model.layout import check_fits
from consa.model.load import read_layout
from consa.runs import card, figures, inputs, summary
from consa.runs.display import Display, Record, check_boards
from consa.runs.evaluation import as_measured
from consa.runs.folder import opened, record_settings
from consa.runs.summary import Summary
from consa.training import distributed
from consa.training.adaptation import adapt
from consa.training.lora import check_lora

HYBRID, ADAPTED = "hybrid", "adapted"  # names of the hybrid in the table, before and after training


def run_adaptation(
    where: RunConfig,
    allocation: Allocation,
    config: AdaptConfig,
    folder: Path,
    *,
    command: str,
    boards: Collection[str] = (),
) -> Summary | None:
    """Train a model under an allocation, measure it beside dense, all-SWA and the untrained hybrid, write `folder`.

    An interrupted run resumes from its last checkpoint when it is called with the same arguments.

    Args:
        where: model, text and other settings of the run. Of a converted hybrid the weights count, not the allocation.
        allocation: made for the model.
        config: settings of the training.
        folder: for the results; the trained hybrid is written to its folder `model`.
        command: the command line that does the same again, for the record.
        boards: what else takes the metrics, by names in `display.BOARDS`.

    Returns:
        What summary.json holds; None in the other processes of a distributed run.

    Raises:
        ConsaError: an error that the caller can fix; it is found before long work where that is possible.
    """
    measured = as_measured(config, allocation)
    start = where.start_for(measured)
    check_boards(boards)
    inputs.check(where)
    settings = {"run": asdict(where), "adapt": asdict(config), "allocation": allocation.decision()}
    with opened(where, config, folder, settings):
        with distributed.main_first():
            layout = read_layout(where.model)
        check_fits(allocation, layout, where.model)
        loaded = inputs.load(where, seq_len=config.seq_len)
        check_lora(loaded.model, config)
        train = inputs.training_text(where, config.seq_len, loaded)
        heldout = inputs.heldout_text(where, config.seq_len, loaded)
        inputs.warn_if_repeated(len(train.tokens), config)
        record = record_settings(settings, command, folder)
        suite = Suite(loaded=loaded, heldout=heldout, config=measured, folder=folder, start=start)
        before = suite.with_ends({HYBRID: allocation})
        results, means = {}, {}
        if distributed.is_main():
            allocation.save(folder / "allocation.json")
            results = suite.measure(before)
            means = {name: float(np.mean(results[name, LOSSES]["all"])) for name in before}
        began = time.monotonic()
        with Display("Adapting", config.num_steps, _describe, folder, boards) as shown:
            history = adapt(
                loaded.model,
                train.tokens,
                allocation,
                config,
                identity=loaded.identity,
                tokenizer=loaded.tokenizer,
                run_dir=folder,
                evaluate=partial(_evaluate, suite, means),
                on_step=shown.on_step if distributed.is_main() else None,
            )
        if not distributed.is_main():
            return None
        adapted = time.monotonic()
        write_files(folder, {"curves.png": png(figures.adaptation_curves(history, means))})
        results |= suite.measure({ADAPTED: allocation}, trained=asdict(config))
        table = suite.table({**before, ADAPTED: allocation}, results, how={}, made=ADAPTED)
        seconds = summary.seconds_since("adapting", began, adapted)
        whole = summary.summarise(loaded.identity, allocation, config, heldout, table, seconds, record)
        summary.write(whole, summary.of_adaptation(whole), folder)
        if not (folder / "model").exists():
            convert(loaded.model, allocation, folder / "model", tokenizer=loaded.tokenizer)
            card.write(folder / "model", where.model, allocation=str(folder))
    return whole


def _evaluate(suite: Suite, means: dict[str, float], hybrid: PreTrainedModel) -> Record:
    """Held-out loss of the hybrid in training; `means` holds the other losses, on the main process."""
    losses = heldout_losses(hybrid, suite.heldout.tokens, batch_size=suite.config.batch_size)
    if not means:  # another process computes as well because layers may be sharded
        return {}
    mean = float(losses[:, suite.start :].mean(dtype=np.float64))
    closed = recovered(mean, dense=means[DENSE], floor=means[ALL_SWA])
    return {"heldout_loss": mean} | ({"recovered": closed} if math.isfinite(closed) else {})


def _describe(record: Record) -> str:
    return f"held-out {record['heldout_loss']:.3f}" if "heldout_loss" in record else ""
