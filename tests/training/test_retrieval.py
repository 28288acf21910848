"""Retrieval in the objective: what its sequences hold, which tokens count, and who uses them."""

from __future__ import annotations

import random
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.model import loss
from consa.model.attach import attached
from consa.training import refinement
from consa.training.adaptation import adapt
from consa.training.learning import learn
from consa.training.objective import Batch, Mixture, Objective
from consa.training.refinement import refine
from consa.training.retrieval import FAMILIES, Retrieval
from tests.models import allocate, tiny
from tests.text import TEXT
from tests.training.learning_case import Interrupted, at_step, interrupt

SEQ_LEN = 640  # as short as a puzzle of letters allows
CONFIG = LearnConfig(
    sparsity=0.5,
    window=8,
    num_sink_tokens=1,
    seq_len=SEQ_LEN,
    num_steps=2,
    sequences_per_step=2,
    micro_batch=2,
    retrieval=0.5,
    refine_evaluations=1,
    refine_sequences=4,
    checkpoint_every=1,
)
ADAPTING = AdaptConfig(
    seq_len=SEQ_LEN,
    num_steps=8,
    sequences_per_step=2,
    micro_batch=2,
    learning_rate=3e-3,
    retrieval=0.5,
    checkpoint_every=3,
)


@pytest.fixture(scope="module")
def tokenizer(tiny_model_folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(tiny_model_folder)


@pytest.fixture(scope="module")
def sequences(tokenizer: Any) -> np.ndarray:
    ids = tokenizer(TEXT * 60, add_special_tokens=False)["input_ids"]
    return np.array([ids[start : start + SEQ_LEN] for start in range(0, 6 * 50, 50)], dtype=np.uint16)


@pytest.mark.parametrize("seq_len", [SEQ_LEN, 3000])
def test_every_answer_is_stated_once_before_its_question(seq_len: int, tokenizer: Any):
    ids = np.array((tokenizer(TEXT * 200, add_special_tokens=False)["input_ids"])[:seq_len])
    for seed in range(3):
        tokens, is_answer, is_text = Retrieval(1, tokenizer).puzzles_in(ids, random.Random(seed))
        assert tokens.shape == is_answer.shape == ids.shape
        assert is_text[0] and not (is_text & is_answer).any()
        assert (tokens[is_text] == ids[: is_text.sum()]).all(), "the end of the text makes room"
        whole = tokenizer.decode(tokens)
        facts = re.findall(r"The special magic number for (\w+) is (\d+)\.", whole)
        assert len(dict(facts)) == len(facts) == 4 * min(6, max(1, seq_len // 1024))
        asked = 0
        for start in np.flatnonzero(is_answer & ~np.roll(is_answer, 1)):
            end = start + int(np.argmin([*is_answer[start:], False]))
            before, answer = tokenizer.decode(tokens[:start]), tokenizer.decode(tokens[start:end])
            things = re.findall(r"\w+", before.rpartition("? The special magic number")[2])
            wanted = [number for thing in things for name, number in facts if name == thing]
            assert re.findall(r"\d+", answer) == wanted
            assert all(before.count(f"is {number}.") == 1 for number in wanted)
            asked += 1
        assert asked == min(6, max(1, seq_len // 1024))


def test_facts_come_first_where_all_places_are_the_same():
    """With token numbers that fall where letters rise, so that sorting by tokens would put the question first."""

    def backwards(text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [300 - ord(letter) for letter in text]}

    rng = random.Random(0)
    rng.random = lambda: 0.5
    tokens, *_ = Retrieval(1, backwards).puzzles_in(np.full(900, 1), rng)
    whole = "".join(chr(300 - token) for token in tokens)
    places = [whole.index(mark) for mark in ("are hidden in", ". ", "? The special magic number")]
    assert places == sorted(places) and whole.rindex(".\n") < places[2]


def test_places_alone_decide_what_is_drawn(sequences: np.ndarray, tokenizer: Any):
    objective = Retrieval(0.25, tokenizer)
    whole = objective.drawn(sequences, 3, range(12))
    parts = [objective.drawn(sequences, 3, range(start, start + 3)) for start in range(0, 12, 3)]
    assert torch.equal(whole.tokens, torch.cat([part.tokens for part in parts]))
    assert torch.equal(whole.weights, torch.cat([part.weights for part in parts]))
    assert not torch.equal(objective.drawn(sequences, 4, range(3, 4)).tokens, whole.tokens[3:4])


@pytest.mark.parametrize("share", [0.25, 1.0])
def test_answers_make_up_their_share_of_every_sequence(share: float, sequences: np.ndarray, tokenizer: Any):
    drawn, answered = (Retrieval(part, tokenizer).drawn(sequences, 3, range(4)) for part in (share, 1.0))
    assert torch.equal(drawn.tokens, answered.tokens)
    of_answers = answered.weights > 0
    for weights, is_answer in zip(drawn.weights, of_answers, strict=True):
        assert 5 < is_answer.sum() < 60
        assert float(weights.mean()) == pytest.approx(1)
        assert float(weights[is_answer].sum() / weights.sum()) == pytest.approx(share)
        assert weights[is_answer].unique().numel() == 1
        others = weights[~is_answer].unique()
        assert (others == 0).all() if share == 1 else others.numel() == 2, "the puzzles' other tokens do not count"


def test_weights_of_the_base_move_along_with_the_text(sequences: np.ndarray, tokenizer: Any):
    class Weighted(Objective):
        def drawn(self, sequences: np.ndarray, seed: int, places: range) -> Batch:
            tokens = super().drawn(sequences, seed, places).tokens
            return Batch(tokens, torch.arange(1.0, tokens.shape[1]).repeat(len(tokens), 1))

    objective = Retrieval(0.25, tokenizer, Weighted())
    text = Objective().drawn(sequences, 3, range(2)).tokens
    drawn, plain = objective.drawn(sequences, 3, range(2)), Retrieval(0.25, tokenizer).drawn(sequences, 3, range(2))
    assert torch.equal(drawn.tokens, plain.tokens)
    for row in range(2):
        *_, is_text = objective.puzzles_in(text[row].numpy(), random.Random(f"retrieval 3 {row}"))
        counted = torch.from_numpy(is_text[1:])
        torch.testing.assert_close(
            drawn.weights[row][counted] / plain.weights[row][counted], torch.arange(1.0, counted.sum() + 1)
        )
        assert torch.equal(drawn.weights[row][~counted], plain.weights[row][~counted])


def test_without_retrieval_a_run_is_as_before(sequences: np.ndarray, tokenizer: Any):
    plain = replace(CONFIG, retrieval=0.0)
    results = [
        learn(tiny(vocab_size=2000, num_hidden_layers=1), sequences, plain, **given)
        for given in ({}, {"tokenizer": tokenizer}, {"objective": Objective()})
    ]
    assert results[0].history == results[1].history == results[2].history
    masks = [result.allocation.full_attention for result in results]
    assert (masks[0] == masks[1]).all() and (masks[0] == masks[2]).all()


def test_learning_and_refinement_use_it_and_a_stopped_run_ends_alike(
    sequences: np.ndarray, tokenizer: Any, tmp_path: Path
):
    texts: list[Batch] = []

    def recorded(model: Any, allocation: Any, text: Batch, **options: Any) -> Any:
        texts.append(text)
        return refine(model, allocation, text, **options)

    options = {"tokenizer": tokenizer, "refine": recorded}
    wanted = learn(tiny(vocab_size=2000, num_hidden_layers=1), sequences, CONFIG, **options)
    with pytest.raises(Interrupted):
        learn(
            tiny(vocab_size=2000, num_hidden_layers=1),
            sequences,
            CONFIG,
            run_dir=tmp_path,
            on_step=at_step(2, interrupt),
            **options,
        )
    got = learn(tiny(vocab_size=2000, num_hidden_layers=1), sequences, CONFIG, run_dir=tmp_path, **options)
    assert got.history == wanted.history and got.allocation == wanted.allocation
    following = Retrieval(0.5, tokenizer).drawn(sequences, 0, range(4, 8))
    assert torch.equal(texts[0].tokens, following.tokens) and torch.equal(texts[0].weights, following.weights)
    assert (
        learn(tiny(vocab_size=2000, num_hidden_layers=1), sequences, replace(CONFIG, retrieval=0.0)).history
        != wanted.history
    )


def adapted(sequences: np.ndarray, config: AdaptConfig = ADAPTING, **options: Any) -> tuple[Any, Any]:
    """What adaptation of a small model records, and the model."""
    model = tiny(vocab_size=2000, num_hidden_layers=1)
    kept = allocate(model, window=8, num_sink_tokens=1)
    return adapt(model, sequences, kept, config, **options), model


def test_adaptation_learns_the_answers(sequences: np.ndarray, tokenizer: Any):
    asked = Retrieval(1, tokenizer).drawn(sequences, 9, range(4))

    def answering(model: Any) -> float:
        return refinement._mean_loss(model, allocate(model, window=8, num_sink_tokens=1), asked, 4)

    plain, mixed, answers = (
        adapted(sequences, replace(ADAPTING, retrieval=share), tokenizer=tokenizer)[1] for share in (0, 0.5, 1)
    )
    before = answering(tiny(vocab_size=2000, num_hidden_layers=1))
    assert answering(answers) < answering(mixed) < answering(plain) - 1 < before - 1


def test_adaptation_without_retrieval_is_as_before(sequences: np.ndarray, tokenizer: Any):
    config = replace(ADAPTING, retrieval=0.0, num_steps=2, distillation=0.5)
    given = ({}, {"tokenizer": tokenizer}, {"objective": Mixture(distillation=0.5)})
    (history, model), *others = (adapted(sequences, config, **options) for options in given)
    for other, trained in others:
        assert other == history
        assert all(torch.equal(value, trained.state_dict()[name]) for name, value in model.state_dict().items())


def test_adaptation_follows_the_dense_model_in_its_answers(sequences: np.ndarray, tokenizer: Any):
    """The weights of the answers hold for each part of the loss, on the sequences that hold puzzles."""
    config = replace(ADAPTING, num_steps=1, distillation=2.0)
    ((record,), _), model = adapted(sequences, config, tokenizer=tokenizer), tiny(vocab_size=2000, num_hidden_layers=1)
    drawn = Retrieval(0.5, tokenizer).drawn(sequences, 0, range(2))
    with torch.no_grad():
        target = model(drawn.tokens).logits[:, :-1].log_softmax(-1)
        with attached(model, allocate(model, window=8, num_sink_tokens=1)):
            predicted = model(drawn.tokens, use_cache=False).logits[:, :-1].log_softmax(-1)
    parts = {
        "cross_entropy": -predicted.gather(-1, drawn.tokens[:, 1:, None])[..., 0],
        "distillation": (target.exp() * (target - predicted)).sum(-1),
    }
    for name, each in parts.items():
        assert record[name] == pytest.approx(float((each * drawn.weights).mean()), rel=1e-4)
    assert record["loss"] == pytest.approx(record["cross_entropy"] + 2 * record["distillation"])


def test_a_stopped_adaptation_ends_alike(sequences: np.ndarray, tokenizer: Any, tmp_path: Path):
    wanted, model = adapted(sequences, tokenizer=tokenizer)
    with pytest.raises(Interrupted):
        adapted(sequences, tokenizer=tokenizer, run_dir=tmp_path, on_step=at_step(5, interrupt))
    steps: list[float] = []
    got, other = adapted(
        sequences, tokenizer=tokenizer, run_dir=tmp_path, on_step=lambda record: steps.append(record["step"])
    )
    assert steps[0] == 4 and got == wanted
    assert all(torch.equal(value, other.state_dict()[name]) for name, value in model.state_dict().items())
    with pytest.raises(ConsaError, match=r"config\.retrieval was 0\.5, now 0\.25"):
        adapted(sequences, replace(ADAPTING, retrieval=0.25), tokenizer=tokenizer, run_dir=tmp_path)


def test_the_refinement_weighs_tokens_as_a_step_does():
    model, tokens = tiny(), torch.arange(24).view(2, 12)
    weights = torch.zeros(2, 11)
    weights[1, 4] = 22.0
    allocation = allocate(model, window=3)
    only = refinement._mean_loss(model, allocation, Batch(tokens, weights), 1)
    with attached(model, allocation):
        assert only == pytest.approx(float(loss.token_losses(model, tokens)[1, 4]), rel=1e-5)


def test_needs_a_tokenizer_and_room(sequences: np.ndarray, tokenizer: Any):
    with pytest.raises(ConsaError, match="retrieval needs the model's tokenizer, because questions are text"):
        learn(tiny(vocab_size=2000, num_hidden_layers=1), sequences, CONFIG)
    with pytest.raises(ConsaError, match="retrieval needs the model's tokenizer, because questions are text"):
        adapted(sequences)
    with pytest.raises(ConsaError, match=r"retrieval needs sequences of more than \d+ tokens, got seq_len 64"):
        adapted(sequences[:, :64], tokenizer=tokenizer)
    with pytest.raises(ConsaError, match=r"retrieval needs sequences of more than \d+ tokens, got seq_len 64"):
        learn(tiny(vocab_size=2000, num_hidden_layers=1), sequences[:, :64], CONFIG, tokenizer=tokenizer)


def test_the_families_that_judge_are_not_trained_on():
    assert {"single", "multi_value", "variable_tracking", "common_words"}.isdisjoint(FAMILIES)
