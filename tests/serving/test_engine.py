"""The real engine serves what `consa convert` writes: with the tokens of `generate()`, in the memory planned."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("vllm", reason="needs vLLM; run make test-vllm")

from transformers import AutoConfig

from consa import Allocation, convert, rules
from consa.bench.vllm import dense_folder, planned_bytes
from consa.model.load import load_model
from consa.model.register import HybridConfig
from consa.serving import limits, plugin
from consa.serving.plan import plan
from tests.models import allocate, tiny, tokens
from tests.serving.engine import engine, generate, groups, same_tokens, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
WINDOW = 40
LENGTHS = (3, 39, 40, 41, 130, 700, 1500)  # around the window, the page of 128 tokens and the chunk of 256
PROMPTS = [tokens(1, length, seed=length, vocab_size=257)[0].tolist() for length in LENGTHS]


def job(
    folder: Path, prompts: list[list[int]], environment: dict[str, str] | None = None, **options: Any
) -> Any:
    """What tests/serving/job.py finds."""
    text = json.dumps(
        {"folder": str(folder), "prompts": prompts, "environment": environment or {}, "options": options}
    )
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.job"], input=text, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("num_sink_tokens", [0, 5])
@pytest.mark.parametrize("family", ["llama", "qwen3", "qwen2", "mistral"])
def test_heads(family: str, num_sink_tokens: int, tmp_path: Path):
    """All at once, again with the prefix cache, and one after the other; the longest in chunks."""
    model = served(family)
    convert(model, allocate(model, window=WINDOW, num_sink_tokens=num_sink_tokens), tmp_path / "hybrid")
    with engine(tmp_path / "hybrid") as llm:
        together = generate(llm, PROMPTS)
        again = generate(llm, PROMPTS)
        alone = [generate(llm, [prompt])[0] for prompt in PROMPTS]
    assert same_tokens(tmp_path / "hybrid", PROMPTS, together)
    assert again == together == alone
    assert not any(together.from_cache) and [n > 0 for n in again.from_cache] == [n > 128 for n in LENGTHS]
    assert not same_tokens(model, PROMPTS[-2:], together[-2:])  # the dense model says something else


@pytest.mark.parametrize(
    "rows",
    [
        pytest.param([[1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]], id="any"),
        pytest.param([[0, 0, 0]] * 4, id="all sliding"),
        pytest.param([[0, 0, 0], [1, 1, 1]] * 2, id="whole layers"),
    ],
)
def test_sinks_of_several_pages_in_a_pool_too_small_for_all(rows: list[list[int]], tmp_path: Path):
    """Pages of 32 tokens, sinks on two of them; requests are put off, and what they leave behind is overwritten."""
    allocation = Allocation(full_attention=np.array(rows, dtype=bool), window=WINDOW, num_sink_tokens=40)
    convert(served("llama"), allocation, tmp_path / "hybrid", kind="hybrid")
    prompts = [PROMPTS[3], PROMPTS[4], PROMPTS[5], [7, *PROMPTS[5]], PROMPTS[6][:600]]
    with engine(tmp_path / "hybrid", block_size=32, max_model_len=800, num_gpu_blocks_override=110) as llm:
        first = generate(llm, prompts)
        again = generate(llm, prompts[::-1])[::-1]
    assert same_tokens(tmp_path / "hybrid", prompts, first)
    assert same_tokens(tmp_path / "hybrid", prompts, again)


@pytest.mark.parametrize("num_sink_tokens", [0, 4])
def test_a_real_model(num_sink_tokens: int, tmp_path: Path):
    loaded = load_model("smollm2-135m")
    shape = loaded.layout.num_layers, loaded.layout.num_kv_heads
    options = {"sparsity": 0.75, "window": 64, "num_sink_tokens": num_sink_tokens, "seed": 0}
    convert(loaded.model, rules.random_units(*shape, granularity="kv_head", **options), tmp_path / "hybrid")
    text = Path(rules.__file__).read_text(encoding="utf-8")
    prompts = [loaded.tokenizer(text[:length])["input_ids"] for length in (60, 300, 1500)]
    with engine(tmp_path / "hybrid") as llm:
        assert same_tokens(tmp_path / "hybrid", prompts, generate(llm, prompts))


SHAPE = {"num_hidden_layers": 4, "num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 128}
CONTEXT = 32_768


@pytest.fixture(scope="module")
def long_model() -> Any:
    """Layers of the shape of Qwen3-0.6B's, with little else."""
    return served("qwen3", **SHAPE, hidden_size=64, max_position_embeddings=CONTEXT).bfloat16()


@pytest.fixture(scope="module")
def dense_plan(long_model: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[int, float, int]:
    folder = tmp_path_factory.mktemp("long")
    convert(long_model, every(lambda _: 2), folder / "hybrid")
    with long_engine(dense_folder(folder / "hybrid", folder / "dense")) as llm:
        return planned_bytes(llm, CONTEXT)


def long_engine(folder: Path) -> Any:
    return engine(folder, dtype="bfloat16", max_model_len=CONTEXT, max_num_batched_tokens=512)


def every(num_full: Any, **changes: Any) -> Allocation:
    """So many FA heads of 8 in each of 4 layers, anywhere."""
    rng = np.random.default_rng(0)
    mask = np.array([rng.permutation(8) < num_full(layer) for layer in range(4)])
    return Allocation(full_attention=mask, window=512, **{"num_sink_tokens": 0} | changes)


@pytest.mark.parametrize(
    ("name", "allocation"),
    [
        ("the same number", every(lambda _: 2)),
        ("even numbers", every(lambda layer: (0, 4, 2, 2)[layer])),
        ("any numbers", every(lambda layer: (1, 5, 0, 2)[layer])),
        ("any numbers, sinks", every(lambda layer: (1, 5, 0, 2)[layer], num_sink_tokens=4)),
    ],
)
def test_memory(name: str, allocation: Allocation, long_model: Any, dense_plan: Any, tmp_path: Path):
    """What the engine plans is what `plan` says and no request in prefill holds more than a chunk on top."""
    convert(long_model, allocation, tmp_path / "hybrid")
    with long_engine(tmp_path / "hybrid") as llm:
        planned, requests, _ = planned_bytes(llm, CONTEXT)
        block_size = llm.llm_engine.vllm_config.cache_config.block_size
    wanted = plan(allocation, context=CONTEXT, head_dim=128, block_size=block_size)
    assert wanted.planned_bytes <= 1.05 * wanted.ideal_bytes
    chunk = 24 * (512 // block_size) * block_size * 2 * 128 * 2  # of 24 SWA heads
    # A page of slack in each group: vLLM rounds up, and tells the pool's size in whole pages.
    assert abs(planned - wanted.planned_bytes - chunk) <= 0.03 * wanted.planned_bytes
    assert dense_plan[0] == 4 * 8 * CONTEXT * 2 * 128 * 2
    assert requests / dense_plan[1] >= 3.5


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_two_ranks(tmp_path: Path):
    model = served("llama", num_key_value_heads=4, num_attention_heads=8, hidden_size=256)
    rows = [[1, 0, 0, 1], [0, 0, 0, 0], [1, 1, 1, 1], [0, 1, 1, 0]]
    allocation = Allocation(full_attention=np.array(rows, dtype=bool), window=WINDOW, num_sink_tokens=5)
    convert(model, allocation, tmp_path / "hybrid")
    first, second = sorted(os.sched_getaffinity(0))[:2]
    environment = {"VLLM_CPU_OMP_THREADS_BIND": f"{first}|{second}", "VLLM_ENABLE_V1_MULTIPROCESSING": "1"}
    found = job(tmp_path / "hybrid", PROMPTS, environment, tensor_parallel_size=2)
    assert same_tokens(tmp_path / "hybrid", PROMPTS, found["tokens"])


LAYERS = Allocation(
    full_attention=np.array([[0], [1], [0], [0]], dtype=bool).repeat(3, axis=1),
    granularity="layer",
    window=WINDOW,
    num_sink_tokens=0,
)
SLIDING = [(1, 3, WINDOW)] * 3 + [(1, 3, None)]  # of each group: modules, KV heads, window


@pytest.mark.parametrize("family", ["llama", "mistral"])
def test_plain_folders_that_vllm_reads_by_itself(family: str, tmp_path: Path):
    assert convert(served(family), LAYERS, tmp_path / "plain").kind == "plain"
    with engine(tmp_path / "plain") as llm:
        assert same_tokens(tmp_path / "plain", PROMPTS, generate(llm, PROMPTS))
        assert sorted(groups(llm), key=str) == sorted(SLIDING, key=str)


@pytest.mark.parametrize("family", ["qwen2", "qwen3", "smollm3"])
def test_plain_folders_that_vllm_reads_through_transformers(family: str, tmp_path: Path):
    assert convert(served(family), LAYERS, tmp_path / "plain").kind == "plain"
    found = job(tmp_path / "plain", PROMPTS, model_impl="transformers")
    assert same_tokens(tmp_path / "plain", PROMPTS, found["tokens"])
    assert sorted(map(tuple, found["groups"]), key=str) == sorted(SLIDING, key=str)


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Three KV heads, of which two ranks cannot have as many each; 5 sinks."""
    model = served("llama", num_key_value_heads=4, num_attention_heads=8, hidden_size=256)
    folder = tmp_path_factory.mktemp("refused") / "hybrid"
    allocation = Allocation(full_attention=np.eye(4, dtype=bool), window=WINDOW, num_sink_tokens=5)
    convert(model, allocation, folder)
    yield folder


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tensor_parallel_size": 2}, "layer 0 has 1, 0; learn with --tensor-parallel 2"),
        ({"disable_hybrid_kv_cache_manager": True}, "SWA heads would keep every token"),
        ({"kv_cache_dtype": "fp8"}, "5 sink tokens takes no kv_cache_dtype fp8"),
        ({"model_impl": "transformers"}, "ConSALlamaForCausalLM"),
    ],
)
def test_what_would_not_be_exact_is_refused(hybrid: Path, options: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message), engine(hybrid, **options):
        pass


def test_a_family_that_is_not_served_is_refused(tmp_path: Path):
    model = tiny("olmo2")
    convert(model, allocate(model), tmp_path / "hybrid")
    with pytest.raises(ValueError, match="ConSAOlmo2ForCausalLM"), engine(tmp_path / "hybrid"):
        pass


def test_without_the_plugin_a_hybrid_is_refused(hybrid: Path):
    code = f"from vllm import LLM; LLM({str(hybrid)!r})"
    environment = os.environ | {"VLLM_PLUGINS": ""}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True)
    assert done.returncode != 0 and "`consa`" in done.stderr


def test_another_version_of_vllm_refuses_hybrids_and_says_why(hybrid: Path, monkeypatch: pytest.MonkeyPatch):
    with monkeypatch.context() as patch:
        patch.setattr(limits, "VERSION", "0.1")
        plugin.register()
        with (
            pytest.raises(ValueError, match=r"serves with vLLM 0\.1, and 0\.32\.0 is installed"),
            engine(hybrid),
        ):
            pass
    AutoConfig.register("consa", HybridConfig, exist_ok=True)  # as it was, for the tests to come
