"""Every setting of a run, its default and what it means, stated once; the command line's options are made from this."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, fields
from typing import Any, Literal, cast

from consa.allocation import NUM_SINK_TOKENS, WINDOW, Granularity, check_sparsity
from consa.constraints import ANY, Constraint, FullHeadsPerLayer
from consa.data.questions import TASKS
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
    full_heads_per_layer: FullHeadsPerLayer = _option(
        "any",
        "of kv_head, for serving: 'any' number of FA heads in a layer, an 'even' one, or 'uniform': the same in all",
    )
    tensor_parallel: int = _option(
        1,
        "of kv_head, for serving: ranks that KV heads are split over, each with as many FA heads of a layer",
    )
    window: int = _option(WINDOW, "tokens a sliding-window query sees, itself included")
    num_sink_tokens: int = _option(NUM_SINK_TOKENS, "first tokens that stay visible on top of the window")
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
    log_alpha_max: float = _option(3.0, "upper bound of the gates; beyond it the constraint's pull vanishes")
    warmup: float = _option(0.7, "share of the steps over which the target rises from 0")
    penalty: float = _option(300.0, "quadratic coefficient of the constraint (rho), nats")
    multiplier_step: float = _option(3.0, "step size of the constraint's multiplier (eta), nats")
    penalty_growth: float = _option(
        10.0, "factor by which both have grown at the end, from the warm-up's end on"
    )
    sharpening: float = _option(3.0, "largest coefficient of P(1 - P), nats; drives gates to a decision")
    sharpening_start: float = _option(0.75, "share of the steps after which that coefficient rises from 0")
    averaged: float = _option(0.2, "last share of the steps whose log_alpha is averaged for the decision")
    refine_evaluations: int = _option(
        40, "budget of the final exchange of units near the boundary; 0 for none"
    )
    refine_sequences: int = _option(8, "training sequences that each of these evaluations runs on")
    activation_checkpointing: bool = _option(False, "recompute layers in the backward pass to save memory")
    compile: bool = _option(
        False, "compile layers (torch.compile), which takes seconds and makes steps faster"
    )
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp",
        "on several processes, in joint mode: 'ddp' has all weights on each, 'fsdp' shards those of the layers",
    )
    checkpoint_every: int = _option(10, "steps between checkpoints")

    def __post_init__(self) -> None:
        check_sparsity(self.sparsity)
        if (self.kv_budget is None) != (self.context is None):
            raise ConsaError("kv_budget (bytes) and context (tokens) belong together; give both or neither")
        _check_choices(
            self, granularity=("layer", "kv_head"), mode=("frozen", "joint"), parallel=("ddp", "fsdp")
        )
        _check_integers(self, window=1, num_sink_tokens=0, seq_len=2, num_steps=1, sequences_per_step=1)
        _check_integers(self, micro_batch=1, checkpoint_every=1, kv_budget=1, context=1, seed=0)
        _check_integers(self, refine_evaluations=0, refine_sequences=1)
        _check_positive(
            self, "weight_lr", "gate_lr", "penalty", "multiplier_step", "penalty_growth", "averaged"
        )
        _check_not_negative(self, "sharpening")
        _check_shares(self, "warmup", "sharpening_start", "averaged")
        _check_flags(self, "activation_checkpointing", "compile")
        _check_steps(self)
        if self.mode == "frozen" and self.parallel == "fsdp":
            raise ConsaError("parallel must be ddp with mode frozen, which trains no weights; got 'fsdp'")
        for name in ("log_alpha_min", "log_alpha_max", "initial_log_alpha"):
            value = getattr(self, name)
            if not _is_number(value) or not math.isfinite(value):
                raise ConsaError(f"{name} must be a finite number, got {value!r}")
        if not self.log_alpha_min < self.initial_log_alpha < self.log_alpha_max:
            raise ConsaError(
                f"initial_log_alpha must lie between log_alpha_min ({self.log_alpha_min}) and log_alpha_max"
                f" ({self.log_alpha_max}), got {self.initial_log_alpha!r}; gates that start clamped start tied"
            )
        Constraint(full_heads_per_layer=self.full_heads_per_layer, tensor_parallel=self.tensor_parallel)
        if (self.granularity, self.full_heads_per_layer) == ("layer", "uniform") and (
            self.kv_budget is not None or self.sparsity not in (0, 1)
        ):
            raise ConsaError(
                "full_heads_per_layer must be any or even with granularity layer, got 'uniform';"
                " layers decided as one are alike only at sparsity 0 or 1"
            )

    @property
    def constraint(self) -> Constraint:
        """What the decision must meet; it counts for KV heads only."""
        if self.granularity == "layer":
            return ANY
        return Constraint(
            full_heads_per_layer=self.full_heads_per_layer, tensor_parallel=self.tensor_parallel
        )


@dataclass(frozen=True, kw_only=True)
class AdaptConfig:
    """Everything that continued training under a fixed allocation depends on, besides the model and the text.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    method: Literal["full", "lora"] = _option(
        "full",
        "'full' trains every weight, 'lora' low-rank additions to the linear layers (needs consa[lora])",
    )
    cross_entropy: float = _option(1.0, "weight of the next-token loss")
    distillation: float = _option(0.0, "weight of KL(dense model || hybrid) over the next token")
    hidden_loss: float = _option(
        0.0, "weight of the last hidden states' squared distance from the dense model's, relative to theirs"
    )
    seq_len: int = _option(LearnConfig.seq_len, "tokens per training sequence")
    num_steps: int = _option(200, "optimiser steps")
    sequences_per_step: int = _option(8, "sequences per optimiser step, over all processes")
    micro_batch: int = _option(1, "sequences computed at once; the rest is gradient accumulation")
    seed: int = _option(0, "of the order of the text and of LoRA's start")
    learning_rate: float | None = _option(
        None, "of AdamW, at the warm-up's end; 1e-5 for full and 2e-4 for lora unless given"
    )
    warmup: float = _option(
        0.05, "share of the steps over which the learning rate rises; then it falls as a cosine"
    )
    max_grad_norm: float = _option(1.0, "gradients' norm beyond which they are scaled down to it")
    lora_rank: int = _option(16, "rank of LoRA's additions")
    lora_alpha: float = _option(32.0, "LoRA's additions are scaled by this over the rank")
    lora_targets: str = _option(
        "all-linear", "linear layers that LoRA adds to, such as q_proj,v_proj; commas between several"
    )
    evaluate_every: int = _option(20, "steps between evaluations on held-out text; also after the last")
    activation_checkpointing: bool = _option(False, "recompute layers in the backward pass to save memory")
    compile: bool = _option(
        False, "compile layers (torch.compile), which takes seconds and makes steps faster"
    )
    parallel: Literal["ddp", "fsdp"] = _option(
        "ddp",
        "on several processes: 'ddp' has all weights on each, 'fsdp' shards those of the layers",
    )
    checkpoint_every: int = _option(50, "steps between checkpoints")

    def __post_init__(self) -> None:
        _check_choices(self, method=("full", "lora"), parallel=("ddp", "fsdp"))
        _check_integers(self, seq_len=2, num_steps=1, sequences_per_step=1, micro_batch=1, seed=0)
        _check_integers(self, lora_rank=1, evaluate_every=1, checkpoint_every=1)
        _check_positive(self, "learning_rate", "max_grad_norm", "lora_alpha")
        _check_not_negative(self, "cross_entropy", "distillation", "hidden_loss")
        if not self.cross_entropy + self.distillation + self.hidden_loss:
            raise ConsaError(
                "cross_entropy, distillation and hidden_loss are all 0; give one of them a weight"
            )
        _check_shares(self, "warmup")
        _check_flags(self, "activation_checkpointing", "compile")
        _check_steps(self)
        if self.method == "lora" and self.parallel == "fsdp":
            raise ConsaError(
                "parallel must be ddp with method lora, whose trained weights are few; got 'fsdp'"
            )
        if not isinstance(self.lora_targets, str) or not words_of(self.lora_targets):
            raise ConsaError(f"lora_targets must name linear layers, got {self.lora_targets!r}")

    @property
    def needs_teacher(self) -> bool:
        """Whether the dense model is computed beside the hybrid."""
        return bool(self.distillation or self.hidden_loss)

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then a cosine that would reach 0 one step on."""
        peak = self.learning_rate or {"full": 1e-5, "lora": 2e-4}[self.method]
        rising = math.ceil(self.warmup * self.num_steps)
        if step < rising:
            return peak * (step + 1) / rising
        return peak * (1 + math.cos(math.pi * (step - rising) / (self.num_steps - rising))) / 2


def _check_steps(config: LearnConfig | AdaptConfig) -> None:
    if config.sequences_per_step % config.micro_batch:
        raise ConsaError(
            f"micro_batch must divide sequences_per_step ({config.sequences_per_step}), got {config.micro_batch}"
        )
    if config.compile and config.activation_checkpointing:
        raise ConsaError(
            "compile must be off with activation_checkpointing, whose layers are not compiled when they are"
            " computed again; got True"
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
        "text: file, folder, glob, hf:owner/name, or stdlib (Python's own sources); commas between several",
    )
    heldout_data: str | None = _option(
        None,
        "text to measure on; a tenth of the documents of data, on which nothing is learned, unless given",
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
        _check_integers(self, num_heldout=1, start=0, max_tokens=1)
        _check_choices(self, dtype=("float32", "bfloat16"))

    def start_for(self, config: LearnConfig | EvalConfig) -> int:
        """The first position whose loss counts.

        Raises:
            ConsaError: no position is left from there on, or window and sinks cover whole sequences.
        """
        seq_len, window = config.seq_len, config.window
        check_window(window, config.num_sink_tokens, seq_len)
        if self.max_tokens is not None and self.max_tokens < seq_len:
            raise ConsaError(f"max_tokens must be at least seq_len ({seq_len}), got {self.max_tokens}")
        if self.start is None:
            return min(max(4 * window, seq_len // 8), seq_len // 2, seq_len - 2)
        if self.start >= seq_len - 1:
            raise ConsaError(f"start must be below seq_len - 1 ({seq_len - 1}), got {self.start}")
        return self.start


@dataclass(frozen=True, kw_only=True)
class EvalConfig:
    """What allocations are measured by.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    seq_len: int = _option(LearnConfig.seq_len, "tokens per held-out sequence")
    sparsity: float = _option(
        LearnConfig.sparsity, "of rules: share of units on sliding-window attention, in [0, 1]"
    )
    granularity: Granularity = _option(
        LearnConfig.granularity, "of rules: what is decided as one, 'layer' or 'kv_head'"
    )
    window: int = _option(
        WINDOW, "tokens a sliding-window query sees, itself included, where no file says it"
    )
    num_sink_tokens: int = _option(
        NUM_SINK_TOKENS, "first tokens that stay visible on top, where no file says it"
    )
    retrieval: str | None = _option(None, f"retrieval tasks, of {', '.join(TASKS)}; commas between several")
    lengths: str = _option("1024,4096", "tokens of their texts")
    examples: int = _option(20, "of each retrieval task at each length")
    tasks: str | None = _option(None, "tasks of lm-eval; commas between several")
    limit: int | None = _option(None, "documents of each of these tasks; all unless given")
    batch_size: int = _option(1, "sequences, questions, or texts of lm-eval's tasks, computed at once")
    cache_tokens: int = _option(32768, "in the KV cache whose size is shown")
    seed: int = _option(0, "of retrieval texts, confidence intervals and random allocations")

    def __post_init__(self) -> None:
        LearnConfig(sparsity=self.sparsity, granularity=self.granularity)  # the same limits as in learning
        _check_integers(self, seq_len=2, window=1, num_sink_tokens=0, examples=1, limit=1)
        _check_integers(self, batch_size=1, cache_tokens=1, seed=0)
        for task in self.retrieval_tasks:
            if task not in TASKS:
                raise ConsaError(f"retrieval task must be one of {', '.join(TASKS)}, got {task!r}")
        if min(self.retrieval_lengths, default=0) < 1:
            raise ConsaError(f"lengths must be integers >= 1 with commas between, got {self.lengths!r}")

    @property
    def retrieval_tasks(self) -> tuple[str, ...]:
        """Names in `retrieval`."""
        return words_of(self.retrieval)

    @property
    def retrieval_lengths(self) -> tuple[int, ...]:
        """Numbers in `lengths`, in tokens."""
        try:
            return tuple(int(length) for length in words_of(self.lengths))
        except ValueError:
            raise ConsaError(
                f"lengths must be integers >= 1 with commas between, got {self.lengths!r}"
            ) from None

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """Names in `tasks`."""
        return words_of(self.tasks)


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """What is chosen, and how often.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    sparsity: str = _option("0.5,0.75,0.9", "shares of units on sliding-window attention; commas between")
    granularity: str = _option("kv_head", "what is decided as one: layer, kv_head or both; commas between")
    methods: str = _option(
        "consa,rules",
        "how allocations are chosen: consa, other methods such as prulong, rules by name, or all 'rules'",
    )
    seeds: int = _option(1, "runs of each method, from seed 0 on; rules that draw nothing run once")
    num_steps: int | None = _option(None, "optimiser steps of methods that train; their default unless given")
    sequences_per_step: int | None = _option(None, "sequences of each of these steps")
    evaluations: int | None = _option(None, "forward evaluations of methods that search")
    evaluation_sequences: int | None = _option(None, "sequences of each of these evaluations")
    micro_batch: int | None = _option(None, "sequences computed at once while choosing; 1 unless given")
    compile: bool = _option(False, "compile layers where gates are trained on the text, as in learning")

    def __post_init__(self) -> None:
        _check_integers(self, seeds=1)
        for name in ("sparsity", "granularity", "methods"):
            if not words_of(getattr(self, name)):
                raise ConsaError(f"{name} is empty; name at least one")
        for granularity in self.granularities:
            LearnConfig(granularity=granularity)  # the same limits as in learning
        for sparsity in self.sparsities:
            LearnConfig(sparsity=sparsity)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Numbers in `sparsity`."""
        try:
            return tuple(dict.fromkeys(float(share) for share in words_of(self.sparsity)))
        except ValueError:
            raise ConsaError(f"sparsity must be shares with commas between, got {self.sparsity!r}") from None

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Names in `granularity`."""
        return cast(tuple[Granularity, ...], words_of(self.granularity))

    @property
    def budget(self) -> dict[str, Any]:
        """What was given of the methods' budgets."""
        names = ("num_steps", "sequences_per_step", "evaluations", "evaluation_sequences")
        names += ("micro_batch", "compile")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """What all methods share. What only one of them knows is a constant of its file, with its source.

    At the defaults the methods that train and those that search cost about the same: 200 steps of 4 sequences and the
    refinement's 40 evaluations of 8 are 340 evaluations of 8, if a backward pass counts as two forward ones.

    Attributes:
        sparsity: share of units to put on SWA, in [0, 1].
        granularity: what is decided as one: "layer" or "kv_head".
        window: tokens an SWA query sees, itself included.
        num_sink_tokens: first tokens that stay visible on top of the window.
        seed: of whatever a method draws.
        num_steps: optimiser steps of a method that trains.
        sequences_per_step: sequences, or questions, of each of them.
        evaluations: budget of a method that searches, in forward evaluations.
        evaluation_sequences: sequences, or questions, of each of them, and of what measures attention.
        micro_batch: sequences of one length computed at once; on a GPU, as many as fit.
        compile: compile layers where gates are trained on sequences; takes seconds and makes steps faster.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    sparsity: float = LearnConfig.sparsity
    granularity: Granularity = LearnConfig.granularity
    window: int = WINDOW
    num_sink_tokens: int = NUM_SINK_TOKENS
    seed: int = 0
    num_steps: int = LearnConfig.num_steps
    sequences_per_step: int = LearnConfig.sequences_per_step
    evaluations: int = 340
    evaluation_sequences: int = 8
    micro_batch: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        _check_integers(self, evaluations=1, evaluation_sequences=1)
        self.for_learning()

    def for_learning(self, **other: Any) -> LearnConfig:
        """The settings of `consa.training.learning.learn` that these stand for, but for `other`."""
        alike = {item.name for item in fields(self)} & {item.name for item in fields(LearnConfig)}
        settings: dict[str, Any] = {name: getattr(self, name) for name in alike}
        settings["refine_sequences"] = self.evaluation_sequences
        return LearnConfig(**settings | other)


def check_window(window: int, num_sink_tokens: int, seq_len: int) -> None:
    """Raise ConsaError if window and sinks cover whole sequences, on which nothing can be learned or measured."""
    if window + num_sink_tokens >= seq_len:
        raise ConsaError(
            f"window + num_sink_tokens must be smaller than seq_len ({seq_len}), got {window} + {num_sink_tokens};"
            " else sliding-window attention is full attention"
        )


def words_of(text: str | None) -> tuple[str, ...]:
    """The words of an option that takes several, with commas between; each once."""
    return tuple(dict.fromkeys(word.strip() for word in (text or "").split(",") if word.strip()))


def _given(config: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    """Settings by name, but for those that may be left out and are."""
    optional = {item.name for item in fields(config) if item.default is None}
    for name in names:
        value = getattr(config, name)
        if value is not None or name not in optional:
            yield name, value


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check_choices(config: Any, **allowed: tuple[str, ...]) -> None:
    for name, value in _given(config, allowed):
        if value not in allowed[name]:
            raise ConsaError(f"{name} must be one of {', '.join(allowed[name])}, got {value!r}")


def _check_flags(config: Any, *names: str) -> None:
    for name, value in _given(config, names):
        if not isinstance(value, bool):
            raise ConsaError(f"{name} must be True or False, got {value!r}")


def _check_integers(config: Any, **least: int) -> None:
    for name, value in _given(config, least):
        if not isinstance(value, int) or isinstance(value, bool) or value < least[name]:
            raise ConsaError(f"{name} must be an integer >= {least[name]}, got {value!r}")
        if value >= 2**63:
            raise ConsaError(f"{name} must be below 2**63, got {value}")


def _check_positive(config: Any, *names: str) -> None:
    for name, value in _given(config, names):
        if not _is_number(value) or not 0 < value < math.inf:
            raise ConsaError(f"{name} must be a positive number, got {value!r}")


def _check_not_negative(config: Any, *names: str) -> None:
    for name, value in _given(config, names):
        if not _is_number(value) or not 0 <= value < math.inf:
            raise ConsaError(f"{name} must be a number >= 0, got {value!r}")


def _check_shares(config: Any, *names: str) -> None:
    for name, value in _given(config, names):
        if not _is_number(value) or not 0 <= value <= 1:
            raise ConsaError(f"{name} must be a share in [0, 1], got {value!r}")
