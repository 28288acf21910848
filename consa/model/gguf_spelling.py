"""Write a GGUF file as a family of llama.cpp that slides single layers. Quantised tensors are copied, never rounded."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np

from consa.allocation import Allocation
from consa.errors import ConsaError, first_line, missing_extra
from consa.files import check_writable
from consa.model.gguf import check_header
from consa.model.load import cannot_write
from consa.model.spelling import NO_SINK, layers_obstacle

# Architecture -> the one that slides its layers. A GGUF of Mistral has the architecture llama.
TARGETS = {"llama": "granite_swa", "qwen2": "granite_swa", "qwen3": "mellum", "qwen3moe": "mellum"}
HALVES = ("qwen2",)  # rotate the halves of a head; granite_swa rotates neighbours
ROTATED = ("attn_q", "attn_k")
READER = "read by llama.cpp 0.5.0 or later"


def check_wish(source: str, out: Path, engine: str | None) -> None:
    """Raise a ConsaError for arguments of `respell` that are wrong with any file."""
    if not source.endswith(".gguf"):
        raise ConsaError(f"kind gguf copies a GGUF file, and {source!r} is none; give a file that ends in .gguf")
    if out.suffix != ".gguf":
        raise ConsaError(f"kind gguf writes a file that ends in .gguf, got {str(out)!r}")
    if engine not in (None, "llama.cpp"):
        raise ConsaError(f"kind gguf is for llama.cpp, and the engine is {engine}; leave one of the two out")
    if out.exists():
        raise ConsaError(f"{out} already exists; choose another file, or delete it")
    check_writable(out.parent)


def respell(source: Path, allocation: Allocation, out: Path) -> str:
    """Copy a GGUF file with the names and metadata of a family that slides the layers of the allocation.

    Qwen2's queries and keys are also put in another order, row by row, which leaves every number as it is. All tensors
    keep their quantisation.

    Args:
        source: a GGUF file of Llama, Mistral, Qwen2, Qwen3 or Qwen3-MoE.
        allocation: of whole layers without sink tokens.
        out: the file to write; a file that is there already is replaced.

    Returns:
        Which family was written, and what reads it.

    Raises:
        ConsaError: the allocation or the file cannot be written so, or the file is damaged.
    """
    if obstacle := layers_obstacle(allocation):
        raise ConsaError(f"no GGUF of llama.cpp can express the allocation: {obstacle}")
    try:
        import gguf
    except ImportError as error:
        raise missing_extra("GGUF files", "gguf") from error
    try:
        check_header(source)
        reader = gguf.GGUFReader(source)
        fields = {name: field for name, field in reader.fields.items() if not name.startswith("GGUF.")}
        family = str(fields["general.architecture"].contents())
    except Exception as error:  # GGUFReader raises many types
        raise ConsaError(f"cannot read {source}: {first_line(error)}") from error
    if family not in TARGETS:
        raise ConsaError(
            f"llama.cpp slides no layers of {family} by another name (those of {', '.join(TARGETS)} it can)"
        )
    layers, heads = (int(fields[f"{family}.{key}"].contents()) for key in ("block_count", "attention.head_count"))
    kv_heads = int(fields[f"{family}.attention.head_count_kv"].contents())
    if TARGETS[family] == "mellum":
        scaling = fields.get(f"{family}.rope.scaling.type")
        if scaling is not None and (scaled := scaling.contents()) != "none":
            raise ConsaError(f"llama.cpp's mellum scales no RoPE in sliding layers, and {source} has {scaled} scaling")
        if bias := next((tensor.name for tensor in reader.tensors if tensor.name.endswith(".bias")), None):
            raise ConsaError(f"llama.cpp's mellum has no biases, and {source} has {bias}")
    if allocation.full_attention.shape != (layers, kv_heads):
        raise ConsaError(
            f"the allocation is for {allocation.num_layers} layers x {allocation.num_kv_heads} KV heads, and {source}"
            f" has {layers} x {kv_heads}"
        )
    part = out.with_name(f".{out.name}.part")
    try:
        writer = gguf.GGUFWriter(part, TARGETS[family])
        _add_metadata(writer, fields, family, allocation)
        for name, data, kind in _tensors(reader, family, layers, heads, kv_heads):
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        os.replace(part, out)
    except OSError as error:
        raise cannot_write(out, error, "choose a folder with room") from error
    finally:
        part.unlink(missing_ok=True)
    return f"{TARGETS[family]}, {READER}"


def _add_metadata(writer: Any, fields: dict[str, Any], family: str, allocation: Allocation) -> None:
    target = TARGETS[family]
    for name, field in fields.items():
        if name in ("general.architecture", "general.alignment"):  # the writer's own
            continue
        owned = name.startswith(f"{family}.")
        written = target + name.removeprefix(family) if owned else name
        writer.add_key_value(written, field.contents(), field.types[0], sub_type=field.types[-1])
    writer.add_sliding_window(allocation.window)
    pattern = [not full for full in allocation.full_attention[:, 0].tolist()]
    writer.add_array(f"{target}.attention.sliding_window_pattern", pattern)
    if target == "granite_swa":
        writer.add_logit_scale(1.0)
    elif family == "qwen3":  # one expert, which gets every token
        writer.add_expert_count(1)
        writer.add_expert_used_count(1)
        writer.add_expert_feed_forward_length(int(fields[f"{family}.feed_forward_length"].contents()))
    writer.add_string("consa.allocation", allocation.to_json())


def _tensors(reader: Any, family: str, layers: int, heads: int, kv_heads: int) -> list[tuple[str, np.ndarray, Any]]:
    """Name, data and quantisation of every tensor to write."""
    float32 = reader.tensors[0].tensor_type.__class__.F32
    names = {tensor.name for tensor in reader.tensors}
    made: list[tuple[str, np.ndarray, Any]] = []
    for tensor in reader.tensors:
        name, data = tensor.name, tensor.data
        part = name.split(".")[2] if name.startswith("blk.") else name
        if family in HALVES and part in ROTATED:
            data = neighbours(data, heads if part == "attn_q" else kv_heads)
        if family == "qwen3" and part in ("ffn_gate", "ffn_up", "ffn_down"):
            name, data = name.replace(part, f"{part}_exps"), data[None]
        made.append((name, data, tensor.tensor_type))
        if name == "token_embd.weight" and TARGETS[family] == "mellum" and "output.weight" not in names:
            made.append(("output.weight", data, tensor.tensor_type))  # llama.cpp's mellum ties no embeddings
    for layer in range(layers):
        if TARGETS[family] == "granite_swa":
            made.append((f"blk.{layer}.attn_sinks.weight", np.full(heads, NO_SINK, np.float32), float32))
        elif family == "qwen3":
            width = next(len(data) for name, data, _ in made if name == "output_norm.weight")
            made.append((f"blk.{layer}.ffn_gate_inp.weight", np.zeros((1, width), np.float32), float32))
    return made


def neighbours(rows: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a projection in the order of a RoPE that rotates neighbours, from that of one that rotates halves."""
    return rows.reshape(heads, 2, -1, *rows.shape[1:]).swapaxes(1, 2).reshape(rows.shape)
