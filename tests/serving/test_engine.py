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
from vllm import SamplingParams
from vllm.v1.core.sched.scheduler import Scheduler

from consa import Allocation, convert, rules
from consa.model.load import load_model
from consa.model.register import HybridConfig
from consa.serving import capacity, limits, plugin
from consa.serving.attention import HybridAttention, HybridBuilder, _merged
from consa.serving.pages import SinkSpec
from consa.serving.plan import unused_places
from tests.models import allocate, tiny, tokens
from tests.serving.engine import engine, generate, groups, same_tokens, served

pytestmark = [pytest.mark.vllm, pytest.mark.timeout(1200)]
ROOT = Path(__file__).parents[2]
WINDOW = 40
LENGTHS = (3, 39, 40, 41, 130, 700, 1500)  # around the window, the page of 128 tokens and the chunk of 256
PROMPTS = [tokens(1, length, seed=length, vocab_size=257)[0].tolist() for length in LENGTHS]


def job(
    folder: Path,
    prompts: list[list[int]],
    environment: dict[str, str] | None = None,
    num_tokens: int = 24,
    **options: Any,
) -> Any:
    """What tests/serving/job.py finds."""
    wanted = {"folder": str(folder), "prompts": prompts, "options": options, "num_tokens": num_tokens}
    text = json.dumps(wanted | {"environment": environment or {}})
    done = subprocess.run(
        [sys.executable, "-m", "tests.serving.job"],
        input=text,
        cwd=ROOT,
        env=os.environ | (environment or {}),
        capture_output=True,
        text=True,
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


def test_requests_that_outgrow_the_pool_are_computed_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Five answers begin in 30 pages and would end in 120, of 60."""
    preempted: list[str] = []
    preempt = Scheduler._preempt_request

    def counted(self: Any, request: Any, *args: Any, **options: Any) -> None:
        preempted.append(request.request_id)
        preempt(self, request, *args, **options)

    monkeypatch.setattr(Scheduler, "_preempt_request", counted)
    rows = np.array([[1, 0, 0], [0, 0, 0], [0, 1, 0], [1, 1, 1]], dtype=bool)
    allocation = Allocation(full_attention=rows, window=WINDOW, num_sink_tokens=40)
    convert(served("llama"), allocation, tmp_path / "hybrid")
    prompts = [[first, *PROMPTS[2]] for first in range(5)]
    with engine(tmp_path / "hybrid", block_size=32, max_model_len=800, num_gpu_blocks_override=60) as llm:
        found = generate(llm, prompts, 360)
    assert preempted
    assert same_tokens(tmp_path / "hybrid", prompts, found)


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


@pytest.mark.parametrize("reach", ["ours", "of the window"])
def test_sinks_survive_where_page_tables_are_cleared(reach: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Page tables as vLLM 0.33 clears them on a GPU, by what the cache says must stay."""
    build = HybridBuilder.build

    def cleared(self: HybridBuilder, prefix: int, common: Any, fast_build: bool = False) -> Any:
        batch = build(self, prefix, common, fast_build)
        if isinstance(spec := self.kv_cache_spec, SinkSpec):
            batch.table = batch.table.clone()
            firsts = batch.seq_lens - batch.query_starts.diff()
            for row, first in zip(batch.table, firsts.tolist(), strict=True):
                row[: max(first - spec.num_retained_tokens, 0) // spec.block_size] = 0
        return batch

    monkeypatch.setattr(HybridBuilder, "build", cleared)
    if reach == "of the window":
        monkeypatch.setattr(SinkSpec, "num_retained_tokens", property(lambda self: self.sliding_window - 1))
    model = served("llama")
    convert(model, allocate(model, window=WINDOW, num_sink_tokens=5), tmp_path / "hybrid")
    with engine(tmp_path / "hybrid", block_size=16, max_num_batched_tokens=64) as llm:
        # Page 0, which the cleared entries name, is made different from the sinks.
        for layer in hybrid_layers(llm):
            for place in (layer, *layer.places):
                place.kv_cache[0] = 1
        found = generate(llm, PROMPTS)
    assert same_tokens(tmp_path / "hybrid", PROMPTS, found) == (reach == "ours")


@pytest.mark.parametrize("sparsity", [0.25, 0.45, 0.9])
def test_full_heads_are_one_group_at_any_sparsity(sparsity: float, tmp_path: Path):
    """Where there are fewer SWA heads than FA heads, or not a multiple, unused places fill their groups up."""
    model = served("llama", num_hidden_layers=5, num_key_value_heads=4, num_attention_heads=8)
    options: dict[str, Any] = {"sparsity": sparsity, "granularity": "kv_head", "window": WINDOW, "seed": 3}
    allocation = rules.random_units(5, 4, num_sink_tokens=4, **options)
    convert(model, allocation, tmp_path / "hybrid")
    with engine(tmp_path / "hybrid") as llm:
        assert same_tokens(tmp_path / "hybrid", PROMPTS, generate(llm, PROMPTS))
        found, layers = groups(llm), hybrid_layers(llm)
    num_full = int(allocation.full_attention.sum())
    unused = unused_places(num_full, 20 - num_full)
    kinds = [None] + [WINDOW] * ((20 - num_full + unused) // num_full)
    assert sorted(found, key=str) == sorted([(num_full, 1, kind) for kind in kinds], key=str)
    assert sum(len(layer.places) + 1 for layer in layers) == 20 + unused


def hybrid_layers(llm: Any) -> list[Any]:
    """The attention modules, one for each layer; checks that the places of each layer's FA heads are adjacent."""
    context = llm.llm_engine.vllm_config.compilation_config.static_forward_context
    layers = [layer for layer in context.values() if isinstance(layer, HybridAttention)]
    for layer in layers:
        names = layer.heads.place_names(layer.layer_name)[: len(layer.heads.full)]
        caches = [context[name].kv_cache for name in names]
        if caches:
            view = _merged(caches)
            assert view.shape[1] == len(caches)
            for head, cache in enumerate(caches):
                assert view[1:2, head].data_ptr() == cache[1:2].data_ptr()
    return layers


LAYER = {"num_hidden_layers": 4, "num_key_value_heads": 8, "num_attention_heads": 16, "head_dim": 128}
CONTEXT = 32_768


def test_memory(tmp_path: Path):
    """With vLLM's own number of tokens at once, memory is what FA heads and windows take; what is in use is known."""
    model = served("qwen3", **LAYER, hidden_size=64, max_position_embeddings=CONTEXT).bfloat16()
    full = np.array([np.random.default_rng(layer).permutation(8) < n for layer, n in enumerate((1, 5, 0, 2))])
    allocation = Allocation(full_attention=full, window=512, num_sink_tokens=4)
    convert(model, allocation, tmp_path / "hybrid")
    options: dict[str, Any] = {"dtype": "bfloat16", "max_model_len": CONTEXT, "max_num_batched_tokens": 8192}
    with engine(tmp_path / "hybrid", **options) as llm:
        core = llm.llm_engine.engine_core.engine_core
        cache, config = core.scheduler.kv_cache_config, core.vllm_config
        assert len(hybrid_layers(llm)) == 4
        page = config.cache_config.block_size
        dense = 4 * 8 * CONTEXT * 2 * 128 * 2
        held = capacity.bytes_of_request(cache, CONTEXT)
        window = -(-513 // page) + 1 + 1  # 513 tokens from the middle of a page, and the sinks
        assert (
            held == (CONTEXT // page + 3 * window) * 8 * page * 2 * 128 * 2
        )  # a group of FA heads, three of SWA heads
        assert held < 0.275 * dense
        pool, flying = cache.kv_cache_tensors[0].size, config.max_in_flight_tokens
        assert flying >= 8192
        fit = capacity.requests_that_fit(cache, config, CONTEXT)
        reserve = 3 * flying * 8 * 2 * 128 * 2  # of three groups of 8 places
        assert fit == pytest.approx((pool - reserve) / held, rel=1e-3)
        assert config.scheduler_config.watermark == plugin.WATERMARK
        specs = [group.kv_cache_spec for group in cache.kv_cache_groups]
        # A request is admitted, and vLLM starts, if a prompt's chunks fit too.
        most = -(-(511 + flying) // page) + 1 + 1  # the window begins inside a page, the sinks take one
        assert specs[1].max_memory_usage_bytes(config) == most * specs[1].page_size_bytes
        managers = core.scheduler.kv_cache_manager.coordinator.single_type_managers
        assert managers[1].max_admission_blocks_per_request == most
        manager = core.scheduler.kv_cache_manager
        assert capacity.bytes_in_use(manager) == 0
        engine_ = llm.llm_engine
        prompt = tokens(1, 3 * page, seed=0, vocab_size=257)[0].tolist()
        engine_.add_request("one", {"prompt_token_ids": prompt}, SamplingParams(max_tokens=4, detokenize=False))
        engine_.step()
        engine_.step()
        assert capacity.bytes_in_use(manager) == capacity.bytes_of_request(cache, len(prompt) + 1)
        while engine_.has_unfinished_requests():
            engine_.step()
        assert capacity.bytes_in_use(manager) == 0


def test_a_watermark_that_the_user_gave_stays(hybrid: Path):
    with engine(hybrid, watermark=0.1) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.watermark == 0.1


@pytest.mark.parametrize("runner", [1, 2])
@pytest.mark.parametrize("rows", ["01 10 11 00", "00 00 00 01"])
def test_the_kernels_read_the_engine_s_own_pages(rows: str, runner: int, tmp_path: Path):
    """By Triton's interpreter, with FlashAttention replaced by torch on the same view of several places.

    Of vLLM's two model runners, the second is that of GPUs.
    """
    full = np.array([[digit == "1" for digit in row] for row in rows.split()])
    model = served("llama", num_hidden_layers=4, num_key_value_heads=2, num_attention_heads=6)
    convert(model, Allocation(full_attention=full, window=20, num_sink_tokens=3), tmp_path / "hybrid")
    prompts = [prompt[:60] for prompt in PROMPTS[3:5]] + [PROMPTS[0]]
    options: dict[str, Any] = {"block_size": 16, "max_num_batched_tokens": 48, "max_num_seqs": 3}
    environment = {"TRITON_INTERPRET": "1", "VLLM_USE_V2_MODEL_RUNNER": str(runner - 1)}
    found = job(tmp_path / "hybrid", prompts, environment, num_tokens=3, **options)
    assert (".cpu." in found["runner"]) == (runner == 2)
    steps = found["launches"]["write"] / 4
    launches = {"write": 4, "flash": full.any(1).sum(), "attention": (~full).any(1).sum()}
    assert found["launches"] == {name: number * steps for name, number in launches.items()}
    assert same_tokens(tmp_path / "hybrid", prompts, found["tokens"])


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


@pytest.mark.parametrize("family", ["llama", "mistral", "qwen2", "smollm3"])
def test_plain_folders_that_vllm_reads_by_itself(family: str, tmp_path: Path):
    assert convert(served(family), LAYERS, tmp_path / "plain", engine="vllm").kind == "plain"
    with engine(tmp_path / "plain") as llm:
        assert same_tokens(tmp_path / "plain", PROMPTS, generate(llm, PROMPTS))
        assert sorted(groups(llm), key=str) == sorted(SLIDING, key=str)


@pytest.mark.parametrize("family", ["qwen3", "qwen3_moe"])
def test_plain_folders_that_vllm_reads_through_transformers(family: str, tmp_path: Path):
    assert convert(served(family), LAYERS, tmp_path / "plain", engine="vllm").kind == "plain"
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
        ({"kv_cache_dtype": "fp8"}, "kv_cache_dtype must be auto for a hybrid, got fp8"),
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
        patch.setattr(limits, "VERSIONS", ("0.1",))
        plugin.register()
        with pytest.raises(ValueError, match=r"serves with vLLM 0\.1, and 0\.32\.0 is installed"), engine(hybrid):
            pass
    AutoConfig.register("consa", HybridConfig, exist_ok=True)  # as it was, for the tests to come
