"""Engines that never heard of consa compute what consa computes. Skipped without mlx-lm and llama-cpp-python."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consa import Allocation, attached, convert, load
from consa.model.gguf_spelling import neighbours, respell
from tests.models import tiny, tokens

ROOT = Path(__file__).parents[2]
WINDOW = 6
IDS = tokens(1, 50)


def layers(window: int = WINDOW) -> Allocation:
    full = np.zeros((4, 3), dtype=bool)
    full[1:3] = True
    return Allocation(full_attention=full, granularity="layer", window=window, num_sink_tokens=0)


def apart(got: np.ndarray, model: Any, allocation: Allocation) -> float:
    """The largest difference of logits from consa's, as a share of their standard deviation."""
    with torch.no_grad(), attached(model, allocation):
        wanted = model(IDS).logits[0].numpy()
    return float(np.abs(got - wanted).max() / wanted.std())


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_mlx_lm_reads_mellum(family: str, tmp_path: Path):
    mx, utils = pytest.importorskip("mlx.core"), pytest.importorskip("mlx_lm.utils")
    model = tiny(family)
    convert(model, layers(), tmp_path / "out", engine="mlx")
    engine, _ = utils.load_model(tmp_path / "out")
    assert apart(np.array(engine(mx.array(IDS.numpy())))[0], model, layers()) < 1e-4
    cache = engine.make_cache()
    logits, written = engine(mx.array(IDS.numpy()), cache=cache), []
    for _ in range(30):
        written.append(int(mx.argmax(logits[0, -1])))
        logits = engine(mx.array([written[-1:]]), cache=cache)
    stock: Any = load(tmp_path / "out")
    sequence = stock.generate(IDS, max_new_tokens=30, do_sample=False)
    assert written == sequence[0, IDS.shape[1] :].tolist()
    assert [layer.keys.shape[2] == WINDOW for layer in cache] == [True, False, False, True]


NAMES = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def write_gguf(model: Any, path: Path) -> None:
    """A dense model as a GGUF file without a tokenizer, as llama.cpp's converter writes it."""
    import gguf

    config = model.config
    writer = gguf.GGUFWriter(path, config.model_type)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.hidden_size // config.num_attention_heads)
    writer.add_value_length(config.hidden_size // config.num_attention_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("none")
    heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}
    for name, weight in model.state_dict().items():
        match = re.fullmatch(r"(?:model\.layers\.(\d+)\.)?(.+)\.(weight|bias)", name)
        assert match
        layer, part, kind = match.groups()
        data = weight.numpy()
        if config.model_type == "llama" and NAMES[part] in heads:
            data = neighbours(data, heads[NAMES[part]])
        writer.add_tensor(f"blk.{layer}.{NAMES[part]}.{kind}" if layer else f"{NAMES[part]}.{kind}", data)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
def test_llama_cpp_reads_respelt_files(family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("llama_cpp")
    monkeypatch.syspath_prepend(ROOT / "benchmarks")
    from llama import Engine

    model = tiny(family, hidden_size=192, head_dim=32, vocab_size=64)
    write_gguf(model, tmp_path / "dense.gguf")
    respell(tmp_path / "dense.gguf", layers(), tmp_path / "hybrid.gguf")
    got = {name: Engine(tmp_path / f"{name}.gguf", 256, 1) for name in ("dense", "hybrid")}
    logits = {name: engine.read(IDS[0].numpy(), every=True) for name, engine in got.items()}
    dense = Allocation(full_attention=np.ones((4, 3), bool), window=WINDOW, num_sink_tokens=0)
    assert apart(logits["dense"], model, dense) < 0.02
    assert apart(logits["hybrid"], model, layers()) < 0.02
    assert min(apart(logits["hybrid"], model, layers(window)) for window in (WINDOW - 1, WINDOW + 1)) > 0.1
