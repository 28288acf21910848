"""Converted models on disk: weights, config, tokenizer and allocation in one folder, whole or absent.

There are two kinds. A *hybrid* checkpoint needs consa: its config.json has a model type, layer types and architecture
of consa, so transformers and other engines refuse it without consa. A *plain* checkpoint needs nothing: it is written
as a family whose config expresses a layer-wise allocation without sinks (`consa.model.spelling`).
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from consa.allocation import Allocation
from consa.errors import ConsaError, first_line
from consa.files import JsonObject, check_writable, read_json, sha256_of
from consa.model import interface
from consa.model.layout import attention_layout, check_fits, max_positions
from consa.model.load import cannot_write, check_device, new_folder, quiet
from consa.model.register import config_record, hybrid_config
from consa.model.spelling import (
    check_engine,
    layers_obstacle,
    model_obstacle,
    readers,
    respelt,
    spelling_for,
    windows,
    written_fields,
)

SCHEMA = "consa.checkpoint/1"
MANIFEST = "consa.json"
ALLOCATION = "allocation.json"
WINDOWS = "windows.json"
MAX_JSON_BYTES = 64 * 2**20


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
    engine: str | None = None,
) -> Converted:
    """Write a model with its allocation to a folder for `load`.

    Beside a plain checkpoint, `windows.json` has the window of every layer in the words of engines that take a list.

    Args:
        model: the pretrained model, or one trained further under the allocation.
        allocation: which KV heads keep full attention.
        out_dir: a folder that does not exist yet, or is empty.
        tokenizer: also written, unless None.
        kind: "plain", "hybrid", or "auto", which is plain if an engine is named.
        engine: one of `spelling.ENGINES`, which must be able to read the plain checkpoint; None allows any.

    Raises:
        InvalidAllocationError: the allocation was made for another model.
        ConsaError: a plain checkpoint is not possible, transformers cannot save the model, or the folder cannot be
            written.
    """
    folder = Path(out_dir)
    check_wish(folder, kind, engine)
    check_fits(allocation, attention_layout(model), type(model).__name__)
    if kind == "auto":
        kind = "hybrid" if engine is None else "plain"
    if kind == "plain":
        check_plain(model.config, allocation, engine)
        chosen = spelling_for(model.config.model_type, engine)
        engines = [chosen.engines[engine]] if engine else readers(written_fields(model.config))
        reason = f"{chosen.name}, which needs no consa; read by {'; '.join(engines)}"
    else:
        obstacle = plain_obstacle(model.config, allocation)
        reason = f"needs consa: {obstacle or 'a plain checkpoint is possible too'}"
    try:
        with new_folder(folder) as temporary, quiet():
            record = vars(model.config).pop("consa", None)  # the family's config is written, and changed below
            try:
                written = model if kind == "hybrid" else respelt(model, allocation, engine)
                written.save_pretrained(temporary)
            finally:
                if record is not None:
                    model.config.consa = record
            if kind == "hybrid":
                config = json.loads((temporary / "config.json").read_text(encoding="utf-8"))
                _write_json(temporary / "config.json", hybrid_config(config, allocation))
            else:
                _write_json(temporary / WINDOWS, windows(allocation, max_positions(model.config)))
            if tokenizer is not None:
                tokenizer.save_pretrained(temporary)
            allocation.save(temporary / ALLOCATION)
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


def check_wish(folder: Path, kind: str, engine: str | None = None) -> None:
    """Raise a ConsaError for arguments of `convert` that are wrong with any model."""
    if kind not in ("auto", "hybrid", "plain"):
        raise ConsaError(f"kind must be auto, hybrid, plain or gguf, got {kind!r}")
    check_engine(engine)
    if engine and kind == "hybrid":
        raise ConsaError(f"a hybrid needs consa, and {engine} is to do without; leave out kind or engine")
    check_writable(folder)
    if folder.exists() and any(folder.iterdir()):
        raise ConsaError(f"{folder} already exists; choose another folder, or delete it")


def load(
    folder: str | Path, *, device: str | torch.device | None = None, dtype: torch.dtype | str | None = None
) -> PreTrainedModel:
    """Load a converted model; its `generate()` uses the small cache automatically.

    Args:
        folder: a folder written by `convert`, of either kind, or by `save_pretrained` of a hybrid.
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
        check_fits(allocation, attention_layout(model), type(model).__name__)
    return model.to(device)


def verify(folder: str | Path) -> tuple[Literal["hybrid", "plain"], Allocation]:
    """The kind and allocation of a folder, after checking, as for `load`, that it holds what `convert` wrote."""
    folder = Path(folder)
    manifest_file, config_file = folder / MANIFEST, folder / "config.json"
    if not os.path.isfile(manifest_file):  # unlike Path.is_file, accepts names that are too long
        if (saved := _saved_allocation(folder)) is not None:
            return "hybrid", saved
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
    if manifest.get("kind") != "hybrid" or config.get("consa") != config_record(allocation):
        raise _damaged(f"{config_file} does not hold the allocation of {ALLOCATION}")
    if config.get("model_type") != interface.NAME:
        raise _damaged(f"{config_file}: model_type must be {interface.NAME!r}, got {config.get('model_type')!r}")
    return "hybrid", allocation


def _saved_allocation(folder: Path) -> Allocation | None:
    """The allocation of a hybrid that `save_pretrained` wrote, which writes neither manifest nor allocation.json."""
    if not os.path.isfile(folder / "config.json") or os.path.exists(folder / ALLOCATION):
        return None
    config = _read_json(folder / "config.json")
    if config.get("model_type") != interface.NAME or not isinstance(config.get("consa"), dict):
        return None
    return Allocation.from_json(json.dumps(config["consa"]))


def check_plain(config: Any, allocation: Allocation, engine: str | None) -> None:
    """Raise a ConsaError unless a plain checkpoint of a model with this config is possible, for this engine."""
    if obstacle := plain_obstacle(config, allocation, engine):
        raise ConsaError(f"no plain checkpoint is possible: {obstacle}; write a hybrid, which consa.load reads")


def plain_obstacle(config: Any, allocation: Allocation, engine: str | None = None) -> str | None:
    """Why no stock config, or none that the engine reads, can express this allocation; None if one can."""
    if obstacle := layers_obstacle(allocation):
        return obstacle
    return model_obstacle(config, engine)


def _write_json(path: Path, record: JsonObject) -> None:
    path.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _read_json(path: Path) -> JsonObject:
    try:
        return read_json(path, max_bytes=MAX_JSON_BYTES)
    except ConsaError as error:
        raise _damaged(error) from error


def _damaged(problem: object) -> ConsaError:
    return ConsaError(f"{problem}; convert the model again")
