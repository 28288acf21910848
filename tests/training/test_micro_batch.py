"""`micro_batch="auto"`: the most sequences at once that fit in memory, and the same number after an interruption."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedModel

from consa.config import EvalConfig, LearnConfig, RunConfig, SweepConfig
from consa.errors import ConsaError
from consa.runs import evaluation
from consa.runs.sweep import sweep
from consa.training import distributed, loop
from consa.training.adaptation import adapt
from consa.training.learning import learn
from tests.models import allocate, tiny
from tests.training import adaptation_case, learning_case
from tests.training.learning_case import Interrupted, at_step, interrupt

STEP: dict[str, Any] = {"sequences_per_step": 4, "num_steps": 3, "checkpoint_every": 1}


def limited(model: PreTrainedModel, most: int, sizes: list[int] | None = None) -> PreTrainedModel:
    """The model, on a device whose memory holds the backward pass of `most` sequences."""

    def hold(module: Any, given: Any, named: Any, output: Any) -> None:
        count = len(named["input_ids"])
        if sizes is not None:
            sizes.append(count)

        def fail(gradient: torch.Tensor) -> None:
            if count > most:
                raise torch.OutOfMemoryError("out of memory")

        if output.last_hidden_state.requires_grad:
            output.last_hidden_state.register_hook(fail)

    model.base_model.register_forward_hook(hold, with_kwargs=True)
    return model


def run(verb: str, most: int, micro_batch: Any, **options: Any) -> tuple[list[dict[str, float]], dict[str, Any]]:
    """The history, and whatever has been trained."""
    model = limited(tiny(), most)
    if verb == "adapt":
        config = adaptation_case.changed(micro_batch=micro_batch, **STEP)
        history = adapt(model, adaptation_case.text(), allocate(model, window=3), config, **options)
        return history, model.state_dict()
    config = learning_case.changed(micro_batch=micro_batch, mode=verb, weight_lr=1e-3, refine_evaluations=3, **STEP)
    result = learn(model, learning_case.text(), config, **options)
    assert result.allocation.scores is not None
    scores = {"log_alpha": torch.from_numpy(result.allocation.scores.copy())}
    recorded = result.allocation.provenance["config"]["micro_batch"]
    assert recorded == result.history[0]["micro_batch"]
    return result.history, scores | model.state_dict()


@pytest.mark.parametrize("verb", ["frozen", "joint", "adapt"])
@pytest.mark.parametrize(("most", "number"), [(1, 1), (2, 2), (3, 2), (9, 4)])
def test_auto_is_the_largest_power_of_two_that_fits(verb: str, most: int, number: int):
    history, weights = run(verb, most, "auto")
    assert [record["micro_batch"] for record in history] == [number] * 3
    wanted, others = run(verb, most, number)
    assert history == wanted and all(torch.equal(value, others[name]) for name, value in weights.items())


def test_what_does_not_divide_the_step_is_not_tried():
    sizes: list[int] = []
    config = learning_case.changed(micro_batch="auto", **STEP | {"sequences_per_step": 6})
    learn(limited(tiny(), 9, sizes), learning_case.text(), config)
    assert set(sizes) == {2}


@pytest.mark.parametrize("verb", ["frozen", "adapt"])
def test_a_resumed_run_keeps_its_number(verb: str, tmp_path: Path):
    wanted, weights = run(verb, 2, "auto")
    with pytest.raises(Interrupted):
        run(verb, 2, "auto", run_dir=tmp_path, on_step=at_step(3, interrupt))
    history, others = run(verb, 9, "auto", run_dir=tmp_path)  # more memory is free now
    assert history == wanted and all(torch.equal(value, others[name]) for name, value in weights.items())
    lines = (tmp_path / loop.METRICS).read_text().splitlines()
    assert [json.loads(line)["micro_batch"] for line in lines] == [2] * 3


def test_without_memory_for_one_sequence_the_run_ends():
    with pytest.raises(torch.OutOfMemoryError):
        run("frozen", 0, "auto")


def test_on_a_cpu_nothing_is_tried_by_default():
    assert [record["micro_batch"] for record in run("frozen", 9, None)[0]] == [1] * 3
    assert loop.is_automatic(None, torch.device("cuda")) and not loop.is_automatic(2, torch.device("cuda"))


def test_all_processes_agree_on_the_smallest(monkeypatch: pytest.MonkeyPatch):
    def two_processes(own: torch.Tensor) -> torch.Tensor:
        return own if distributed.world_size() == 1 else torch.cat([own, torch.tensor([2])])

    sizes: list[int] = []

    class Tried:
        model = tiny()
        config = LearnConfig(sequences_per_step=8, micro_batch="auto")

        def accumulate(self, step: int) -> loop.Record:
            assert distributed.world_size() == 1 and distributed.share(4) == slice(0, 4), "no other may be waited for"
            sizes.append(int(self.config.micro_batch or 0))
            return {}

        def discard(self) -> None: ...

    monkeypatch.setattr(distributed, "all_gather", two_processes)
    monkeypatch.setattr(distributed.dist, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed.dist, "get_world_size", lambda: 2)
    monkeypatch.setattr(distributed.dist, "get_rank", lambda: 1)
    training: Any = Tried()
    assert loop.fitting_micro_batch(training, training.config) == 2 and sizes == [4]
    sharded = replace(training.config, mode="joint", parallel="fsdp")
    assert loop.fitting_micro_batch(training, sharded) == 1 and sizes == [4]


@pytest.fixture
def memory(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Sets how many sequences fit in the memory of sweeps."""
    load = evaluation.load

    def set_to(most: int) -> None:
        def loaded(*given: Any) -> Any:
            found = load(*given)
            limited(found.model, most)
            return found

        monkeypatch.setattr(evaluation, "load", loaded)

    return set_to


def test_a_sweep_finds_its_number_once(
    memory: Callable[[int], None], tmp_path: Path, tiny_model_folder: Path, text_folder: Path
):
    where = RunConfig(model=str(tiny_model_folder), data=str(text_folder), num_heldout=4, device="cpu")
    measured = EvalConfig(window=8, num_sink_tokens=2, seq_len=96)
    shared: dict[str, Any] = {"num_steps": 1, "evaluation_sequences": 1, "settings": "consa.refine_evaluations=0"}
    config = SweepConfig(sparsity="0.5", methods="consa", micro_batch="auto", **shared)
    memory(2)
    sweep(where, config, measured, tmp_path, command="c")
    memory(9)
    sweep(where, replace(config, sparsity="0.75"), measured, tmp_path, command="c")
    assert json.loads((tmp_path / "config.json").read_text())["sweep"]["micro_batch"] == 2
    for path in (tmp_path / "allocations").glob("*.json"):
        assert json.loads(path.read_text())["provenance"]["config"]["micro_batch"] == 2
    with pytest.raises(ConsaError, match="micro_batch was 2, now 4"):
        sweep(where, replace(config, micro_batch=4), measured, tmp_path, command="c")
