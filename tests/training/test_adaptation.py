"""Adaptation: its gradients, that it recovers, resumes and converts, and how it fails."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from consa import Allocation, convert, load, rules
from consa.cli.commands import app
from consa.config import AdaptConfig, LearnConfig, RunConfig
from consa.data.sequences import load_sequences
from consa.errors import ConsaError
from consa.model import interface, loss
from consa.model.attach import attached
from consa.runs import summary as summary_file
from consa.runs.adaptation import run_adaptation
from consa.runs.learning import run_learning
from consa.training.adaptation import adapt
from consa.training.loop import METRICS
from consa.training.objective import Objective
from consa.training.weights import Weights
from tests.compare import Elements, assert_close
from tests.compiler import needs_compiler
from tests.models import exact, tiny, tokens
from tests.text import TEXT
from tests.training.adaptation_case import (
    METHODS,
    OBJECTIVES,
    QUICK,
    Interrupted,
    allocation,
    changed,
    interrupt_at,
    text,
)

ROOT = Path(__file__).parents[2]


# What it computes.


def plain_loss(model: PreTrainedModel, teacher: PreTrainedModel, config: AdaptConfig) -> torch.Tensor:
    """The first step's objective, all at once, with attention by the reference."""
    ids = torch.cat([batch.tokens for batch in Objective().batches(text(), config, 0)])
    with exact(model, allocation()):
        out = model(input_ids=ids, labels=ids, use_cache=False, output_hidden_states=True)
    with torch.no_grad():
        wanted = teacher(input_ids=ids, use_cache=False, output_hidden_states=True)
    q, p = (o.logits[:, :-1].log_softmax(-1) for o in (out, wanted))
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    h, t = (o.hidden_states[-1][:, :-1] for o in (out, wanted))
    distance = ((h - t).square().mean(-1) / t.square().mean(-1)).mean()
    return config.cross_entropy * out.loss + config.distillation * divergence + config.hidden_loss * distance


@pytest.mark.parametrize("objective", OBJECTIVES)
@pytest.mark.parametrize(
    "change",
    [
        pytest.param({}, id=""),
        pytest.param({"micro_batch": 2}, id="batch"),
        pytest.param({"gradient_checkpointing": True}, id="checkpointing"),
        pytest.param({"compile": True}, id="compile", marks=needs_compiler),
    ],
)
def test_first_update_is_that_of_the_formula(objective: str, change: Any, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 5)
    config = changed(**OBJECTIVES[objective], num_steps=1, warmup=0.0, **change)
    model = tiny()
    (record,) = adapt(model, text(), allocation(), config)
    other = tiny()
    value = plain_loss(other, tiny(), config)
    value.backward()
    norm = torch.nn.utils.clip_grad_norm_(other.parameters(), 1.0)
    assert record["loss"] == pytest.approx(value.item(), rel=1e-5)
    assert record["grad_norm"] == pytest.approx(norm.item(), rel=1e-4)
    # AdamW's first step is the sign of the gradient; where that is near zero, rounding decides.
    for (name, before), (_, gradient) in zip(
        tiny().named_parameters(), ((n, p.grad) for n, p in other.named_parameters()), strict=True
    ):
        moved = (model.get_parameter(name) - before).detach()
        sure = gradient.abs() > 1e-2 * gradient.abs().max()
        assert_close(moved[sure], -3e-3 * gradient.sign()[sure], 5e-3, name)


def test_bfloat16_trains_float32_masters():
    """Steps far below bfloat16's resolution add up, and the model ends with the rounded masters."""
    model, sequences = tiny().to(torch.bfloat16), text()[:2]
    config = changed(learning_rate=1e-4, num_steps=20, warmup=0.0)
    losses = [record["loss"] for record in adapt(model, sequences, allocation(), config)]
    reference = [record["loss"] for record in adapt(tiny(), sequences, allocation(), config)]
    assert losses[0] - losses[-1] == pytest.approx(reference[0] - reference[-1], rel=0.2)
    assert all(p.dtype == torch.bfloat16 and p.grad is None for p in model.parameters())
    assert all(not p._post_accumulate_grad_hooks for p in model.parameters())


def test_logits_of_neither_model_exist_at_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(loss, "CHUNK_TOKENS", 16)
    model = tiny(vocab_size=3001, num_hidden_layers=1)
    one = Allocation(full_attention=np.zeros((1, 3), dtype=bool), window=9)
    sequences = tokens(1, 257).numpy()
    config = changed(**OBJECTIVES["all"], num_steps=1, sequences_per_step=1, method="lora")
    with Elements() as seen:
        adapt(model, sequences, one, config)
    assert any(3001 in shape for shape in seen.shapes)
    assert seen.largest <= max(16 * 3001, 3001 * 48)  # a chunk's logits, or the output layer itself


def test_learning_rate_rises_and_falls():
    config = changed(num_steps=20, warmup=0.25, learning_rate=2.0)
    rates = [config.learning_rate_at(step) for step in range(20)]
    assert rates[:5] == pytest.approx([0.4, 0.8, 1.2, 1.6, 2.0]) and rates[5] == 2.0
    assert all(a > b > 0 for a, b in pairwise(rates[5:]))
    assert [changed(method=m, learning_rate=None, warmup=0.0).learning_rate_at(0) for m in METHODS] == [5e-4, 2e-4]


# What comes of it.


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("objective", ["cross_entropy", "distillation"])
def test_it_recovers(method: Any, objective: str):
    """The text comes from the dense model, which the hybrid without sinks is far from at first."""
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight *= 2
        torch.manual_seed(0)
        sequences = model.generate(torch.full((32, 1), 1), do_sample=True, max_new_tokens=31, top_k=0).numpy()
    sliding = rules.bottom(4, 3, sparsity=1.0, window=4, num_sink_tokens=0)
    config = changed(
        method=method, **OBJECTIVES[objective], num_steps=40, sequences_per_step=8, micro_batch=8, lora_rank=8
    )
    history = adapt(model, sequences, sliding, replace(config, learning_rate=1e-2))
    assert history[-1][objective] < 0.7 * history[0][objective]


@pytest.mark.parametrize("method", METHODS)
def test_it_leaves_nothing_but_weights(method: Any):
    model = tiny().train()
    before = {name: p.clone() for name, p in model.state_dict().items()}
    modes = {name: module.training for name, module in model.named_modules()}
    config = model.config.to_json_string()
    adapt(model, text(), allocation(), changed(method=method, gradient_checkpointing=True, distillation=1.0))
    after = model.state_dict()
    assert after.keys() == before.keys()
    trained = {name for name, value in after.items() if not torch.equal(value, before[name])}
    layers = {name for name in before if "_proj" in name}
    assert trained == (layers if method == "lora" else before.keys())
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.config.to_json_string() == config and model.config._attn_implementation == "sdpa"
    assert not torch.are_deterministic_algorithms_enabled() and not any(
        getattr(m, "gradient_checkpointing", False) for m in model.modules()
    )
    assert not model._hf_peft_config_loaded


def test_evaluation_sees_the_hybrid_and_joins_the_records():
    model, kept = tiny(), allocation()
    ids = torch.from_numpy(text().astype(np.int64))
    history = adapt(
        model,
        text(),
        kept,
        changed(method="lora"),
        evaluate=lambda hybrid: {"heldout": float(loss.token_losses(hybrid, ids).mean())},
    )
    assert [record["step"] for record in history if "heldout" in record] == [2, 4, 5]
    with attached(model, kept):  # merged
        assert history[-1]["heldout"] == pytest.approx(float(loss.token_losses(model, ids).mean()), rel=1e-5)


@pytest.mark.parametrize("layer_wise", [False, True])
@pytest.mark.parametrize("method", METHODS)
def test_it_converts(method: Any, layer_wise: bool, tmp_path: Path):
    kept = rules.interleaved(4, 3, sparsity=0.5, granularity="layer", window=5, num_sink_tokens=0)
    kept = kept if layer_wise else allocation()
    model = tiny()
    adapt(model, text(), kept, changed(method=method))
    written = convert(model, kept, tmp_path / "model", kind="plain" if layer_wise else "auto")
    assert written.kind == ("plain" if layer_wise else "hybrid")
    ids = tokens(2, 20)
    with exact(model, kept):
        wanted = model(ids, use_cache=False).logits
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model") if layer_wise else load(tmp_path / "model")
    assert_close(loaded(ids).logits, wanted, 1e-4)


# Killed and started again.


def end(folder: Path, config: AdaptConfig = QUICK, **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    model = tiny()
    history = adapt(model, text(), allocation(), config, run_dir=folder, **options)
    return history, model.state_dict()


@pytest.mark.parametrize("change", [{}, {"method": "lora", "distillation": 1.0}], ids=METHODS)
def test_goes_on_bit_for_bit(change: Any, tmp_path: Path):
    config = changed(**change, evaluate_every=1)
    evaluate = {"evaluate": lambda hybrid: {"heldout": float(next(hybrid.parameters()).detach().sum())}}
    wanted = end(tmp_path / "undisturbed", config, **evaluate)
    steps: list[float] = []
    for number in (1, 3, 5):
        folder = tmp_path / str(number)
        with pytest.raises(Interrupted):
            end(folder, config, on_step=interrupt_at(number), **evaluate)
        steps.clear()
        got = end(folder, config, on_step=lambda record: steps.append(record["step"]), **evaluate)
        assert steps[0] == (number - 1) // 2 * 2 + 1, "it must go on, not start over"
        for done in (got, end(folder, config, **evaluate)):  # and once finished, again
            assert done[0] == wanted[0]
            assert all(torch.equal(value, wanted[1][name]) for name, value in done[1].items())
        assert (folder / METRICS).read_bytes() == (tmp_path / "undisturbed" / METRICS).read_bytes()


def test_goes_on_though_a_weight_has_no_gradient(tmp_path: Path):
    """Hidden states are compared before the output layer."""
    config = changed(cross_entropy=0.0, hidden_loss=1.0, num_steps=4)
    with pytest.raises(Interrupted):
        end(tmp_path, config, on_step=interrupt_at(3))
    history, weights = end(tmp_path, config)
    assert history == adapt(tiny(), text(), allocation(), config)
    assert torch.equal(weights["lm_head.weight"], tiny().lm_head.weight)


def test_goes_on_after_sigkill(tmp_path: Path):
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom tests.training.test_adaptation import end\n"
        "kill = lambda record: record['step'] == 4 and os.kill(os.getpid(), signal.SIGKILL)\n"
        "end(Path(sys.argv[1]), on_step=kill)\n"
    )
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        env=os.environ | threads,
        timeout=120,
    )
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    steps: list[float] = []
    got = end(tmp_path, on_step=lambda record: steps.append(record["step"]))
    assert steps == [3, 4, 5]
    wanted = end(tmp_path / "undisturbed")
    assert got[0] == wanted[0]
    assert all(torch.equal(value, wanted[1][name]) for name, value in got[1].items())


@pytest.mark.parametrize(
    ("config", "kept", "difference"),
    [
        (changed(learning_rate=1e-3), allocation(), r"config.learning_rate was 0\.003, now 0\.001"),
        (changed(method="lora"), allocation(), "config.method was 'full', now 'lora'"),
        (QUICK, allocation(window=4), "allocation.window was 3, now 4"),
    ],
)
def test_a_checkpoint_of_another_run_is_refused(config: AdaptConfig, kept: Allocation, difference: str, tmp_path: Path):
    end(tmp_path, changed(checkpoint_every=1))
    with pytest.raises(ConsaError, match=difference):
        adapt(tiny(), text(), kept, config, run_dir=tmp_path)


# Runs.


@pytest.fixture(scope="module")
def where(tiny_model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunConfig]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONSA_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield RunConfig(model=str(tiny_model_folder), data=str(text_folder), num_heldout=3, device="cpu")


@pytest.mark.parametrize("method", METHODS)
def test_the_run_folder(method: Any, where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = changed(method=method, seq_len=96, num_steps=8)
    kept, folder = allocation(window=8), tmp_path / "run"
    summary = run_adaptation(where, kept, config, folder, command="consa adapt it")
    names = {
        ".lock",
        "allocation.json",
        "checkpoint.sealed",
        "config.json",
        "curves.png",
        "cells",
        "metrics.jsonl",
        "model",
    }
    names |= {"summary.json", "summary.md"} | ({"adapter"} if method == "lora" else set())
    assert {path.name for path in folder.iterdir()} == names
    assert Allocation.load(folder) == kept
    rows = {row["name"]: row for row in summary["rows"]}
    assert list(rows) == ["dense", "all_swa", "hybrid", "adapted"]
    assert rows["adapted"]["loss"] < rows["hybrid"]["loss"]
    last = json.loads((folder / "metrics.jsonl").read_text().splitlines()[-1])
    assert last["heldout_loss"] == pytest.approx(rows["adapted"]["loss"], rel=1e-5)
    assert last["recovered"] == pytest.approx(rows["adapted"]["recovered"], rel=1e-4)
    heldout = load_sequences(where.data, AutoTokenizer.from_pretrained(where.model), 96, split="heldout").spread(3)
    losses = loss.token_losses(load(folder / "model"), torch.from_numpy(heldout.tokens.astype(np.int64)))
    assert rows["adapted"]["loss"] == pytest.approx(float(losses[:, summary["start"] :].mean()), rel=1e-4)
    for said in ("consa adapt it", f"{rows['adapted']['loss']:.4f}", f"method {method}"):
        assert said in (folder / "summary.md").read_text()

    before = {path: path.read_bytes() for path in (folder / "model").iterdir()}
    monkeypatch.setattr(summary_file, "summarise", None)  # killed before the end
    (folder / "summary.json").unlink()
    with pytest.raises(TypeError):
        run_adaptation(where, kept, config, folder, command="consa adapt it")
    monkeypatch.undo()
    again = run_adaptation(where, kept, config, folder, command="consa adapt it")
    assert again | {"seconds": None} == summary | {"seconds": None}
    assert {path: path.read_bytes() for path in (folder / "model").iterdir()} == before
    with pytest.raises(ConsaError, match=r"a different run .allocation\.window was 8, now 9"):
        run_adaptation(where, allocation(window=9), config, folder, command="c")


def test_from_joint_learning_to_adaptation(where: RunConfig, tmp_path: Path):
    """The weights that joint learning ends with are in `model`, and adaptation starts from them."""
    learned = LearnConfig(mode="joint", weight_lr=1e-3, sparsity=0.5, window=8, seq_len=96, num_steps=2)
    summary = run_learning(where, replace(learned, refine_evaluations=0), tmp_path / "learn", command="c")
    kept = Allocation.load(tmp_path / "learn" / "allocation.json")
    hybrid = tmp_path / "learn" / "model"
    assert interface.allocation_of(load(hybrid).config) == replace(kept, scores=None, provenance={})
    config = changed(seq_len=96, num_steps=1, learning_rate=1e-6)
    adapted = run_adaptation(replace(where, model=str(hybrid)), kept, config, tmp_path / "adapt", command="c")
    rows, wanted = ({row["name"]: row["loss"] for row in s["rows"]} for s in (adapted, summary))
    assert rows["dense"] == pytest.approx(wanted["dense"], rel=1e-5)
    assert rows["hybrid"] == pytest.approx(wanted["learned"], rel=1e-5)


def test_the_command(where: RunConfig, tmp_path: Path):
    kept = allocation(window=8)
    kept.save(tmp_path / "allocation.json")
    common = ["adapt", where.model, "--data", where.data, "--device", "cpu", "--num-heldout", "2"]
    common += ["--allocation", str(tmp_path / "allocation.json"), "--out", str(tmp_path / "run")]
    common += ["--seq-len", "96", "--num-steps", "1", "--sequences-per-step", "1"]
    runner = CliRunner()
    done = runner.invoke(app, common)
    assert done.exit_code == 0, done.output
    assert "adapted" in done.stdout and str(tmp_path / "run" / "model") in done.stdout
    (tmp_path / "book.txt").write_text(TEXT * 40)
    longer = ["--data", str(tmp_path / "book.txt"), "--seq-len", "640", "--out", str(tmp_path / "retrieval")]
    done = runner.invoke(app, [*common, *longer, "--retrieval", "0.25"])
    assert done.exit_code == 0, done.output
    assert "share of retrieval 0.25" in (tmp_path / "retrieval" / "summary.md").read_text()
    for extra, message in ((["--method", "qlora"], "method must be one of"), (["--allocation", "x"], "x")):
        done = runner.invoke(app, [*common, *extra])
        assert done.exit_code == 2 and message in done.stderr


# Bad input.


def test_a_model_in_training_mode_follows_itself_without_dropout():
    model = tiny("phi3", resid_pdrop=0.5).train()
    config = changed(cross_entropy=0.0, distillation=1.0, num_steps=1)
    (record,) = adapt(model, text(), rules.bottom(4, 3, sparsity=0.0, window=3, num_sink_tokens=0), config)
    assert record["distillation"] < 1e-5 and all(module.training for module in model.modules())


def test_a_loss_that_is_not_finite_and_no_text():
    model = tiny()
    with torch.no_grad():
        model.lm_head.weight[0] = float("nan")
    with pytest.raises(ConsaError, match=r"the loss became nan at step 1; lower learning_rate"):
        adapt(model, text(), allocation(), QUICK)
    with pytest.raises(ConsaError, match="no training text"):
        adapt(tiny(), text()[:0], allocation(), QUICK)


def test_what_diverges_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    config = changed(num_steps=4, checkpoint_every=1)
    with pytest.raises(ConsaError, match="the heldout_loss became inf at step 4; the last good checkpoint"):
        adapt(tiny(), text(), allocation(), config, run_dir=tmp_path, evaluate=spoiled_at(2))
    update, norms = Weights.update, iter([0.5, float("nan")])

    def diverging(self: Weights, **settings: Any) -> float:
        update(self, **settings)
        return next(norms)

    with monkeypatch.context() as patch:
        patch.setattr(Weights, "update", diverging)
        with pytest.raises(ConsaError, match=r"the grad_norm became nan at step 2; .* lower learning_rate"):
            adapt(tiny(), text(), allocation(), config, run_dir=tmp_path / "b")
    steps: list[float] = []
    for folder, step in ((tmp_path, 4), (tmp_path / "b", 2)):
        adapt(tiny(), text(), allocation(), config, run_dir=folder, on_step=lambda r: steps.append(r["step"]))
        assert steps[0] == step and steps.pop() == 4
        steps.clear()


def spoiled_at(call: int) -> Any:
    """A measure that is infinite when it is called for the second time, say."""
    found = iter([*[1.0] * (call - 1), float("inf")])
    return lambda model: {"heldout_loss": next(found)}


def test_gradients_are_scaled_down_to_the_norm_asked_for(monkeypatch: pytest.MonkeyPatch):
    asked, update = [], Weights.update

    def seen(weights: Weights, *, max_norm: float, **options: Any) -> float:
        asked.append(max_norm)
        return update(weights, max_norm=max_norm, **options)

    monkeypatch.setattr(Weights, "update", seen)
    adapt(tiny(), text(), allocation(), changed(max_grad_norm=0.25, num_steps=2))
    assert asked == [0.25, 0.25]


def test_the_default_learning_rate_is_the_one_that_was_measured():
    assert AdaptConfig().for_size(135_000_000).learning_rate == AdaptConfig().for_size(10).learning_rate == 5e-4
    assert AdaptConfig().for_size(4 * 135_000_000).learning_rate == 2.5e-4
    assert AdaptConfig(method="lora").for_size(10**9).learning_rate == 2e-4
    assert AdaptConfig(learning_rate=0.1).for_size(10**9).learning_rate == 0.1
