"""A converted model loads bit for bit as converted, or an error names the file."""

from __future__ import annotations

import inspect
import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AttentionInterface,
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    Trainer,
    TrainingArguments,
)

import consa
from consa import Allocation, ConsaError, attached, convert, load
from consa.errors import InvalidAllocationError
from consa.model import interface, spelling
from consa.model.convert import verify
from tests.models import CACHE, FAMILIES, allocate, tiny, tokens

ROOT = Path(__file__).parents[2]


def layerwise(num_layers: int = 4, num_kv_heads: int = 3, num_sink_tokens: int = 0) -> Allocation:
    full = np.zeros((num_layers, num_kv_heads), dtype=bool)
    full[1:3] = True
    return Allocation(full_attention=full, granularity="layer", window=6, num_sink_tokens=num_sink_tokens)


def logits(model, *ids, **options):
    with torch.no_grad():
        return model(*ids, **options).logits


@pytest.fixture(scope="module")
def model():
    return tiny()


@pytest.fixture(scope="module")
def folder(model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "hybrid"
    provenance = {"method": "by hand"}
    convert(model, allocate(model, provenance=provenance), folder)
    return folder


def fresh(code: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    return subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=120
    )


@pytest.mark.parametrize("how", ["load", "transformers"])
def test_a_fresh_process_computes_the_same_bits(model, folder, tmp_path, how):
    ids = tokens(2, 50)
    with attached(model, allocate(model)):
        wanted = logits(model, ids)
        sequence = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    torch.save({"ids": ids}, tmp_path / "in.pt")
    get = {
        "load": f"from consa import load; model = load({str(folder)!r}, device='cpu')",
        "transformers": "import consa.model.register; from transformers import AutoModelForCausalLM; "
        f"model = AutoModelForCausalLM.from_pretrained({str(folder)!r})",
    }[how]
    done = fresh(
        f"import torch; {get}\n"
        f"ids = torch.load({str(tmp_path / 'in.pt')!r}, weights_only=True)['ids']\n"
        "with torch.no_grad(): logits = model(ids).logits\n"
        "out = model.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)\n"
        f"cache = out.{CACHE}\n"
        "layers = {type(layer).__name__ for layer in cache.layers}\n"
        "assert layers == {'HybridLayer'}, layers\n"
        "assert not model.training\n"
        f"torch.save({{'logits': logits, 'ids': out.sequences}}, {str(tmp_path / 'out.pt')!r})\n"
    )
    assert done.returncode == 0, done.stderr
    got = torch.load(tmp_path / "out.pt", weights_only=True)
    assert torch.equal(got["logits"], wanted)
    assert torch.equal(got["ids"], sequence)


def test_without_consa_transformers_refuses_whichever_class_and_attention_is_asked_for(folder):
    done = fresh(
        "import sys, transformers\n"
        "for name in ('AutoConfig', 'AutoModel', 'AutoModelForCausalLM', 'LlamaConfig', 'LlamaForCausalLM'):\n"
        "    for options in ({}, {'attn_implementation': 'sdpa'}, {'attn_implementation': 'eager'}):\n"
        "        try:\n"
        f"            getattr(transformers, name).from_pretrained({str(folder)!r}, **options)\n"
        "        except Exception as error:\n"
        "            print(name, ' '.join(str(error).split()))\n"
        "assert not any(module.startswith('consa') for module in sys.modules)\n"
    )
    assert done.returncode == 0, done.stderr
    refused = done.stdout.splitlines()
    assert len(refused) == 15, done.stdout
    for line in refused:
        auto = line.startswith("Auto")
        assert ("has model type `consa`" if auto else "import consa.register before loading it") in line, line


def test_a_tokenizer_needs_no_consa(tiny_model_folder, tmp_path):
    source = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    convert(source, allocate(source), tmp_path / "out", tokenizer=AutoTokenizer.from_pretrained(tiny_model_folder))
    done = fresh(f"import transformers; transformers.AutoTokenizer.from_pretrained({str(tmp_path / 'out')!r})")
    assert done.returncode == 0, done.stderr


def test_the_classes_of_the_family_read_a_hybrid_as_a_hybrid(folder):
    assert LlamaConfig.from_pretrained(folder).num_hidden_layers == 4
    ids = tokens(1, 40)
    hybrid = LlamaForCausalLM.from_pretrained(folder).eval()
    assert torch.equal(logits(hybrid, ids, use_cache=False), logits(load(folder), ids))
    with pytest.raises(ConsaError, match="would run it as full attention"):
        LlamaForCausalLM.from_pretrained(folder, attn_implementation="sdpa")


def test_importing_consa_alone_registers_nothing():
    done = fresh(
        "import consa, transformers\n"
        "assert 'consa' not in transformers.AttentionInterface().valid_keys()\n"
        "assert 'consa' not in transformers.CONFIG_MAPPING\n"
        "assert 'consa' not in transformers.cache_utils.DYNAMIC_LAYER_TYPE_MAPPING\n"
        "before = transformers.cache_utils.get_layer_types_and_kwargs\n"
        "import consa.model.register\n"
        "assert 'consa' in transformers.AttentionInterface().valid_keys()\n"
        "config = transformers.Gemma3TextConfig()\n"
        "assert transformers.cache_utils.get_layer_types_and_kwargs(config) == before(config)\n"
        "assert transformers.CONFIG_MAPPING['llama'] is transformers.LlamaConfig\n"
    )
    assert done.returncode == 0, done.stderr


def test_another_attention_than_the_hybrid_is_refused(folder):
    message = "attn_implementation='sdpa' would run it as full attention"
    with pytest.raises(ConsaError, match=message):
        AutoModelForCausalLM.from_pretrained(folder, attn_implementation="sdpa")
    model = AutoModelForCausalLM.from_pretrained(folder)
    wanted = model(tokens(1, 5), use_cache=False).logits
    with pytest.raises(ConsaError, match=message):
        model.set_attn_implementation("sdpa")
    assert torch.equal(model(tokens(1, 5), use_cache=False).logits, wanted)
    with pytest.raises(ConsaError, match=message):
        model.config._attn_implementation = "sdpa"
    assert torch.equal(model(tokens(1, 5)).logits, wanted)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("way", ["from_config", "from_dict", "constructor", "config argument", "stored value"])
def test_a_hybrid_never_runs_full_attention_however_it_is_constructed(folder, way, training):
    config, hybrid = AutoConfig.from_pretrained(folder), load(folder)
    fields = config.to_dict()
    if way == "stored value":
        vars(config)["_attn_implementation_internal"] = "sdpa"
    other = {
        "from_config": lambda: AutoModelForCausalLM.from_config(config),
        "from_dict": lambda: LlamaForCausalLM(LlamaConfig.from_dict(fields)),
        "constructor": lambda: LlamaForCausalLM(LlamaConfig(**fields)),
        "config argument": lambda: AutoModelForCausalLM.from_pretrained(folder, config=config),
        "stored value": lambda: LlamaForCausalLM(config),
    }[way]().eval()
    other.load_state_dict(hybrid.state_dict())
    if training:
        other.train()
        other.gradient_checkpointing_enable()
    ids = tokens(1, 40)
    assert torch.equal(logits(other, ids, use_cache=False), logits(hybrid, ids))
    for name in ("sdpa", "eager"):
        with pytest.raises(ConsaError, match="would run it as full attention"):
            AutoModelForCausalLM.from_config(config, attn_implementation=name)


@pytest.mark.parametrize("loader", [load, AutoModelForCausalLM.from_pretrained])
def test_a_loaded_hybrid_attaches_nothing_and_saves_itself(model, folder, tmp_path, loader):
    hybrid = loader(folder)
    with pytest.raises(ConsaError, match="converted hybrid with its own allocation"), attached(hybrid, allocate(model)):
        pass
    hybrid.save_pretrained(tmp_path / "saved")
    convert(hybrid, allocate(model), tmp_path / "again")
    ids = tokens(1, 40)
    for name in ("saved", "again"):
        for loader_of_saved in (load, AutoModelForCausalLM.from_pretrained, LlamaForCausalLM.from_pretrained):
            assert torch.equal(logits(loader_of_saved(tmp_path / name).eval(), ids), logits(hybrid, ids))
        for file in ("config.json", "model.safetensors"):
            assert (tmp_path / name / file).read_bytes() == (folder / file).read_bytes()
    assert verify(tmp_path / "saved")[1] == allocate(model)
    hybrid.config.to_json_file(tmp_path / "config.json")
    assert "import consa.register" in json.loads((tmp_path / "config.json").read_text())["num_hidden_layers"]


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_trainer_saves_and_reloads_hybrids(folder, tmp_path, checkpointing):
    pytest.importorskip("accelerate", reason="needs accelerate")
    hybrid = AutoModelForCausalLM.from_pretrained(folder)
    rows = [{"input_ids": tokens(1, 12, seed=i)[0], "labels": tokens(1, 12, seed=i)[0]} for i in range(4)]
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        max_steps=2,
        save_steps=1,
        eval_steps=1,
        eval_strategy="steps",
        load_best_model_at_end=True,
        gradient_checkpointing=checkpointing,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
    )
    Trainer(model=hybrid, args=arguments, train_dataset=rows, eval_dataset=rows).train()
    ids = tokens(1, 40)
    saved = load(tmp_path / "checkpoint-2")
    assert torch.equal(logits(AutoModelForCausalLM.from_pretrained(tmp_path / "checkpoint-2"), ids), logits(saved, ids))
    assert verify(tmp_path / "checkpoint-2")[1].full_attention.tolist() == verify(folder)[1].full_attention.tolist()
    assert not torch.equal(logits(saved, ids), logits(load(folder), ids)), "it was trained"


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")
def test_lora_weights_of_a_hybrid_are_saved_as_usual(folder, tmp_path):
    peft = pytest.importorskip("peft", reason="needs consa[lora]")
    options = peft.LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    wrapped = peft.get_peft_model(load(folder), options).eval()
    wrapped.save_pretrained(tmp_path)
    again = peft.PeftModel.from_pretrained(load(folder), tmp_path).eval()
    assert torch.equal(logits(again, input_ids=tokens(1, 40)), logits(wrapped, input_ids=tokens(1, 40)))


def test_a_model_of_an_auto_class_compiles_before_any_other_call(folder):
    hybrid, ids = AutoModelForCausalLM.from_pretrained(folder), tokens(1, 20)
    options = {"cache_implementation": "static", "max_new_tokens": 4, "do_sample": False, "disable_compile": True}
    wanted = load(folder).generate(ids, **options)
    hybrid.forward = torch.compile(hybrid.forward, backend="eager", fullgraph=True)
    assert torch.equal(hybrid.generate(ids, **options), wanted)


def test_export_is_refused_in_those_words(folder):
    ids = tokens(1, 8)
    for options in ({"use_cache": False}, {"attention_mask": torch.ones_like(ids)}):
        with pytest.raises(ConsaError, match=r"torch\.export of a hybrid is not supported"):
            torch.export.export(load(folder), (ids,), kwargs=options)


def test_the_attention_function_takes_the_parameters_of_flash_attention_in_their_order():
    flash = list(inspect.signature(AttentionInterface()["flash_attention_2"]).parameters)[:9]
    assert list(inspect.signature(interface._attend).parameters)[:9] == flash


def test_converting_leaves_the_model_as_it_was(tmp_path):
    model = tiny()
    ids = tokens(1, 40)
    model.save_pretrained(tmp_path / "before")  # which notes dtype and architecture in the config
    before, config = logits(model, ids), model.config.to_dict()
    convert(model, allocate(model), tmp_path / "out")
    assert torch.equal(logits(model, ids), before)
    assert model.config.to_dict() == config


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back(family, tmp_path):
    model = tiny(family)
    allocation = allocate(model)
    written = convert(model, allocation, tmp_path / "out")
    assert written.kind == "hybrid" and "heads of one layer differ" in written.reason
    ids = tokens(2, 40)
    hybrid = load(tmp_path / "out")
    with attached(model, allocation):
        assert torch.equal(logits(hybrid, ids), logits(model, ids))
        wanted = model.generate(ids, max_new_tokens=20, do_sample=False, use_cache=False)
    assert torch.equal(hybrid.generate(ids, max_new_tokens=20, do_sample=False), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_dtype_comes_back(dtype, tmp_path):
    model = tiny().to(dtype)
    convert(model, allocate(model), tmp_path / "out")
    assert load(tmp_path / "out").dtype == dtype
    assert load(tmp_path / "out", dtype=torch.float32).dtype == torch.float32


def test_the_tokenizer_and_all_of_the_allocation_come_along(tiny_model_folder, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    rng = np.random.default_rng(0)
    allocation = allocate(model, scores=rng.normal(size=(4, 3)), provenance={"method": "by hand"})
    convert(model, allocation, tmp_path / "out", tokenizer=tokenizer)
    assert AutoTokenizer.from_pretrained(tmp_path / "out")("fox").input_ids == tokenizer("fox").input_ids
    assert verify(tmp_path / "out") == ("hybrid", allocation)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "consa" and config["architectures"] == ["ConSALlamaForCausalLM"]
    loaded = AutoConfig.from_pretrained(tmp_path / "out")  # to other code it is the family's
    assert type(loaded) is type(model.config) and loaded.num_hidden_layers == 4


# What a damaged folder looks like.


def listed(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


FILES = ["allocation.json", "config.json", "generation_config.json", "model.safetensors"]


def test_the_folder_holds_what_these_tests_damage(folder):
    assert listed(folder) == sorted([*FILES, "consa.json"])


@pytest.mark.parametrize("damage", ["truncated", "edited", "missing", "empty"])
@pytest.mark.parametrize("name", [*FILES, "consa.json"])
def test_a_damaged_file_is_named(folder, tmp_path, name, damage):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    path, content = copy / name, bytearray((copy / name).read_bytes())
    if damage == "missing":
        path.unlink()
    else:
        content[len(content) // 2] ^= 1
        path.write_bytes({"truncated": content[:-5], "edited": content, "empty": b""}[damage])
    with pytest.raises(ConsaError, match=name.replace(".", r"\.")):
        load(copy)


@pytest.mark.parametrize("name", ["allocation.json", "model.safetensors", "config.json"])
def test_a_file_of_another_model_is_named(folder, tmp_path, name):
    other = tiny(seed=1, rope_theta=5000.0)
    convert(other, allocate(other, seed=1), tmp_path / "other")
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    shutil.copy(tmp_path / "other" / name, copy / name)
    with pytest.raises(ConsaError, match=name.replace(".", r"\.")):
        load(copy)


def test_an_allocation_exchanged_with_its_hash_is_named(folder, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    allocation = Allocation.load(copy / "allocation.json")
    Allocation(full_attention=~allocation.full_attention, window=allocation.window, num_sink_tokens=2).save(
        copy / "allocation.json"
    )
    manifest = json.loads((copy / "consa.json").read_text())
    manifest["files"]["allocation.json"] = consa.files.sha256_of(copy / "allocation.json")
    (copy / "consa.json").write_text(json.dumps(manifest))
    with pytest.raises(ConsaError, match=r"config\.json does not hold the allocation of allocation\.json"):
        load(copy)


def test_what_is_no_converted_model_is_refused(tiny_model_folder, tmp_path):
    with pytest.raises(ConsaError, match=r"holds no consa\.json"):
        load(tiny_model_folder)
    with pytest.raises(ConsaError, match=r"holds no consa\.json"):
        load(tmp_path / "nowhere")


def test_nothing_half_written_is_left(model, tmp_path, monkeypatch):
    def fails(*args, **kwargs):
        (Path(args[1]) / "model.safetensors").write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(type(model), "save_pretrained", fails)
    with pytest.raises(ConsaError, match=r"cannot write .*out: No space left"):
        convert(model, allocate(model), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_what_exists_is_not_overwritten(model, tmp_path):
    (tmp_path / "out").mkdir()
    convert(model, allocate(model), tmp_path / "out")  # empty: as good as none
    before = (tmp_path / "out" / "consa.json").read_bytes()
    with pytest.raises(ConsaError, match="already exists"):
        convert(model, allocate(model, window=9), tmp_path / "out")
    assert (tmp_path / "out" / "consa.json").read_bytes() == before


def test_an_allocation_of_another_model_is_refused(model, tmp_path):
    with pytest.raises(InvalidAllocationError, match="4 layers x 2 KV heads"):
        convert(model, layerwise(num_kv_heads=2), tmp_path / "out")
    assert not (tmp_path / "out").exists()


# Plain checkpoints.

PLAIN = ["llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "smollm3"]


@pytest.mark.parametrize("family", PLAIN)
def test_a_plain_checkpoint_needs_no_consa(family, tmp_path):
    model = tiny(family)
    written = convert(model, layerwise(), tmp_path / "out", engine="transformers")
    assert written.kind == "plain"
    ids = tokens(2, 50)
    with attached(model, layerwise()):
        wanted = logits(model, ids)
        sequence = model.generate(ids, max_new_tokens=30, do_sample=False, use_cache=False)
    assert (wanted - logits(model, ids)).abs().max() > 1e-2  # there is something to get wrong
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.model_type in ("granite_swa", "mellum") and not hasattr(stock.config, "consa")
    torch.testing.assert_close(logits(stock, ids), wanted, atol=1e-4, rtol=0)
    out = stock.generate(ids, max_new_tokens=30, do_sample=False, return_dict_in_generate=True)
    assert torch.equal(out.sequences, sequence)
    kinds = [type(layer).__name__ for layer in getattr(out, CACHE).layers]
    assert kinds == ["DynamicSlidingWindowLayer", *["DynamicLayer"] * 2, "DynamicSlidingWindowLayer"]
    torch.testing.assert_close(logits(load(tmp_path / "out"), ids), wanted, atol=1e-4, rtol=0)


def test_a_plain_folder_has_a_class_that_engines_without_it_refuse(model, tmp_path):
    convert(model, layerwise(), tmp_path / "out", kind="plain")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "granite_swa" and config["architectures"] == ["GraniteSWAForCausalLM"]
    assert "consa" not in config and "attn_implementation" not in config
    listed = json.loads((tmp_path / "out" / "windows.json").read_text())
    assert listed["tensorrt-llm"] == {"kv_cache_config": {"max_attention_window": [6, 4096, 4096, 6]}}
    assert "let every layer attend to all tokens" in listed["note"]


@pytest.mark.parametrize("changes", [{"attention_bias": True}, {"mlp_bias": True}, {"tie_word_embeddings": True}])
def test_a_plain_llama_keeps_its_biases_and_ties(changes, tmp_path):
    model = tiny(**changes)
    convert(model, layerwise(), tmp_path / "out", kind="plain")
    with attached(model, layerwise()):
        wanted = logits(model, tokens(1, 40))
    torch.testing.assert_close(logits(load(tmp_path / "out"), tokens(1, 40)), wanted, atol=1e-4, rtol=0)


def test_a_spelling_that_computes_something_else_is_not_written(model, tmp_path, monkeypatch):
    right = spelling.GRANITE_SWA.config
    wrong = replace(spelling.GRANITE_SWA, config=lambda config: right(config) | {"attention_multiplier": 1.0})
    monkeypatch.setattr(spelling, "SPELLINGS", (wrong,))
    with pytest.raises(ConsaError, match="as granite_swa this model's logits differ"):
        convert(model, layerwise(), tmp_path / "out", kind="plain")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"engine": "ollama"}, "engine must be one of transformers, vllm, .* got 'ollama'"),
        ({"engine": "vllm", "kind": "hybrid"}, "a hybrid needs consa, and vllm is to do without"),
        (
            {"engine": "mlx"},
            "mlx reads no spelling of llama; granite_swa is read by llama.cpp, sglang, transformers, vllm",
        ),
        ({"engine": "tensorrt-llm"}, "shortens the KV cache, but its classes .* let every layer attend to all tokens"),
    ],
)
def test_engines_that_cannot_read_it_are_named(options, reason, model, tmp_path):
    with pytest.raises(ConsaError, match=reason):
        convert(model, layerwise(), tmp_path / "out", **options)
    assert not list(tmp_path.iterdir())


LOST = [
    ("qwen2", {}, "sglang", "SGLang drops the biases of granite_swa"),
    ("llama", {"attention_bias": True}, "sglang", "SGLang drops the biases of granite_swa"),
    ("llama", {"mlp_bias": True}, "sglang", "SGLang drops the biases of granite_swa"),
    ("smollm3", {}, "llama.cpp", "gives every layer RoPE, and some layers of this model have none"),
    ("qwen3_moe", {"mlp_only_layers": [0]}, "mlx", "mlx reads mellum with experts in every layer only"),
    ("qwen3_moe", {"decoder_sparse_step": 2}, "llama.cpp", "llama.cpp reads mellum with experts in every layer only"),
    ("qwen3_moe", {"norm_topk_prob": False}, "llama.cpp", "always normalises the weights of mellum's experts"),
    (
        "qwen3",
        {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 2.0}},
        "mlx",
        "mlx does not scale RoPE in every layer of mellum",
    ),
]


@pytest.mark.parametrize(("family", "changes", "engine", "reason"), LOST)
def test_an_engine_that_would_compute_something_else_is_refused_and_not_listed(
    family, changes, engine, reason, tmp_path
):
    model = tiny(family, **changes)
    with pytest.raises(ConsaError, match=reason):
        convert(model, layerwise(), tmp_path / "out", engine=engine)
    assert not list(tmp_path.iterdir())
    written = convert(model, layerwise(), tmp_path / "out", kind="plain")
    names = {"sglang": "SGLang", "llama.cpp": "llama.cpp", "mlx": "mlx-lm"}
    assert "transformers 5.19" in written.reason and names[engine] not in written.reason


READ = {  # what `--for` takes of models without biases and with RoPE in every layer
    "transformers": {"llama", "mistral", "qwen2", "smollm3", "qwen3", "qwen3_moe"},
    "vllm": {"llama", "mistral", "qwen2", "smollm3", "qwen3", "qwen3_moe"},
    "sglang": {"llama", "mistral", "smollm3", "qwen3", "qwen3_moe"},
    "llama.cpp": {"llama", "mistral", "qwen2", "qwen3", "qwen3_moe"},
    "mlx": {"qwen3", "qwen3_moe"},
    "tensorrt-llm": set(),
}


@pytest.mark.parametrize("engine", spelling.ENGINES)
def test_families_of_an_engine(engine):
    configs = {family: tiny(family).config for family in (*PLAIN, "gemma2", "olmo2", "phi3")}
    configs["qwen3_moe"].norm_topk_prob = True  # as in the released models
    assert {name for name in configs if not spelling.model_obstacle(configs[name], engine)} == READ[engine]


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
@pytest.mark.parametrize("engine", ["mlx", "llama.cpp"])
def test_mellum_with_experts_in_every_layer(family, engine, tmp_path):
    options = {"norm_topk_prob": True} if family == "qwen3_moe" else {"tie_word_embeddings": True}
    model = tiny(family, **options)
    assert engine in convert(model, layerwise(), tmp_path / "out", engine=engine).reason
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_experts"] == (4 if family == "qwen3_moe" else 1)
    assert config["tie_word_embeddings"] == (family == "qwen3" and engine == "mlx")
    listed = spelling.readers(config)
    assert any("mlx-lm" in reader for reader in listed)
    assert any("llama.cpp" in reader for reader in listed) == (not config["tie_word_embeddings"])
    with attached(model, layerwise()):
        wanted = logits(model, tokens(1, 40))
    torch.testing.assert_close(logits(load(tmp_path / "out"), tokens(1, 40)), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("family", "changes", "allocation", "reason"),
    [
        ("llama", {}, layerwise(num_sink_tokens=4), "no sink tokens, and the allocation has 4"),
        ("llama", {"head_dim": 16}, layerwise(), "granite_swa has heads of hidden_size / num_attention_heads numbers"),
        ("olmo2", {}, layerwise(), "olmo2's config cannot express it"),
        ("granite", {}, layerwise(), "granite's config cannot express it"),
        ("llama", {}, None, "heads of one layer differ"),
        ("gemma2", {}, None, "heads of one layer differ"),
    ],
)
def test_where_no_plain_checkpoint_is_possible_a_hybrid_is_written(family, changes, allocation, reason, tmp_path):
    model = tiny(family, **changes)
    allocation = allocation or allocate(model)
    with pytest.raises(ConsaError, match=reason):
        convert(model, allocation, tmp_path / "plain", kind="plain")
    assert not (tmp_path / "plain").exists()
    written = convert(model, allocation, tmp_path / "out")
    assert written.kind == "hybrid" and reason in written.reason
    ids = tokens(1, 40)
    with attached(model, allocation):
        assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))


def test_a_hybrid_is_written_where_it_is_asked_for(model, tmp_path):
    assert convert(model, layerwise(), tmp_path / "out", kind="hybrid").kind == "hybrid"
    ids = tokens(1, 40)
    with attached(model, layerwise()):
        assert torch.equal(logits(load(tmp_path / "out"), ids), logits(model, ids))
    with pytest.raises(ConsaError, match="kind must be auto, hybrid, plain or gguf, got 'stock'"):
        convert(model, layerwise(), tmp_path / "other", kind="stock")  # pyright: ignore[reportArgumentType]


def test_what_transformers_does_not_save_is_one_line(tmp_path):
    model = tiny()
    model.generation_config.temperature = 0.5  # without sampling
    with pytest.raises(ConsaError, match=r"^LlamaForCausalLM cannot be saved: "):
        convert(model, allocate(model), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_an_allocation_of_another_shape_in_a_config_is_refused():
    model = tiny()
    model.config.consa = json.loads(Allocation(full_attention=np.ones((5, 3), bool), window=4).to_json())
    model.set_attn_implementation("consa")
    with pytest.raises(ConsaError, match=r"is for 5 layers x 3 KV heads, the model has 4 x 3; convert"):
        model(tokens(1, 8), use_cache=False)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize(("device", "message"), [("cuda", "torch sees no GPU"), ("gpu", "got 'gpu'")])
def test_a_device_that_is_not_there_is_said_before_anything_is_read(device: str, message: str, tmp_path: Path):
    with pytest.raises(ConsaError, match=message):
        load(tmp_path / "nothing", device=device)
