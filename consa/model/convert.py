"""Converted models on disk: weights, config, tokenizer and allocation in one folder, whole or absent.

There are two kinds. A *hybrid* checkpoint needs consa: its config.json has a model type, layer types and architecture
of consa, so transformers and other engines refuse it without consa. A *plain* checkpoint needs nothing: it expresses a
layer-wise allocation without sinks in the config fields of the model's own family.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from consa.allocation import Allocation
from consa.errors import ConsaError, UnsupportedModelError, first_line
from consa.files import JsonObject, check_writable, read_json, sha256_of
from consa.model import interface
from consa.model.layout import attention_layout, check_fits, inspect_attention
from consa.model.load import cannot_write, check_device, new_folder, quiet
from consa.model.plan import Plan
from consa.model.register import ARCHITECTURE_PREFIX, PREFIX, TAKEN

SCHEMA = "consa.checkpoint/1"
MANIFEST = "consa.json"
ALLOCATION = "allocation.json"
MAX_JSON_BYTES = 64 * 2**20
# Families whose config can mix FA and SWA layers: model_type -> fields to write besides window and layer_types. Llama's
# cannot: with layer_types it would use a sliding cache under a full mask. Ministral is the same network with these
# fields. vLLM runs both under the name of Llama's class.
PLAIN_FAMILIES: dict[str, JsonObject] = {
    "llama": {"model_type": "ministral", "architectures": ["LlamaForCausalLM"]},
    "mistral": {"model_type": "ministral", "architectures": ["LlamaForCausalLM"]},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "max_window_layers": 0},
    "smollm3": {"use_sliding_window": True},
}


@dataclass(frozen=True)
class Converted:
    """The result of `convert`."""

    folder: Path  # with the checkpoint
    kind: Literal["hybrid", "plain"]  # "hybrid" needs consa, stock transformers reads "plain"
    reason: str  # why `convert` chose this kind


def convert(
    model: PreTrainedModel,
    allocation: Allocation,
    out_dir: str | Path,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    kind: Literal["auto", "hybrid", "plain"] = "auto",
) -> Converted:
    """Write a model with its allocation to a folder for `load`.

    Args:
        model: the pretrained model, or one trained further under the allocation.
        allocation: which KV heads keep full attention.
        out_dir: a folder that does not exist yet, or is empty.
        tokenizer: also written, unless None.
        kind: "plain", "hybrid", or "auto", which writes a plain checkpoint whenever it is equivalent.

    Raises:
        InvalidAllocationError: the allocation was made for another model.
        ConsaError: a plain checkpoint is not possible, transformers cannot save the model, or the folder cannot be
            written.
    """
    folder = Path(out_dir)
    check_wish(folder, kind)
    check_fits(allocation, attention_layout(model), type(model).__name__)
    obstacle = None if kind == "hybrid" else plain_obstacle(model.config, allocation)
    if kind == "plain" and obstacle:
        raise ConsaError(f"no plain checkpoint is possible: {obstacle}; write a hybrid, which consa.load reads")
    if kind == "hybrid" or obstacle:
        kind, reason = "hybrid", f"needs consa: {obstacle or 'as requested'}"
    else:
        ministral = PLAIN_FAMILIES[model.config.model_type].get("model_type") == "ministral"
        vllm = "vLLM" if ministral else "vLLM (with --model-impl transformers)"
        kind = "plain"
        reason = (
            f"stock configs can express whole layers without sinks; transformers and {vllm} read it without consa."
            " Other engines may silently run it as full attention: compare before use"
        )
    try:
        with new_folder(folder) as temporary, quiet():
            record = vars(model.config).pop("consa", None)  # without it, a hybrid's config may be saved
            try:
                model.save_pretrained(temporary)
            finally:
                if record is not None:
                    model.config.consa = record
            config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
            describe = _hybrid_config if kind == "hybrid" else _plain_config
            _write_json(temporary / "config.json", config | describe(model, config, allocation))
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            allocation.save(temporary / ALLOCATION)
            if kind == "plain":
                _check_plain(temporary, allocation)
            files = sorted(path.relative_to(temporary) for path in temporary.rglob("*") if path.is_file())
            digests = {path.as_posix(): sha256_of(temporary / path) for path in files}
            _write_json(temporary / MANIFEST, {"schema": SCHEMA, "kind": kind, "files": digests})
    except (OSError, SafetensorError) as error:  # safetensors raises the latter if the disk is full
        raise cannot_write(folder, error, "choose a folder with room") from error
    except ConsaError:
        raise
    except ValueError as error:  # checks of transformers, for example of the generation config
        raise ConsaError(f"{type(model).__name__} cannot be saved: {first_line(error)}") from error
    return Converted(folder, kind, reason)


def check_wish(folder: Path, kind: str) -> None:
    """Raise a ConsaError for arguments of `convert` that are wrong with any model."""
    if kind not in ("auto", "hybrid", "plain"):
        raise ConsaError(f"kind must be auto, hybrid or plain, got {kind!r}")
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConsaError(f"{folder} already exists; choose another folder, or delete it")


def load(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """Load a converted model; its `generate()` uses the small cache automatically.

    Args:
        folder: a folder written by `convert`, of either kind.
        device: None selects "cuda" if available, else "cpu".
        dtype: of the weights, also by name; None keeps the saved dtype.

    Returns:
        The model in evaluation mode.

    Raises:
        ConsaError: a file is missing, truncated, edited or of another model; the message names it.
    """
    folder = Path(folder)
    check_device(None if device is None else str(device))
    kind, allocation = verify(folder)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        with quiet():
            model: Any = AutoModelForCausalLM.from_pretrained(
                folder, dtype=dtype or "auto", local_files_only=True, trust_remote_code=False
            ).eval()
    except ConsaError:
        raise
    # transformers raises many types. The files are intact, so its version is the cause.
    except Exception as error:
        raise ConsaError(f"cannot load {folder}: {first_line(error)}") from error
    if kind == "hybrid":
        layout = attention_layout(model)
        check_fits(allocation, layout, type(model).__name__)
        plan = Plan(allocation)
        for name in layout.names:
            model.get_submodule(name).consa_plan = plan
    return model.to(device)


def verify(folder: str | Path) -> tuple[Literal["hybrid", "plain"], Allocation]:
    """The kind and allocation of a folder, after checking, as for `load`, that it holds what `convert` wrote."""
    folder = Path(folder)
    manifest_file, config_file = folder / MANIFEST, folder / "config.json"
    if not os.path.isfile(manifest_file):  # unlike Path.is_file, accepts names that are too long
        raise ConsaError(f"{folder} holds no {MANIFEST}, so it is not a converted model; make one with consa convert")
    manifest = _read_json(manifest_file)
    files = manifest.get("files")
    if manifest.get("schema") != SCHEMA or not isinstance(files, dict):
        raise _damaged(f"{manifest_file}: schema must be {SCHEMA!r}, got {manifest.get('schema')!r}")
    for name in ("config.json", ALLOCATION):
        if name not in files:
            raise _damaged(f"{manifest_file} lists no {name}")
    for name, digest in files.items():
        if Path(name).is_absolute() or ".." in Path(name).parts:
            raise _damaged(f"{manifest_file} lists {name!r}, outside its folder")
        if not os.path.isfile(folder / name):
            raise _damaged(f"{folder / name} is missing")
        if sha256_of(folder / name) != digest:
            raise _damaged(f"{folder / name} is truncated or edited: its hash differs from {MANIFEST}")
    allocation = Allocation.load(folder / ALLOCATION)
    config = _read_json(config_file)
    if manifest.get("kind") == "plain" and "consa" not in config:
        return "plain", allocation
    if manifest.get("kind") != "hybrid" or config.get("consa") != _record(allocation):
        raise _damaged(f"{config_file} does not hold the allocation of {ALLOCATION}")
    if config.get("model_type") != interface.NAME:
        raise _damaged(f"{config_file}: model_type must be {interface.NAME!r}, got {config.get('model_type')!r}")
    return "hybrid", allocation


def plain_obstacle(config: Any, allocation: Allocation) -> str | None:
    """Why a stock config of the model's family cannot express this allocation; None if it can."""
    if (allocation.full_attention.any(1) != allocation.full_attention.all(1)).any():
        return "heads of one layer differ, and stock configs express whole layers only"
    if allocation.num_sink_tokens and allocation.sparsity:
        return f"stock configs have no sink tokens, and the allocation has {allocation.num_sink_tokens}"
    if allocation.native_windows:
        return "the model already has sliding layers, and stock configs have only one window"
    if config.model_type not in PLAIN_FAMILIES:
        known = ", ".join(PLAIN_FAMILIES)
        return f"{config.model_type}'s config cannot express it (those of {known} can)"
    for name in ("attention_bias", "mlp_bias"):
        if config.model_type == "llama" and getattr(config, name, False):
            return f"a Llama is written as a Ministral, which has no {name}"
    return None


def _hybrid_config(model: PreTrainedModel, written: JsonObject, allocation: Allocation) -> JsonObject:
    """The changes to a config `written` by the family so that only `register.HybridConfig` can read it."""
    return {PREFIX + name: written[name] for name in TAKEN if name in written} | {
        "model_type": interface.NAME,  # read by AutoModel
        "layer_types": [interface.NAME] * allocation.num_layers,  # read by the classes of all families
        "architectures": [ARCHITECTURE_PREFIX + type(model).__name__],  # read by vLLM and others
        "consa": _record(allocation),
    }


def _record(allocation: Allocation) -> JsonObject:
    """The allocation as a config holds it."""
    return json.loads(allocation.to_json()) | {"scores": None, "provenance": {}}


def _plain_config(model: PreTrainedModel, written: JsonObject, allocation: Allocation) -> JsonObject:
    """The changes that express the allocation in the config of the family."""
    config: Any = model.config
    kinds = ("sliding_attention", "full_attention")
    changes = PLAIN_FAMILIES[config.model_type] | {
        "sliding_window": allocation.window,
        "layer_types": [kinds[int(full)] for full in allocation.full_attention[:, 0]],
    }
    if changes.get("model_type") == "ministral":
        changes["head_dim"] = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    return changes


def _check_plain(folder: Path, allocation: Allocation) -> None:
    """Check that this version of transformers reads the config as intended."""
    config = AutoConfig.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    wanted = {layer: allocation.window for layer, full in enumerate(allocation.full_attention[:, 0]) if not full}
    try:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
        found = inspect_attention(model_class, config).native_windows
    except UnsupportedModelError:
        if len(wanted) < allocation.num_layers:
            raise
        return  # every layer slides as intended; `inspect_attention` refuses such models
    if found != wanted:
        raise ConsaError(
            f"this version of transformers would slide layers {found}, not {wanted}; write a hybrid instead"
        )


def _write_json(path: Path, record: JsonObject) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> JsonObject:
    try:
        return read_json(path, max_bytes=MAX_JSON_BYTES)
    except ConsaError as error:
        raise _damaged(error) from error


def _damaged(problem: object) -> ConsaError:
    return ConsaError(f"{problem}; convert the model again")
