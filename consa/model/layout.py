"""Find the attention layers of a model by running a skeleton of it without weights."""

from __future__ import annotations

import functools
import inspect
import json
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.cache_utils import Cache

from consa.allocation import Allocation
from consa.cache.hybrid import cache_argument
from consa.cache.layer import HybridLayer, NewKeys
from consa.cache.split import HeadSplit
from consa.errors import InvalidAllocationError, UnsupportedModelError
from consa.model import interface
from consa.model import register as _register  # noqa: F401 (the attention that records a skeleton's calls)

MAX_LAYERS = 4096  # a damaged config may hold any number, and a skeleton takes time and memory
# Keywords that a model may pass to its attention function; others could change its meaning.
KNOWN_KEYWORDS = {
    "scaling", "dropout", "softcap", "sliding_window", "is_causal", "position_ids", "use_cache", "cache_position",
    "position_embeddings", "output_attentions", "output_hidden_states", "output_router_logits",
}  # fmt: skip


@dataclass(frozen=True)
class AttentionLayout:
    """The attention layers of a model and their shape; every layer has the same."""

    names: tuple[str, ...]  # of the attention modules, one per layer
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    native_windows: dict[int, int] = field(default_factory=dict)  # layer -> tokens, if the model itself slides there

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int]:
        """(layers, KV heads per layer), the first two arguments of rules."""
        return self.num_layers, self.num_kv_heads


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The decoder layers, each with one attention module, from the input to the output."""
    return [model.get_submodule(name.rpartition(".")[0]) for name in attention_layout(model).names]


def check_fits(allocation: Allocation, layout: AttentionLayout, model_name: str) -> None:
    """Raise InvalidAllocationError unless `allocation` has the model's shape and native windows."""
    have, want = (allocation.num_layers, allocation.num_kv_heads), layout.shape
    if have != want:
        raise InvalidAllocationError(
            f"the allocation is for {have[0]} layers x {have[1]} KV heads, but {model_name} has {want[0]} x {want[1]};"
            " use an allocation made for this model"
        )
    if allocation.native_windows != layout.native_windows:
        raise InvalidAllocationError(
            f"native_windows of the allocation are {allocation.native_windows}, but those of {model_name} are"
            f" {layout.native_windows}; use an allocation made for this model"
        )


def attention_layout(model: PreTrainedModel) -> AttentionLayout:
    """The layout of a loaded model; see `inspect_attention`.

    Raises:
        UnsupportedModelError: as there, or `model` is a wrapper around a model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a model of transformers; pass the model inside: get_base_model() or"
            " merge_and_unload() of a peft model, _orig_mod of a compiled model"
        )
    return _inspect_cached(type(model), type(model.config), model.config.to_json_string(use_diff=False))


def inspect_attention(model_class: type[PreTrainedModel], config: Any) -> AttentionLayout:
    """Run a skeleton of the model, without weights, and record the calls of its attention function.

    Args:
        model_class: the causal language model's class.
        config: its configuration.

    Raises:
        UnsupportedModelError: some layer's attention is not plain full or sliding softmax attention through
            transformers' attention interface; the message names the model and the reason.
    """
    name = model_class.__name__

    def refuse(reason: str) -> UnsupportedModelError:
        return UnsupportedModelError(f"{name} is not supported: {reason}")

    layer_types = getattr(config, "layer_types", None) or []
    kinds = set(layer_types) - {"full_attention", "sliding_attention"}
    if kinds:
        raise refuse(f"it has layers of kind {', '.join(sorted(kinds))}")
    if not model_class._can_set_attn_implementation():
        raise refuse("its attention does not go through transformers' attention interface")
    num_layers = config.get_text_config().num_hidden_layers
    if not isinstance(num_layers, int) or not 1 <= num_layers <= MAX_LAYERS:
        raise refuse(f"its config says num_hidden_layers {num_layers!r}, which is not 1 to {MAX_LAYERS}")
    fields = config.to_dict()  # a copy: the skeleton must not change the caller's
    fields.pop("consa", None)  # a hybrid is inspected as the dense model of its weights
    try:
        config = type(config).from_dict(fields)
        config._attn_implementation = interface.INSPECT_NAME
        with torch.device("meta"):
            skeleton = model_class(config).eval()
            for parent in skeleton.modules():
                if any(map(interface.is_attention, parent.children())):
                    # Feed-forward layers and norms keep the shape, and some cannot run on the meta device.
                    for child in parent.children():
                        if not interface.is_attention(child):
                            child.forward = _first_argument
                elif hasattr(parent, "rope_type"):  # some scale with the values of positions, which are not there
                    parent.forward = functools.partial(inspect.unwrap(type(parent).forward), parent)
            _run(skeleton, 2, use_cache=False)
    except Exception as error:  # model code may raise anything
        raise refuse(f"a forward pass of its skeleton failed: {type(error).__name__}: {error}") from error
    modules: Any = {n: m for n, m in skeleton.named_modules() if hasattr(m, "consa_call")}
    if [module.layer_idx for module in modules.values()] != list(range(num_layers)):
        raise refuse(f"{len(modules)} of its {num_layers} layers have attention that consa can take over")
    shapes, native_windows = set(), {}
    for layer, module in enumerate(modules.values()):
        q, k, v, keywords = module.consa_call
        shapes.add((q.shape[1], k.shape[1], q.shape[3], k.shape[3], v.shape[3]))
        asked = {key for key, value in keywords.items() if value is not None}
        causal = keywords.get("is_causal")
        if asked - KNOWN_KEYWORDS or not (getattr(module, "is_causal", True) if causal is None else causal):
            raise refuse(f"its attention uses {', '.join(sorted(asked - KNOWN_KEYWORDS)) or 'no causality'}")
        if "sliding_window" in asked:
            native_windows[layer] = keywords["sliding_window"]
    if len(shapes) > 1:
        raise refuse(f"its layers differ in (q heads, KV heads, head dimensions): {sorted(shapes)}")
    ((q_heads, kv_heads, head_dim, k_dim, v_dim),) = shapes
    if not head_dim == k_dim == v_dim or q_heads % kv_heads:
        raise refuse(f"its heads do not match: {q_heads} query, {kv_heads} KV, dimensions {head_dim}, {k_dim}, {v_dim}")
    sliding = {layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"}
    if layer_types and sliding != native_windows.keys():
        raise refuse("layer_types in its config and its attention layers disagree about which layers slide")
    if len(native_windows) == num_layers:
        raise refuse("every layer already uses a sliding window, so there is nothing to allocate")
    cache: Any = Cache(layers=[_CountingLayer(HeadSplit((), (), window=1, num_sink_tokens=0)) for _ in modules])
    try:
        with torch.device("meta"):
            for queries in (2, 1):  # a prompt and a generated token
                _run(skeleton, queries, use_cache=True, **{cache_argument(skeleton): cache})
    except Exception as error:
        raise refuse(f"a step of its skeleton with a cache failed: {type(error).__name__}: {error}") from error
    for layer, module in enumerate(modules.values()):
        if cache.layers[layer].get_seq_length() != 3 or [x.shape for x in module.consa_call[:3]] != [
            (1, heads, 1, head_dim) for heads in (q_heads, kv_heads, kv_heads)
        ]:
            raise refuse(f"its layer {layer} does not keep its own keys and values in the cache")
    return AttentionLayout(tuple(modules), q_heads, kv_heads, head_dim, native_windows)


class _CountingLayer(HybridLayer):
    """A layer of a skeleton's cache: hands on keys as a `HybridLayer` does, and counts them."""

    def update(self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self.length += key_states.shape[2]
        return NewKeys(self, key_states, value_states), None


def _run(skeleton: Any, queries: int, **options: Any) -> None:
    # Without a mask, transformers would look for packed sequences in the data.
    mask = torch.ones(1, queries, dtype=torch.long)
    skeleton(input_ids=torch.zeros_like(mask), attention_mask=mask, **options)


def max_positions(config: Any) -> int | None:
    """The number of tokens that a model's positions cover, with those that RoPE scaling adds; None without a limit."""
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    longest = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None) or {}
    if longest is None or rope.get("rope_type") not in ("yarn", "linear", "dynamic"):
        return longest  # other kinds, and scaling by layer type, have it in max_position_embeddings
    return max(longest, int((rope.get("original_max_position_embeddings") or longest) * rope["factor"]))


def _first_argument(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@functools.lru_cache(maxsize=32)  # attaching is frequent, and a skeleton takes 0.15 s
def _inspect_cached(model_class: type, config_class: Any, config_json: str) -> AttentionLayout:
    fields = config_class._decode_special_floats(json.loads(config_json))
    return inspect_attention(model_class, config_class.from_dict(fields))
