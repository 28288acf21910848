"""The chunked loss is the model's own, value and gradients, and never holds all logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from consa.model import loss
from consa.model.attach import attached
from tests.compare import Elements, assert_close
from tests.models import FAMILIES, allocate, tiny, tokens

SPECIAL: dict[str, dict[str, Any]] = {  # what these families do between hidden states and logits
    "gemma2": {"final_logit_softcapping": 3.0},
    "granite": {"logits_scaling": 3.0},
    "cohere2": {"logit_scale": 0.25},
    "llama": {"tie_word_embeddings": True},
}


def own_loss(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids, labels=ids, use_cache=False).loss


def gradients(model: PreTrainedModel) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad()
    return found


@pytest.mark.parametrize("batch", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family(family: str, batch: int, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 5 * batch)
    model = tiny(family, **SPECIAL.get(family, {}))
    ids = tokens(batch, 18)
    wanted = own_loss(model, ids)
    wanted.backward()
    wanted_gradients = gradients(model)
    assert wanted_gradients
    got = loss.backward(model, ids, scale=1.0)
    assert_close(got, wanted)
    assert got.dtype == torch.float32 and not got.requires_grad
    got_gradients = gradients(model)
    assert got_gradients.keys() == wanted_gradients.keys()
    for name, value in wanted_gradients.items():
        assert_close(got_gradients[name], value, 2e-5, name)
    each = loss.token_losses(model, ids)
    assert each.shape == (batch, 17) and not each.requires_grad
    logits = model(input_ids=ids, use_cache=False).logits.log_softmax(-1)
    assert_close(each, -logits[:, :-1].gather(2, ids[:, 1:, None])[..., 0])
    assert_close(each.mean(), wanted)


@pytest.mark.parametrize("family", ["gemma2", "granite", "cohere2"])
def test_the_special_settings_are_special(family: str):
    """Else the test above would pass on a loss that knows nothing of them."""
    ids = tokens(1, 18)
    plain = tiny(family, **{name: None if name.startswith("final") else 1.0 for name in SPECIAL[family]})
    assert (own_loss(tiny(family, **SPECIAL[family]), ids) - own_loss(plain, ids)).abs() > 1e-2


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 16, 17, 18, 1000])
@pytest.mark.parametrize("length", [2, 18])
def test_any_chunk_size(chunk: int, length: int, monkeypatch: pytest.MonkeyPatch):
    model, ids = tiny("granite", logits_scaling=3.0), tokens(2, length)
    (own_loss(model, ids) * 0.25).backward()
    wanted = gradients(model)
    monkeypatch.setattr(loss, "CHUNK_TOKENS", chunk)
    assert_close(loss.backward(model, ids, scale=0.25), own_loss(model, ids) * 0.25)
    for name, value in gradients(model).items():
        assert_close(value, wanted[name], 2e-5, name, floor=1e-2)  # one key alone: no gradient on queries
    assert_close(loss.token_losses(model, ids).mean(), own_loss(model, ids))


def test_gradients_accumulate():
    model, ids = tiny(), tokens(4, 12)
    own_loss(model, ids).backward()
    wanted = gradients(model)
    total = sum(loss.backward(model, half, scale=0.5) for half in ids.split(2))
    assert_close(torch.as_tensor(total), own_loss(model, ids))
    for name, value in gradients(model).items():
        assert_close(value, wanted[name], 2e-5, name)


def test_logits_never_exist_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    vocabulary, length = 3001, 257
    model, ids = tiny(vocab_size=vocabulary, num_hidden_layers=1), tokens(1, length)
    model.requires_grad_(False)
    embedded = model.get_input_embeddings()
    embedded.register_forward_hook(lambda *arguments: arguments[2].requires_grad_())
    for compute in (lambda: loss.backward(model, ids, scale=1.0), lambda: loss.token_losses(model, ids)):
        with Elements() as seen:
            compute()
        widest = [shape for shape in seen.shapes if vocabulary in shape]
        assert widest, "the output layer was not seen"
        assert seen.largest <= 16 * vocabulary < length * vocabulary / 10
    with Elements() as seen:
        own_loss(model, ids).backward()
    assert seen.largest > 250 * vocabulary, "this is how it looks otherwise"


def test_without_any_gradient_path():
    model, ids = tiny().requires_grad_(False), tokens(1, 12)
    got = loss.backward(model, ids, scale=1.0)
    assert_close(got, own_loss(model, ids))
    assert not gradients(model)


def test_with_a_gradient_on_the_output_layer_alone():
    model, ids = tiny().requires_grad_(False), tokens(1, 12)
    model.get_output_embeddings().requires_grad_(True)
    own_loss(model, ids).backward()
    wanted = gradients(model)
    loss.backward(model, ids, scale=1.0)
    got = gradients(model)
    assert got.keys() == wanted.keys() == {"lm_head.weight"}
    assert_close(got["lm_head.weight"], wanted["lm_head.weight"])


def test_gates_get_their_gradient_through_a_frozen_model():
    model, ids = tiny().requires_grad_(False), tokens(2, 20)
    z = torch.full((4, 2, 3), 0.5)
    with attached(model, allocate(model, window=3)) as plan:
        with plan.gated(z, ids.device) as wanted:
            own_loss(model, ids).backward()
        with plan.gated(z, ids.device) as got:
            loss.backward(model, ids, scale=1.0)
    assert wanted.grad is not None and got.grad is not None and (wanted.grad != 0).all()
    assert_close(got.grad, wanted.grad, 2e-5)
    assert not gradients(model)


def test_the_output_layer_leaves_no_trace_even_when_it_fails():
    model, ids = tiny(), tokens(1, 12)
    wanted = own_loss(model, ids)
    with pytest.raises(RuntimeError):
        loss.output_layer(model)(torch.zeros(1, 3, 5))
    assert "forward" not in vars(model.base_model)
    assert torch.equal(own_loss(model, ids), wanted)


def test_a_forward_of_the_backbones_own_is_put_back():
    model, calls = tiny(), []
    plain = model.base_model.forward

    def hooked(*args: Any, **kwargs: Any) -> Any:
        calls.append(1)
        return plain(*args, **kwargs)

    model.base_model.forward = hooked
    for _ in range(2):
        loss.token_losses(model, tokens(1, 12))
    assert vars(model.base_model)["forward"] is hooked and len(calls) == 2
