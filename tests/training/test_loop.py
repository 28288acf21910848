"""What training loops share: the order of the text, what is put back, random numbers, and updates."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consa.errors import ConsaError
from consa.training import loop, objective
from consa.training.learning import learn
from consa.training.weights import Weights
from tests.models import tiny
from tests.training.learning_case import QUICK, at_step, changed, text


def test_text_comes_once_per_epoch_each_in_its_own_order():
    config = changed(sequences_per_step=2)
    order = objective.order(text(), config.seed, range(21))
    epochs = [order[:7], order[7:14], order[14:]]
    assert all(sorted(epoch) == list(range(7)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    batches = [objective.Objective().batches(text(), config, step) for step in range(3)]
    found = torch.cat([batch.tokens for step in batches for batch in step])
    assert np.array_equal(found, text()[order[:6]])


def test_what_the_caller_had_chosen_comes_back():
    model, settings = tiny(), torch.utils.deterministic
    model.gradient_checkpointing_enable()
    try:
        for warn_only in (False, True):
            torch.use_deterministic_algorithms(True, warn_only=warn_only)
            with loop.prepared(model, gradient_checkpointing=True):
                assert not settings.fill_uninitialized_memory
            assert torch.are_deterministic_algorithms_enabled()
            assert torch.is_deterministic_algorithms_warn_only_enabled() == warn_only
            assert settings.fill_uninitialized_memory and model.is_gradient_checkpointing
    finally:
        torch.use_deterministic_algorithms(False)


def test_every_seed_and_purpose_draws_numbers_of_its_own():
    drawn = {
        float(torch.rand(1, generator=loop.generator(seed, purpose)))
        for seed in (0, 1)
        for purpose in ("start", "noise 0", "noise 1")
    }
    assert len(drawn) == 6


def test_updates_are_adamws_without_decay_on_gradients_clipped_where_they_are_long():
    start = torch.tensor([3.0, -4.0])
    own, plain = (torch.nn.Parameter(start.clone()) for _ in range(2))
    weights = Weights({"w": own}, learning_rate=0.1)
    optimizer = torch.optim.AdamW([plain], lr=0.1, weight_decay=0)
    for scale in (0.1, 5.0, 0.3):  # one of them beyond the largest norm
        for parameter in (own, plain):
            parameter.grad = scale * torch.tensor([1.0, 0.5])
        norm = torch.nn.utils.clip_grad_norm_([plain], 2.0)
        optimizer.step()
        assert weights.update(max_norm=2.0) == pytest.approx(float(norm))
        torch.testing.assert_close(own, plain)


@pytest.mark.parametrize("shape", [(0, 16), (3, 1), (0, 0)])
def test_no_text_is_refused(shape: tuple[int, int]):
    with pytest.raises(ConsaError, match=rf"no training text: got sequences of shape \({shape[0]}, {shape[1]}\)"):
        learn(tiny(), np.zeros(shape, dtype=np.uint16), QUICK)


@pytest.mark.parametrize(
    ("changes", "sequences", "said"),
    [
        ({"window": 15}, text(), r"window \+ num_sink_tokens must be smaller than seq_len \(16\), got 15 \+ 1"),
        ({}, torch.zeros(4, 16), r"a numpy array of tokens .*, got Tensor of shape \(4, 16\)"),
        ({}, text()[0], r"got ndarray of shape \(16,\)"),
    ],
    ids=["window", "tensor", "one sequence"],
)
def test_text_that_nothing_can_be_learned_on_is_refused(changes: dict[str, Any], sequences: Any, said: str):
    with pytest.raises(ConsaError, match=said):
        learn(tiny(), sequences, changed(**changes))


def test_a_checkpoint_is_named_only_where_there_is_one(tmp_path: Path):
    for folder, every, kept in ((tmp_path / "a", 1, True), (tmp_path / "b", 5, False)):
        model = tiny()

        def poison(model: Any = model) -> None:
            with torch.no_grad():
                model.lm_head.weight[:] = float("nan")

        with pytest.raises(ConsaError, match="and choose another folder") as caught:
            learn(model, text(), changed(checkpoint_every=every), run_dir=folder, on_step=at_step(1, poison))
        assert ("the last good checkpoint" in str(caught.value)) == kept
