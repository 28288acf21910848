"""Layer-wise hybrids in the words of engines that have never heard of consa.

A *spelling* writes a model as another family that computes the same and whose config can slide single layers. Engines
that lack these families refuse them. Llama and Qwen can have a window in their configs too, but several engines ignore
it and compute full attention in silence.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from consa.allocation import Allocation
from consa.errors import ConsaError
from consa.files import JsonObject
from consa.model.attach import attached
from consa.model.load import quiet

LIST_ENGINE = "tensorrt-llm"  # takes the dense model and a list of windows
ENGINES = ("transformers", "vllm", "sglang", "llama.cpp", "mlx", LIST_ENGINE)
NO_SINK = -1e4
"""Logit of a learned sink that gets no weight: exp(-1e4) is 0 beside any score."""
EXTRA_TOKENS = 64  # beyond the window, so that the comparison sees a window that is wrong by one
TOLERANCE = {torch.float32: 1e-3}  # of logits, as a share of their standard deviation
ROUNDING = 0.1  # the same for 16-bit weights, whose rounding differs with the order of sums


@dataclass(frozen=True)
class Spelling:
    """A family that other families can be written as."""

    name: str  # its model_type
    families: tuple[str, ...]  # the model types that it can hold
    engines: Mapping[str, str]  # engine -> from which version it reads the spelling, and what is lost
    config: Callable[[Any], JsonObject]  # the family's own config -> fields besides those of the same name
    tensors: Callable[[Any], dict[str, Tensor]]  # the model -> all tensors of the written one
    lost: Callable[[JsonObject], dict[str, str]] = lambda fields: {}
    """All fields -> what an engine that has the family leaves out of this model without an error."""


def _granite_swa(config: Any) -> JsonObject:
    theta = config.rope_parameters["rope_theta"]
    rotated = getattr(config, "no_rope_layers", None) or [1] * config.num_hidden_layers  # SmolLM3: 0 is no RoPE
    return {
        "attention_multiplier": (config.hidden_size // config.num_attention_heads) ** -0.5,
        "layer_rope_theta": [theta if rotates else 0 for rotates in rotated],
        "attention_bias": config.model_type == "qwen2" or getattr(config, "attention_bias", False),
    }


def _granite_swa_tensors(model: Any) -> dict[str, Tensor]:
    tensors = _own_tensors(model)
    for index, layer in enumerate(model.model.layers):
        attention, name = layer.self_attn, f"model.layers.{index}.self_attn"
        weight = attention.o_proj.weight
        tensors[f"{name}.sinks"] = weight.new_full((model.config.num_attention_heads,), NO_SINK)
        if attention.q_proj.bias is not None and attention.o_proj.bias is None:  # Qwen2
            tensors[f"{name}.o_proj.bias"] = weight.new_zeros(weight.shape[0])
    return tensors


def _granite_swa_lost(fields: JsonObject) -> dict[str, str]:
    lost = {}
    if fields["attention_bias"] or fields.get("mlp_bias"):
        lost["sglang"] = "SGLang drops the biases of granite_swa without an error"
    if 0 in fields["layer_rope_theta"]:
        lost["llama.cpp"] = "llama.cpp's converter gives every layer RoPE, and some layers of this model have none"
    return lost


def _own_tensors(model: Any) -> dict[str, Tensor]:
    return {name: value.detach() for name, value in model.state_dict().items()}


def _mellum(config: Any) -> JsonObject:
    layers, sparse = config.num_hidden_layers, config.model_type == "qwen3_moe"
    dense = getattr(config, "mlp_only_layers", []) if sparse else range(layers)
    step = config.decoder_sparse_step if sparse else 1
    kinds = ["dense" if layer in dense or (layer + 1) % step else "sparse" for layer in range(layers)]
    rope = config.rope_parameters
    return {"mlp_layer_types": kinds, "rope_parameters": {"full_attention": rope, "sliding_attention": rope}}


def _mellum_experts(config: Any) -> JsonObject:
    if config.model_type == "qwen3_moe":
        return _mellum(config)
    one = {"num_experts": 1, "num_experts_per_tok": 1, "moe_intermediate_size": config.intermediate_size}
    return _mellum(config) | one | {"mlp_layer_types": ["sparse"] * config.num_hidden_layers}


def _mellum_experts_tensors(model: Any) -> dict[str, Tensor]:
    """A dense MLP as the only expert, which gets every token with weight 1."""
    tensors = _own_tensors(model)
    for index in range(model.config.num_hidden_layers if model.config.model_type == "qwen3" else 0):
        name = f"model.layers.{index}.mlp"
        gate, up, down = (tensors.pop(f"{name}.{part}_proj.weight") for part in ("gate", "up", "down"))
        tensors[f"{name}.gate.weight"] = gate.new_zeros(1, gate.shape[1])
        tensors[f"{name}.experts.gate_up_proj"] = torch.cat((gate, up))[None]
        tensors[f"{name}.experts.down_proj"] = down[None]
    return tensors


def _mellum_experts_lost(engine: str, fields: JsonObject) -> dict[str, str]:
    if "dense" in fields["mlp_layer_types"]:
        return {engine: f"{engine} reads mellum with experts in every layer only"}
    if fields["rope_parameters"]["full_attention"].get("rope_type", "default") != "default":
        return {engine: f"{engine} does not scale RoPE in every layer of mellum"}
    return {}


def _mellum_untied(config: Any) -> JsonObject:
    return _mellum_experts(config) | {"tie_word_embeddings": False}


def _mellum_untied_tensors(model: Any) -> dict[str, Tensor]:
    tensors = _mellum_experts_tensors(model)
    if model.config.tie_word_embeddings:
        tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    return tensors


def _mellum_untied_lost(fields: JsonObject) -> dict[str, str]:
    if fields["tie_word_embeddings"]:
        return {"llama.cpp": "llama.cpp's mellum ties no embeddings"}
    if lost := _mellum_experts_lost("llama.cpp", fields):
        return lost
    if not fields.get("norm_topk_prob", True):
        return {"llama.cpp": "llama.cpp always normalises the weights of mellum's experts, and this model does not"}
    return {}


GRANITE_SWA = Spelling(
    name="granite_swa",
    families=("llama", "mistral", "qwen2", "smollm3"),
    engines={
        "transformers": "transformers 5.19 or later, with eager attention, whose memory grows with length squared",
        "vllm": "vLLM 0.32 or later, in its own class",
        "sglang": "SGLang 0.5.23 or later, in its own class",
        "llama.cpp": "llama.cpp 0.5.0 or later, after its convert_hf_to_gguf.py",
    },
    config=_granite_swa,
    tensors=_granite_swa_tensors,
    lost=_granite_swa_lost,
)
MELLUM = Spelling(
    name="mellum",
    families=("qwen3", "qwen3_moe"),
    engines={
        "transformers": "transformers 5.19 or later",
        "vllm": "vLLM 0.32 or later, through its transformers backend",
        "sglang": "SGLang 0.5.23 or later, in its own class",
    },
    config=_mellum,
    tensors=_own_tensors,
)
MELLUM_EXPERTS = replace(  # experts in every layer
    MELLUM,
    engines={"mlx": "mlx-lm 0.32 or later"},
    config=_mellum_experts,
    tensors=_mellum_experts_tensors,
    lost=partial(_mellum_experts_lost, "mlx"),
)
MELLUM_UNTIED = replace(  # experts in every layer, and no tied embeddings
    MELLUM,
    engines={"llama.cpp": "llama.cpp 0.5.0 or later, after its convert_hf_to_gguf.py"},
    config=_mellum_untied,
    tensors=_mellum_untied_tensors,
    lost=_mellum_untied_lost,
)
SPELLINGS = (GRANITE_SWA, MELLUM, MELLUM_EXPERTS, MELLUM_UNTIED)
LIST_ONLY = (
    "TensorRT-LLM takes the dense model and kv_cache_config.max_attention_window, which shortens the KV cache, but its"
    " classes of Llama and Qwen let every layer attend to all tokens"
)


def spelling_for(family: str, engine: str | None = None) -> Spelling:
    """The spelling of a family that an engine reads.

    Args:
        family: the model type.
        engine: one of `ENGINES`; None takes any.

    Raises:
        ConsaError: there is none; the message says why.
    """
    of_family = [spelling for spelling in SPELLINGS if family in spelling.families]
    if not of_family:
        known = ", ".join(sorted({family for spelling in SPELLINGS for family in spelling.families}))
        raise ConsaError(f"{family}'s config cannot express it (those of {known} can)")
    if engine == LIST_ENGINE:
        raise ConsaError(LIST_ONLY)
    for spelling in of_family:
        if engine is None or engine in spelling.engines:
            return spelling
    readers = ", ".join(sorted({engine for spelling in of_family for engine in spelling.engines}))
    raise ConsaError(f"{engine} reads no spelling of {family}; {of_family[0].name} is read by {readers}")


def readers(fields: JsonObject) -> list[str]:
    """Which engines read a folder in a spelling, each with its version and what is lost.

    Args:
        fields: of the folder's config, or those from `written_fields`.
    """
    return [
        says
        for spelling in SPELLINGS
        if spelling.name == fields["model_type"]
        for engine, says in spelling.engines.items()
        if engine not in spelling.lost(fields)
    ]


def written_fields(config: Any, engine: str | None = None) -> JsonObject:
    """The config that a model would have in the spelling that an engine reads, with fields that only the model has."""
    spelling = spelling_for(config.model_type, engine)
    return config.to_dict() | spelling.config(config) | {"model_type": spelling.name}


def check_engine(engine: str | None) -> None:
    """Raise a ConsaError for an engine that nothing is written for."""
    if engine is not None and engine not in ENGINES:
        raise ConsaError(f"engine must be one of {', '.join(ENGINES)}, got {engine!r}")


def layers_obstacle(allocation: Allocation) -> str | None:
    """Why no config of whole layers can express an allocation; None if one can."""
    if (allocation.full_attention.any(1) != allocation.full_attention.all(1)).any():
        return "heads of one layer differ, and stock configs express whole layers only"
    if allocation.num_sink_tokens and allocation.sparsity:
        return f"stock configs have no sink tokens, and the allocation has {allocation.num_sink_tokens}"
    if allocation.native_windows:
        return "the model already has sliding layers, and stock configs have only one window"
    return None


def model_obstacle(config: Any, engine: str | None = None) -> str | None:
    """Why a model cannot be written in a spelling, or not in one that the engine reads; None if it can."""
    try:
        spelling = spelling_for(config.model_type, engine)
    except ConsaError as error:
        return str(error)
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    if spelling is GRANITE_SWA and head_dim * config.num_attention_heads != config.hidden_size:
        return (
            f"{spelling.name} has heads of hidden_size / num_attention_heads numbers, and the model's have {head_dim}"
        )
    return spelling.lost(written_fields(config, engine)).get(engine) if engine else None


def respelt(model: PreTrainedModel, allocation: Allocation, engine: str | None = None) -> PreTrainedModel:
    """The model in the spelling that an engine reads, sharing most of the model's weights.

    Its logits have been compared with those of the hybrid that `consa.attached` makes of the model.

    Raises:
        ConsaError: the two differ, or this version of transformers lacks the family.
    """
    spelling = spelling_for(model.config.model_type, engine)
    try:
        own = AutoConfig.for_model(spelling.name)
    except ValueError as error:
        raise ConsaError(f"this version of transformers lacks {spelling.name}; install a newer one") from error
    written_by: Any = AutoModelForCausalLM._model_mapping[type(own)]
    source = model.config.to_dict()
    fields = {name: source[name] for name in own.to_dict() if name in source and name != "model_type"}
    fields |= spelling.config(model.config) | {
        "sliding_window": allocation.window,
        "layer_types": _layer_types(allocation),
        "architectures": [written_by.__name__],
    }
    config = AutoConfig.for_model(spelling.name, **fields)
    if hasattr(config, "num_experts"):
        vars(config)["num_experts"] = config.num_experts  # mlx-lm reads this name, and transformers writes another
    with quiet(), torch.device("meta"):
        written: Any = AutoModelForCausalLM.from_config(config, dtype=model.dtype)
    written.load_state_dict(spelling.tensors(model), assign=True)
    if config.tie_word_embeddings:
        written.tie_weights()
    for module in written.modules():
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):  # RoPE's frequencies, which are no weights
            module.__init__(module.config)
    written.generation_config = model.generation_config
    _compare(written.eval(), model, allocation)
    return written


def _compare(written: Any, model: Any, allocation: Allocation) -> None:
    """Raise a ConsaError unless the two compute the same logits on random tokens, longer than the window."""
    longest = getattr(model.config, "max_position_embeddings", None) or allocation.window + EXTRA_TOKENS
    generator = torch.Generator().manual_seed(0)
    length = min(allocation.window + EXTRA_TOKENS, longest)
    ids = torch.randint(model.config.vocab_size, (1, length), generator=generator).to(model.device)
    with torch.no_grad():
        got = written(ids, use_cache=False).logits.float()
        with attached(model, allocation):
            wanted = model(ids, use_cache=False).logits.float()
    apart = float((got - wanted).abs().max() / wanted.std())
    if not apart <= TOLERANCE.get(model.dtype, ROUNDING):
        raise ConsaError(
            f"written as {written.config.model_type} this model's logits differ by {apart:.2g} of their standard"
            " deviation; write a hybrid, which consa.load reads"
        )


def window_of_layers(allocation: Allocation, num_positions: int | None) -> list[int]:
    """The window of every layer in tokens; that of full attention is the number of positions."""
    longest = num_positions or 2**31 - 1
    return [longest if full else allocation.window for full in allocation.full_attention[:, 0]]


def windows(allocation: Allocation, num_positions: int | None) -> JsonObject:
    """The window of every layer, in the words of engines that take a list beside the dense model."""
    return {
        LIST_ENGINE: {"kv_cache_config": {"max_attention_window": window_of_layers(allocation, num_positions)}},
        "layer_types": _layer_types(allocation),
        "sliding_window": allocation.window,
        "note": LIST_ONLY,
    }


def _layer_types(allocation: Allocation) -> list[str]:
    return ["full_attention" if full else "sliding_attention" for full in allocation.full_attention[:, 0]]
