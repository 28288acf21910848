"""A run: load, learn or adapt, measure, write the folder. What `consa learn`, `consa demo` and `consa adapt` share."""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from consa.training import distributed, loop
from consa.runs import inputs, summary
from consa import rules
from consa.training.adaptation import adapt, check_lora
from consa.allocation import Allocation
from consa.model.convert import convert
from consa.config import AdaptConfig, LearnConfig, RunConfig
from consa.errors import ConsaError, missing_extra
from consa.evaluation.losses import compare, heldout_losses, load_losses, recovered, sampled_losses, save_losses
from consa.files import write_atomically, write_json
from consa.training.learning import LearnResult, learn, target_units, units_of
from consa.model.load import LoadedModel, read_layout
from consa.model.layout import check_fits
from consa.progress import Display, note, progress
from consa.provenance import hardware, versions
from consa.runs import figures
from consa.runs.folder import CONFIG, check_same, claimed

# What may differ when a run is continued: none of these changes what is learned.
FREE = {"num_heldout", "start", *loop.FREE}
MOST_FRACTIONAL = 0.2  # share of undecided gates that is worth a word


def run_learning(
    where: RunConfig, config: LearnConfig, folder: Path, *, command: str, tensorboard: bool = False
) -> dict[str, Any]:
    """Learn an allocation, measure it beside dense, all-SWA and every rule, and write all of it to `folder`.

    Killed at any moment and called again with the same arguments, it goes on where it was.

    Args:
        where: model, text and what else the run needs besides the learning's settings.
        config: the learning's settings.
        folder: for the results; one process at a time.
        command: that does the same again, for the record.
        tensorboard: also write the metrics for TensorBoard.

    Returns:
        What summary.json holds; nothing in the other processes of a distributed run.

    Raises:
        ConsaError: something the caller can mend; what is wrong is found before long work where that is possible.
    """
    start = where.start_for(config)
    _check_before_loading(where, tensorboard)
    settings = {"run": asdict(where), "learn": asdict(config)}
    with _joined(where, config, folder, settings):
        loaded = inputs.load(where)
        units = units_of(loaded.layout, config.granularity)
        sparsity = 1 - target_units(loaded.layout, config) / units.count  # finds a budget that is too small
        train = inputs.training_text(where, config.seq_len, loaded)
        heldout = inputs.heldout_text(where, config.seq_len, loaded)
        _say_if_few(len(train.tokens), config)
        record = _record(settings, command, folder)
        began = time.monotonic()
        board = folder / "tensorboard" if tensorboard else None
        with Display("Learning", config.num_steps, _learning_text, board) as shown:
            on_exchange = partial(shown.on_exchange, config.refine_evaluations)
            result = learn(
                loaded.model,
                train.tokens,
                config,
                identity=loaded.identity,
                run_dir=folder,
                on_step=shown.on_step if distributed.is_main() else None,
                on_exchange=on_exchange if distributed.is_main() else None,
            )
        if not distributed.is_main():
            return {}
        learned = time.monotonic()
        _save_learned(result, folder)
        losses = _measure(
            loaded,
            heldout.tokens,
            _competitors(loaded, config, sparsity) | {"learned": result.allocation},
            folder,
            batch_size=config.micro_batch,
            weights=asdict(config) if config.mode == "joint" else None,
            sampled=bool(result.history),
        )
        sampled = losses.pop("sampled", None)
        comparison = compare(losses, start=start)
        last = result.history[-1] if result.history else {}
        if last.get("fractional", 0) > MOST_FRACTIONAL:
            note(
                f"Undecided: {last['fractional']:.0%} of the gates; take more steps, or read the result with care"
            )
        found = {
            "losses": {
                "dense": comparison.rows[0].loss,
                "stochastic": None if sampled is None else float(sampled[1][:, start:].mean()),
                "final": comparison.rows[-1].loss,
            },
            "expected_sparsity": last.get("expected_sparsity"),
            "fractional": last.get("fractional"),
            "seconds": _seconds("learning", began, learned),
        }
        shared = summary.measured(loaded.identity, result.allocation, config, heldout, comparison)
        whole = shared | found | record
        _write_summary(folder, whole, summary.of_learning(whole))
        if config.mode == "joint":
            _convert(loaded, result.allocation, folder / "model", kind="hybrid")
    return whole


def run_adaptation(
    where: RunConfig,
    allocation: Allocation,
    config: AdaptConfig,
    folder: Path,
    *,
    command: str,
    tensorboard: bool = False,
) -> dict[str, Any]:
    """Adapt a model to an allocation, measure it beside dense, all-SWA and the hybrid as it was, and write `folder`.

    Killed at any moment and called again with the same arguments, it goes on where it was.

    Args:
        where: model, text and what else the run needs besides the training's settings. The model may be a converted
            hybrid: its weights count, not its allocation.
        allocation: made for the model.
        config: the training's settings.
        folder: for the results; the trained hybrid is in `model`.
        command: that does the same again, for the record.
        tensorboard: also write the metrics for TensorBoard.

    Returns:
        What summary.json holds; nothing in the other processes of a distributed run.

    Raises:
        ConsaError: something the caller can mend; what is wrong is found before long work where that is possible.
    """
    limits: dict[str, Any] = {"window": allocation.window, "num_sink_tokens": allocation.num_sink_tokens}
    start = where.start_for(LearnConfig(seq_len=config.seq_len, **limits))
    _check_before_loading(where, tensorboard)
    settings = {"run": asdict(where), "adapt": asdict(config), "allocation": allocation.decision()}
    with _joined(where, config, folder, settings):
        with distributed.main_first():
            layout = read_layout(where.model)
        check_fits(allocation, layout, where.model)
        loaded = inputs.load(where)
        check_lora(loaded.model, config)
        train = inputs.training_text(where, config.seq_len, loaded)
        heldout = inputs.heldout_text(where, config.seq_len, loaded)
        _say_if_few(len(train.tokens), config)
        record = _record(settings, command, folder)
        measure = partial(_measure, loaded, heldout.tokens, folder=folder, batch_size=config.micro_batch)
        losses, means = {}, {}
        if distributed.is_main():
            allocation.save(folder / "allocation.json")
            all_swa = rules.all_swa(
                *layout.shape,
                window=allocation.window,
                num_sink_tokens=allocation.num_sink_tokens,
                native_windows=layout.native_windows,
            )
            losses = measure({"dense": None, "all_swa": all_swa, "hybrid": allocation})
            means = {name: float(values[:, start:].mean()) for name, (_, values) in losses.items()}

        def evaluate(hybrid: PreTrainedModel) -> dict[str, float]:
            found = heldout_losses(hybrid, heldout.tokens, batch_size=config.micro_batch)
            if not means:  # another process than the main one: it computes along where layers are sharded
                return {}
            mean, dense, floor = float(found[:, start:].mean()), means["dense"], means["all_swa"]
            closed = recovered(mean, dense=dense, floor=floor)
            return {"heldout_loss": mean} | ({"recovered": closed} if math.isfinite(closed) else {})

        began = time.monotonic()
        board = folder / "tensorboard" if tensorboard else None
        with Display("Adapting", config.num_steps, _adaptation_text, board) as shown:
            history = adapt(
                loaded.model,
                train.tokens,
                allocation,
                config,
                identity=loaded.identity,
                run_dir=folder,
                evaluate=evaluate,
                on_step=shown.on_step if distributed.is_main() else None,
            )
        if not distributed.is_main():
            return {}
        adapted = time.monotonic()
        figures.adaptation_curves(history, means, folder / "curves.png")
        losses |= measure({"adapted": allocation}, weights=asdict(config))
        _convert(loaded, allocation, folder / "model")
        shared = summary.measured(loaded.identity, allocation, config, heldout, compare(losses, start=start))
        whole = shared | {"seconds": _seconds("adapting", began, adapted)} | record
        _write_summary(folder, whole, summary.of_adaptation(whole))
    return whole


@contextmanager
def _joined(
    where: RunConfig, config: LearnConfig | AdaptConfig, folder: Path, settings: dict[str, Any]
) -> Iterator[None]:
    """Join the job's other processes; the main one holds the folder, after making sure that it is this run's."""
    with distributed.group(where.device), claimed(folder) if distributed.is_main() else nullcontext():
        distributed.check_divides(config.sequences_per_step, config.micro_batch)
        if distributed.is_main():
            check_same(folder, settings, _without_free, kind="run")
        yield


def _say_if_few(num_sequences: int, config: LearnConfig | AdaptConfig) -> None:
    times = config.num_steps * config.sequences_per_step / num_sequences
    if times > 1 and distributed.is_main():
        note(f"Little text: each training sequence is used {times:.1f} times")


def _record(settings: dict[str, Any], command: str, folder: Path) -> dict[str, Any]:
    """What the run is and computes on; the main process keeps it in the folder."""
    record = settings | {"command": command, "hardware": hardware(), "versions": versions()}
    if distributed.is_main():
        write_json(folder / CONFIG, record)
    return record


def _check_before_loading(where: RunConfig, tensorboard: bool) -> None:
    if tensorboard and not find_spec("tensorboard"):
        raise missing_extra("tensorboard", "tensorboard")
    inputs.check(where)


def _convert(loaded: LoadedModel, allocation: Allocation, folder: Path, *, kind: Any = "auto") -> None:
    """Write the converted model, unless this very run has done so before."""
    if not folder.exists():
        convert(loaded.model, allocation, folder, tokenizer=loaded.tokenizer, kind=kind)


def _without_free(settings: dict[str, Any]) -> dict[str, Any]:
    return {
        part: {key: value for key, value in values.items() if key not in FREE}
        for part, values in settings.items()
    }


def _learning_text(record: dict[str, float]) -> str:
    sparsity = f"sparsity {record['expected_sparsity']:.3f} (target {record['target']:.3f})"
    return f"{sparsity}, multiplier {record['multiplier']:.2f}"


def _adaptation_text(record: dict[str, float]) -> str:
    heldout = f"held-out {record['heldout_loss']:.3f}, " if "heldout_loss" in record else ""
    return f"{heldout}gradient {record['grad_norm']:.2f}, learning rate {record['learning_rate']:.1e}"


def _competitors(loaded: LoadedModel, config: LearnConfig, sparsity: float) -> dict[str, Allocation | None]:
    """What the learned allocation is measured against; None is the model as it is."""
    shape = loaded.layout.shape
    options: dict[str, Any] = {
        "window": config.window,
        "num_sink_tokens": config.num_sink_tokens,
        "native_windows": loaded.layout.native_windows,
        "granularity": config.granularity,
    }
    ends = {"dense": None, "all_swa": rules.all_swa(*shape, **options)}
    return ends | rules.every_rule(*shape, sparsity=sparsity, **options)


def _measure(
    loaded: LoadedModel,
    tokens: np.ndarray,
    allocations: dict[str, Allocation | None],
    folder: Path,
    *,
    batch_size: int,
    weights: dict[str, Any] | None = None,
    sampled: bool = False,
) -> dict[str, tuple[float, np.ndarray]]:
    """Sparsity and held-out losses of every allocation, and of sampled gates; what the folder holds is not redone.

    `weights` says how the model was trained, if it was.
    """
    jobs = {
        name: partial(heldout_losses, allocation=allocation, batch_size=batch_size)
        for name, allocation in allocations.items()
    }
    named = dict(allocations)
    if sampled and (learned := allocations["learned"]):
        named["sampled"] = learned
        jobs["sampled"] = partial(sampled_losses, allocation=learned, batch_size=batch_size)
    common = {
        "model": loaded.identity,
        "computed": [str(loaded.model.dtype), str(loaded.model.device.type), versions()],
        "tokens": hashlib.sha256(np.ascontiguousarray(tokens).tobytes()).hexdigest(),
        "weights": weights,
    }
    paths, found = {}, {}
    for name, allocation in named.items():
        described = common | (allocation.decision() if allocation else {})
        if name == "sampled" and allocation and allocation.scores is not None:
            described["scores"] = allocation.scores.tolist()
        digest = hashlib.sha256(json.dumps([described, name == "sampled"]).encode()).hexdigest()
        paths[name] = folder / "heldout" / f"{name}-{digest[:16]}.npy"
        values = load_losses(paths[name], (len(tokens), tokens.shape[1] - 1))
        if values is not None:
            found[name] = values
    missing = [name for name in jobs if name not in found]
    done = 0
    with progress("Measuring", len(missing) * len(tokens)) as update:
        for name in missing:

            def on_batch(count: int, name: str = name) -> None:
                nonlocal done
                done += count
                update(done, name)

            found[name] = jobs[name](loaded.model, tokens, on_batch=on_batch)
            if not np.isfinite(found[name]).all():
                raise ConsaError(
                    f"{name} has held-out losses that are not finite; use float32 or train at lower rates"
                )
            save_losses(paths[name], found[name])
    return {
        name: (allocation.sparsity if allocation else 0.0, found[name]) for name, allocation in named.items()
    }


def _save_learned(result: LearnResult, folder: Path) -> None:
    result.allocation.save(folder / "allocation.json")
    figures.heatmap(result.allocation, folder / "heatmap.png")
    if result.history:
        figures.curves(result.history, folder / "curves.png")


def _seconds(name: str, began: float, ended: float) -> dict[str, float]:
    """How long this process took for the loop, and since its end."""
    return {name: round(ended - began, 1), "evaluation": round(time.monotonic() - ended, 1)}


def _write_summary(folder: Path, found: dict[str, Any], markdown: str) -> None:
    write_json(folder / "summary.json", found)
    # A path may hold bytes that are no text.
    write_atomically(folder / "summary.md", markdown.encode(errors="backslashreplace"))
