"""A respelt GGUF file holds the same numbers under other names, for an allocation of whole layers."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from consa import Allocation, ConsaError
from consa.model.gguf_spelling import check_wish, neighbours, respell
from tests.models import allocate, tiny

gguf = pytest.importorskip("gguf")
LAYERS = Allocation(
    full_attention=np.array([[0], [1], [0]], dtype=bool).repeat(2, axis=1),
    granularity="layer",
    window=7,
    num_sink_tokens=0,
)


def written(path: Path, family: str, *, bias: bool | None = None, scaling: str = "") -> dict[str, np.ndarray]:
    """A GGUF file of three layers, with quantised projections; returns its tensors."""
    bias = family == "qwen2" if bias is None else bias
    writer = gguf.GGUFWriter(path, family)
    writer.add_block_count(3)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_feed_forward_length(64)
    if scaling:
        writer.add_string(f"{family}.rope.scaling.type", scaling)
    rng = np.random.default_rng(0)
    tensors = {"token_embd.weight": rng.normal(size=(40, 32)), "output_norm.weight": rng.normal(size=32)}
    for layer in range(3):
        for name, rows in (("attn_q", 32), ("attn_k", 16), ("ffn_gate", 64)):
            tensors[f"blk.{layer}.{name}.weight"] = rng.normal(size=(rows, 32))
        if bias:
            tensors[f"blk.{layer}.attn_q.bias"] = rng.normal(size=32)
    for name, values in tensors.items():
        kind = gguf.GGMLQuantizationType.Q8_0 if "attn" in name and values.ndim == 2 else gguf.GGMLQuantizationType.F32
        tensors[name] = values if kind is gguf.GGMLQuantizationType.F32 else gguf.quantize(values.astype("f4"), kind)
        tensors[name] = tensors[name].astype("f4") if kind is gguf.GGMLQuantizationType.F32 else tensors[name]
        writer.add_tensor(name, tensors[name], raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return tensors


@pytest.mark.parametrize(
    ("family", "target"), [("llama", "granite_swa"), ("qwen2", "granite_swa"), ("qwen3", "mellum")]
)
def test_tensors_are_copied_and_layers_listed(family: str, target: str, tmp_path: Path):
    source = written(tmp_path / "in.gguf", family)
    assert target in respell(tmp_path / "in.gguf", LAYERS, tmp_path / "out.gguf")
    reader = gguf.GGUFReader(tmp_path / "out.gguf")
    tensors = {tensor.name: tensor for tensor in reader.tensors}
    fields = {name: field.contents() for name, field in reader.fields.items()}
    assert fields["general.architecture"] == target and fields[f"{target}.block_count"] == 3
    assert fields[f"{target}.attention.sliding_window"] == 7
    assert fields[f"{target}.attention.sliding_window_pattern"] == [True, False, True]
    assert Allocation.from_json(fields["consa.allocation"]) == LAYERS
    for name, data in source.items():
        if "attn_q" in name or "attn_k" in name:
            data = neighbours(data, 4 if "attn_q" in name else 2) if family == "qwen2" else data
        if family == "qwen3" and "ffn_gate" in name:
            name, data = name.replace("ffn_gate", "ffn_gate_exps"), data[None]
        np.testing.assert_array_equal(tensors[name].data.reshape(data.shape), data)
    extra = "attn_sinks" if target == "granite_swa" else "ffn_gate_inp"
    assert all(f"blk.{layer}.{extra}.weight" in tensors for layer in range(3))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in.gguf", "out.gguf"]


def test_neighbours_rotate_as_halves_do():
    heads, half = 2, 3
    rows = np.arange(heads * 2 * half)
    moved = neighbours(rows, heads).reshape(heads, half, 2)
    assert np.array_equal(moved[..., 0], rows.reshape(heads, 2, half)[:, 0])
    assert np.array_equal(moved[..., 1], rows.reshape(heads, 2, half)[:, 1])


def test_bad_input_is_refused_and_nothing_written(tmp_path: Path):
    written(tmp_path / "in.gguf", "llama")
    written(tmp_path / "other.gguf", "gemma")
    written(tmp_path / "qwen3.gguf", "qwen3", bias=True)
    written(tmp_path / "yarn.gguf", "qwen3", scaling="yarn")
    out = tmp_path / "out.gguf"
    for source, allocation, message in (
        ("nowhere.gguf", allocate(tiny()), "heads of one layer differ"),  # no file is read
        ("in.gguf", Allocation(full_attention=LAYERS.full_attention, window=7), "no sink tokens"),
        ("in.gguf", Allocation(full_attention=np.ones((2, 2), bool), window=7, num_sink_tokens=0), "2 layers x 2 KV"),
        ("other.gguf", LAYERS, "slides no layers of gemma"),
        ("qwen3.gguf", LAYERS, "mellum has no biases, and .*qwen3.gguf has blk.0.attn_q.bias"),
        ("yarn.gguf", LAYERS, "mellum scales no RoPE in sliding layers, and .*yarn.gguf has yarn scaling"),
    ):
        with pytest.raises(ConsaError, match=message):
            respell(tmp_path / source, allocation, out)
    assert not out.exists()
    for source, file, engine, message in (
        ("model", out, None, "copies a GGUF file, and 'model' is none"),
        ("in.gguf", tmp_path / "out", None, "ends in .gguf"),
        ("in.gguf", out, "vllm", "the engine is vllm"),
        ("in.gguf", tmp_path / "in.gguf", None, "already exists"),
    ):
        with pytest.raises(ConsaError, match=message):
            check_wish(source, file, engine)
