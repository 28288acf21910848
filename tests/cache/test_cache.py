"""The cache keeps exactly the needed tokens, and attention over it is the exact hybrid."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import DynamicCache, StaticCache
from transformers.cache_utils import Cache

from consa import Allocation, ConsaError, HybridCache, attached
from consa.attention.reference import reference_attention
from consa.cache.hybrid import allocated_bytes
from consa.cache.layer import GROWTH, STORAGE, HybridLayer
from consa.model.interface import consa_attention
from consa.model.plan import Plan
from tests.models import CACHE, FAMILIES, allocate, exact, left_padding, tiny, tokens

HEAD_DIM = 8


def one_layer(heads: list[bool], window: int, num_sink_tokens: int) -> Allocation:
    return Allocation(full_attention=np.array([heads]), window=window, num_sink_tokens=num_sink_tokens)


def attend(plan: Plan, cache: Cache, q, k, v, first, softcap=None):
    """One chunk in a model's attention layer."""
    keys, values = cache.update(k, v, 0)
    module = SimpleNamespace(consa_plan=plan, layer_idx=0)
    mask = None if first is None else first[:, None, None, None]
    out, _ = consa_attention(module, q, keys, values, mask, scaling=0.4, softcap=softcap)
    return out.transpose(1, 2)


def mask_of(starts: list[int], seen: int) -> torch.Tensor | None:
    """The result of `consa_mask` for left padding after `seen` columns."""
    first = torch.tensor(starts).clamp(max=seen)
    return first if bool(first.any()) else None


@st.composite
def sequences(draw):
    heads = draw(st.lists(st.booleans(), min_size=1, max_size=4))
    window, sinks = draw(st.integers(1, 12)), draw(st.integers(0, 5))
    chunks = draw(st.lists(st.one_of(st.just(1), st.integers(1, 25)), min_size=1, max_size=12))
    batch = draw(st.integers(1, 3))
    starts = draw(
        st.one_of(st.just([0] * batch), st.lists(st.integers(0, sum(chunks) - 1), min_size=batch, max_size=batch))
    )
    return heads, window, sinks, chunks, starts, draw(st.integers(1, 3)), draw(st.integers(0, 2**31))


def qkv(heads: int, group: int, batch: int, length: int, seed: int):
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, heads, length, HEAD_DIM)
    q = torch.randn(batch, heads * group, length, HEAD_DIM, generator=generator)
    return q, torch.randn(shape, generator=generator), torch.randn(shape, generator=generator)


@given(sequences(), st.sampled_from([None, 5.0]), st.sampled_from(["grows", "fixed", "records"]))
@settings(max_examples=250)
def test_any_chunks_of_any_sequences_give_the_exact_hybrid(sequences, softcap, kind):
    heads, window, sinks, chunks, starts, group, seed = sequences
    length = sum(chunks)
    allocation = one_layer(heads, window, sinks)
    cache = HybridCache(allocation, max_length=length if kind == "fixed" else None)
    if kind == "records":
        cache.activate_past_recording()
    q, k, v = qkv(len(heads), group, len(starts), length, seed)
    # What is padding must not matter, whatever it holds.
    padding = torch.arange(length) < torch.tensor(starts)[:, None]
    k, v = (x.masked_fill(padding[:, None, :, None], 1e4) for x in (k, v))
    out, done = [], 0
    for chunk in chunks:
        part = slice(done, done + chunk)
        done += chunk
        out.append(
            attend(Plan(allocation), cache, q[:, :, part], k[:, :, part], v[:, :, part], mask_of(starts, done), softcap)
        )
    wanted = reference_attention(
        q,
        k,
        v,
        torch.tensor([heads], dtype=torch.float32),
        window=window,
        num_sink_tokens=sinks,
        scaling=0.4,
        softcap=softcap,
        first=torch.tensor(starts),
    )
    torch.testing.assert_close(torch.cat(out, 2), wanted, atol=2e-5, rtol=0)


@given(sequences())
@settings(max_examples=60)
def test_bytes_are_those_of_the_allocation_to_within_a_growth_chunk(sequences):
    heads, window, sinks, chunks, _, group, seed = sequences
    allocation = one_layer(heads, window, sinks)
    chunks = [*chunks, GROWTH]
    cache = HybridCache(allocation)
    done = 0
    for chunk in chunks:
        q, k, v = qkv(len(heads), group, 2, chunk, seed)
        attend(Plan(allocation), cache, q, k, v, None)
        done += chunk
        wanted = allocation.kv_cache_bytes(done, head_dim=HEAD_DIM, bytes_per_element=4, batch_size=2)
        one_chunk = 2 * 2 * len(heads) * GROWTH * HEAD_DIM * 4
        assert wanted <= allocated_bytes(cache) < wanted + one_chunk
    if not any(heads):
        assert allocated_bytes(cache) == wanted  # all of it allocated, nothing more
    cache.reset()
    assert allocated_bytes(cache) == 0 and cache.get_seq_length() == 0


def test_a_quarter_of_full_heads_takes_about_a_quarter_of_the_memory():
    """The shape of SmolLM2-135M at 8,192 tokens, without the model."""
    full = np.random.default_rng(0).permutation(90).reshape(30, 3) < 22
    allocation = Allocation(full_attention=full, window=128, num_sink_tokens=4)
    assert allocation.sparsity >= 0.75
    plan, cache, dense = Plan(allocation), HybridCache(allocation), DynamicCache()
    k = torch.zeros(1, 3, 8192, 64, dtype=torch.bfloat16)
    for layer in range(30):
        new, _ = cache.update(k, k, layer)
        new.cache.write(k, k, None)
        assert new.cache.split == plan._splits[layer]
        dense.update(k, k, layer)
    assert allocated_bytes(cache) == allocation.kv_cache_bytes(8192, head_dim=64)  # 8,192 is whole chunks
    assert allocated_bytes(cache) / allocated_bytes(dense) <= 0.27


def test_decoding_copies_nothing_but_the_new_token():
    allocation = one_layer([True, False], 8, 2)
    cache, plan = HybridCache(allocation), Plan(allocation)
    q, k, v = qkv(2, 2, 1, 20, 0)
    attend(plan, cache, q, k, v, None)
    layer = cache.layers[0]
    before = {name: value.data_ptr() for name, value in vars(layer).items() if torch.is_tensor(value)}
    for _ in range(GROWTH - 20):  # as long as the first chunk lasts
        attend(plan, cache, q[:, :, :1], k[:, :, :1], v[:, :, :1], None)
    assert before == {name: value.data_ptr() for name, value in vars(layer).items() if torch.is_tensor(value)}


def in_chunks(model, cache, ids, mask, positions, chunks):
    """Logits of a whole text that the model reads in pieces."""
    out, done = [], 0
    for chunk in chunks:
        part = slice(done, done + chunk)
        done += chunk
        out.append(
            model(ids[:, part], attention_mask=mask[:, :done], position_ids=positions[:, part], **{CACHE: cache}).logits
        )
    return torch.cat(out, 1)


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_decodes_the_exact_hybrid(family, padded):
    model = tiny(family)
    allocation = allocate(model)
    ids, positions, mask = tokens(2, 48), torch.arange(48).expand(2, -1), torch.ones(2, 48)
    if padded:
        ids, mask = left_padding(ids, [0, 11])
        positions = (mask.cumsum(1) - 1).clamp(min=0)
    real = mask.bool()
    with torch.no_grad(), exact(model, allocation):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    dense = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    assert (wanted - dense)[real].abs().max() > 1e-2  # there is something to get wrong
    for chunks in ([48], [20] + [1] * 28, [5, 1, 1, 20, 3, 18], [1] * 48):
        for max_length in (None, 50):
            cache = HybridCache(allocation, max_length=max_length)
            with torch.no_grad(), attached(model, allocation):
                got = in_chunks(model, cache, ids, mask, positions, chunks)
            torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    "family", [family if family == "llama" else pytest.param(family, marks=pytest.mark.slow) for family in FAMILIES]
)
def test_thousands_of_tokens_past_the_window(family):
    """Chunks of every size up to 60, and single tokens; one of the two sequences is padded."""
    model = tiny(family, num_hidden_layers=2)
    allocation = allocate(model, window=16, num_sink_tokens=3)
    chunks = [*range(1, 61), *[1] * 270]
    ids, mask = left_padding(tokens(2, sum(chunks)), [0, 37])
    positions, real = (mask.cumsum(1) - 1).clamp(min=0), mask.bool()
    with torch.no_grad(), exact(model, allocation):
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits
    with torch.no_grad(), attached(model, allocation):
        got = in_chunks(model, HybridCache(allocation), ids, mask, positions, chunks)
    torch.testing.assert_close(got[real], wanted[real], atol=1e-4, rtol=0)


def decode(model, cache, ids, chunks):
    out, done = [], cache.get_seq_length()
    for chunk in chunks:
        out.append(model(ids[:, done : done + chunk], **{CACHE: cache}).logits)
        done += chunk
    return torch.cat(out, 1)


@pytest.fixture(scope="module")
def model():
    return tiny()


@given(st.lists(st.integers(1, 12), min_size=1, max_size=5), st.integers(1, 40), st.data())
@settings(max_examples=40)
def test_crop_takes_back_what_was_recorded(model, chunks, before, data):
    allocation = allocate(model)
    ids = tokens(1, before + sum(chunks) + 10)
    removed = data.draw(st.integers(0, sum(chunks)))
    with torch.no_grad(), attached(model, allocation):
        cache = HybridCache(allocation)
        decode(model, cache, ids, [before])
        cache.activate_past_recording()
        decode(model, cache, ids, chunks)
        cache.crop(-removed)
        assert cache.get_seq_length() == before + sum(chunks) - removed
        changed = ids.flip(1)  # what follows is other than what was taken back
        changed[:, : cache.get_seq_length()] = ids[:, : cache.get_seq_length()]
        rest = ids.shape[1] - cache.get_seq_length()
        got = decode(model, cache, changed, [1] * rest)
        wanted = model(changed, use_cache=False).logits[:, -rest:]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_crop_of_left_padded_sequences(model):
    allocation = allocate(model)
    ids, mask = left_padding(tokens(2, 40), [3, 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)

    def forward(part, cache):
        return model(
            ids[:, part], attention_mask=mask[:, : part.stop], position_ids=positions[:, part], **{CACHE: cache}
        ).logits

    with torch.no_grad(), attached(model, allocation):
        cache = HybridCache(allocation)
        forward(slice(0, 30), cache)
        cache.activate_past_recording()
        forward(slice(30, 38), cache)
        cache.crop(-6)
        got = forward(slice(32, 40), cache)
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 32:]
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_crop_refuses_what_is_gone(model):
    allocation = allocate(model, window=7, num_sink_tokens=2)
    with torch.no_grad(), attached(model, allocation):
        cache = HybridCache(allocation)
        decode(model, cache, tokens(1, 9), [9])
        cache.crop(-4)  # nothing was dropped yet: 9 tokens are kept
        assert cache.get_seq_length() == 5
        decode(model, cache, tokens(1, 20), [15])
        with pytest.raises(ConsaError, match=r"cannot remove 1 tokens.*activate_past_recording"):
            cache.crop(-1)
        with pytest.raises(ConsaError, match="negative number of tokens to remove, got 3"):
            cache.crop(3)
        cache.activate_past_recording()
        decode(model, cache, tokens(1, 22), [2])
        with pytest.raises(ConsaError, match="cannot remove 3 tokens"):
            cache.crop(-3)
        cache.crop(-2)
        assert cache.get_seq_length() == 20


@pytest.mark.parametrize("max_length", [None, 64])
def test_crop_of_more_than_there_is_empties_the_cache_as_that_of_transformers(model, max_length):
    allocation, ids = allocate(model, window=7, num_sink_tokens=2), tokens(1, 20)
    with torch.no_grad(), attached(model, allocation):
        cache, stock = HybridCache(allocation, max_length=max_length), DynamicCache()
        for removed in (-1, 0):
            cache.crop(removed)
            assert cache.get_seq_length() == 0
        for removed in (-20, -21):
            wanted = decode(model, HybridCache(allocation, max_length=max_length), ids, [20])
            assert torch.equal(decode(model, cache, ids, [20]), wanted)
            model(ids, **{CACHE: stock})
            for each in (cache, stock):
                each.crop(removed)
                assert each.get_seq_length() == 0


@pytest.mark.parametrize("max_length", [None, 64])
def test_sequences_are_selected_reordered_and_repeated(model, max_length):
    allocation = allocate(model)
    ids, mask = left_padding(tokens(3, 30), [0, 4, 9])
    positions = (mask.cumsum(1) - 1).clamp(min=0)
    order = torch.tensor([2, 0, 0, 1, 1, 1])
    more = tokens(6, 12, seed=1)
    with torch.no_grad(), attached(model, allocation):
        cache = HybridCache(allocation, max_length=max_length)
        model(ids, attention_mask=mask, position_ids=positions, **{CACHE: cache})
        cache.reorder_cache(torch.tensor([1, 2, 0]))
        cache.batch_repeat_interleave(2)  # 1 1 2 2 0 0
        cache.batch_select_indices(torch.tensor([2, 4, 5, 0, 1, 0]))
        mask = torch.cat([mask[order], torch.ones(6, 12, dtype=torch.long)], 1)
        ids = torch.cat([ids[order], more], 1)
        positions = (mask.cumsum(1) - 1).clamp(min=0)
        got = [
            model(
                ids[:, column : column + 1],
                attention_mask=mask[:, : column + 1],
                position_ids=positions[:, column : column + 1],
                **{CACHE: cache},
            ).logits
            for column in range(30, 42)
        ]
        wanted = model(ids, attention_mask=mask, position_ids=positions, use_cache=False).logits[:, 30:]
    torch.testing.assert_close(torch.cat(got, 1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_length", [None, 64])
def test_a_cache_can_be_used_again_after_reset(model, max_length):
    allocation = allocate(model)
    with torch.no_grad(), attached(model, allocation):
        cache = HybridCache(allocation, max_length=max_length)
        decode(model, cache, tokens(2, 40, seed=1), [33, 1, 6])
        cache.reset()
        assert cache.get_seq_length() == 0
        ids = tokens(2, 40)
        got = decode(model, cache, ids, [20, *[1] * 20])
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_offloading_waits_for_the_attention_that_is_about_to_run():
    """transformers offloads a layer as soon as `update` returns; here the tokens are written after that."""
    allocation = one_layer([True, False], 8, 2)
    cache, plan = HybridCache(allocation), Plan(allocation)
    layer = cache.layers[0]
    moved = []
    layer._move = lambda device: moved.append((device.type, layer.get_seq_length()))
    q, k, v = qkv(2, 2, 1, 20, 0)
    for _ in range(2):
        keys, values = cache.update(k, v, 0)
        layer.offload()
        consa_attention(SimpleNamespace(consa_plan=plan, layer_idx=0), q, keys, values, None, scaling=1.0)
        layer.prefetch()
    assert moved == [("cpu", 20), ("cpu", 20), ("cpu", 40), ("cpu", 40)]


def test_attention_reads_nothing_that_was_offloaded(model):
    """Chunks and single tokens over a cache whose layers are offloaded except during use."""
    allocation = allocate(model)
    away: dict[tuple[HybridLayer, str], torch.Tensor] = {}

    def move_away(layer: HybridLayer, device: torch.device) -> None:
        for name in STORAGE:
            if getattr(layer, name) is not None:
                away[layer, name] = getattr(layer, name)
                setattr(layer, name, away[layer, name].to("meta"))  # whoever reads it gets no numbers

    class Offloading(HybridCache):
        def update(self, key_states, value_states, layer_idx, *args, **kwargs):
            layer = self.layers[layer_idx]
            for name in STORAGE:
                setattr(layer, name, away.pop((layer, name), None))
            new = super().update(key_states, value_states, layer_idx, *args, **kwargs)
            layer.offload()
            return new

    cache, ids = Offloading(allocation), tokens(2, 60)
    for layer in cache.layers:
        layer._move = partial(move_away, layer)
    with torch.no_grad(), attached(model, allocation):
        got = decode(model, cache, ids, [20, 15, 1, 1, 23])
        wanted = model(ids, use_cache=False).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)
    assert {layer for layer, _ in away} == set(cache.layers)


@pytest.mark.parametrize("family", ["gemma2", "gemma3_text", "cohere2"])
def test_layers_that_the_model_slides_keep_their_window_and_no_more(family):
    model = tiny(family)
    allocation = allocate(model)
    cache, ids = HybridCache(allocation), tokens(2, 2 * GROWTH)
    with torch.no_grad(), attached(model, allocation):
        for chunk in (2 * GROWTH - 1, 1):  # after a long prefill as after decoding
            decode(model, cache, ids, [chunk])
            capacity = allocation.kv_cache_bytes(2 * GROWTH, head_dim=HEAD_DIM, bytes_per_element=4, batch_size=2)
            assert allocated_bytes(cache) == capacity


def test_gradients_pass_the_first_forward_and_are_refused_after(model):
    allocation = allocate(model)
    with attached(model, allocation):
        cache = HybridCache(allocation)
        model(tokens(1, 20), **{CACHE: cache}).logits.sum().backward()
        gradient = model.model.layers[0].self_attn.k_proj.weight.grad.clone()
        model.zero_grad()
        model(tokens(1, 20), use_cache=False).logits.sum().backward()
        torch.testing.assert_close(gradient, model.model.layers[0].self_attn.k_proj.weight.grad)
        model.zero_grad()
        with pytest.raises(ConsaError, match="no gradient flows through cached keys"):
            model(tokens(1, 1), **{CACHE: cache})


def test_what_would_not_be_exact_is_refused(model):
    allocation = allocate(model)
    with torch.no_grad(), attached(model, allocation) as plan:
        cache = HybridCache(allocation)
        ids, mask = left_padding(tokens(2, 20), [0, 4])
        model(ids, attention_mask=mask, **{CACHE: cache})
        with pytest.raises(ConsaError, match="in other columns than before"):
            model(ids[:, :1], **{CACHE: cache})
        other = torch.ones(2, 21, dtype=torch.long)
        other[1, :3] = 0
        with pytest.raises(ConsaError, match="in other columns than before"):
            model(ids[:, :1], attention_mask=other, **{CACHE: cache})
        with pytest.raises(ConsaError, match="made for another allocation"):
            model(ids, **{CACHE: HybridCache(allocate(model, window=6))})
        z = torch.ones(allocation.num_layers, len(ids), allocation.num_kv_heads)
        with pytest.raises(ConsaError, match="pass use_cache=False"), plan.gated(z, ids.device):
            model(ids, **{CACHE: HybridCache(allocation)})
        with pytest.raises(ConsaError, match="for 2 KV heads per layer, the model has 3"):
            model(ids, **{CACHE: HybridCache(Allocation(full_attention=np.ones((4, 2), bool), window=7))})
        with pytest.raises(ConsaError, match="room for 15 tokens, but 20 are needed"):
            model(ids, **{CACHE: HybridCache(allocation, max_length=15)})
        with pytest.raises(ConsaError, match="room for 20 tokens, but 21 are needed"):
            decode(model, HybridCache(allocation, max_length=20), tokens(1, 21), [20, 1])
        with pytest.raises(ConsaError, match=r"StaticCache of transformers is not supported"):
            model(ids, **{CACHE: StaticCache(model.config, max_cache_len=30)})
        with pytest.raises(ConsaError, match="is not supported"):
            model(ids, attention_mask=torch.ones(2, 1, 20, 20, dtype=torch.bool))


@pytest.mark.parametrize("max_length", [None, 50])
def test_a_mask_may_say_already_what_comes_later(model, max_length: int | None):
    allocation = allocate(model)
    ids, mask = left_padding(tokens(2, 20), [0, 6])
    longer = torch.cat([mask, torch.ones(2, 30, dtype=torch.long)], 1)
    position = (mask.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad(), attached(model, allocation):
        wanted = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        cache, out = HybridCache(allocation, max_length=max_length), []
        for here in (slice(0, 9), slice(9, 20)):
            options = {"attention_mask": longer, "position_ids": position[:, here], CACHE: cache}
            out.append(model(ids[:, here], **options).logits)
    torch.testing.assert_close(torch.cat(out, 1)[mask.bool()], wanted[mask.bool()], atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_length", [None, 30])
def test_rows_without_padding_go_on_alone(model, max_length: int | None):
    allocation = allocate(model)
    ids, mask = left_padding(tokens(3, 21), [0, 6, 0])
    rows, cache = torch.tensor([0, 2]), HybridCache(allocation, max_length=max_length)
    with torch.no_grad(), attached(model, allocation):
        wanted = model(ids[rows], use_cache=False).logits[:, -1:]
        model(ids[:, :20], attention_mask=mask[:, :20], **{CACHE: cache})
        cache.batch_select_indices(rows)
        got = model(ids[rows, 20:], position_ids=torch.full((2, 1), 20), **{CACHE: cache}).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


def test_a_hybrids_cache_in_another_model_is_named(model):
    with pytest.raises(AttributeError, match="only a hybrid can use a HybridCache"):
        model(tokens(1, 8), **{CACHE: HybridCache(allocate(model))})


def test_crop_takes_nothing_back_of_sequences_that_were_reordered(model):
    allocation = allocate(model, window=7, num_sink_tokens=2)
    with torch.no_grad(), attached(model, allocation):
        cache = HybridCache(allocation)
        decode(model, cache, tokens(2, 30), [30])
        cache.activate_past_recording()
        decode(model, cache, tokens(2, 35), [5])
        cache.reorder_cache(torch.tensor([1, 0]))
        with pytest.raises(ConsaError, match="cannot remove 2 tokens"):
            cache.crop(-2)
