"""convert, generate and bench as commands: what they write and print, and what they refuse in one line."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from consa import Allocation, attached, load, rules
from consa.model.convert import verify
from tests.cli.test_cli import apart, consa_cli, refused  # noqa: F401 (apart is a fixture, for every test)
from tests.models import tiny

FULL = np.array([[True, False, True], [False] * 3, [False, True, False], [True] * 3])
HEADS = Allocation(full_attention=FULL, window=7, num_sink_tokens=2)
LAYERS = replace(
    HEADS,
    full_attention=np.repeat([[False], [True], [True], [False]], 3, axis=1),
    granularity="layer",
    num_sink_tokens=0,
)


@pytest.fixture(scope="module")
def allocations(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One that is possible as hybrid only, one as plain too, and some that are no good."""
    folder = tmp_path_factory.mktemp("allocations")
    HEADS.save(folder / "heads.json")
    LAYERS.save(folder / "layers.json")
    Allocation(full_attention=FULL[:, :2], window=7).save(folder / "other.json")
    (folder / "cut.json").write_text(HEADS.to_json()[:-40])
    return folder


@pytest.fixture(scope="module")
def converted(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both kinds, and a hybrid without its tokenizer."""
    from consa import convert

    folder = tmp_path_factory.mktemp("converted")
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    convert(model, HEADS, folder / "hybrid", tokenizer=tokenizer)
    convert(model, LAYERS, folder / "plain", tokenizer=tokenizer, kind="plain")
    convert(model, HEADS, folder / "mute")
    return folder


def test_an_allocation_with_weights_of_its_own_is_said(tiny_model_folder: Path, tmp_path: Path):
    for mode in ("frozen", "joint"):
        replace(HEADS, provenance={"config": {"mode": mode}}).save(tmp_path / f"{mode}.json")
        out = tmp_path / mode
        result = consa_cli("convert", tiny_model_folder, "--allocation", tmp_path / f"{mode}.json", "--out", out)
        assert result.exit_code == 0, result.output
        said = "weights along with this allocation; they are in the folder `model`" in result.output
        assert said == (mode == "joint")


def test_weights_are_not_read_for_an_allocation_of_another_model(
    allocations: Path, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("consa.model.load.load_model", None)
    other = allocations / "other.json"
    assert "4 layers x 2 KV heads" in refused(
        "convert", tiny_model_folder, "--allocation", other, "--out", tmp_path / "out"
    )


@pytest.mark.parametrize(
    ("allocation", "options", "kind"),
    [
        ("heads", [], "hybrid"),
        ("layers", [], "hybrid"),
        ("layers", ["--for", "vllm"], "plain"),
        ("layers", ["--kind", "hybrid"], "hybrid"),
        ("layers", ["--kind", "plain"], "plain"),
    ],
)
def test_convert(
    allocation: str, options: list[str], kind: str, allocations: Path, tiny_model_folder: Path, tmp_path: Path
):
    file = allocations / f"{allocation}.json"
    result = consa_cli("convert", tiny_model_folder, "--allocation", file, "--out", tmp_path / "out", *options)
    assert result.exit_code == 0, result.output
    assert result.stdout.startswith(f"{tmp_path / 'out'}: {kind} checkpoint in float32 (")
    assert ("Window of each layer: [" in result.stdout) == (kind == "plain")
    assert verify(tmp_path / "out") == (kind, Allocation.load(file))
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    ids = tokenizer("0123456789 " * 3, return_tensors="pt").input_ids
    original = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    with torch.no_grad():
        dense = original(ids).logits
        with attached(original, Allocation.load(file)):
            wanted = original(ids).logits
        got = load(tmp_path / "out", device="cpu")(ids).logits
    assert (wanted - dense).abs().max() > 1e-2
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"--allocation": "nowhere.json"}, ["nowhere.json' is neither a file", "all_swa", "interleaved"]),
        ({"--allocation": "cut.json"}, ["cut.json", "not JSON"]),
        ({"--allocation": "other.json"}, ["4 layers x 2 KV heads", "4 x 3"]),
        ({"--kind": "stock"}, ["auto, hybrid, plain or gguf", "'stock'"]),
        ({"--kind": "plain"}, ["no plain checkpoint is possible", "heads of one layer differ"]),
        ({"--kind": "gguf"}, ["kind gguf copies a GGUF file"]),
        ({"--for": "ollama"}, ["--for must be one of transformers", "'ollama'"]),
        ({"--out": "taken"}, ["taken already exists"]),
        ({"--out": "taken/file"}, ["cannot write", "taken/file", "Not a directory"]),
        ({"--out": "x" * 300}, ["cannot write", "File name too long"]),
        ({"--out": "taken/file/out"}, ["cannot write", "taken/file/out"]),
        ({"MODEL": "./nowhere"}, ["./nowhere"]),
    ],
)
def test_what_cannot_be_converted_is_refused(
    changes: dict[str, str], named: list[str], allocations: Path, tiny_model_folder: Path, tmp_path: Path
):
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "file").touch()
    before = sorted(tmp_path.rglob("*"))
    given = {"--allocation": "heads.json", "--out": "out", "--kind": "auto"} | changes
    arguments = ["--allocation", allocations / given["--allocation"], "--out", tmp_path / given["--out"]]
    arguments += [word for name in ("--kind", "--for") if name in given for word in (name, given[name])]
    line = refused("convert", changes.get("MODEL", tiny_model_folder), *arguments)
    assert all(part in line for part in named), line
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize("given", [{"--out": "file"}, {"--kind": "stock"}, {"--allocation": "cut.json"}])
def test_convert_reads_no_model_in_vain(
    given: dict[str, str], allocations: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("consa.model.load.load_model", lambda *_, **__: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    given = {"--allocation": "heads.json", "--out": "out", "--kind": "auto"} | given
    arguments = ["--allocation", allocations / given["--allocation"], "--out", tmp_path / given["--out"]]
    refused("convert", "model", *arguments, "--kind", given["--kind"])


@pytest.mark.parametrize(
    ("engine", "named"),
    [("mlx", "mlx reads no spelling of "), ("tensorrt-llm", "TensorRT-LLM takes the dense model and kv_cache_config")],
)
def test_an_engine_that_cannot_read_the_family_is_named_before_weights_are_read(
    engine: str, named: str, tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr("consa.model.load.load_model", lambda *_, **__: pytest.fail("loaded"))
    layers = ["--allocation", "interleaved", "--granularity", "layer", "--num-sink-tokens", "0"]
    assert named in refused("convert", tiny_model_folder, *layers, "--for", engine, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("family", "allocation", "options", "named"),
    [
        ("qwen2", "layers", ["--for", "sglang"], "SGLang drops the biases of granite_swa"),
        ("qwen2", "heads.json", ["--for", "sglang"], "heads of one layer differ"),
        ("qwen2", "heads.json", ["--kind", "plain"], "heads of one layer differ"),
        ("olmo2", "layers", ["--for", "vllm"], "olmo2's config cannot express it"),
        ("qwen2", "heads.json", ["--for", "ollama"], "'ollama'"),
    ],
)
def test_a_plain_folder_is_refused_before_weights_are_read(
    family: str,
    allocation: str,
    options: list[str],
    named: str,
    allocations: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    tiny(family).save_pretrained(tmp_path / "model")
    monkeypatch.setattr("consa.model.load.load_model", lambda *_, **__: pytest.fail("loaded"))
    layers = ["--allocation", "interleaved", "--granularity", "layer", "--num-sink-tokens", "0"]
    arguments = layers if allocation == "layers" else ["--allocation", allocations / allocation]
    assert named in refused("convert", tmp_path / "model", *arguments, *options, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_checkpoint_keeps_its_dtype(dtype: torch.dtype, allocations: Path, tiny_model_folder: Path, tmp_path: Path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder, dtype=dtype)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(tiny_model_folder).save_pretrained(tmp_path / "half")
    arguments = ["--allocation", allocations / "heads.json", "--out", tmp_path / "out"]
    result = consa_cli("convert", tmp_path / "half", *arguments)
    assert result.exit_code == 0, result.output
    got = load(tmp_path / "out", device="cpu")
    assert got.dtype == dtype
    weights = model.state_dict()
    assert all(torch.equal(weights[name], weight) for name, weight in got.state_dict().items())


def test_a_converted_model_is_not_converted_again(allocations: Path, converted: Path, tmp_path: Path):
    arguments = ["--allocation", allocations / "heads.json", "--out", tmp_path / "out"]
    result = consa_cli("convert", converted / "hybrid", *arguments)
    assert result.exit_code == 0, result.output
    for name in ("config.json", "model.safetensors", "allocation.json"):
        assert (tmp_path / "out" / name).read_bytes() == (converted / "hybrid" / name).read_bytes()


@pytest.mark.parametrize("kind", ["hybrid", "plain"])
def test_generate(kind: str, converted: Path, tmp_path: Path):
    (tmp_path / "prompt.txt").write_text("the quick fox")
    result = consa_cli("generate", converted / kind, "--file", tmp_path / "prompt.txt", "--max-new-tokens", 40)
    assert result.exit_code == 0, result.output
    model, tokenizer = (load(converted / kind, device="cpu"), AutoTokenizer.from_pretrained(converted / kind))
    inputs = tokenizer("the quick fox", return_tensors="pt")
    new = model.generate(inputs.input_ids, max_new_tokens=40, do_sample=False, use_cache=False)
    new = new[0, inputs.input_ids.shape[1] :]
    assert result.stdout == tokenizer.decode(new) + "\n"
    sampled = [
        consa_cli(
            "generate",
            converted / kind,
            *["--prompt", "the quick fox", "--max-new-tokens", 40],
            *["--temperature", 0.8, "--top-p", 0.9, "--seed", seed],
        ).stdout
        for seed in (1, 1, 2)
    ]
    assert sampled[0] == sampled[1] != sampled[2]


@pytest.mark.parametrize(
    ("folder", "arguments", "named"),
    [
        ("hybrid", [], ["either --prompt or --file"]),
        ("hybrid", ["--prompt", "a", "--file", "b"], ["either --prompt or --file"]),
        ("hybrid", ["--file", "./nowhere"], ["cannot read", "nowhere"]),
        ("hybrid", ["--prompt", ""], ["the prompt is empty"]),
        ("hybrid", ["--prompt", "a", "--chat"], ["no chat template"]),
        ("hybrid", ["--prompt", "a", "--temperature", "-1"], ["temperature", "-1"]),
        ("hybrid", ["--prompt", "a", "--top-p", "0"], ["--top-p", "got 0"]),
        ("hybrid", ["--prompt", "a", "--max-new-tokens", "0"], ["--max-new-tokens", "got 0"]),
        ("hybrid", ["--prompt", "a", "--max-new-tokens", "9999"], ["9999", "4096 positions"]),
        ("mute", ["--prompt", "a"], ["holds no tokenizer"]),
        ("nowhere", ["--prompt", "a"], ["nowhere", "does not exist"]),
    ],
)
def test_what_cannot_be_generated_is_refused(folder: str, arguments: list[str], named: list[str], converted: Path):
    line = refused("generate", converted / folder, *arguments)
    assert all(part in line for part in named), line


def test_what_is_measured_of_the_folder_here_lies_beside_it(
    converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    shutil.copytree(converted / "hybrid", tmp_path / "hybrid")
    monkeypatch.chdir(tmp_path / "hybrid")
    result = consa_cli("bench", ".", "--contexts", "20", "--decode-tokens", "1", "--repeats", "1")
    assert result.exit_code == 0, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hybrid", "hybrid-bench"]


def test_bench(converted: Path, tmp_path: Path):
    result = consa_cli(
        *["bench", converted / "hybrid", "--contexts", "100,300", "--batch-sizes", "1,2"],
        *["--decode-tokens", 3, "--repeats", 1, "--out", tmp_path / "out"],
    )
    assert result.exit_code == 0, result.output
    heading = result.stdout.splitlines()[1]
    assert " ".join(heading.split()) == "context batch model prefill s decode tok/s KV cache MB peak MB"
    models = [word for word in result.stdout.split() if word in ("dense", "hybrid", "ratio")]
    assert models == ["dense", "hybrid", "ratio"] * 4
    record = json.loads((tmp_path / "out" / "bench.json").read_text())
    found = [(m["context"], m["batch_size"], m["model"]) for m in record["measurements"]]
    assert found == [(c, b, m) for c in (100, 300) for b in (1, 2) for m in ("dense", "hybrid")]
    assert (tmp_path / "out" / "bench.png").read_bytes().startswith(b"\x89PNG")
    for name in ("bench.json", "bench.png"):
        assert str(tmp_path / "out" / name) in result.stdout.replace("\n", "")


@pytest.mark.parametrize(
    ("folder", "arguments", "named"),
    [
        ("hybrid", ["--contexts", "many"], ["contexts", "'many'"]),
        ("hybrid", ["--batch-sizes", "1;2"], ["--batch-sizes", "'1;2'"]),
        ("hybrid", ["--contexts", "0"], ["at least 1"]),
        ("hybrid", ["--decode-tokens", "0"], ["at least 1"]),
        ("hybrid", ["--repeats", "0"], ["at least 1"]),
        ("hybrid", ["--contexts", "4096"], ["4096", "4096 positions"]),
        ("plain", [], ["not a hybrid", "--kind hybrid"]),
        ("nowhere", [], ["nowhere", "does not exist"]),
    ],
)
def test_what_cannot_be_measured_is_refused(
    folder: str, arguments: list[str], named: list[str], converted: Path, tmp_path: Path
):
    line = refused("bench", converted / folder, *arguments, "--out", tmp_path / "out")
    assert all(part in line for part in named), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "options", "advice"), [("bench", [], "--contexts"), ("generate", ["--prompt", "a"], "the prompt")]
)
def test_too_little_memory_is_said(
    command: str, options: list[str], advice: str, converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: object, **__: object) -> None:
        raise MemoryError

    monkeypatch.setattr("consa.bench.measure.benchmark", fail)
    monkeypatch.setattr("consa.model.generate.generate_text", fail)
    monkeypatch.chdir(tmp_path)
    line = refused(command, converted / "hybrid", *options)
    assert "out of memory" in line and advice in line and "--micro-batch" not in line


def test_nothing_is_measured_in_vain(converted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("consa.model.convert.load", lambda *_: pytest.fail("loaded"))
    (tmp_path / "file").touch()
    line = refused("bench", converted / "hybrid", "--out", tmp_path / "file" / "out")
    assert "cannot write" in line and "file/out" in line


@pytest.mark.parametrize("name", ["top", "dense", "all_swa", "{0}/a.tsv", "{0}/a.json", "{0}"])
def test_convert_takes_the_allocations_that_eval_takes(name: str, tiny_model_folder: Path, tmp_path: Path):
    (tmp_path / "a.tsv").write_text("1\t0\t1\n" * 4)
    for file in ("a.json", "allocation.json"):
        rules.top(4, 3, sparsity=0.5, window=8).save(tmp_path / file)
    options = {"top": ["--sparsity", 0.5, "--window", 9], "all_swa": ["--window", 9], "{0}/a.tsv": ["--window", 9]}
    given = ["--allocation", name.format(tmp_path), *options.get(name, [])]
    result = consa_cli("convert", tiny_model_folder, *given, "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    written = Allocation.load(tmp_path / "out" / "allocation.json")
    wanted = {"dense": 0.0, "all_swa": 1.0, "{0}/a.tsv": 1 / 3}.get(name, 0.5)
    assert written.sparsity == pytest.approx(wanted)


@pytest.mark.parametrize("verb", ["generate", "bench", "serve"])
def test_a_folder_that_does_not_exist_is_called_that(verb: str, tmp_path: Path):
    assert f"{tmp_path}/none does not exist" in refused(verb, tmp_path / "none")
    assert f"{tmp_path}/none does not exist" in refused("report", tmp_path / "none")
    line = refused("convert", tmp_path / "none", "--allocation", "top", "--out", tmp_path / "out")
    assert "there is no such folder" in line


def test_serve_says_where_options_of_vllm_go(tmp_path: Path):
    assert "serve FOLDER -- --port" in refused("serve", tmp_path, "--port", 8001)


def test_h_is_help():
    assert consa_cli("generate", "-h").stdout == consa_cli("generate", "--help").stdout
