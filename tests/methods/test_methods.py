"""Methods choose exactly as many units as asked for, find what is known to matter, and leave the model as it was."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import asdict, fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import get_cosine_schedule_with_warmup

from consa import ConsaError
from consa.allocation import num_full_units
from consa.attention import masks
from consa.config import ChoiceConfig
from consa.data.tsv import read_tsv
from consa.methods import METHODS, Method
from consa.methods.choice import choose, method_named
from consa.methods.problem import Problem, Text
from consa.methods.searching import apportion, buckets_of
from consa.methods.training import DuoAttention, PruLong
from consa.model import loss
from consa.model.attach import attached
from consa.model.layout import attention_layout
from consa.model.load import LoadedModel, load_model
from consa.training import refinement
from consa.training.retrieval import Retrieval
from tests.models import allocate, exact, tiny

LENGTH = 600  # tokens; a question with a byte for a token does not fit into fewer
ASKED: dict[str, Any] = {"window": 6, "num_sink_tokens": 1}
SMALL: dict[str, Any] = {"num_steps": 3, "sequences_per_step": 2, "evaluations": 18, "evaluation_sequences": 2}
SMALL |= {"num_lengths": 1, "per_length": 2}  # making questions takes most of the time, and all lengths are the same
ASKING = ("duo_attention", "nll_guided", "retrieval_score")


def small(name: str, **settings: Any) -> Method:
    return method_named(name, **SMALL | settings)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return load_model(str(tiny_model_folder)).tokenizer


def loaded_from(model: Any, tokenizer: Any) -> LoadedModel:
    return LoadedModel(model, tokenizer, attention_layout(model), {"model": "tiny", "revision": "0"})


def text_of(model: Any, number: int, length: int, seed: int = 0) -> np.ndarray:
    """Text that a model wrote itself, so that to change the model is to raise the loss."""
    torch.manual_seed(seed)
    prompt = torch.full((number, 1), 1)
    return model.generate(prompt, do_sample=True, max_new_tokens=length - 1, top_k=0).numpy()


def state_of(model: Any) -> dict[str, Any]:
    """All that a method could leave behind on a model."""
    return {
        "weights": {name: value.clone() for name, value in model.state_dict().items()},
        "wanted": [(parameter.requires_grad, parameter.grad) for parameter in model.parameters()],
        "training": [module.training for module in model.modules()],
        "names": [sorted(vars(module)) for module in model.modules()],
        "attention": model.config._attn_implementation,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
    }


@pytest.mark.parametrize(("family", "granularity"), [("llama", "kv_head"), ("gemma2", "layer")])
@pytest.mark.parametrize("name", METHODS)
def test_every_method_meets_the_target_twice_alike_and_leaves_no_trace(
    name: str, family: str, granularity: Any, tokenizer: Any
):
    model = tiny(family, vocab_size=len(tokenizer))
    loaded = loaded_from(model, tokenizer)
    length = LENGTH if name in ASKING else 90
    sequences = np.random.default_rng(0).integers(2, len(tokenizer), (3, length)).astype(np.uint16)
    config = ChoiceConfig(sparsity=0.6, granularity=granularity, seed=1, **ASKED)
    before = state_of(model)
    method = small(name)
    method.check(loaded.layout, config)
    allocation = method.choose(Problem(loaded, sequences, config))
    after = state_of(model)
    assert all(torch.equal(after["weights"][key], value) for key, value in before.pop("weights").items())
    assert {key: after[key] for key in before} == before
    layers = [layer for layer in range(4) if layer not in loaded.layout.native_windows]
    per_unit = 3 if granularity == "layer" else 1
    num_units = len(layers) * 3 // per_unit
    assert allocation.full_attention.shape == (4, 3)
    assert allocation.full_attention.sum() == num_full_units(num_units, 0.6) * per_unit
    assert (allocation.granularity, allocation.window, allocation.num_sink_tokens) == (granularity, 6, 1)
    assert allocation.native_windows == loaded.layout.native_windows
    assert allocation.scores is not None
    assert allocation.provenance["method"] == name and allocation.provenance["model"] == "tiny"
    assert asdict(method).items() <= allocation.provenance["settings"].items()
    assert allocation.provenance["config"]["seed"] == 1
    if num_units == 12 or name not in ("consa", "greedy"):  # refining 2 units takes fewer than it may
        forward, backward = expected_cost(name, num_units, length, Problem(loaded, sequences, config))
        spent = {"forward_tokens": forward, "backward_tokens": backward}
        assert allocation.provenance["cost"] == spent
    assert method.choose(Problem(loaded, sequences, config)).to_json() == allocation.to_json()


def expected_cost(name: str, num_units: int, length: int, problem: Problem) -> tuple[int, int]:
    """Tokens forward and backward of 3 steps of 2 sequences, evaluations of 2, and a budget of 18."""
    if name in ASKING:
        asked = sum(len(text.tokens) for text in problem.questions(2))
        return {
            "duo_attention": (2 * 3 * asked, 3 * asked),
            "nll_guided": ((num_units + 1) * asked, 0),
            "retrieval_score": (asked, 0),
        }[name]
    steps, evaluation = 3 * 2 * length, 2 * length
    return {
        "consa": (steps + 40 * evaluation, steps),  # what refinement takes at its defaults
        "prulong": (steps, steps),
        "nested": (steps, steps),
        "bosch": (18 * evaluation, 0),
        "greedy": (18 * evaluation, 0),
    }.get(name, (evaluation, 0))


PLANTED = {  # KV heads whose output reaches the residual stream
    "kv_head": np.array([[0, 0, 0], [0, 1, 0], [1, 0, 0]], dtype=bool),
    "layer": np.array([[0, 0, 0], [1, 1, 1], [0, 0, 0]], dtype=bool),
}


@pytest.mark.parametrize("granularity", PLANTED)
@pytest.mark.parametrize("name", ["consa", "nested", "prulong", "duo_attention", "bosch", "greedy", "nll_guided"])
def test_methods_that_measure_effects_find_the_units_that_have_any(
    name: str, granularity: Any, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    model = tiny(num_hidden_layers=3)
    with torch.no_grad():
        for layer, kept in zip(model.model.layers, PLANTED[granularity], strict=True):
            layer.self_attn.o_proj.weight *= 2 * torch.tensor(kept).float().repeat_interleave(2 * 8)
    sequences = text_of(model, 8, 40)
    monkeypatch.setattr(
        Problem,
        "questions",
        lambda problem, number, length=None: [Text(tokens, 20) for tokens in problem.sequences[:number]],
    )
    noisy = (name, granularity) == ("prulong", "kv_head")  # its penalty is on the gates drawn
    settings = {"evaluations": 80, "evaluation_sequences": 4, "num_steps": 120 if noisy else 60}
    asked = ASKED | {"window": 3, "granularity": granularity}
    config = ChoiceConfig(sparsity=1 - PLANTED[granularity].mean(), **asked)
    problem = Problem(loaded_from(model, tokenizer), sequences, config)
    allocation = small(name, **settings).choose(problem)
    assert np.array_equal(allocation.full_attention, PLANTED[granularity])


@pytest.mark.parametrize("family", ["llama", "gemma2"])
@pytest.mark.parametrize("name", ["attention_mass", "lazy_layers", "retrieval_score"])
def test_measures_agree_with_whole_attention_matrices(name: str, family: str, tokenizer: Any):
    model = tiny(family, vocab_size=len(tokenizer))
    loaded = loaded_from(model, tokenizer)
    sequences = np.random.default_rng(3).integers(2, len(tokenizer), (2, LENGTH))
    problem = Problem(loaded, sequences, ChoiceConfig(**ASKED | {"window": 40}))
    found: Any = small(name).choose(problem).scores
    asking = name == "retrieval_score"
    texts = problem.questions(2) if asking else [Text(s) for s in sequences]
    model.set_attn_implementation("eager")
    per_head = torch.zeros(4, 6, dtype=torch.float64)
    for text in texts:
        tokens = torch.tensor(text.tokens)
        with torch.no_grad():
            attentions = model(tokens[None], output_attentions=True, use_cache=False).attentions
        weights = torch.stack([layer[0] for layer in attentions])  # (layers, q_heads, queries, keys)
        place = torch.arange(len(tokens))
        hidden = ~masks.sliding(place[:, None], place, 40, 1)
        if asking:
            best = weights[:, :, text.start - 1 : -1].argmax(-1)
            value = ((tokens[best] == tokens[text.start :]) & (best < text.start)).double()
        else:
            value = (weights * hidden).sum(-1)[:, :, -64 if name == "lazy_layers" else 0 :].double()
        per_head += value.mean(-1) / len(texts)
    wanted = per_head.unflatten(1, (3, 2)).amax(-1).numpy()
    wanted[list(loaded.layout.native_windows)] = 0
    assert wanted.max() > 0
    np.testing.assert_allclose(found, wanted, atol=1e-4)


def test_the_loss_of_a_problem_is_that_of_its_answers_under_the_allocation(tokenizer: Any):
    model = tiny()
    sequences = np.random.default_rng(0).integers(2, 61, (3, 50))
    problem = Problem(loaded_from(model, tokenizer), sequences, ChoiceConfig(**ASKED))
    full = allocate(model).full_attention.flatten()
    texts = [Text(sequences[0], 1), Text(sequences[1][:40], 30), Text(sequences[2], 44)]
    losses = []
    with torch.no_grad(), exact(model, problem.allocation(full)):
        for text in texts:
            tokens = torch.tensor(text.tokens)
            logits = model(tokens[None], use_cache=False).logits[0]
            losses += torch.nn.functional.cross_entropy(logits[:-1], tokens[1:], reduction="none")[
                text.start - 1 :
            ].tolist()
    assert problem.loss(full, texts) == pytest.approx(np.mean(losses), rel=1e-5)
    assert (problem.forward_tokens, problem.backward_tokens) == (140, 0)
    problem.config = replace(problem.config, micro_batch=2)
    texts = [texts[0], texts[2], texts[1]]
    assert [len(batch) for batch in problem.batches(texts)] == [2, 1]
    assert problem.loss(full, texts) == pytest.approx(np.mean(losses), rel=1e-5)


def test_a_sample_with_retrieval_weighs_as_learning_does(tokenizer: Any):
    model = tiny(vocab_size=300)
    sequences = np.random.default_rng(0).integers(2, 250, (3, 700)).astype(np.uint16)
    problem = Problem(loaded_from(model, tokenizer), sequences, ChoiceConfig(seed=1, **ASKED))
    assert [text.tokens.tolist() for text in problem.sample(2)] == [
        text.tokens.tolist() for text, _ in zip(problem.stream(), range(2), strict=False)
    ]
    texts, wanted = problem.sample(2, 0.5), Retrieval(0.5, tokenizer).drawn(sequences, 1, range(2))
    together = problem.together(texts)
    assert torch.equal(together.tokens, wanted.tokens) and torch.equal(together.weights, wanted.weights)
    full = allocate(model).full_attention.flatten()
    with attached(model, problem.allocation(full)):
        losses = loss.token_losses(model, wanted.tokens)
    assert problem.loss(full, texts) == pytest.approx(float((losses * wanted.weights).mean()), rel=1e-5)


@pytest.mark.parametrize("name", ["bosch", "greedy"])
def test_searches_judge_by_answers_all_along(name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    judged: list[Any] = []
    text_loss, batch_loss = Problem.loss, refinement._mean_loss
    monkeypatch.setattr(Problem, "loss", lambda *of: judged.append(of[2][0].weights) or text_loss(*of))
    monkeypatch.setattr(refinement, "_mean_loss", lambda *of: judged.append(of[2].weights[0]) or batch_loss(*of))
    sequences = np.random.default_rng(0).integers(2, 250, (3, 700)).astype(np.uint16)
    small(name, retrieval=1.0).choose(
        Problem(loaded_from(tiny(vocab_size=300), tokenizer), sequences, ChoiceConfig(**ASKED))
    )
    assert len(judged) == 18 and all(0 < int((weights > 0).sum()) < 60 for weights in judged)


def test_questions_end_with_their_answers(tokenizer: Any):
    problem = Problem(loaded_from(tiny(), tokenizer), np.zeros((1, LENGTH), int), ChoiceConfig(**ASKED))
    for text in problem.questions(3):
        assert len(text.tokens) <= LENGTH
        numbers = tokenizer.decode(text.tokens[text.start :]).split(", ")
        assert len(numbers) > 1
        prompt = tokenizer.decode(text.tokens[: text.start])
        assert all(prompt.count(number.strip()) == 1 for number in numbers)


def test_nested_learns_too_if_the_largest_sparsity_leaves_nothing_to_choose(tokenizer: Any):
    loaded = loaded_from(tiny(), tokenizer)
    sequences = text_of(loaded.model, 4, 40)
    found = choose(small("nested"), loaded, sequences, ChoiceConfig(**ASKED), [0.5, 1.0])
    assert all(allocation.provenance["cost"]["backward_tokens"] for allocation in found.values())
    assert found[1.0].sparsity == 1.0 and np.ptp(found[0.5].scores) > 0


@pytest.mark.parametrize("granularity", ["layer", "kv_head"])
def test_nested_allocations_are_nested_and_exact_after_one_run(granularity: Any, tokenizer: Any):
    model = tiny()
    loaded = loaded_from(model, tokenizer)
    config = ChoiceConfig(granularity=granularity, **ASKED)
    method = small("nested", num_steps=12)
    found = choose(method, loaded, text_of(model, 4, 40), config, [0.25, 0.5, 0.75])
    last = np.ones((4, 3), dtype=bool)
    for sparsity, allocation in found.items():
        assert allocation.sparsity == sparsity == allocation.provenance["target_sparsity"]
        assert allocation.granularity == granularity
        assert (allocation.full_attention <= last).all()
        last = allocation.full_attention
        assert allocation.provenance["cost"] == {"forward_tokens": 12 * 2 * 40, "backward_tokens": 12 * 2 * 40}
    assert len({str(allocation.scores) for allocation in found.values()}) == 1


@pytest.mark.parametrize("name", ["prulong", "bosch", "greedy", "consa"])
def test_sequences_computed_at_once_change_nothing_but_rounding(name: str, tokenizer: Any):
    loaded = loaded_from(tiny(), tokenizer)
    sequences = np.random.default_rng(0).integers(2, 61, (5, 50)).astype(np.uint16)
    alone, together = (
        small(name).choose(Problem(loaded, sequences, ChoiceConfig(micro_batch=size, **ASKED))) for size in (1, 2)
    )
    assert alone.scores is not None and together.scores is not None
    np.testing.assert_allclose(together.scores, alone.scores, atol=1e-3)
    assert together.provenance["cost"] == alone.provenance["cost"]


@pytest.mark.parametrize("name", METHODS)
def test_one_run_of_a_ranking_gives_what_a_run_per_sparsity_gives(
    name: str, tokenizer: Any, monkeypatch: pytest.MonkeyPatch
):
    loaded = loaded_from(tiny(vocab_size=len(tokenizer)), tokenizer)
    length = LENGTH if name in ASKING else 60
    sequences = np.random.default_rng(0).integers(2, len(tokenizer), (3, length)).astype(np.uint16)
    config = ChoiceConfig(**ASKED)
    method, asked = small(name), []
    original = type(method).choose

    def counted(self: Method, problem: Problem) -> Any:
        asked.append(problem.config.sparsity)
        return original(self, problem)

    problems = {s: Problem(loaded, sequences, replace(config, sparsity=s)) for s in (0.75, 0.25)}
    alone = {s: method.choose(problem) for s, problem in problems.items()}
    monkeypatch.setattr(type(method), "choose", counted)
    together = choose(method, loaded, sequences, config, [0.75, 0.25])
    assert asked == ([0.75] if method.ranks else [0.75, 0.25])
    if name == "nested":  # runs of other lengths, so to speak
        alone[0.25] = together[0.25]
    assert {s: a.to_json() for s, a in together.items()} == {s: a.to_json() for s, a in alone.items()}
    assert [a.sparsity for a in together.values()] == [0.75, 0.25]


@pytest.mark.parametrize("num_steps", [1, 7, 200])
def test_learning_rates_follow_the_published_schedules(num_steps: int):
    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    warmup = -(-num_steps // 10)
    published = get_cosine_schedule_with_warmup(optimizer, warmup, num_steps)
    for step in range(num_steps):
        factor = published.get_last_lr()[0]
        assert PruLong(num_steps=num_steps).lr_factor(step) == pytest.approx(
            factor if step < warmup else 0.01 + 0.99 * factor
        )
        optimizer.step()
        published.step()
    part = max(1, num_steps // 5)
    for step in range(num_steps):
        wanted = min(1, max((step + 1) / part, 0.1), max((num_steps - step) / part, 0.1))
        assert DuoAttention(num_steps=num_steps).lr_factor(step) == pytest.approx(wanted)


@pytest.mark.parametrize("weights", [[3.0, 1.0, 0.0], [0.0, 0.0, 0.0], [1e9, 1.0, 1.0]])
def test_shares_add_up_and_respect_their_room(weights: list[float]):
    room = [4, 5, 6]
    for total in range(16):
        shares = apportion(total, weights, room)
        assert sum(shares) == total and all(share <= most for share, most in zip(shares, room, strict=True))
    assert apportion(4, [3.0, 1.0, 0.0], room) == [3, 1, 0]


@pytest.mark.parametrize("name", ["bosch", "greedy"])
def test_a_budget_too_small_to_probe_every_unit_is_refused(name: str, tokenizer: Any):
    loaded = loaded_from(tiny(), tokenizer)
    with pytest.raises(ConsaError, match=f"evaluations must be at least .* for {name} on this model, got 4"):
        choose(small(name, evaluations=4), loaded, np.zeros((1, 20), int), ChoiceConfig(**ASKED), [0.5])


def test_no_text_is_refused(tokenizer: Any):
    with pytest.raises(ConsaError, match=r"no text to choose by: got sequences of shape \(0, 20\)"):
        Problem(loaded_from(tiny(), tokenizer), np.zeros((0, 20), int), ChoiceConfig())


@pytest.mark.parametrize("field", ["sparsity", "window", "seed", "micro_batch"])
def test_what_is_asked_out_of_range_is_refused_by_name(field: str):
    with pytest.raises(ConsaError, match=field):
        ChoiceConfig(**{field: -1})


@pytest.mark.parametrize("name", METHODS)
def test_every_setting_of_a_method_has_help_and_is_checked(name: str):
    method = method_named(name)
    assert type(method).__doc__ and fields(method)
    for field in fields(method):
        assert field.metadata["help"].endswith(".")
        for bad in ("x", None, float("nan")):
            with pytest.raises(ConsaError, match=f"^{field.name} must be"):
                replace(method, **{field.name: bad})


def test_an_unknown_method_is_told_the_known_ones():
    assert type(method_named("bosch")).__name__ == "Bosch"
    with pytest.raises(ConsaError, match=r"method must be one of rules, consa, prulong, .*, got 'duo'"):
        method_named("duo")


def test_the_registry_is_light():
    code = "import sys, consa.methods; assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])


# As numpy.savetxt and csv.writer write them: those of DuoAttention and of PruLong.
DUO = "6.054687500000000000e-01\t0.0e+00\n9.960937500000000000e-01\t2.490234375000000000e-02\n5.0e-01\t1.0e+00\n"
PRULONG = "1.0\t0.0\r\n0.0\t0.0\r\n1.0\t1.0\r\n"


def test_published_patterns_are_read(tmp_path: Path):
    shape = {"num_layers": 3, "num_kv_heads": 2}
    duo, prulong = tmp_path / "full_attention_heads.tsv", tmp_path / "masks_sp0.5.tsv"
    duo.write_bytes(DUO.encode())
    prulong.write_bytes(PRULONG.encode())
    as_is = read_tsv(duo, **shape, window=256, num_sink_tokens=128)
    assert as_is.full_attention.tolist() == [[True, False], [True, False], [True, True]]
    assert as_is.scores is not None and as_is.scores[0, 0] == 0.60546875
    assert (as_is.window, as_is.num_sink_tokens, as_is.granularity) == (256, 128, "kv_head")
    cut = read_tsv(duo, **shape, sparsity=2 / 3)
    assert cut.full_attention.tolist() == [[False, False], [True, False], [False, True]]
    masks_read = read_tsv(prulong, **shape)
    assert masks_read.full_attention.tolist() == [[True, False], [False, False], [True, True]]
    ties = read_tsv(prulong, **shape, sparsity=1 / 6)  # two of three zeros: the first ones
    assert ties.full_attention.tolist() == [[True, True], [True, False], [True, True]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1.0\t0.0\n0.0\n1.0\t1.0\n", "line 2: must hold 2 finite numbers"),
        ("1.0\t0.0\n0.0\tx\n1.0\t1.0\n", "line 2: not tab-separated numbers"),
        ("1.0 0.0\n0.0 1.0\n1.0 1.0\n", "line 1: not tab-separated numbers"),
        ("1.0\tnan\n0.0\t1.0\n1.0\t1.0\n", "line 1: must hold 2 finite numbers"),
        ("1.0\t0.0\n", "has 1 lines, but the model has 3 layers"),
        ("", "has 0 lines, but the model has 3 layers"),
    ],
)
def test_patterns_of_another_shape_are_refused_by_name(text: str, message: str, tmp_path: Path):
    path = tmp_path / "masks.tsv"
    path.write_text(text)
    with pytest.raises(ConsaError, match=f"masks.tsv.*{message}"):
        read_tsv(path, num_layers=3, num_kv_heads=2)


def test_a_pattern_that_is_not_there_is_refused_by_name(tmp_path: Path):
    with pytest.raises(ConsaError, match=r"cannot read .*nothing\.tsv"):
        read_tsv(tmp_path / "nothing.tsv", num_layers=3, num_kv_heads=2)


def test_every_seed_has_an_order_of_its_own(tokenizer: Any):
    sequences = np.arange(40).reshape(20, 2)
    samples = [
        [
            int(text.tokens[0])
            for text in Problem(loaded_from(tiny(), tokenizer), sequences, ChoiceConfig(seed=seed, **ASKED)).sample(2)
        ]
        for seed in range(3)
    ]
    assert all(len(set(sample)) == 2 for sample in samples) and len(set(map(tuple, samples))) == 3


def test_a_bucket_opens_a_head_of_each_of_its_layers_first():
    rise = np.array([0.0, 5.0, 1.0, 4.0, 2.0, 3.0])
    found = [bucket.tolist() for bucket in buckets_of(rise, 2, 3)]
    assert found == [[2, 6, 3, 7], [10, 8, 11, 9], [4, 0, 5, 1]]


def test_ties_of_many_units_go_to_the_lower_ones(tokenizer: Any):
    loaded = loaded_from(tiny(num_hidden_layers=32), tokenizer)
    problem = Problem(loaded, np.zeros((1, 9), int), ChoiceConfig(**ASKED | {"sparsity": 0.5}))
    tied = np.random.default_rng(0).integers(0, 3, 96).astype(float)
    wanted = np.argsort(-tied, kind="stable")[:48]
    assert np.flatnonzero(problem.top(tied)).tolist() == sorted(wanted)


def test_duo_attentions_gates_stay_between_0_and_1(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    model = tiny(num_hidden_layers=2)
    with torch.no_grad():  # half of the gates have no effect and close
        model.model.layers[0].self_attn.o_proj.weight.zero_()
    texts = [Text(tokens, 20) for tokens in text_of(model, 4, 40)]
    monkeypatch.setattr(Problem, "questions", lambda *_: texts)
    config = ChoiceConfig(sparsity=0.5, **ASKED | {"window": 3})
    problem = Problem(loaded_from(model, tokenizer), np.zeros((1, 40), int), config)
    scores = small("duo_attention", num_steps=90).choose(problem).scores
    assert scores is not None and scores.min() >= 0 and scores.max() <= 1 + 1e-6


def test_duo_attention_looks_at_answers_alone(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    loaded = loaded_from(model := tiny(), tokenizer)
    sequences = text_of(model, 4, 40)
    config, found = ChoiceConfig(**ASKED | {"window": 3}), []
    for start in (1, 20, 38):
        monkeypatch.setattr(Problem, "questions", lambda *_, start=start: [Text(t, start) for t in sequences])
        method = small("duo_attention", num_steps=8)
        found.append(method.choose(Problem(loaded, sequences, config)).scores)
    assert not np.allclose(found[0], found[1], atol=1e-4) and not np.allclose(found[1], found[2], atol=1e-4)


def test_greedy_ranks_open_and_closed_units_by_what_they_are_worth(tokenizer: Any, monkeypatch: pytest.MonkeyPatch):
    costs = np.random.default_rng(0).random(12)
    monkeypatch.setattr(Problem, "loss", lambda problem, full, texts: float(costs[~full].sum()))
    loaded = loaded_from(tiny(), tokenizer)
    problem = Problem(loaded, text_of(loaded.model, 2, 20), ChoiceConfig(**ASKED))
    allocation = small("greedy", evaluations=14).choose(problem)
    assert allocation.scores is not None
    np.testing.assert_allclose(allocation.scores.flatten(), costs, atol=1e-12)


def test_consa_refines_on_as_many_sequences_as_it_is_told(tokenizer: Any):
    loaded = loaded_from(tiny(), tokenizer)
    problem = Problem(loaded, text_of(loaded.model, 4, 20), ChoiceConfig(**ASKED))
    record = small("consa", evaluation_sequences=3, refine_evaluations=2).choose(problem).provenance
    assert (record["config"]["refine_sequences"], record["config"]["refine_evaluations"]) == (3, 2)
    assert record["cost"]["forward_tokens"] - record["cost"]["backward_tokens"] == 2 * 3 * 20


def test_every_seed_asks_questions_of_its_own(tokenizer: Any):
    loaded = loaded_from(tiny(), tokenizer)
    asked = [
        Problem(loaded, np.zeros((1, LENGTH), int), ChoiceConfig(seed=seed, **ASKED)).questions(1)[0] for seed in (0, 1)
    ]
    assert asked[0].tokens.tolist() != asked[1].tokens.tolist()
