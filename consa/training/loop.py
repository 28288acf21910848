"""The training loop of learning and adaptation: accumulate, check, update, record, keep a checkpoint."""

from __future__ import annotations

import hashlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import safetensors.torch
import torch
from torch import Tensor
from torch._dynamo.exc import TorchDynamoException
from transformers import PreTrainedModel

from consa.config import AdaptConfig, LearnConfig, MicroBatch, at_once, check_window
from consa.errors import ConsaError, first_line
from consa.files import read_sealed, read_text, write_atomically, write_sealed
from consa.model.layout import decoder_layers
from consa.model.loss import evaluating
from consa.progress import note
from consa.provenance import first_difference
from consa.training import distributed
from consa.training.objective import Objective

# Settings that may differ when a run is continued: they change nothing in the result but rounding.
FREE = {"checkpoint_every", "parallel", "rules"}

METRICS = "metrics.jsonl"
CHECKPOINT = "checkpoint.sealed"  # a safetensors file, followed by its SHA-256
OLD_CHECKPOINT = "checkpoint.safetensors"  # of consa before files were sealed; refused
MAX_METRICS_BYTES = 2**30

Record = dict[str, float]
"""The numbers of one step, by name; `step` counts from 1."""


class Checkpoint:
    """The checkpoint and metrics of a run in its folder: complete or absent, continued only at an equal fingerprint."""

    def __init__(self, folder: Path, fingerprint: Mapping[str, object]) -> None:
        self.folder = folder
        self.fingerprint = json.loads(json.dumps(fingerprint))

    def save(self, tensors: dict[str, Tensor], step: int, history: list[Record]) -> None:
        """Replace the checkpoint; `history` has a record per step. If writing fails, the previous one is complete."""
        # Metrics first: a kill between the two leaves more lines than steps, and `load` drops those.
        lines = [json.dumps(record) for record in history]
        write_atomically(self.folder / METRICS, "".join(f"{line}\n" for line in lines).encode())
        record = {"step": step, "metrics": _digest(lines), "fingerprint": self.fingerprint}
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
        content = safetensors.torch.save(tensors, {"consa": json.dumps(record)})
        write_sealed(self.folder / CHECKPOINT, content)

    def load(self) -> tuple[dict[str, Tensor], int, list[Record]] | None:
        """What the last `save` was given, or None; ConsaError if that is damaged or of another version or run."""
        path = self.folder / CHECKPOINT
        if not path.exists() and not (self.folder / OLD_CHECKPOINT).exists():
            return None
        content = read_sealed(path)
        if content is None:
            raise ConsaError(
                f"cannot continue from {path}: damaged, or written by another version of consa; delete the folder to"
                " start over"
            )
        header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
        record = json.loads(header["__metadata__"]["consa"])
        step: int = record["step"]
        lines = read_text(self.folder / METRICS, max_bytes=MAX_METRICS_BYTES).splitlines()[:step]
        if _digest(lines) != record["metrics"]:
            raise ConsaError(
                f"cannot continue from {path}: damaged (it does not match {METRICS}); delete the folder to start over"
            )
        tensors = safetensors.torch.load(content)
        difference = first_difference(record["fingerprint"], self.fingerprint)
        if difference:
            raise ConsaError(
                f"{self.folder} holds a different run ({difference}); choose another folder, or delete it to start over"
            )
        return tensors, step, [json.loads(line) for line in lines]


def _digest(lines: list[str]) -> str:
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


class Training(Protocol):
    """What is trained, and how; `train` runs its steps.

    Attributes:
        model: that computes.
        config: the run's settings; `train` puts a number in the place of an automatic micro_batch.
    """

    model: PreTrainedModel
    config: Any

    def accumulate(self, step: int) -> Record:
        """Add up the gradients of a step, counted from 0; returns its loss and the parts of it."""
        ...

    def update(self, step: int, losses: Record) -> Record:
        """Change what is trained by these gradients; returns the step's record."""
        ...

    def evaluate(self, step: int) -> Record:
        """What is measured after a step, to join its record."""
        return {}

    def discard(self) -> None:
        """Forget the gradients that `accumulate` has added up."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The whole state by name; the main process gets all of it, and every process must call it."""
        ...

    def restore(self, tensors: dict[str, Tensor]) -> None:
        """Take over what `tensors` returned in an earlier process."""
        ...


def train(
    training: Training,
    config: LearnConfig | AdaptConfig,
    *,
    seq_len: int,
    checkpoint: Checkpoint | None = None,
    on_step: Callable[[Record], None] | None = None,
) -> list[Record]:
    """Run all steps that the checkpoint has not done yet.

    Args:
        training: what is trained.
        config: has the number of steps and how often to keep a checkpoint.
        seq_len: tokens of a sequence, for the speed that is shown.
        checkpoint: where to continue from and to keep the state.
        on_step: called with each step's record.

    Returns:
        One record per step, those from the checkpoint included.

    Raises:
        ConsaError: a number is not finite, or the checkpoint is unusable or cannot be written.
    """
    start, history = 0, []
    if checkpoint and (saved := checkpoint.load()):
        tensors, start, history = saved
        training.restore(tensors)
        if distributed.is_main():
            note(f"Resuming after step {start} of {config.num_steps}")
    distributed.check_same(start, "the step to continue from (is --out a folder that all of them see?)")
    begun = history[0].get("micro_batch") if history else None
    micro_batch = int(begun or fitting_micro_batch(training, config))
    training.config = replace(training.config, micro_batch=micro_batch)
    with _finishing_steps() if checkpoint else nullcontext(lambda: False) as is_interrupted:
        for step in range(start, config.num_steps):
            began, done = time.perf_counter(), step + 1
            losses = training.accumulate(step)
            _check_finite({"step": done} | losses, config, checkpoint)
            record = training.update(step, losses) | {"micro_batch": micro_batch}
            speed = config.sequences_per_step * seq_len / (time.perf_counter() - began)
            record |= training.evaluate(step)
            _check_finite(record, config, checkpoint)
            history.append(record)
            if on_step:
                on_step(record | {"tokens_per_second": speed})
            stop = is_interrupted()
            if checkpoint and (stop or done % config.checkpoint_every == 0 or done == config.num_steps):
                save(checkpoint, training, history)
            if stop:
                raise KeyboardInterrupt
    return history


def fitting_micro_batch(training: Training, config: LearnConfig | AdaptConfig) -> int:
    """The micro_batch of the config, or if it is automatic the largest whose step fits in memory on every process.

    That is found by trying powers of two that divide a process's sequences of a step, the largest first. Layers that
    are sharded cannot be tried by one process alone, and take 1. How many sequences are computed at once can change the
    last bits of a result.
    """
    sharded = config.parallel == "fsdp" and distributed.world_size() > 1
    if sharded or not is_automatic(config.micro_batch, training.model.device):
        return at_once(config.micro_batch)
    own = config.sequences_per_step // distributed.world_size()
    size = own & -own  # the largest power of two that divides it
    while size > 1 and not _fits(training, size):
        size //= 2
    smallest = int(distributed.all_gather(torch.tensor([size])).min())
    if distributed.is_main():
        note(f"Computing {smallest} sequences at once, the most that fit in memory")
    return smallest


def is_automatic(micro_batch: MicroBatch, device: torch.device) -> bool:
    """Whether the number of sequences computed at once is found by trying: where that is asked for, and on a GPU."""
    return micro_batch == "auto" or (micro_batch is None and device.type == "cuda")


def _fits(training: Training, size: int) -> bool:
    """Whether the gradients of `size` sequences at once fit in memory."""
    config = training.config
    training.config = replace(config, sequences_per_step=size, micro_batch=size)
    try:
        with distributed.alone():
            training.accumulate(0)
    except torch.OutOfMemoryError:
        return False
    finally:
        training.config = config
        training.discard()
        torch.cuda.empty_cache()
    return True


@contextmanager
def _finishing_steps() -> Iterator[Callable[[], bool]]:
    """Within the block, Ctrl-C waits for the end of a step; a second one does not. Yields whether it was pressed.

    It does not wait in threads, under a caller's own handler, or in one of several processes, which stop at different
    steps.
    """
    is_own = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if not is_own or threading.current_thread() is not threading.main_thread() or distributed.world_size() > 1:
        yield lambda: False
        return
    pressed: list[int] = []

    def press(number: int, frame: object) -> None:
        pressed.append(number)
        if len(pressed) > 1:
            raise KeyboardInterrupt

    signal.signal(signal.SIGINT, press)
    try:
        yield lambda: bool(pressed)
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def save(checkpoint: Checkpoint, training: Training, history: list[Record]) -> None:
    """Keep the state after the last step of `history`; every process must call it, the main one writes."""
    tensors = training.tensors()
    if distributed.is_main():
        checkpoint.save(tensors, len(history), history)


@contextmanager
def prepared(model: PreTrainedModel, *, gradient_checkpointing: bool = False, compile: bool = False) -> Iterator[None]:
    """Choose deterministic kernels, recompute layers in the backward pass, compile layers (ConsaError if they cannot).

    On exit all of that is undone, and changes of requires_grad.
    """
    wanted = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    deterministic = torch.are_deterministic_algorithms_enabled()
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    settings: Any = torch.utils.deterministic
    fill = settings.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    settings.fill_uninitialized_memory = False  # costs time and protects from nothing here
    try:
        # No dropout: train the model as it will be used.
        with (
            evaluating(model),
            _recomputing(model) if gradient_checkpointing else nullcontext(),
            _compiled(decoder_layers(model) if compile else []),
        ):
            yield
    finally:
        torch.use_deterministic_algorithms(deterministic, warn_only=warn_only)
        settings.fill_uninitialized_memory = fill
        for parameter, required in wanted:
            parameter.requires_grad_(required)


@contextmanager
def _recomputing(model: PreTrainedModel) -> Iterator[None]:
    """Within the block layers keep only their inputs and are computed again in the backward pass."""
    modules = [module for module in model.modules() if hasattr(module, "gradient_checkpointing")]
    before = any(module.gradient_checkpointing for module in modules)
    # Before transformers 5.23 it was called gradient checkpointing, a name that 6 drops.
    word = "activation" if hasattr(model, "activation_checkpointing_enable") else "gradient"
    settings = {f"{word}_checkpointing_kwargs": {"use_reentrant": False}}
    getattr(model, f"{word}_checkpointing_enable")(**settings)
    for module in modules:  # transformers recomputes only in modules in training mode
        module.training = True
    try:
        yield
    finally:
        if not before:
            getattr(model, f"{word}_checkpointing_disable")()


@contextmanager
def _compiled(layers: list[Any]) -> Iterator[None]:
    """Within the block these modules run compiled; a forward that a hook has set is put back afterwards."""
    own = [layer.__dict__.get("forward") for layer in layers]
    for layer in layers:
        layer.forward = torch.compile(layer.forward, dynamic=False)
    try:
        yield
    except TorchDynamoException as error:
        cause = getattr(error, "inner_exception", None) or error
        raise ConsaError(
            f"layers cannot be compiled: {first_line(cause)}; leave compile out. On a CPU it needs g++, and torch"
            " in a path without spaces"
        ) from error
    finally:
        for layer, forward in zip(layers, own, strict=True):
            if forward is None:
                del layer.forward
            else:
                layer.forward = forward


def generator(seed: int, purpose: str) -> torch.Generator:
    """A generator that depends only on its arguments, so that a resumed run draws the same numbers."""
    digest = np.random.SeedSequence([seed, *purpose.encode()]).generate_state(1, np.uint64)[0]
    return torch.Generator().manual_seed(int(digest) % 2**63)


def check(config: LearnConfig | AdaptConfig, sequences: np.ndarray, *, window: int, num_sink_tokens: int) -> None:
    """Raise ConsaError if no text lies beyond window and sinks, or a step's sequences do not divide over processes."""
    if not isinstance(sequences, np.ndarray) or sequences.ndim != 2:
        raise ConsaError(
            "sequences must be a numpy array of tokens (num_sequences, seq_len), got"
            f" {type(sequences).__name__} of shape {tuple(getattr(sequences, 'shape', ()))}"
        )
    if len(sequences) == 0 or sequences.shape[1] < 2:
        raise ConsaError(f"no training text: got sequences of shape {sequences.shape}; give longer or more documents")
    check_window(window, num_sink_tokens, sequences.shape[1])
    distributed.check_divides(config.sequences_per_step, config.micro_batch)


def _check_finite(record: Record, config: LearnConfig | AdaptConfig, checkpoint: Checkpoint | None) -> None:
    """Raise ConsaError if training has diverged, before anything is kept of a step."""
    folder = checkpoint.folder if checkpoint else None
    for name, value in record.items():
        if not math.isfinite(value):
            kept = folder and (folder / CHECKPOINT).exists()
            rates = "gate_lr or weight_lr" if isinstance(config, LearnConfig) else "learning_rate"
            raise ConsaError(
                f"the {name} became {value} at step {record['step']};"
                f"{f' the last good checkpoint is kept in {folder};' if kept else ''} lower {rates}"
                f"{' and choose another folder' if folder else ''}, or compute in float32"
            )


def checkpoint_of(
    run_dir: Path | None,
    config: LearnConfig | AdaptConfig,
    sequences: np.ndarray,
    identity: dict[str, str] | None,
    **decided: Any,
) -> Checkpoint | None:
    """The checkpoint of a run in its folder (None: no checkpoint), which only a run with the same result continues.

    That is: with the same settings, text and identity of the model, and what else is `decided`, JSON-able.
    """
    if run_dir is None:
        return None
    text = hashlib.sha256(np.ascontiguousarray(sequences).tobytes()).hexdigest()
    settings = {f.name: getattr(config, f.name) for f in fields(config) if f.name not in FREE}
    return Checkpoint(run_dir, {"config": settings, "model": identity, "sequences": text} | decided)


def described(*replaced: object) -> dict[str, list[str]]:
    """For records, the objects that a caller handed in instead of the defaults, by name; empty if all are None."""
    names: list[str] = []
    for part in (part for part in replaced if part is not None):
        name = getattr(part, "__qualname__", type(part).__qualname__)
        if isinstance(part, Objective):
            name += f"({', '.join(f'{key}={factor}' for key, factor in part.factors.items())})"
        names.append(name)
    return {"replaced": names} if names else {}
