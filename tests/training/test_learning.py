"""Learning: what it learns, that it is exact and repeatable, what it leaves behind, and how it fails."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel

from consa.attention.reference import reference_attention
from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.model.attach import attached
from consa.model.layout import attention_layout
from consa.model.plan import Plan
from consa.training import gates, learning, loop
from consa.training.lagrangian import AugmentedLagrangian
from consa.training.learning import learn, target_units, units_of
from consa.training.objective import Objective
from consa.training.refinement import _mean_loss
from consa.training.weights import Weights
from tests.compare import assert_close
from tests.compiler import needs_compiler
from tests.models import tiny
from tests.training.learning_case import QUICK, Interrupted, at_step, changed, interrupt, text

# What it learns.


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_keeps_full_attention_where_it_matters(granularity: Any):
    """Some heads write nothing, so full attention in them is worthless; the text comes from the model itself."""
    if granularity == "kv_head":
        matters = np.array([[1, 0, 0], [0, 1, 1], [1, 0, 1], [0, 1, 0]], dtype=bool)
    else:
        matters = np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0], [1, 1, 1]], dtype=bool)
    model = tiny()
    with torch.no_grad():
        for layer, row in zip(model.model.layers, matters, strict=True):
            layer.self_attn.o_proj.weight *= torch.from_numpy(row).repeat_interleave(2 * 8)
        model.lm_head.weight *= 2  # text that the model is sure of
        torch.manual_seed(0)
        sequences = model.generate(torch.full((64, 1), 1), do_sample=True, max_new_tokens=47, top_k=0).numpy()
    config = changed(
        sparsity=0.5, granularity=granularity, seq_len=48, num_steps=40, sequences_per_step=4, gate_lr=None
    )
    result = learn(model, sequences, replace(config, micro_batch=4))
    assert result.allocation.full_attention.tolist() == matters.tolist()
    assert result.history[-1]["expected_sparsity"] == pytest.approx(0.5, abs=0.05)
    assert [record["step"] for record in result.history] == list(range(1, 41))


def reference_gradient(model: PreTrainedModel, z: Tensor, ids: Tensor, config: LearnConfig) -> Tensor:
    """The model's own loss with every layer computed by the reference and mixed by `z`, differentiable in z."""

    def attend(module: Any, q: Tensor, k: Tensor, v: Tensor, _: Any, **asked: Any) -> tuple[Tensor, None]:
        options = {"window": config.window, "num_sink_tokens": config.num_sink_tokens, "scaling": asked["scaling"]}
        return reference_attention(q, k, v, z[module.layer_idx], **options).transpose(1, 2), None

    AttentionInterface.register("consa_test_gated", attend)
    AttentionMaskInterface.register("consa_test_gated", lambda *args, **kwargs: None)
    before = model.config._attn_implementation
    model.set_attn_implementation("consa_test_gated")
    try:
        return model(input_ids=ids, labels=ids, use_cache=False).loss
    finally:
        model.set_attn_implementation(before)


def fresh(model: PreTrainedModel, config: LearnConfig) -> Any:
    """The gates before the first step."""
    units = units_of(attention_layout(model), config.granularity)
    constraint = AugmentedLagrangian(config.penalty, config.multiplier_step)
    draws = gates.stratified_uniform
    return learning._Learning(model, text(), units, config.sparsity, config, Objective(), constraint, draws)


def gate_gradient(model: PreTrainedModel, config: LearnConfig) -> tuple[Tensor, float]:
    """What one step of learning leaves on log_alpha, before the constraint, and its loss."""
    state = fresh(model, config)
    with state.attached(model, learning._dense_start(attention_layout(model), config)):
        value = state.accumulate(0)["loss"]
    assert state.log_alpha.grad is not None
    return state.log_alpha.grad, value


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_gradient_of_a_step_is_that_of_the_formula(granularity: Any):
    model = tiny()
    config = changed(granularity=granularity, sequences_per_step=4, initial_log_alpha=0.3)
    got, value = gate_gradient(model, config)
    units = units_of(attention_layout(model), granularity)
    log_alpha = fresh(model, config).log_alpha
    uniform = gates.stratified_uniform(4, units.count, loop.generator(config.seed, "noise 0"))
    z = gates.sample(log_alpha, uniform).unflatten(1, (4, -1)).expand(-1, -1, 3).transpose(0, 1)
    ids = torch.cat([batch.tokens for batch in Objective().batches(text(), config, 0)])
    wanted = reference_gradient(model, z, ids, config)
    wanted.backward()
    assert log_alpha.grad is not None
    assert_close(got, log_alpha.grad, 2e-5)
    assert value == pytest.approx(float(wanted.detach()), rel=1e-5)


@pytest.mark.parametrize(
    "change",
    [
        {"micro_batch": 2},
        {"micro_batch": 4},
        {"gradient_checkpointing": True},
        {"mode": "joint"},
        pytest.param({"compile": True}, marks=needs_compiler),
    ],
    ids=str,
)
def test_gradient_does_not_depend_on_how_it_is_computed(change: dict[str, Any]):
    config = changed(sequences_per_step=4, initial_log_alpha=0.3)
    wanted, value = gate_gradient(tiny(), config)
    model = tiny()
    got, found = gate_gradient(model, replace(config, **change))
    assert_close(got, wanted, 2e-5)
    assert found == pytest.approx(value, rel=1e-6)


def test_layers_are_compiled_within_a_run_only(monkeypatch: pytest.MonkeyPatch):
    """Else the test above would compare a run with itself."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    model, graphs = tiny(), torch._dynamo.utils.counters["stats"]
    hooked = model.model.layers[0]
    hooked.forward = kept = partial(hooked.forward)  # as hooks replace it
    torch._dynamo.reset()
    before = graphs["unique_graphs"]
    learn(model, text(), changed(compile=True, num_steps=2, refine_evaluations=1))
    assert graphs["unique_graphs"] > before
    assert [layer.__dict__.get("forward") for layer in model.model.layers] == [kept, None, None, None]


def test_layers_share_their_graphs(monkeypatch: pytest.MonkeyPatch):
    """More layers need no more of them: what differs, the attention, is left out."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    found = []
    for count in (2, 4):  # few enough that the compiler would not give up
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        learn(tiny(num_hidden_layers=count), text(), changed(compile=True, num_steps=2))
        found.append(torch._dynamo.utils.counters["stats"]["unique_graphs"])
    assert 0 < found[1] <= found[0]


def test_layers_that_do_not_compile_are_one_line(monkeypatch: pytest.MonkeyPatch):
    def backend(*_: Any) -> None:
        raise RuntimeError("no compiler\nat all")

    torch._dynamo.reset()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))
    with pytest.raises(ConsaError, match=r"^layers cannot be compiled: no compiler; leave compile out") as caught:
        learn(tiny(), text(), changed(compile=True))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("config", [LearnConfig, AdaptConfig])
def test_what_is_recomputed_is_not_compiled(config: Any):
    with pytest.raises(ConsaError, match=r"compile must be off with gradient_checkpointing.*; got True"):
        config(compile=True, gradient_checkpointing=True)


def test_gradient_checkpointing_recomputes(monkeypatch: pytest.MonkeyPatch):
    """Else the test above would compare a run with itself."""
    calls = 0
    attend = Plan.attend

    def counted(*args: Any) -> Tensor:
        nonlocal calls
        calls += 1
        return attend(*args)

    monkeypatch.setattr(Plan, "attend", counted)
    counts = []
    for on in (False, True):
        calls = 0
        gate_gradient(tiny(), changed(gradient_checkpointing=on, initial_log_alpha=0.3))
        counts.append(calls)
    assert counts == [8, 16]  # 4 layers x 2 sequences


@pytest.mark.parametrize("micro_batch", [2, 4])
def test_gradient_accumulation_gives_the_same_log_alpha(micro_batch: int):
    config = changed(sequences_per_step=4)
    wanted = learn(tiny(), text(), config).allocation.scores
    got = learn(tiny(), text(), replace(config, micro_batch=micro_batch)).allocation.scores
    assert got is not None and wanted is not None
    assert np.abs(got - wanted).max() <= 1e-5
    assert np.abs(learn(tiny(), text(), replace(config, seed=1)).allocation.scores - wanted).max() > 1e-3


# Exact at the target, and the same each time.


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize("sparsity", [0.1, 0.37, 0.5, 0.75, 0.95])
def test_exact_number_of_units(sparsity: float, granularity: Any):
    config = changed(sparsity=sparsity, granularity=granularity, num_steps=2)
    allocation = learn(tiny(), text(), config).allocation
    num_units = 12 if granularity == "kv_head" else 4
    best = min(range(num_units + 1), key=lambda full: (abs(1 - full / num_units - sparsity), full))
    assert int(allocation.full_attention.sum()) * num_units // 12 == best
    assert allocation.sparsity == (num_units - best) / num_units
    assert allocation.provenance["target_sparsity"] == pytest.approx(allocation.sparsity)
    assert (allocation.granularity, allocation.window, allocation.num_sink_tokens) == (granularity, 3, 1)
    scores = allocation.scores
    assert scores is not None
    open_, closed = scores[allocation.full_attention], scores[~allocation.full_attention]
    assert not len(open_) or not len(closed) or open_.min() >= closed.max()
    assert granularity == "kv_head" or (scores == scores[:, :1]).all()


def test_ties_go_to_the_lower_layer_and_head():
    allocation = fresh(tiny(), QUICK).decide(5, attention_layout(tiny()), {})
    assert np.flatnonzero(allocation.full_attention).tolist() == [0, 1, 2, 3, 4]


def test_the_decision_averages_the_last_steps():
    seen: list[Tensor] = []
    config = changed(num_steps=10, averaged=0.3)

    class Watching(AugmentedLagrangian):
        def update(self, log_alpha: Tensor, target: float, growth: float = 1.0) -> float:
            seen.append(log_alpha.detach().double().clone())
            return super().update(log_alpha, target, growth)

    constraint = Watching(config.penalty, config.multiplier_step)
    allocation = learn(tiny(), text(), config, constraint=constraint).allocation
    assert allocation.scores is not None
    assert np.allclose(allocation.scores.flatten(), torch.stack(seen[-3:]).mean(0), atol=1e-12)


def test_the_same_seed_gives_the_same_and_another_another():
    first, again = (learn(tiny(), text(), QUICK) for _ in range(2))
    assert first.allocation.to_json() == again.allocation.to_json() and first.history == again.history
    torch.manual_seed(99)  # whatever else goes on in the process
    np.random.seed(99)
    assert learn(tiny(), text(), QUICK).history == first.history
    other = learn(tiny(), text(), changed(seed=1))
    assert other.history[0]["loss"] != first.history[0]["loss"]
    assert not np.array_equal(other.allocation.scores, first.allocation.scores)


def test_noise_differs_between_steps():
    one_text = text()[:1].repeat(2, 0)
    history = learn(tiny(), one_text, changed(gate_lr=1e-9, initial_log_alpha=0.0)).history
    assert len({record["loss"] for record in history}) == len(history)


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize(("sparsity", "full"), [(0.0, True), (1.0, False), (0.01, True), (0.99, False)])
def test_nothing_to_choose_returns_at_once(sparsity: float, full: bool, granularity: Any):
    steps: list[Any] = []
    config = changed(sparsity=sparsity, granularity=granularity, refine_evaluations=5)
    result = learn(tiny(), text(), config, on_step=steps.append)
    assert not steps and not result.history
    assert (result.allocation.full_attention == full).all()


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_a_budget_buys_the_most_units_it_can(family: str, granularity: Any):
    model = tiny(family)
    layout = attention_layout(model)
    context, per_unit = 500, 1 if granularity == "kv_head" else 3
    decided = [layer for layer in range(4) if layer not in layout.native_windows]
    places = [(layer, head) for layer in decided for head in range(3)]

    def cost(num_units: int) -> int:
        """bf16 keys and values of every head, one by one."""
        full = set(places[: num_units * per_unit])
        held = 0
        for layer in range(4):
            for head in range(3):
                native = layout.native_windows.get(layer)
                held += min(context, native) if native else context if (layer, head) in full else min(context, 3 + 1)
        return held * 8 * 2 * 2

    costs = [cost(n) for n in range(len(places) // per_unit + 1)]
    for budget in {*costs[:-1], *(c + 1 for c in costs[:-1]), *(c - 1 for c in costs[1:])}:
        config = changed(kv_budget=budget, context=context, granularity=granularity, num_steps=1)
        best = max(n for n, c in enumerate(costs) if c <= budget)
        assert target_units(layout, config) == best
    config = changed(kv_budget=costs[1] + 7, context=context, granularity=granularity, num_steps=1)
    allocation = learn(model, text(), config).allocation
    assert allocation.full_attention.sum() == per_unit
    assert allocation.kv_cache_bytes(context, head_dim=8) == costs[1] <= config.kv_budget
    with pytest.raises(ConsaError, match=f"KV budget of {costs[0] - 1} bytes is too small"):
        learn(model, text(), replace(config, kv_budget=costs[0] - 1))
    with pytest.raises(ConsaError, match="holds the dense model's cache"):
        learn(model, text(), replace(config, kv_budget=costs[-1]))


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_layers_that_the_model_slides_itself_get_no_units(granularity: Any):
    model = tiny("gemma3_text")
    config = changed(granularity=granularity, sparsity=0.5, refine_evaluations=12, refine_sequences=2)
    allocation = learn(model, text(), config).allocation
    assert allocation.native_windows == {0: 5, 2: 5}
    assert not allocation.full_attention[[0, 2]].any()
    assert allocation.full_attention.sum() == 3 and allocation.sparsity == 0.5
    with attached(model, allocation):
        pass


def test_refinement_is_part_of_learning_and_does_not_lose():
    config = changed(num_steps=2, refine_evaluations=15, refine_sequences=3)
    rough = learn(tiny(), text(), replace(config, refine_evaluations=0)).allocation
    exchanges: list[Any] = []
    fine = learn(tiny(), text(), config, on_exchange=exchanges.append).allocation
    assert exchanges and fine.sparsity == rough.sparsity
    chosen = Objective().drawn(text(), config.seed, range(4, 7))
    assert _mean_loss(tiny(), fine, chosen, 1) <= _mean_loss(tiny(), rough, chosen, 1)


# It leaves the model as it was, or trains it.


@pytest.mark.parametrize("checkpointing", [False, True])
def test_frozen_mode_leaves_the_model_as_it_was(checkpointing: bool):
    model = tiny()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    frozen = {name for name, _ in model.named_parameters() if "mlp" in name}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    model.train()
    modes = {name: module.training for name, module in model.named_modules()}
    config = model.config.to_json_string()
    learn(model, text(), changed(gradient_checkpointing=checkpointing, refine_evaluations=3))
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    assert {name for name, p in model.named_parameters() if not p.requires_grad} == frozen
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(p.grad is None for p in model.parameters())
    assert model.config.to_json_string() == config and model.config._attn_implementation == "sdpa"
    assert not torch.are_deterministic_algorithms_enabled()
    assert not any(getattr(m, "gradient_checkpointing", False) for m in model.modules())


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_failure_leaves_the_model_as_it_was(checkpointing: bool):
    model = tiny().train()
    modes = {name: module.training for name, module in model.named_modules()}
    with pytest.raises(Interrupted):
        learn(model, text(), changed(gradient_checkpointing=checkpointing), on_step=at_step(2, interrupt))
    assert all(p.requires_grad for p in model.parameters())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert model.config._attn_implementation == "sdpa"
    assert not torch.are_deterministic_algorithms_enabled() and not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )


def test_joint_mode_trains_every_weight_and_lowers_the_loss():
    model = tiny()
    before = {name: p.clone() for name, p in model.named_parameters()}
    result = learn(model, text(), changed(mode="joint", weight_lr=3e-3, num_steps=20))
    for name, p in model.named_parameters():
        assert not torch.equal(p, before[name]), name
    assert result.history[-1]["loss"] < result.history[0]["loss"] - 0.5
    assert all(p.grad is None for p in model.parameters())


@pytest.mark.parametrize("sparsity", [0.0, 0.99])
def test_joint_mode_with_nothing_to_choose_is_refused(sparsity: float):
    with pytest.raises(ConsaError, match=r"mode must be frozen where .* none is to be chosen; .* use adapt"):
        learn(tiny(), text(), changed(mode="joint", sparsity=sparsity))


def test_a_model_in_training_mode_is_learned_and_refined_without_dropout():
    model, config = tiny("phi3", resid_pdrop=0.5), changed(refine_evaluations=12)
    results, exchanges = [], ([], [])
    for training, seen in zip((False, True), exchanges, strict=True):
        results.append(learn(model.train(training), text(), config, on_exchange=seen.append).history)
        assert all(module.training == training for module in model.modules())
    assert results[0] == results[1] and exchanges[0] == exchanges[1] != []


# What goes wrong on the way.


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_and_keeps_the_checkpoint(value: float, tmp_path: Path):
    model = tiny()
    weight = model.lm_head.weight
    good = weight.detach().clone()

    def poison() -> None:
        with torch.no_grad():
            weight[:] = value

    with pytest.raises(ConsaError, match=r"the loss became (nan|inf) at step 4;") as caught:
        learn(model, text(), QUICK, run_dir=tmp_path, on_step=at_step(3, poison))
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    with torch.no_grad():
        weight.copy_(good)
    steps: list[float] = []
    result = learn(model, text(), QUICK, run_dir=tmp_path, on_step=lambda record: steps.append(record["step"]))
    assert steps == [4, 5, 6]
    assert result.history == learn(tiny(), text(), QUICK).history


@pytest.mark.parametrize("mode", ["frozen", "joint"])
@pytest.mark.parametrize("setting", ["open", "closed", "either"])
def test_a_step_with_every_gate_saturated_does_not_crash(setting: str, mode: Any, monkeypatch: pytest.MonkeyPatch):
    sample = gates.sample

    def saturated(log_alpha: Tensor, uniform: Tensor) -> Tensor:
        z = sample(log_alpha, uniform)
        half = {"open": -1.0, "closed": 2.0, "either": 0.5}[setting]
        return (z > half).float() + 0 * z  # a graph, and no gradient

    monkeypatch.setattr(gates, "sample", saturated)
    result = learn(tiny(), text(), changed(mode=mode, num_steps=20, gate_lr=None))
    assert result.history[-1]["expected_sparsity"] == pytest.approx(0.5, abs=0.1), "the constraint still pulls"
    assert result.allocation.sparsity == 0.5


def test_gradients_of_weights_are_clipped_in_joint_mode(monkeypatch: pytest.MonkeyPatch):
    asked, update = [], Weights.update

    def seen(weights: Weights, *, max_norm: float, **options: Any) -> float:
        asked.append(max_norm)
        return update(weights, max_norm=max_norm, **options)

    monkeypatch.setattr(Weights, "update", seen)
    learn(tiny(), text(), changed(mode="joint", num_steps=2))
    assert asked == [1.0, 1.0]


def test_the_multiplier_grows_faster_from_the_warm_ups_end_on():
    config, multiplier = changed(num_steps=10, warmup=0.4), 0.0
    for record in learn(tiny(), text(), config).history:
        growth = config.penalty_growth ** max(0.0, (record["step"] / 10 - 0.4) / 0.6)
        multiplier += growth * config.multiplier_step * (record["target"] - record["expected_sparsity"])
        assert record["multiplier"] == pytest.approx(multiplier, rel=1e-9)


def test_sharpening_begins_where_it_is_told():
    without, with_it = (
        learn(tiny(), text(), changed(num_steps=10, sharpening=most, sharpening_start=0.5)).history
        for most in (0.0, 30.0)
    )
    assert without[:5] == with_it[:5]
    assert without[5]["expected_sparsity"] != with_it[5]["expected_sparsity"]


def test_gates_stay_within_their_bounds():
    config = changed(sparsity=0.9, num_steps=12, gate_lr=3.0, log_alpha_min=-1.5, log_alpha_max=2.5)
    scores = learn(tiny(), text(), config).allocation.scores
    assert scores is not None and scores.min() == -1.5 and scores.max() <= 2.5


def test_the_record_says_how_long_the_sequences_were():
    allocation = learn(tiny(), text(), changed(seq_len=8192, num_steps=1)).allocation
    assert allocation.provenance["config"]["seq_len"] == 16
