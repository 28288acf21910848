"""Continued training of a hybrid: its allocation stays, its weights learn to live with sliding windows."""

from __future__ import annotations

import copy
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import PreTrainedModel
from transformers.integrations.peft import MIN_PEFT_VERSION
from transformers.utils.peft_utils import check_peft_version

from consa.allocation import Allocation
from consa.config import AdaptConfig, words_of
from consa.errors import ConsaError, missing_extra
from consa.files import write_atomically
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import quiet
from consa.model.plan import Plan
from consa.training import distributed, loop
from consa.training.resume import Checkpoint

ADAPTER = "adapter"  # folder, in the format of peft
EVERY_LINEAR = "all-linear"  # peft's word for all linear layers but the output layer


def adapt(
    model: PreTrainedModel,
    sequences: np.ndarray,
    allocation: Allocation,
    config: AdaptConfig,
    *,
    identity: dict[str, str] | None = None,
    run_dir: Path | None = None,
    evaluate: Callable[[PreTrainedModel], dict[str, float]] | None = None,
    on_step: Callable[[dict[str, float]], None] | None = None,
) -> list[dict[str, float]]:
    """Train `model` under `allocation`; it keeps the weights it ends with, LoRA's additions merged.

    The dense model that distillation follows is the one given: a frozen copy of it, or with LoRA the same weights with
    additions off and full attention everywhere.

    Args:
        model: a causal language model of transformers. What computes in bfloat16 is trained on float32 masters.
        sequences: int tokens `(num_sequences, seq_len)`, each from one document.
        allocation: which KV heads keep full attention.
        config: the run's settings.
        identity: of the model, for the checkpoint's fingerprint.
        run_dir: where to keep checkpoints and metrics.jsonl, and with LoRA the folder `adapter`; a run killed at any
            moment and started again with the same arguments goes on from there and ends with the same weights, bit
            for bit, on the same machine and number of processes.
        evaluate: called with the hybrid every `evaluate_every` steps and after the last; its numbers join the record.
        on_step: called with each step's record.

    Returns:
        One record per step: step, loss and its parts, learning_rate, grad_norm, and what `evaluate` said.

    Raises:
        ConsaError: unusable settings or text, a loss that is not finite, or a folder that cannot be written.
    """
    loop.check(config, sequences, window=allocation.window, num_sink_tokens=allocation.num_sink_tokens)
    decided = {**loop.fingerprint(config, sequences, identity), "allocation": allocation.decision()}
    run = Checkpoint(run_dir, decided) if run_dir else None
    with ExitStack() as stack:
        stack.enter_context(loss.evaluating(model))  # the teacher too
        trained = stack.enter_context(distributed.sharded(model)) if config.parallel == "fsdp" else model
        teacher = None if trained is model else model
        if trained is model and config.needs_teacher and config.method == "full":
            teacher = copy.deepcopy(model)
        checkpointing = config.activation_checkpointing
        stack.enter_context(
            loop.prepared(trained, activation_checkpointing=checkpointing, compile=config.compile)
        )
        if config.method == "lora":
            stack.enter_context(_additions(trained, config, run_dir))
        else:
            trained.requires_grad_(True)
        parameters = {name: p for name, p in trained.named_parameters() if p.requires_grad}
        weights = stack.enter_context(loop.Weights(parameters, learning_rate=config.learning_rate_at(0)))
        start, history = 0, []
        if run and (saved := run.load()):
            tensors, start, history = saved
            weights.restore(tensors)
        distributed.check_same(start, "the step to continue from (is --out a folder that all of them see?)")
        plan = stack.enter_context(attached(trained, allocation))
        for step in range(start, config.num_steps):
            began = time.perf_counter()
            parts = _accumulate_gradients(
                trained, teacher, plan, loop.batches(sequences, config, step), config
            )
            value = sum(getattr(config, name) * part for name, part in parts.items())
            done = step + 1
            loop.check_finite({"step": done, "loss": value}, config, run_dir)
            rate = config.learning_rate_at(step)
            norm = weights.update(max_norm=config.max_grad_norm, learning_rate=rate)
            seconds = time.perf_counter() - began
            record = {"step": done, "loss": value, **parts, "learning_rate": rate, "grad_norm": norm}
            if evaluate and (done % config.evaluate_every == 0 or done == config.num_steps):
                record |= evaluate(trained)
            loop.check_finite(record, config, run_dir)
            history.append(record)
            if on_step:
                speed = config.sequences_per_step * sequences.shape[1] / seconds
                on_step(record | {"tokens_per_second": speed})
            if run and (done % config.checkpoint_every == 0 or done == config.num_steps):
                tensors = weights.tensors()
                if distributed.is_main():
                    run.save(tensors, done, history)
    return history


def check_lora(model: PreTrainedModel, config: AdaptConfig) -> None:
    """Raise ConsaError unless LoRA, where asked for, can be put on `model`."""
    if config.method != "lora":
        return
    if not find_spec("peft"):
        raise missing_extra("method lora", "lora")
    try:
        check_peft_version(MIN_PEFT_VERSION)
    except ValueError as error:
        raise ConsaError(
            f"method lora: {error}; run: pip install 'peft>={MIN_PEFT_VERSION}', or install an older transformers"
        ) from error
    names = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    known = sorted({name.rpartition(".")[2] for name in names})
    for target in words_of(config.lora_targets):
        if target not in (*known, EVERY_LINEAR):
            raise ConsaError(
                f"lora_targets must be of the linear layers of {type(model).__name__}"
                f" ({', '.join([EVERY_LINEAR, *known])}), got {target!r}"
            )


@contextmanager
def _additions(model: PreTrainedModel, config: AdaptConfig, run_dir: Path | None) -> Iterator[None]:
    """Within the block `model` has LoRA's additions, alone trainable; then they are saved and merged, or dropped."""
    check_lora(model, config)
    from peft import LoraConfig
    from peft.tuners.tuners_utils import BaseTunerLayer

    targets = words_of(config.lora_targets)
    described = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha,  # pyright: ignore[reportArgumentType]
        target_modules=EVERY_LINEAR if EVERY_LINEAR in targets else list(targets),
        task_type="CAUSAL_LM",
    )
    added = succeeded = False
    try:
        with torch.random.fork_rng():
            torch.manual_seed(config.seed)
            model.add_adapter(described)
            added = True
        yield
        if run_dir and distributed.is_main():
            _save_additions(model, run_dir / ADAPTER)
        succeeded = True
    finally:
        layers = [(n, module) for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)]
        bare = []
        for name, module in layers:
            if succeeded:
                module.merge()
            parent, _, child = name.rpartition(".")
            outer = model.get_submodule(parent)
            if not isinstance(outer, BaseTunerLayer):  # those of one module's several parameters are nested
                bare.append((outer, child, module.get_base_layer()))
        for outer, child, layer in bare:
            setattr(outer, child, layer)
        if added:
            model.delete_adapter("default")


def _save_additions(model: PreTrainedModel, folder: Path) -> None:
    try:
        with tempfile.TemporaryDirectory() as temporary, quiet():
            model.save_pretrained(temporary)
            for path in Path(temporary).iterdir():
                write_atomically(folder / path.name, path.read_bytes())
    except (OSError, SafetensorError) as error:  # the latter is how Rust says that a disk is full
        raise ConsaError(
            f"cannot write {folder}: {error}; make room there and in {tempfile.gettempdir()}"
        ) from error


def _accumulate_gradients(
    model: PreTrainedModel,
    teacher: PreTrainedModel | None,
    plan: Plan,
    batches: list[np.ndarray],
    config: AdaptConfig,
) -> dict[str, float]:
    """One step's gradients on this process; returns the parts of the loss, means per token over all processes."""
    sums = torch.zeros(3, device=model.device)
    predicted = config.sequences_per_step * (batches[0].shape[1] - 1)
    for batch in batches:
        tokens = torch.from_numpy(batch.astype(np.int64)).to(model.device)
        objective = _Objective(config, tokens, sums)
        if config.needs_teacher:
            objective.follow(model, teacher, plan)
        loss.backward(model, tokens, scale=len(batch) / config.sequences_per_step, objective=objective)
    means = (distributed.all_reduce(sums) / predicted).tolist()
    return {name: mean for name, mean in zip(PARTS, means, strict=True) if getattr(config, name)}


PARTS = ("cross_entropy", "distillation", "hidden_loss")


class _Objective:
    """The loss of a chunk of positions; adds its parts, summed over tokens and unweighted, to `sums`."""

    def __init__(self, config: AdaptConfig, tokens: Tensor, sums: Tensor) -> None:
        self.weights = [getattr(config, name) for name in PARTS]
        self.tokens = tokens
        self.sums = sums
        self.teacher_hidden: Tensor | None = None
        self.teacher_head: Callable[[Tensor], Tensor] | None = None

    @torch.no_grad()
    def follow(self, model: PreTrainedModel, teacher: PreTrainedModel | None, plan: Plan) -> None:
        """Keep what the dense model says of the tokens: `teacher`, or else `model` without LoRA's additions."""
        if teacher is None:
            full = torch.ones(*plan.allocation.full_attention.shape)[:, None].expand(-1, len(self.tokens), -1)
            model.disable_adapters()
            with plan.gated(full, model.device):
                self.teacher_hidden = loss.hidden_states(model, self.tokens)
            model.enable_adapters()
        else:
            self.teacher_hidden = loss.hidden_states(teacher, self.tokens)
        self.teacher_head = loss.output_layer(teacher or model)

    def __call__(self, hidden: Tensor, logits: Tensor, chunk: slice) -> Tensor:
        cross_entropy, distillation, hidden_loss = self.weights
        parts = [torch.zeros((), device=hidden.device)] * 3
        if cross_entropy:
            parts[0] = loss.cross_entropy(logits, self.tokens, chunk).sum()
        if self.teacher_hidden is not None and self.teacher_head:
            wanted = self.teacher_hidden[:, chunk]
            if distillation:
                with torch.no_grad():
                    teacher = self.teacher_head(wanted).float().log_softmax(-1)
                parts[1] = torch.nn.functional.kl_div(
                    logits.float().log_softmax(-1), teacher, reduction="sum", log_target=True
                )
            if hidden_loss:
                wanted = wanted.float()
                distance = (hidden.float() - wanted).square().sum(-1)
                parts[2] = (distance / wanted.square().sum(-1)).sum()
        self.sums += torch.stack([part.detach() for part in parts])
        return sum(
            (w * part for w, part in zip(self.weights, parts, strict=True)), torch.zeros_like(parts[0])
        )
