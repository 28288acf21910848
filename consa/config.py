"""Every setting of a run, its default and what it means, stated once; the command line's options are made from this."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any, Literal

from consa.allocation import Granularity, check_sparsity
from consa.errors import ConsaError


def _option(default: Any, text: str, **more: str) -> Any:
    return field(default=default, metadata={"help": text, **more})


@dataclass(frozen=True, kw_only=True)
class LearnConfig:
    """Everything a learning run depends on, besides the model and the text.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    sparsity: float = _option(0.75, "share of units to put on sliding-window attention, in [0, 1]")
    kv_budget: int | None = _option(
        None, "instead of sparsity: what one sequence's KV cache (bf16) may take, such as 2GiB", unit="bytes"
    )
    context: int | None = _option(None, "tokens in that cache")
    granularity: Granularity = _option("kv_head", "what is decided as one: 'layer' or 'kv_head'")
    window: int = _option(128, "tokens a sliding-window query sees, itself included")
    num_sink_tokens: int = _option(4, "first tokens that stay visible on top of the window")
    seq_len: int = _option(8192, "tokens per training sequence")
    num_steps: int = _option(200, "optimiser steps")
    sequences_per_step: int = _option(4, "sequences per optimiser step")
    micro_batch: int = _option(1, "sequences computed at once; the rest is gradient accumulation")
    seed: int = _option(0, "of the gates' noise and the order of the text")
    mode: Literal["frozen", "joint"] = _option("frozen", "'joint' trains the weights along with the gates")
    weight_lr: float = _option(1e-5, "AdamW learning rate of the weights in joint mode")
    gate_lr: float | None = _option(
        None, "Adam learning rate of the gates; min(1, 60 / num_steps) unless given"
    )
    initial_log_alpha: float = _option(2.0, "where the gates start; 2 is a probability of 0.97 to be open")
    log_alpha_min: float = _option(-7.0, "lower bound of the gates; -7 is a probability of 0.005 to be open")
    log_alpha_max: float = _option(4.0, "upper bound of the gates; beyond it the constraint's pull vanishes")
    warmup: float = _option(0.4, "share of the steps over which the target rises from 0")
    penalty: float = _option(300.0, "quadratic coefficient of the constraint (rho), nats")
    multiplier_step: float = _option(3.0, "step size of the constraint's multiplier (eta), nats")
    penalty_growth: float = _option(
        10.0, "factor by which both have grown at the end, from the warm-up's end on"
    )
    sharpening: float = _option(3.0, "largest coefficient of P(1 - P), nats; drives gates to a decision")
    sharpening_start: float = _option(0.6, "share of the steps after which that coefficient rises from 0")
    averaged: float = _option(0.2, "last share of the steps whose log_alpha is averaged for the decision")
    refine_evaluations: int = _option(
        40, "budget of the final exchange of units near the boundary; 0 for none"
    )
    refine_sequences: int = _option(8, "training sequences that each of these evaluations runs on")
    activation_checkpointing: bool = _option(False, "recompute layers in the backward pass to save memory")
    checkpoint_every: int = _option(10, "steps between checkpoints")

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if (self.kv_budget is None) != (self.context is None):
            raise ConsaError("kv_budget (bytes) and context (tokens) belong together; give both or neither")
        choices = {"granularity": ("layer", "kv_head"), "mode": ("frozen", "joint")}
        for name, allowed in choices.items():
            if getattr(self, name) not in allowed:
                raise ConsaError(f"{name} must be one of {', '.join(allowed)}, got {getattr(self, name)!r}")
        least = {"window": 1, "num_sink_tokens": 0, "seq_len": 2, "num_steps": 1, "sequences_per_step": 1}
        least |= {"micro_batch": 1, "checkpoint_every": 1, "kv_budget": 1, "context": 1, "seed": 0}
        least |= {"refine_evaluations": 0, "refine_sequences": 1}
        for name, minimum in least.items():
            value = getattr(self, name)
            if value is None and name in ("kv_budget", "context"):
                continue
            if not isinstance(value, int) or value < minimum:
                raise ConsaError(f"{name} must be an integer >= {minimum}, got {value!r}")
        positive = ("weight_lr", "gate_lr", "penalty", "multiplier_step", "penalty_growth", "averaged")
        for name in positive:
            value = getattr(self, name)
            if value is not None and not 0 < value < math.inf:
                raise ConsaError(f"{name} must be a positive number, got {value!r}")
        if not 0 <= self.sharpening < math.inf:
            raise ConsaError(f"sharpening must be a number >= 0, got {self.sharpening!r}")
        for name in ("warmup", "sharpening_start", "averaged"):
            if not 0 <= getattr(self, name) <= 1:
                raise ConsaError(f"{name} must be a share in [0, 1], got {getattr(self, name)!r}")
        if self.sequences_per_step % self.micro_batch:
            raise ConsaError(
                f"micro_batch must divide sequences_per_step ({self.sequences_per_step}), got {self.micro_batch}"
            )
        if not self.log_alpha_min < self.initial_log_alpha < self.log_alpha_max:
            raise ConsaError(
                f"initial_log_alpha must lie between log_alpha_min ({self.log_alpha_min}) and log_alpha_max"
                f" ({self.log_alpha_max}), got {self.initial_log_alpha!r}; gates that start clamped start tied"
            )


@dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What a run learns and measures on.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    model: str = field(
        metadata={"help": "a folder, a .gguf file, a Hugging Face name, or smollm2-135m (from a package)"}
    )
    data: str = _option(
        "stdlib",
        "training text: file, folder, glob, hf:owner/name, or stdlib (Python's own sources); commas between several",
    )
    heldout_data: str | None = _option(
        None, "text to measure on; a tenth of the documents of data unless given"
    )
    text_field: str = _option("text", "field of a JSONL record or dataset row that holds the text")
    max_tokens: int | None = _option(None, "tokens of text to read at most, per split; all unless given")
    num_heldout: int = _option(16, "held-out sequences to measure on, from as many documents as there are")
    start: int | None = _option(
        None,
        "first position whose loss counts; max(4 * window, seq_len / 8), at most seq_len / 2, unless given:"
        " from there on a window misses most of the text",
    )
    device: str | None = _option(None, "such as cpu or cuda:1; the GPU if there is one unless given")
    dtype: Literal["float32", "bfloat16"] | None = _option(
        None, "of the weights; bfloat16 on a GPU, float32 on a CPU unless given"
    )

    def __post_init__(self) -> None:
        for name, minimum in {"num_heldout": 1, "start": 0, "max_tokens": 1}.items():
            value = getattr(self, name)
            if value is not None and (not isinstance(value, int) or value < minimum):
                raise ConsaError(f"{name} must be an integer >= {minimum}, got {value!r}")
        if self.dtype not in (None, "float32", "bfloat16"):
            raise ConsaError(f"dtype must be one of float32, bfloat16, got {self.dtype!r}")

    def start_for(self, config: LearnConfig) -> int:
        """The first position whose loss counts.

        Raises:
            ConsaError: no position is left from there on, or the window covers whole sequences.
        """
        if config.window >= config.seq_len:
            raise ConsaError(
                f"window must be smaller than seq_len ({config.seq_len}), got {config.window};"
                " else sliding-window attention is full attention"
            )
        if self.max_tokens is not None and self.max_tokens < config.seq_len:
            raise ConsaError(f"max_tokens must be at least seq_len ({config.seq_len}), got {self.max_tokens}")
        if self.start is None:
            return min(max(4 * config.window, config.seq_len // 8), config.seq_len // 2)
        if self.start >= config.seq_len - 1:
            raise ConsaError(f"start must be below seq_len - 1 ({config.seq_len - 1}), got {self.start}")
        return self.start
