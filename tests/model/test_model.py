"""Attaching an allocation is exact for every supported family, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from consa import Allocation, HybridCache, rules
from consa.attention.reference import reference_attention
from consa.errors import ConsaError, InvalidAllocationError, UnsupportedModelError
from consa.model.attach import attached
from consa.model.layout import attention_layout, inspect_attention, max_positions
from consa.model.load import load_model, read_layout
from tests.compare import assert_close
from tests.models import CACHE, FAMILIES, NATIVE_WINDOW, SHAPE, allocate, tiny, tokens

NATIVE = {"gemma2", "gemma3_text", "cohere2"}


@pytest.fixture(autouse=True)
def one_line_refusals(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "cache"))


@contextmanager
def truth(model: PreTrainedModel, allocation: Allocation, mask: Tensor | None = None) -> Iterator[None]:
    """Within the block, `model` attends under dense masks made from `mask`, independently of consa."""
    first = None if mask is None else mask.argmax(1)

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, **asked: Any) -> tuple[Tensor, None]:
        layer = module.layer_idx
        native = allocation.native_windows.get(layer)
        out = reference_attention(
            q,
            k,
            v,
            torch.tensor(allocation.full_attention[layer][None].astype(np.float32)),
            window=native or allocation.window,
            num_sink_tokens=0 if native else allocation.num_sink_tokens,
            scaling=asked["scaling"],
            softcap=asked.get("softcap"),
            first=first,
        )
        return out.transpose(1, 2), None

    AttentionInterface.register("consa_test_truth", attend)
    AttentionMaskInterface.register("consa_test_truth", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("consa_test_truth")
    try:
        yield
    finally:
        model.set_attn_implementation(before)


def logits(model: PreTrainedModel, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    return model(input_ids=ids, attention_mask=mask, use_cache=False).logits


def dense(allocation: Allocation) -> Allocation:
    full = np.ones_like(allocation.full_attention)
    full[list(allocation.native_windows)] = False
    return replace(allocation, full_attention=full)


@pytest.mark.parametrize("family", FAMILIES)
def test_all_full_is_the_untouched_model(family: str):
    model = tiny(family)
    if family == "gemma2":
        model.set_attn_implementation("eager")  # transformers' sdpa leaves out the softcap
    ids = tokens(2, 23)
    with torch.no_grad():
        untouched = logits(model, ids)
        allocation = dense(allocate(model))
        assert bool(allocation.native_windows) == (family in NATIVE)
        with attached(model, allocation):
            assert_close(logits(model, ids), untouched)
            assert_close(logits(model, ids, torch.ones_like(ids)), untouched)
        with attached(model, replace(allocation, full_attention=np.zeros((4, 3), dtype=bool))):
            assert (logits(model, ids) - untouched).abs().max() > 1e-2, "attention does not matter here"


def gradients(model: PreTrainedModel, ids: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Logits, and gradients of a random projection of them with respect to the embeddings and a weight of layer 0."""
    real = torch.ones_like(ids) if mask is None else mask
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    attention = {name: p for name, p in model.named_parameters() if "layers.0.self_attn" in name}
    weight = next(p for name, p in attention.items() if "v_proj.weight" in name or "qkv_proj.weight" in name)
    out = model(inputs_embeds=embedded, attention_mask=mask, use_cache=False).logits * real[..., None]
    upstream = torch.randn(out.shape, generator=torch.Generator().manual_seed(5))
    return out, *torch.autograd.grad((out * upstream).sum(), (embedded, weight))


PADDINGS = {
    "none": None,
    "left": [(9, 23), (0, 23), (22, 23)],
    "right": [(0, 14), (0, 23), (0, 1)],
    "both": [(9, 20), (4, 23), (0, 17)],
}


def mask_of(padding: str, length: int = 23) -> Tensor | None:
    spans = PADDINGS[padding]
    if spans is None:
        return None
    place = torch.arange(length)
    return torch.stack([((place >= start) & (place < end)).long() for start, end in spans])


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize("family", FAMILIES)
def test_random_heads_equal_dense_masks_logits_and_gradients(family: str, padding: str):
    model = tiny(family)
    allocation = allocate(model, window=5, num_sink_tokens=2, seed=len(family))
    ids, mask = tokens(3, 23), mask_of(padding)
    with truth(model, allocation, mask):
        wanted = gradients(model, ids, mask)
    with attached(model, allocation):
        got = gradients(model, ids, mask)
    for name, x, x2 in zip(("logits", "embeddings", "weight"), got, wanted, strict=True):
        assert_close(x, x2, 2e-5, name)


@pytest.mark.parametrize(
    ("window", "num_sink_tokens", "length"),
    [(1, 0, 17), (1, 3, 17), (16, 0, 17), (17, 0, 17), (40, 4, 17), (2, 17, 17), (2, 30, 17), (5, 12, 17), (3, 1, 1)],
)
def test_edges_of_window_and_sinks(window: int, num_sink_tokens: int, length: int):
    model = tiny()
    allocation = allocate(model, window=window, num_sink_tokens=num_sink_tokens)
    mask = torch.ones(2, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    ids = tokens(2, length)
    with torch.no_grad():
        with truth(model, allocation, mask):
            wanted = logits(model, ids, mask)
        with attached(model, allocation):
            got = logits(model, ids, mask)
            if window >= length or num_sink_tokens >= length:
                untouched = logits(model, ids, mask)
        real = mask.bool()
        assert_close(got[real], wanted[real])
        if window >= length or num_sink_tokens >= length:
            assert_close(got[real], untouched[real])


@pytest.mark.parametrize("padding", ["left", "right", "both"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_batch_with_padding_is_its_sequences_one_by_one(family: str, padding: str):
    model = tiny(family)
    allocation = allocate(model, window=4, num_sink_tokens=2)
    ids, mask = tokens(3, 23), mask_of(padding)
    assert mask is not None
    position_ids = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attached(model, allocation):
        together = model(ids * mask, attention_mask=mask, position_ids=position_ids, use_cache=False).logits
        for row, out in enumerate(together):
            real = mask[row].bool()
            assert_close(out[real], logits(model, ids[row, real][None])[0], 2e-5)


@pytest.mark.parametrize("window", [1, 2, 6, 30])
@pytest.mark.parametrize("family", ["mistral", "qwen2", "qwen3"])
def test_all_sliding_is_transformers_own_sliding_window(family: str, window: int):
    plain = tiny(family)
    options: dict[str, Any] = {"sliding_window": window}
    if family != "mistral":
        options |= {"use_sliding_window": True, "max_window_layers": 0, "layer_types": ["sliding_attention"] * 4}
    own = tiny(family, **options)
    own.load_state_dict(plain.state_dict())
    ids = tokens(2, 23)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    allocation = replace(allocate(plain), full_attention=np.zeros((4, 3), dtype=bool))
    allocation = replace(allocation, window=window, num_sink_tokens=0)
    for given, real in ((None, torch.ones_like(ids).bool()), (mask, mask.bool())):
        with torch.no_grad(), attached(plain, allocation):
            assert_close(logits(plain, ids, given)[real], logits(own, ids, given)[real])


# No trace.


def everything(model: PreTrainedModel) -> list[Any]:
    return [
        json.dumps(model.config.to_dict(), default=str),
        model.config._attn_implementation,
        {name: sorted(vars(module)) for name, module in model.named_modules()},
        {name: dict(module._forward_hooks) for name, module in model.named_modules()},
        [(name, p.requires_grad, p.data_ptr()) for name, p in model.named_parameters()],
        {name: module.training for name, module in model.named_modules()},
        model.generation_config.to_json_string(),
    ]


@pytest.mark.parametrize("implementation", ["sdpa", "eager"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_leaves_no_trace(family: str, implementation: str):
    model = tiny(family)
    model.set_attn_implementation(implementation)
    ids = tokens(2, 19)
    with torch.no_grad():
        wanted = logits(model, ids)
        before = copy.deepcopy(everything(model))
        with attached(model, allocate(model)):
            assert not torch.equal(logits(model, ids), wanted)
            assert everything(model) != before
        assert everything(model) == before
        assert torch.equal(logits(model, ids), wanted)
        with pytest.raises(KeyError, match="inside"), attached(model, allocate(model)):
            raise KeyError("inside")
        assert everything(model) == before
        with pytest.raises(RuntimeError), attached(model, allocate(model)):
            model(inputs_embeds=torch.zeros(1, 2, 3))  # fails within the model
        assert everything(model) == before
        assert torch.equal(logits(model, ids), wanted)


def test_nesting_is_refused_and_harms_nothing():
    model = tiny()
    ids, first = tokens(1, 19), allocate(model)
    with torch.no_grad(), attached(model, first):
        wanted = logits(model, ids)
        inner = attached(model, allocate(model, seed=1))
        with pytest.raises(ConsaError, match="already has an allocation attached"), inner:
            raise AssertionError
        assert torch.equal(logits(model, ids), wanted), "the outer block goes on"
    with attached(model, allocate(model, seed=1)):
        pass


def test_two_models_attached_at_once_do_not_meet():
    one, two = tiny(seed=0), tiny(seed=0)
    ids = tokens(1, 19)
    first, second = allocate(one, window=2), allocate(two, window=9, seed=1)
    with torch.no_grad():
        with attached(one, first):
            wanted_one = logits(one, ids)
        with attached(two, second):
            wanted_two = logits(two, ids)
        with attached(one, first), attached(two, second):
            assert torch.equal(logits(one, ids), wanted_one)
            assert torch.equal(logits(two, ids), wanted_two)


def test_copies_and_saves_inside_the_block_hold_nothing_of_it(tmp_path: Path):
    model = tiny()
    with attached(model, allocate(model)):
        model.save_pretrained(tmp_path)
    assert "consa" not in (tmp_path / "config.json").read_text()


def test_attention_stays_attached_until_the_end_of_the_block():
    model, ids = tiny(), tokens(1, 19)
    with torch.no_grad():
        untouched = logits(model, ids)
        attached(model, allocate(model)).__enter__()
        gc.collect()
        hybrid = logits(model, ids)
        assert not torch.equal(hybrid, untouched)
        for change in (model.set_attn_implementation, lambda name: setattr(model.config, "_attn_implementation", name)):
            with pytest.raises(ConsaError, match=r"attn_implementation='sdpa' would run it as full attention"):
                change("sdpa")
        assert torch.equal(logits(model, ids), hybrid)


@pytest.mark.parametrize("batch", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_plain_generation_follows_the_exact_masks(family: str, batch: int):
    model = tiny(family)
    allocation = allocate(model, window=4, num_sink_tokens=1)
    prompt, mask = tokens(batch, 7), torch.ones(batch, 7, dtype=torch.long)
    if batch > 1:
        mask[0, :3] = 0
    with torch.no_grad():
        with attached(model, allocation):
            out = model.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=9,
                do_sample=False,
                output_logits=True,
                return_dict_in_generate=True,
            )
        mask = torch.cat([mask, torch.ones(batch, 9, dtype=torch.long)], dim=1)
        position_ids = (mask.cumsum(1) - 1).clamp(min=0)
        with truth(model, allocation, mask):
            wanted = model(out.sequences, attention_mask=mask, position_ids=position_ids, use_cache=False).logits[
                :, 6:-1
            ]
    assert_close(torch.stack(out.logits, 1), wanted, 5e-5)
    assert torch.equal(out.sequences[:, 7:], wanted.argmax(-1))


# The layout.


@pytest.mark.parametrize("family", FAMILIES)
def test_layout(family: str):
    model = tiny(family)
    layout = attention_layout(model)
    assert (layout.num_layers, layout.num_q_heads, layout.num_kv_heads, layout.head_dim) == (4, 6, 3, 8)
    assert layout.native_windows == ({0: NATIVE_WINDOW, 2: NATIVE_WINDOW} if family in NATIVE else {})
    for layer, name in enumerate(layout.names):
        assert model.get_submodule(name).layer_idx == layer
    before = model.config.to_json_string(use_diff=False)
    assert inspect_attention(type(model), model.config) == layout
    assert model.config.to_json_string(use_diff=False) == before


# Refusals.

SMALL: dict[str, Any] = {**SHAPE, "num_hidden_layers": 2}


def unsupported() -> dict[str, tuple[Any, str]]:
    t = transformers
    sliding = ["sliding_attention"] * 2
    return {
        "gpt_oss": (t.GptOssConfig(**SMALL, num_local_experts=2), "GptOss"),
        "mamba": (t.MambaConfig(hidden_size=32, num_hidden_layers=2, vocab_size=61, state_size=4), "linear_attention"),
        "llama4_text": (t.Llama4TextConfig(**SMALL, num_local_experts=2, attention_chunk_size=4), "chunked_attention"),
        "bloom": (t.BloomConfig(hidden_size=32, n_layer=2, n_head=2, vocab_size=61), "attention"),
        "mistral": (t.MistralConfig(**SMALL, sliding_window=4), "every layer already uses a sliding window"),
        "qwen3": (
            t.Qwen3Config(**SMALL, use_sliding_window=True, sliding_window=4, layer_types=sliding),
            "every layer already uses a sliding window",
        ),
        "qwen3_next": (t.Qwen3NextConfig(**SMALL, num_experts=2), "linear_attention"),
        "deepseek_v3": (
            t.DeepseekV3Config(
                num_hidden_layers=2,
                first_k_dense_replace=2,
                vocab_size=61,
                hidden_size=32,
                intermediate_size=32,
                num_attention_heads=2,
                num_key_value_heads=2,
                q_lora_rank=16,
                kv_lora_rank=16,
                qk_rope_head_dim=8,
                qk_nope_head_dim=8,
                v_head_dim=8,
                pad_token_id=0,
            ),
            "its heads do not match: 2 query, 2 KV, dimensions 16, 16, 8",
        ),
    }


@pytest.mark.parametrize("name", unsupported())
def test_a_model_that_cannot_be_taken_over_is_refused_by_name_before_its_weights_are_read(name: str, tmp_path: Path):
    config, reason = unsupported()[name]
    config.save_pretrained(tmp_path)  # and nothing else: were weights asked for, the message would say so
    for look in (load_model, read_layout):
        with pytest.raises(UnsupportedModelError, match=reason) as caught:
            look(str(tmp_path))
        model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
        assert model_class.__name__ in str(caught.value)
        assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "options", "reason"),
    [
        ("Glm4MoeLite", {"num_key_value_heads": 4, "n_routed_experts": 4}, "with a cache failed"),
        ("DiffLlama", {}, "with a cache failed"),
        ("Doge", {}, "its masks are not causal ones|with a cache failed"),  # as the version of transformers has it
        ("OPT", {}, "with a cache failed"),
        ("Bert", {}, "its masks are not causal ones"),
        ("Blenderbot", {"d_model": 32}, "its masks are not causal ones"),
    ],
)
def test_a_family_that_would_fail_at_the_first_generated_token_is_refused(name: str, options: Any, reason: str):
    config = getattr(transformers, f"{name}Config")(
        num_hidden_layers=2, num_attention_heads=4, hidden_size=32, intermediate_size=32, vocab_size=61, **options
    )
    model_class = transformers.AutoModelForCausalLM._model_mapping[type(config)]
    with pytest.raises(UnsupportedModelError, match=reason):
        inspect_attention(model_class, config)


@pytest.mark.parametrize("kind", ["dynamic", "longrope"])
def test_rotary_embeddings_that_depend_on_the_positions_are_no_obstacle(kind: str):
    scaling: dict[str, Any] = {"rope_type": kind, "rope_theta": 10000.0, "factor": 4.0}
    if kind == "longrope":
        scaling |= {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 16}
    model = tiny(rope_parameters=scaling, max_position_embeddings=16)
    allocation, ids = allocate(model), tokens(1, 40)
    with torch.no_grad(), truth(model, allocation):
        wanted = logits(model, ids)
    with torch.no_grad(), attached(model, allocation):
        assert_close(logits(model, ids), wanted)


@pytest.mark.parametrize(
    ("rope", "positions"),
    [
        (None, 128),
        ({"rope_type": "default"}, 128),
        ({"rope_type": "yarn", "factor": 4.0}, 512),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32}, 128),
        ({"rope_type": "dynamic", "factor": 2.0}, 256),
        ({"rope_type": "linear", "factor": 2.0}, 256),
        ({"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}, 128),
        ({"full_attention": {"rope_type": "linear", "factor": 8.0}}, 128),
    ],
)
def test_positions_count_those_that_rope_scaling_adds(rope: Any, positions: int):
    assert max_positions(SimpleNamespace(max_position_embeddings=128, rope_parameters=rope)) == positions


def test_an_encoder_is_refused(tmp_path: Path):
    transformers.CLIPVisionConfig().save_pretrained(tmp_path)
    with pytest.raises(UnsupportedModelError, match=r"clip_vision_model.* is not a causal language model"):
        load_model(str(tmp_path))


def test_allocation_of_another_shape_is_refused():
    model = tiny()
    for layers, heads in ((3, 3), (4, 2), (3, 4)):
        allocation = rules.interleaved(layers, heads, sparsity=0.5)
        with (
            pytest.raises(
                InvalidAllocationError, match=rf"for {layers} layers x {heads} KV heads, but LlamaForCausalLM has 4 x 3"
            ),
            attached(model, allocation),
        ):
            raise AssertionError
    assert model.config._attn_implementation == "sdpa"


def test_wrong_native_windows_are_refused():
    plain, gemma = tiny(), tiny("gemma3_text")
    full = np.zeros((4, 3), dtype=bool)
    for model, windows in ((plain, {0: 5}), (gemma, {}), (gemma, {0: 5}), (gemma, {0: 5, 2: 6}), (gemma, {0: 5, 1: 5})):
        allocation = Allocation(full_attention=full, window=4, native_windows=windows)
        with pytest.raises(InvalidAllocationError, match="native_windows"), attached(model, allocation):
            raise AssertionError


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"position_ids": torch.tensor([[0, 1, 2, 0, 1, 2]])}, "packed sequences"),
        ({"attention_mask": torch.tensor([[1, 1, 0, 1, 1, 1]])}, "holes"),
        ({"attention_mask": torch.tensor([[0, 1, 0, 1, 1, 1]])}, "holes"),
        ({"attention_mask": torch.ones(1, 1, 6, 6, dtype=torch.bool)}, r"shape \(1, 1, 6, 6\)"),
        ({"attention_mask": torch.zeros(1, 1, 6, 6)}, r"shape \(1, 1, 6, 6\)"),
        ({"attention_mask": torch.ones(1, 4, dtype=torch.long)}, "keys end at 4 but queries at 6"),
    ],
)
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_masks_that_would_not_be_exact_are_refused(family: str, arguments: dict[str, Tensor], message: str):
    model = tiny(family)
    with attached(model, allocate(model)), pytest.raises(ConsaError, match=message) as caught:
        model(input_ids=tokens(1, 6), use_cache=False, **arguments)
    assert "\n" not in str(caught.value)


def test_a_static_cache_is_refused():
    model = tiny()
    with attached(model, allocate(model)), pytest.raises(ConsaError, match=r"StaticCache of .* is not supported"):
        model.generate(tokens(1, 6), max_new_tokens=3, do_sample=False, cache_implementation="static")


def test_attention_dropout_in_training_is_refused():
    model = tiny(attention_dropout=0.25)
    allocation = allocate(model)
    with attached(model, allocation):
        logits(model, tokens(1, 6))  # in evaluation there is none
        model.train()
        with pytest.raises(ConsaError, match=r"attention dropout 0\.25"):
            logits(model, tokens(1, 6))


def test_what_is_around_a_model_is_refused_by_name():
    pytest.importorskip("peft", reason="needs consa[lora]")
    from peft import LoraConfig, get_peft_model

    model = tiny()
    wrapped = get_peft_model(copy.deepcopy(model), LoraConfig(target_modules=["q_proj"]))
    for outer in (wrapped, torch.compile(model)):
        with (
            pytest.raises(UnsupportedModelError, match=r"the model inside: get_base_model\(\)"),
            attached(outer, allocate(model)),
        ):
            pass


def test_a_mask_that_leaves_out_keys_is_refused():
    model = tiny()
    message = "the attention mask covers 10 of 20 keys; it must cover all"
    with torch.no_grad(), attached(model, allocation := allocate(model)), pytest.raises(ConsaError, match=message):
        model(tokens(2, 20), attention_mask=torch.ones(2, 10).long(), **{CACHE: HybridCache(allocation)})


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_an_observer_sees_what_every_layer_attends_with(family: str):
    model, ids = tiny(family), tokens(2, 23)
    calls: list[tuple[int, Tensor, Tensor, float, float | None]] = []
    with torch.no_grad(), attached(model, allocate(model)):
        unobserved = logits(model, ids)
    with torch.no_grad(), attached(model, allocate(model), observer=lambda *call: calls.append(call)):
        assert torch.equal(logits(model, ids), unobserved)
    assert [layer for layer, *_ in calls] == [0, 1, 2, 3]
    for _, q, k, scaling, softcap in calls:
        assert (q.shape, k.shape) == ((2, 6, 23, 8), (2, 3, 23, 8))
        assert scaling == pytest.approx(8**-0.5)
        assert softcap == (50.0 if family == "gemma2" else None)
    with torch.no_grad(), attached(model, allocate(model)):
        logits(model, ids)
    assert len(calls) == 4
