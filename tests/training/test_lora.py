"""LoRA under an allocation: whom it follows, what it leaves, and which layers and versions it takes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from consa.errors import ConsaError
from consa.model.attach import attached
from consa.training import lora
from consa.training.adaptation import adapt
from tests.compare import assert_close
from tests.models import allocate, tiny, tokens
from tests.training.adaptation_case import (
    METHODS,
    OBJECTIVES,
    Interrupted,
    all_full,
    allocation,
    changed,
    distance_to_dense,
    interrupt_at,
    text,
)


def test_lora_follows_the_dense_model_without_a_second_copy():
    """At the start LoRA adds nothing, so both teachers and both hybrids are the same."""
    config = changed(**OBJECTIVES["all"], num_steps=5)
    models = {method: tiny() for method in METHODS}
    firsts = {
        method: adapt(model, text(), allocation(), replace(config, method=method))[0]
        for method, model in models.items()
    }
    for part in ("loss", "cross_entropy", "distillation", "hidden_loss"):
        assert firsts["lora"][part] == pytest.approx(firsts["full"][part], rel=1e-5)
    for method in METHODS:  # the teacher stays where it was: a hybrid that comes nearer is nearer to `tiny()`
        assert distance_to_dense(models[method]) < distance_to_dense(tiny())
    dense = adapt(tiny(), text(), all_full(), replace(config, method="lora"))
    assert dense[0]["distillation"] == pytest.approx(0, abs=1e-5)
    assert dense[0]["hidden_loss"] == pytest.approx(0, abs=1e-6)


def test_a_failure_takes_the_additions_off():
    model = tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with pytest.raises(Interrupted):
        adapt(model, text(), allocation(), changed(method="lora"), on_step=interrupt_at(2))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert before.keys() == model.state_dict().keys() and all(p.requires_grad for p in model.parameters())


def test_lora_keeps_an_adapter_that_peft_reads(tmp_path: Path):
    from peft import PeftModel

    model = tiny()
    adapt(model, text(), allocation(), changed(method="lora"), run_dir=tmp_path)
    base: Any = PeftModel.from_pretrained(tiny(), str(tmp_path / "adapter"))
    ids = tokens(2, 12)
    assert_close(base.merge_and_unload()(ids).logits, model(ids).logits, 1e-5)


@pytest.mark.parametrize("target", ["query_key_value", "lm_head"])
def test_lora_on_a_model_without_such_layers(target: str):
    model = tiny()
    names = list(model.state_dict())
    with pytest.raises(ConsaError, match=rf"LlamaForCausalLM \(all-linear, down_proj, .*\), got '{target}'"):
        adapt(model, text(), allocation(), changed(method="lora", lora_targets=f"q_proj,{target}"))
    assert list(model.state_dict()) == names


def test_lora_on_named_layers_only():
    model = tiny()
    adapt(model, text(), allocation(), changed(method="lora", lora_targets="q_proj, v_proj"))
    before = tiny().state_dict()
    moved = {name.split(".")[-2] for name, p in model.state_dict().items() if not torch.equal(p, before[name])}
    assert moved == {"q_proj", "v_proj"}


def test_lora_on_experts_whose_parameters_peft_nests():
    model = tiny("qwen3_moe")
    names, decided, seen = list(model.state_dict()), allocate(model, window=3), []

    def look(record: dict[str, float]) -> None:
        with torch.no_grad():
            seen[:] = [model(tokens(2, 24), use_cache=False).logits]

    adapt(model, text(), decided, changed(method="lora"), on_step=look)
    assert list(model.state_dict()) == names
    with torch.no_grad(), attached(model, decided):
        assert_close(model(tokens(2, 24), use_cache=False).logits, seen[0], 1e-4)


def test_without_peft(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora, "find_spec", lambda name: None)
    with pytest.raises(ConsaError, match=r"pip install 'consa\[lora\]'"):
        adapt(tiny(), text(), allocation(), changed(method="lora"))


def test_peft_too_old_for_transformers(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(lora, "MIN_PEFT_VERSION", "999.1")
    with pytest.raises(ConsaError, match=r"999\.1; run: pip install 'peft>=999\.1'"):
        adapt(tiny(), text(), allocation(), changed(method="lora"))
