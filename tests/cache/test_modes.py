"""The cache under torch.compile, autocast and inference mode."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from consa import Allocation, HybridCache, attached
from consa.cache.layer import as_computed
from tests.models import CACHE, allocate, left_padding, tiny, tokens


def test_decoding_compiles_to_one_graph():
    """Decoding steps cause no recompilation and no graph break; CUDA graphs are tested in tests/gpu."""
    model = tiny()
    allocation = allocate(model)
    ids = tokens(2, 40)
    torch._dynamo.reset()
    with torch.no_grad(), attached(model, allocation):
        wanted = model(ids, use_cache=False).logits
        cache = HybridCache(allocation, max_length=64)
        out = [model(ids[:, :20], **{CACHE: cache}).logits]
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        with torch._dynamo.config.patch(error_on_recompile=True):
            for column in range(20, 40):
                position = torch.full((2, 1), column)
                out.append(compiled(ids[:, column : column + 1], position_ids=position, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(out, 1), wanted, atol=1e-4, rtol=0)


def token_by_token(
    model: Any, cache: HybridCache, ids: torch.Tensor, mask: torch.Tensor, position: torch.Tensor
) -> torch.Tensor:
    """Logits `(batch, length, vocabulary)`, with one forward pass per column of `ids`."""
    out = []
    for column in range(ids.shape[1]):
        here = slice(column, column + 1)
        options = {"position_ids": position[:, here], "attention_mask": mask[:, : column + 1], CACHE: cache}
        out.append(model(ids[:, here], **options).logits)
    return torch.cat(out, 1)


@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_a_compiled_prefill_token_by_token_is_exact(padded: bool):
    """A graph recorded before the first write has no starts; it must not write padding as text."""
    model = tiny(num_hidden_layers=2)
    allocation = allocate(model)
    ids, mask = left_padding(tokens(2, 8), [0, 3 * padded])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    torch._dynamo.reset()
    with torch.no_grad(), attached(model, allocation):
        wanted = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        cache = HybridCache(allocation, max_length=16)
        actual = token_by_token(compiled, cache, ids, mask, position)
    real = mask.bool()
    torch.testing.assert_close(actual[real], wanted[real], atol=1e-4, rtol=0)


def test_a_growing_cache_compiles():
    model = tiny(num_hidden_layers=2)
    allocation = allocate(model)
    ids = tokens(2, 22)
    torch._dynamo.reset()
    with torch.no_grad(), attached(model, allocation):
        wanted = model(ids, use_cache=False).logits
        compiled, cache, out = torch.compile(model, backend="eager"), HybridCache(allocation), []
        for begin, end in ((0, 20), (20, 21), (21, 22)):
            position = torch.arange(begin, end).expand(2, -1)
            out.append(compiled(ids[:, begin:end], position_ids=position, **{CACHE: cache}).logits)
    torch.testing.assert_close(torch.cat(out, 1), wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_length", [None, 40])
def test_inference_mode_leaves_model_and_cache_usable(max_length: int | None):
    model = tiny()
    allocation = allocate(model)
    ids, cache = tokens(2, 22), HybridCache(allocation, max_length=max_length)
    with attached(model, allocation):
        with torch.inference_mode():
            model(ids[:, :20], **{CACHE: cache})
        model(ids[:, :20], labels=ids[:, :20], use_cache=False).loss.backward()
        model.zero_grad()
        with torch.no_grad():
            wanted = model(ids, use_cache=False).logits[:, 20:]
            position = torch.arange(20, 22).expand(2, -1)
            got = model(ids[:, 20:], position_ids=position, **{CACHE: cache}).logits
    torch.testing.assert_close(got, wanted, atol=1e-4, rtol=0)


@pytest.mark.parametrize("max_length", [None, 40])
@pytest.mark.parametrize("padded", [False, True], ids=["whole", "padded"])
def test_autocast_computes_as_without_a_cache_and_as_the_dense_model(padded: bool, max_length: int | None):
    model = tiny()
    ids, mask = left_padding(tokens(2, 22), [0, 6 * padded])
    position, real = (mask.cumsum(1) - 1).clamp(min=0), mask.bool()
    inputs = {"attention_mask": mask, "position_ids": position, "use_cache": False}
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        dense = model(ids, **inputs).logits
        everything = Allocation(full_attention=np.ones((4, 3), bool), window=7)
        with attached(model, everything):
            torch.testing.assert_close(model(ids, **inputs).logits[real], dense[real], atol=0.15, rtol=0)
        allocation = allocate(model)
        with attached(model, allocation):
            wanted, cache, out = (model(ids, **inputs).logits, HybridCache(allocation, max_length=max_length), [])
            for here in (slice(0, 20), slice(20, 21), slice(21, 22)):
                part = {"attention_mask": mask[:, : here.stop], "position_ids": position[:, here]}
                out.append(model(ids[:, here], **part, **{CACHE: cache}).logits)
    assert (wanted - dense)[real].abs().max() > 1  # the hybrid is not the dense model
    torch.testing.assert_close(torch.cat(out, 1)[real], wanted[real], atol=0.15, rtol=0)


def test_a_compiled_prefill_into_a_cache_that_was_reset_is_exact():
    """Former sequences do not determine where the next ones start."""
    model = tiny(num_hidden_layers=2)
    allocation = allocate(model)
    ids, mask = left_padding(tokens(2, 6), [0, 3])
    position = (mask.cumsum(1) - 1).clamp(min=0)
    torch._dynamo.reset()
    with torch.no_grad(), attached(model, allocation):
        wanted = model(ids, attention_mask=mask, position_ids=position, use_cache=False).logits
        compiled = torch.compile(model, backend="eager")
        cache = HybridCache(allocation, max_length=16)
        model(tokens(2, 8, seed=1), **{CACHE: cache})
        cache.reset()
        actual = token_by_token(compiled, cache, ids, mask, position)
    real = mask.bool()
    torch.testing.assert_close(actual[real], wanted[real], atol=1e-4, rtol=0)


def test_autocast_leaves_float64_as_it_is():
    with torch.autocast("cpu", torch.bfloat16):
        actual = [x.dtype for kind in (torch.float64, torch.float32) for x in as_computed(torch.zeros(1, dtype=kind))]
    assert actual == [torch.float64, torch.bfloat16]
