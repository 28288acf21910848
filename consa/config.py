"""Every setting of a run: its default, help and bounds, stated once. The command line is generated from these."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

from consa.allocation import NUM_SINK_TOKENS, WINDOW, Granularity
from consa.constraints import ANY, Constraint, FullHeadsPerLayer
from consa.data.questions import TASKS
from consa.errors import ConsaError
from consa.settings import Settings, option, words_of

_data, _speed, _solver = (partial(option, group=group) for group in ("data", "speed", "solver"))

WINDOW_HELP = "Sliding window in tokens: how many a query sees, itself included."
SINKS_HELP = "Sink tokens: first tokens of a sequence that every query sees."
GRANULARITY_HELP = "Unit that is decided as one: a whole layer or a KV head."
SPARSITY_HELP = "Share of the units that use sliding-window attention."
SEQ_LEN_HELP = "Length of a training sequence, in tokens."
BATCH_HELP = "Sequences of one optimizer step, over all processes."
MicroBatch = int | Literal["auto"] | None
MICRO_BATCH_HELP = (
    "Sequences computed at once, or auto for what fits in memory. Can change the last bits."
    " Default: auto on a GPU, 1 on a CPU."
)
RECOMPUTE_HELP = "Save memory by computing the layers twice."
FULL_LEARNING_RATE, MEASURED_PARAMETERS = 5e-4, 135_000_000
"""The peak learning rate of full adaptation that was best, and the size of the one model it was measured on."""
COMPILE_HELP = "Compile the layers with torch.compile. Takes seconds to start and makes steps faster."


@dataclass(frozen=True, kw_only=True)
class LearnConfig(Settings):
    """Settings of a learning run, besides the model and the text.

    Raises:
        ConsaError: a value is out of range; the message names it.
    """

    sparsity: float = option(0.75, SPARSITY_HELP, ge=0, le=1)
    kv_budget: int | None = option(
        None,
        "Memory that the KV cache of one sequence may take in bfloat16, for example 2GiB. Replaces --sparsity.",
        ge=1,
        unit="bytes",
    )
    context: int | None = option(None, "Tokens in the KV cache that --kv-budget limits.", ge=1)
    granularity: Granularity = option("kv_head", GRANULARITY_HELP)
    full_heads_per_layer: FullHeadsPerLayer = _solver(
        "any",
        "Numbers of FA heads that a layer may have: any, even numbers only, or the same in every layer. For serving"
        " engines.",
    )
    tensor_parallel: int = _solver(
        1,
        "Ranks that the KV heads of a layer are split over, each with the same number of FA heads. For serving"
        " engines.",
        ge=1,
    )
    window: int = option(WINDOW, WINDOW_HELP, ge=1)
    num_sink_tokens: int = option(NUM_SINK_TOKENS, SINKS_HELP, ge=0)
    seq_len: int = option(8192, SEQ_LEN_HELP, ge=2)
    num_steps: int = option(200, "Optimizer steps.", ge=1)
    sequences_per_step: int = option(4, BATCH_HELP, ge=1)
    micro_batch: MicroBatch = _speed(None, MICRO_BATCH_HELP, ge=1)
    seed: int = option(0, "Random seed of the gates and of the order of the text.", ge=0)
    mode: Literal["frozen", "joint"] = option(
        "frozen", "Whether the weights stay frozen or are trained jointly with the gates."
    )
    rules: Literal["all", "best", "none"] = _data("all", "Rules to compare with. best measures all and shows the best.")
    weight_lr: float = _solver(1e-5, "Learning rate of AdamW for the weights in joint mode.", gt=0)
    gate_lr: float | None = _solver(None, "Learning rate of Adam for the gates. Default: min(1, 60 / num_steps).", gt=0)
    initial_log_alpha: float = _solver(
        2.0, "Initial log_alpha of the gates. At 2 a gate is open with probability 0.97."
    )
    log_alpha_min: float = _solver(-7.0, "Lower bound of log_alpha. At -7 a gate is open with probability 0.005.")
    log_alpha_max: float = _solver(3.0, "Upper bound of log_alpha. Beyond 3 the constraint hardly moves a gate.")
    warmup: float = _solver(0.7, "Share of the steps over which the target sparsity rises from 0.", ge=0, le=1)
    penalty: float = _solver(300.0, "Quadratic coefficient (rho) of the sparsity constraint, in nats.", gt=0)
    multiplier_step: float = _solver(
        3.0, "Step size (eta) of the sparsity constraint's Lagrange multiplier, in nats.", gt=0
    )
    penalty_growth: float = _solver(10.0, "Factor by which penalty and multiplier step grow after the warm-up.", gt=0)
    sharpening: float = _solver(
        3.0, "Largest coefficient of P(1 - P), in nats, which drives gates to a decision.", ge=0
    )
    sharpening_start: float = _solver(0.75, "Share of the steps after which the sharpening rises from 0.", ge=0, le=1)
    averaged: float = _solver(0.2, "Share of the last steps whose mean log_alpha ranks the units.", gt=0, le=1)
    retrieval: float = option(
        0.0,
        "Share of the loss that asks for facts hidden in the training text, so that the allocation also keeps what"
        " finds them.",
        ge=0,
        le=1,
    )
    refine_evaluations: int = _solver(40, "Evaluations that the final refinement may use. 0 turns it off.", ge=0)
    refine_sequences: int = _solver(8, "Training sequences of each evaluation of the refinement.", ge=1)
    gradient_checkpointing: bool = _speed(False, RECOMPUTE_HELP, alias="activation_checkpointing")
    compile: bool = _speed(False, COMPILE_HELP)
    parallel: Literal["ddp", "fsdp"] = _speed(
        "ddp", "Parallelism over several processes in joint mode: copies of all weights, or layers sharded with FSDP."
    )
    checkpoint_every: int = _speed(10, "Steps between checkpoints.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)
        if (self.kv_budget is None) != (self.context is None):
            raise ConsaError("kv_budget (bytes) and context (tokens) belong together; give both or neither")
        if self.mode == "frozen" and self.parallel == "fsdp":
            raise ConsaError("parallel must be ddp with mode frozen, which trains no weights; got 'fsdp'")
        if not self.log_alpha_min < self.initial_log_alpha < self.log_alpha_max:
            raise ConsaError(
                f"initial_log_alpha must lie between log_alpha_min ({self.log_alpha_min}) and log_alpha_max"
                f" ({self.log_alpha_max}), got {self.initial_log_alpha!r}; gates that start clamped start tied"
            )
        if (self.granularity, self.full_heads_per_layer) == ("layer", "uniform") and (
            self.kv_budget is not None or self.sparsity not in (0, 1)
        ):
            raise ConsaError(
                "full_heads_per_layer must be any or even with granularity layer, got 'uniform';"
                " whole layers are uniform only at sparsity 0 or 1"
            )

    @property
    def constraint(self) -> Constraint:
        """The constraint on the FA heads of a layer; none for whole layers."""
        if self.granularity == "layer":
            return ANY
        return Constraint(full_heads_per_layer=self.full_heads_per_layer, tensor_parallel=self.tensor_parallel)


@dataclass(frozen=True, kw_only=True)
class AdaptConfig(Settings):
    """Settings of continued training under a fixed allocation, besides the model and the text.

    Raises:
        ConsaError: a value is out of range; the message names it.
    """

    method: Literal["full", "lora"] = option(
        "full", "Weights that are trained: all, or low-rank adapters of the linear layers (needs consa[lora])."
    )
    cross_entropy: float = _solver(1.0, "Weight of the next-token loss.", ge=0)
    distillation: float = _solver(
        0.0, "Weight of the KL divergence from the dense model's next-token distribution.", ge=0
    )
    hidden_loss: float = _solver(
        0.0,
        "Weight of the squared distance of the last hidden states from the dense model's, relative to their norm.",
        ge=0,
    )
    retrieval: float = option(
        0.0,
        "Share of the loss that asks for facts hidden in the training text, so that the weights also learn to find"
        " them.",
        ge=0,
        le=1,
    )
    seq_len: int = option(LearnConfig.seq_len, SEQ_LEN_HELP, ge=2)
    num_steps: int = option(200, "Optimizer steps.", ge=1)
    sequences_per_step: int = option(8, BATCH_HELP, ge=1)
    micro_batch: MicroBatch = _speed(None, MICRO_BATCH_HELP, ge=1)
    seed: int = option(0, "Random seed of the order of the text and of LoRA's initial weights.", ge=0)
    learning_rate: float | None = option(
        None,
        "Peak learning rate of AdamW. Default: 2e-4 for lora. For full 5e-4 up to 135M parameters, where it was"
        " measured, and beyond that less by 1/sqrt(parameters), which was not: 6.5e-5 at 8B.",
        gt=0,
    )
    warmup: float = _solver(
        0.05, "Share of the steps over which the learning rate rises. It then falls as a cosine.", ge=0, le=1
    )
    max_grad_norm: float = _solver(1.0, "Norm to which larger gradients are clipped.", gt=0)
    lora_rank: int = _solver(16, "Rank of the LoRA adapters.", ge=1)
    lora_alpha: float = _solver(32.0, "Scale of the LoRA adapters, which is divided by their rank.", gt=0)
    lora_targets: str = _solver(
        "all-linear", "Linear layers that get LoRA adapters, for example q_proj,v_proj. Separated by commas."
    )
    evaluate_every: int = option(
        20, "Steps between evaluations on held-out text. The last step is always evaluated.", ge=1
    )
    gradient_checkpointing: bool = _speed(False, RECOMPUTE_HELP, alias="activation_checkpointing")
    compile: bool = _speed(False, COMPILE_HELP)
    parallel: Literal["ddp", "fsdp"] = _speed(
        "ddp", "Parallelism over several processes: copies of all weights, or layers sharded with FSDP."
    )
    checkpoint_every: int = _speed(50, "Steps between checkpoints.", ge=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        _check_steps(self)
        if not self.cross_entropy + self.distillation + self.hidden_loss:
            raise ConsaError("cross_entropy, distillation and hidden_loss are all 0; give one of them a weight")
        if self.method == "lora" and self.parallel == "fsdp":
            raise ConsaError("parallel must be ddp with method lora, which trains few weights; got 'fsdp'")
        if not words_of(self.lora_targets):
            raise ConsaError(f"lora_targets must name linear layers, got {self.lora_targets!r}")

    def for_size(self, num_parameters: int) -> AdaptConfig:
        """These settings with the peak learning rate of a model of that size, unless they have one."""
        full = FULL_LEARNING_RATE * min(1.0, math.sqrt(MEASURED_PARAMETERS / num_parameters))
        return replace(self, learning_rate=self.learning_rate or {"full": full, "lora": 2e-4}[self.method])

    def learning_rate_at(self, step: int) -> float:
        """The learning rate of a step, counted from 0: linear warm-up, then a cosine that ends at 0 after the last."""
        peak = self.learning_rate or self.for_size(MEASURED_PARAMETERS).learning_rate
        assert peak is not None
        rising = math.ceil(self.warmup * self.num_steps)
        if step < rising:
            return peak * (step + 1) / rising
        return peak * (1 + math.cos(math.pi * (step - rising) / (self.num_steps - rising))) / 2


def at_once(micro_batch: MicroBatch) -> int:
    """The number of sequences computed at once: 1 where it is still to be found by trying."""
    return micro_batch if isinstance(micro_batch, int) else 1


def _check_steps(config: LearnConfig | AdaptConfig) -> None:
    if config.sequences_per_step % at_once(config.micro_batch):
        raise ConsaError(
            f"micro_batch must divide sequences_per_step ({config.sequences_per_step}), got {config.micro_batch}"
        )
    if config.compile and config.gradient_checkpointing:
        raise ConsaError(
            "compile must be off with gradient_checkpointing, because recomputed layers are not compiled; got True"
        )


@dataclass(frozen=True, kw_only=True)
class RunConfig(Settings):
    """The model and the text that a run learns and measures on."""

    model: str = option(
        ..., "Model: a folder, a .gguf file, a Hugging Face name, or smollm2-135m (from an installed package)."
    )
    data: str = _data(
        "stdlib",
        "Training text: file, folder, glob, hf:owner/name, or stdlib (Python's own sources). Separated by commas.",
    )
    heldout_data: str | None = _data(
        None,
        "Text to measure on. Default: a tenth of the documents of --data (the end of a single one), not trained on.",
    )
    text_field: str = _data(
        "text", "Field that holds the text in a record of JSON, JSONL, CSV or Parquet, or in a dataset row."
    )
    max_tokens: int | None = _data(
        None, "Maximum number of tokens to read of training and of held-out text. Default: all.", ge=1
    )
    num_heldout: int = _data(16, "Held-out sequences to measure on, spread over all documents.", ge=1)
    start: int | None = _data(
        None, "First position whose loss counts. Default: max(4 * window, seq_len / 8), at most seq_len / 2.", ge=0
    )
    device: str | None = _speed(None, "Device, for example cpu or cuda:1. Default: the GPU if there is one.")
    dtype: Literal["float32", "bfloat16"] | None = _speed(
        None, "Dtype of the model's weights. Default: bfloat16 on a GPU, float32 on a CPU."
    )

    def start_for(self, config: LearnConfig | EvalConfig) -> int:
        """The first position whose loss counts; ConsaError if none is left, or window and sinks cover sequences."""
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
class EvalConfig(Settings):
    """What allocations are measured by."""

    seq_len: int = option(LearnConfig.seq_len, "Length of a held-out sequence, in tokens.", ge=2)
    sparsity: float = option(LearnConfig.sparsity, f"{SPARSITY_HELP} Applies to rules.", ge=0, le=1)
    granularity: Granularity = option(LearnConfig.granularity, f"{GRANULARITY_HELP} Applies to rules.")
    window: int = option(WINDOW, f"{WINDOW_HELP} Applies where an allocation's file does not say.", ge=1)
    num_sink_tokens: int = option(
        NUM_SINK_TOKENS, f"{SINKS_HELP} Applies where an allocation's file does not say.", ge=0
    )
    retrieval: str | None = option(
        None, f"Retrieval tasks to ask: {', '.join(TASKS)}. Separated by commas. Default: none."
    )
    lengths: str = option("1024,4096", "Prompt lengths of the retrieval tasks, in tokens. Separated by commas.")
    examples: int = option(20, "Prompts of each retrieval task at each length.", ge=1)
    tasks: str | None = option(None, "Tasks of lm-eval to run. Separated by commas. Default: none.")
    limit: int | None = option(None, "Documents of each lm-eval task to use. Default: all.", ge=1)
    batch_size: int = _speed(1, "Batch size of all measurements, in sequences.", ge=1)
    cache_tokens: int = option(32768, "Tokens in the KV cache whose size the tables show.", ge=1)
    seed: int = option(0, "Random seed of retrieval prompts, confidence intervals and random allocations.", ge=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        for task in self.retrieval_tasks:
            if task not in TASKS:
                raise ConsaError(f"retrieval task must be one of {', '.join(TASKS)}, got {task!r}")
        if min(self.retrieval_lengths, default=0) < 1:
            raise ConsaError(f"lengths must be integers >= 1 separated by commas, got {self.lengths!r}")

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
            raise ConsaError(f"lengths must be integers >= 1 separated by commas, got {self.lengths!r}") from None

    @property
    def harness_tasks(self) -> tuple[str, ...]:
        """Names in `tasks`."""
        return words_of(self.tasks)


@dataclass(frozen=True, kw_only=True)
class SweepConfig(Settings):
    """What a sweep chooses, and how often."""

    sparsity: str = option("0.5,0.75,0.9", f"Sparsities to choose at. {SPARSITY_HELP} Separated by commas.")
    granularity: str = option("kv_head", f"{GRANULARITY_HELP} Values are layer and kv_head, separated by commas.")
    methods: str = option(
        "consa,rules",
        "Methods that choose allocations: consa, other methods, rules by name, rules for all of them, or"
        " package.module:Class for your own. Separated by commas.",
    )
    seeds: int = option(1, "Runs of each method that uses randomness, from seed 0 on.", ge=1)
    settings: str | None = _solver(
        None,
        "Settings of single methods, for example prulong.learning_rate=0.5,bosch.num_buckets=4. Separated by commas.",
    )
    num_steps: int | None = _solver(None, "Optimizer steps of methods that train. Default: each method's own.", ge=1)
    sequences_per_step: int | None = _solver(
        None, "Global batch size of methods that train. Default: each method's own.", ge=1
    )
    evaluations: int | None = _solver(
        None, "Forward evaluations of methods that search. Default: each method's own.", ge=1
    )
    evaluation_sequences: int | None = _solver(
        None, "Sequences of each of these evaluations. Default: each method's own.", ge=1
    )
    micro_batch: MicroBatch = _speed(None, f"{MICRO_BATCH_HELP} Applies to choosing.", ge=1)
    compile: bool = _speed(False, f"{COMPILE_HELP} Applies to methods that train gates.")

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("sparsity", "granularity", "methods"):
            if not words_of(getattr(self, name)):
                raise ConsaError(f"{name} is empty; name at least one")
        for granularity in self.granularities:
            ChoiceConfig(granularity=granularity)  # checks the value
        for sparsity in self.sparsities:
            ChoiceConfig(sparsity=sparsity)

    @property
    def sparsities(self) -> tuple[float, ...]:
        """Numbers in `sparsity`."""
        try:
            return tuple(dict.fromkeys(float(share) for share in words_of(self.sparsity)))
        except ValueError:
            raise ConsaError(f"sparsity must be shares separated by commas, got {self.sparsity!r}") from None

    @property
    def granularities(self) -> tuple[Granularity, ...]:
        """Names in `granularity`."""
        return cast(tuple[Granularity, ...], words_of(self.granularity))

    @property
    def budget(self) -> dict[str, int | bool]:
        """Settings that were given here for every method that has them."""
        names = ("num_steps", "sequences_per_step", "evaluations", "evaluation_sequences", "compile")
        return {name: value for name in names if (value := getattr(self, name)) is not None}


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig(Settings):
    """What is asked of a method: the settings that all methods share. Their own settings are their fields."""

    sparsity: float = option(LearnConfig.sparsity, SPARSITY_HELP, ge=0, le=1)
    granularity: Granularity = option(LearnConfig.granularity, GRANULARITY_HELP)
    window: int = option(WINDOW, WINDOW_HELP, ge=1)
    num_sink_tokens: int = option(NUM_SINK_TOKENS, SINKS_HELP, ge=0)
    seed: int = option(0, "Random seed of the method.", ge=0)
    micro_batch: int = _speed(1, "Sequences of one length that are computed at once.", ge=1)


def folder_of(where: RunConfig, config: Settings) -> Path:
    """The folder of a run that names none; the same settings find their folder again."""
    model = re.sub(r"[^\w.-]+", "-", Path(where.model).name) or "model"
    match config:
        case LearnConfig():
            size = f"{config.sparsity:g}" if config.kv_budget is None else f"{config.kv_budget}B"
            name = f"{model}-{config.granularity}-{size}-w{config.window}-seed{config.seed}"
        case AdaptConfig():
            name = f"adapt-{model}-{config.method}-seed{config.seed}"
        case _:
            name = f"{'sweep' if isinstance(config, SweepConfig) else 'eval'}-{model}"
    return Path("runs") / name


FORMER_NAMES = {"activation_checkpointing": "gradient_checkpointing"}


def with_present_names(record: Any) -> Any:
    """A record of settings from an earlier version of consa, under the names that they have now."""
    if not isinstance(record, dict):
        return record
    return {FORMER_NAMES.get(name, name): with_present_names(value) for name, value in record.items()}


def check_window(window: int, num_sink_tokens: int, seq_len: int) -> None:
    """Raise ConsaError if window and sinks cover whole sequences, on which nothing can be learned or measured."""
    if window + num_sink_tokens >= seq_len:
        raise ConsaError(
            f"window + num_sink_tokens must be smaller than seq_len ({seq_len}), got {window} + {num_sink_tokens};"
            " otherwise sliding-window attention is full attention"
        )
