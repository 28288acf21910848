from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AttentionInterface, AttentionMaskInterface, AutoTokenizer, PreTrainedModel
from typer.testing import CliRunner

from consa import Allocation, ConsaError, rules
from consa.attention import masks
from consa.behaviour import measure
from consa.behaviour.record import MEASURES, Behaviour
from consa.cli import commands as cli
from consa.config import RunConfig
from consa.model import interface, loss
from consa.runs import behaviour as behaviour_run
from tests.compare import Elements
from tests.models import SHAPE, exact, tiny, tokens
from tests.report.report_case import make_behaviour

LAYERS, HEADS = SHAPE["num_hidden_layers"], SHAPE["num_key_value_heads"]
WINDOW, SINKS, SEQ = 9, 3, 70


@contextmanager
def captured(model: PreTrainedModel, native: dict[int, int]) -> Iterator[dict[int, torch.Tensor]]:
    """Every layer's whole attention, (q_heads, S, S) in float64, as it is computed."""
    found: dict[int, torch.Tensor] = {}

    def attend(module: Any, q: Any, k: Any, v: Any, attention_mask: Any, *, scaling: float, softcap=None, **_: Any):
        scores = q[0].double() @ k[0].double().repeat_interleave(q.shape[1] // k.shape[1], 0).mT * scaling
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        place = torch.arange(q.shape[2])
        seen = masks.in_window(place[:, None], place, native.get(module.layer_idx, len(place)))
        found[module.layer_idx] = scores.masked_fill(~seen, float("-inf")).softmax(-1)
        out = found[module.layer_idx] @ v[0].double().repeat_interleave(q.shape[1] // k.shape[1], 0)
        return out[None].transpose(1, 2).to(q.dtype), None

    AttentionInterface.register("consa_test_capture", attend)
    AttentionMaskInterface.register("consa_test_capture", interface.consa_mask)
    before: Any = model.config._attn_implementation
    model.set_attn_implementation("consa_test_capture")
    try:
        yield found
    finally:
        model.set_attn_implementation(before)


def plainly(p: np.ndarray, text: np.ndarray) -> dict[str, float]:
    """The measures of one query head's whole attention, (S, S), query by query."""
    found: dict[str, list[float]] = {name: [] for name in MEASURES}
    for i, row in enumerate(p):
        distance = i - np.arange(len(row))
        found["sink_share"].append(row[:SINKS].sum())
        found["beyond_window_share"].append(row[SINKS:][distance[SINKS:] >= WINDOW].sum())
        found["mean_span"].append((row * distance)[: i + 1].sum())
        entropy = -sum(x * np.log(x) for x in row if x > 0)
        found["entropy"].append(entropy)
        found["effective_span"].append(np.exp(entropy))
        if i:
            found["previous_token"].append(row[i - 1])
        earlier = [j for j in range(i) if text[j] == text[i]]
        if earlier:
            found["copy"].append(sum(row[j] for j in earlier))
            found["induction"].append(sum(row[j + 1] for j in earlier))
    return {name: float(np.mean(values)) for name, values in found.items() if values}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma2", "phi3"])
@pytest.mark.parametrize("block", [1, 13, 1000])
def test_measures_agree_with_the_whole_matrix(family: str, block: int, monkeypatch: pytest.MonkeyPatch):
    model = tiny(family)
    text = tokens(2, SEQ, vocab_size=30).numpy()
    monkeypatch.setattr(measure, "MAX_BLOCK_SCORES", block * SHAPE["num_attention_heads"] * SEQ)
    found = measure.measure(model, text, window=WINDOW, num_sink_tokens=SINKS)
    native = measure.attention_layout(model).native_windows
    wanted: dict[str, list[Any]] = {}
    weights: dict[str, list[int]] = {}
    by_distance = np.zeros((LAYERS, HEADS, SEQ))
    for row in text:
        with captured(model, native) as whole, torch.no_grad():
            model(torch.from_numpy(row)[None], use_cache=False)
        heads = np.array([[plainly(p, row) for p in whole[layer].numpy()] for layer in range(LAYERS)])
        repeats = sum(row[i] in row[:i] for i in range(SEQ))  # queries that copy and induction count
        for name in heads[0, 0]:
            values = np.array([[head[name] for head in layer] for layer in heads])
            wanted.setdefault(name, []).append(values.reshape(LAYERS, HEADS, -1).mean(-1))
            weights.setdefault(name, []).append(repeats if name in ("copy", "induction") else 1)
        for layer in range(LAYERS):
            for distance in range(SEQ):
                diagonal = whole[layer].diagonal(-distance, 1, 2).sum(-1) / SEQ / len(text)
                by_distance[layer, :, distance] += diagonal.reshape(HEADS, -1).mean(-1).numpy()
    for name, values in wanted.items():
        plain = np.average(values, axis=0, weights=weights[name])
        np.testing.assert_allclose(found.measures[name], plain, rtol=1e-4, atol=1e-6, err_msg=name)
    edges = [0, 1, 2, 4, 8, 16, 32, 64, 70]
    plain = np.stack([by_distance[:, :, a:b].sum(-1) for a, b in pairwise(edges)], -1)
    np.testing.assert_allclose(found.by_distance, plain, rtol=1e-4, atol=1e-6)


def test_heads_that_do_one_thing_are_seen_to_do_it():
    """On the repeated random sequence, one head looks at the token before and others copy or induce, fully."""
    drawn = measure._repeated_sequence(61, 0)
    half = len(drawn) // 2
    assert len(set(drawn[: half + 1])) == half + 1 and (drawn[1 : half + 1] == drawn[half + 1 :]).all()
    dense = rules.bottom(1, 3, sparsity=0.0, window=4)
    means = measure._Means((1, 3))
    observer = measure._TextObserver(drawn, dense, means)
    attention = torch.full((3, len(drawn), len(drawn)), -1e9)
    for i in range(len(drawn)):
        for head, j in enumerate((i - 1, i - half, i - half + 1)):
            attention[head, i, max(0, j)] = 0
    p = attention.softmax(-1)
    observer._add(0, torch.arange(len(drawn)), p, torch.zeros(3, 1, len(drawn)))
    only = 1 / (len(drawn) - 1)  # what token 1 can look at but itself is token 0
    seen = means.means()
    assert seen["previous_token"][0] == pytest.approx([1, only, only])
    assert seen["copy"][0].round(3).tolist() == [0, 1, 0]
    assert seen["induction"][0].round(3).tolist() == [0, 0, 1]


def test_causal_effect_is_the_rise_of_the_loss():
    model = tiny("gemma2")
    text = tokens(2, 40).numpy()
    found = measure.measure(model, text, window=WINDOW, num_sink_tokens=SINKS, causal_sequences=1)
    native = measure.attention_layout(model).native_windows
    full = np.ones((LAYERS, HEADS), dtype=bool)
    full[list(native)] = False
    dense = Allocation(full_attention=full, window=WINDOW, num_sink_tokens=SINKS, native_windows=native)
    losses = {}
    for unit in [None, (1, 0), (3, 2)]:
        mask = full.copy()
        if unit:
            mask[unit] = False
        with exact(model, replace(dense, full_attention=mask)):
            losses[unit] = float(loss.token_losses(model, torch.from_numpy(text[:1]))[:, WINDOW:].mean())
        if unit:
            effect = found.measures["causal_effect"][unit]
            assert effect == pytest.approx(losses[unit] - losses[None], abs=1e-5) and effect != 0
    assert not found.measures["causal_effect"][list(native)].any()


def test_the_needle_is_where_the_answer_was_said(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(measure, "NEEDLE_TOKENS", 600)
    model, tokenizer = tiny(vocab_size=300), AutoTokenizer.from_pretrained(tiny_model_folder)
    needles = measure._needles(tokenizer, 600, seed=1)
    for text, queries, keys in needles:
        said, asked = tokenizer.decode(text[keys]), tokenizer.decode(text[queries + 1])
        assert said.strip() == asked.strip() and len(said.strip()) == 7 and said.strip().isdigit()
        assert keys.max() < queries.min() and queries.max() == len(text) - 2
    passes: list[int] = []
    found = measure.measure(
        model,
        tokens(1, 600).numpy(),
        window=WINDOW,
        tokenizer=tokenizer,
        seed=1,
        on_pass=lambda done, _: passes.append(done),
    )
    wanted = []
    for text, queries, keys in needles:
        with captured(model, {}) as whole, torch.no_grad():
            model(torch.from_numpy(text)[None], use_cache=False)
        values = [whole[layer][:, queries][:, :, keys].sum(-1).reshape(HEADS, -1).mean(-1) for layer in whole]
        wanted.append(torch.stack(values).numpy())
    counts = [len(queries) for _, queries, _ in needles]
    np.testing.assert_allclose(found.measures["needle"], np.average(wanted, axis=0, weights=counts), rtol=1e-4)
    assert passes == [*range(1, measure.num_passes(model, 1, needles=True, causal=False) + 1)]


def test_no_matrix_of_queries_by_keys_and_no_trace(monkeypatch: pytest.MonkeyPatch):
    model = tiny()
    before = {name: dict(vars(module)) for name, module in model.named_modules()}
    implementation, text = model.config._attn_implementation, tokens(1, 1024)
    wanted = model(text, use_cache=False).logits
    monkeypatch.setattr(measure, "MAX_BLOCK_SCORES", 2**16)
    monkeypatch.setattr(measure, "REPEATED_TOKENS", 8)
    with Elements() as made:
        measure.measure(model, text.numpy(), window=WINDOW)
    assert made.largest <= 2**17 < 1024**2
    assert {name: dict(vars(module)) for name, module in model.named_modules()} == before
    assert model.config._attn_implementation == implementation
    assert torch.equal(model(text, use_cache=False).logits, wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"window": 4, "text": tokens(1, 5000)}, "seq_len must be at most the 4096 positions of the model, got 5000"),
        ({"window": 50}, r"window must lie between 1 and the sequence length \(50\) - 1, got 50"),
        ({"window": 0}, "got 0"),
        ({"window": 4, "num_sink_tokens": -1}, "num_sink_tokens must be an integer >= 0, got -1"),
        ({"window": 4, "causal_sequences": 2}, r"causal_sequences must lie in 0\.\.1, got 2"),
    ],
)
def test_what_cannot_be_measured_is_refused(options: dict[str, Any], message: str):
    text = options.pop("text", tokens(1, 50))
    with pytest.raises(ConsaError, match=message):
        measure.measure(tiny(), text.numpy(), **options)


# The command.


def test_the_command_measures_beside_a_run(
    tiny_model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(measure, "NEEDLE_TOKENS", 500)
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "cache"))
    made_for = rules.top(LAYERS, HEADS, sparsity=0.5, granularity="kv_head", window=WINDOW, num_sink_tokens=SINKS)
    made_for.save(tmp_path / "run" / "allocation.json")
    command = ["behaviour", tiny_model_folder, "--data", text_folder, "--device", "cpu", "--run", tmp_path / "run"]
    command += ["--seq-len", "96", "--sequences", "2", "--causal-sequences", "1"]
    done = CliRunner().invoke(cli.app, [str(word) for word in command])
    assert done.exit_code == 0, done.output
    assert "AUC" in done.stdout and "causal_effect" in done.stdout
    found = Behaviour.load(tmp_path / "run" / "behaviour.safetensors")
    assert (found.window, found.num_sink_tokens) == (WINDOW, SINKS)
    assert found.measures.keys() == MEASURES.keys() and found.provenance["num_sequences"] == 2
    assert found.provenance["model"] == str(tiny_model_folder)


def test_text_with_fewer_sequences_than_asked_for_is_said(
    tiny_model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
):
    seen: list[Any] = []
    monkeypatch.setattr(
        behaviour_run, "measure", lambda model, tokens, **_: seen.append(tokens) or make_behaviour(4, 3)
    )
    where = RunConfig(model=str(tiny_model_folder), data=str(text_folder), device="cpu")
    settings = {"seq_len": 96, "window": WINDOW, "num_sink_tokens": SINKS, "seed": 0, "causal_sequences": 0}
    for number in (1, 10**6):
        behaviour_run.run_behaviour(where, tmp_path / "b.safetensors", num_sequences=number, **settings)
    few = "held-out sequences of 96 tokens; all of them are measured"
    assert capsys.readouterr().err.count(few) == 1 and 1 == len(seen[0]) < len(seen[1])


def test_the_command_wants_a_place_for_its_file():
    done = CliRunner().invoke(cli.app, ["behaviour", "no-model"])
    assert done.exit_code == 2 and "give --out FILE or --run FOLDER" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_8192_tokens_of_a_real_model_take_no_matrix():
    import resource

    from consa.model.load import load_model

    model = load_model("smollm2-135m").model
    text = torch.randint(0, 49152, (1, 8192), generator=torch.Generator().manual_seed(0)).numpy()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measure.measure(model, text, window=128)
    rise = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert rise < 2**20  # kB; one layer's scores would take 2.25 GiB


def test_needles_are_hidden_in_no_more_text_than_the_model_takes(monkeypatch: pytest.MonkeyPatch):
    asked: list[int] = []
    monkeypatch.setattr(measure, "_needles", lambda tokenizer, length, seed: asked.append(length) or [])
    given: Any = object()
    for longest in (100, 5000):
        model = tiny(max_position_embeddings=longest)
        measure.measure(model, tokens(1, 40).numpy(), window=4, tokenizer=given)
    assert asked == [100, measure.NEEDLE_TOKENS]
