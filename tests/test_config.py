"""Settings: what is refused, and that what was learned says how."""

from __future__ import annotations

from typing import Any

import pytest

from consa import Allocation
from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.training.learning import learn
from tests.models import tiny
from tests.training.learning_case import changed, text

BAD: dict[str, list[Any]] = {
    "sparsity": [-0.1, 1.1, float("nan"), float("inf"), "half", None],
    "granularity": ["head", "", None],
    "mode": ["freeze", None],
    "full_heads_per_layer": ["odd"],
    "tensor_parallel": [0, 1.5],
    "parallel": ["tensor", "fsdp", None],
    "rules": ["some", None],
    "window": [0, -1, 2.5, "8", None],
    "num_sink_tokens": [-1, 0.5],
    "seq_len": [1, 0, 16.0],
    "num_steps": [0, -3, 1.5, True],
    "sequences_per_step": [0, 2.0],
    "micro_batch": [0, 3, 8],
    "seed": [-1, 0.5],
    "weight_lr": [0, -1e-3, float("nan"), float("inf")],
    "gate_lr": [0, -1.0, float("nan")],
    "initial_log_alpha": [-7.0, 4.0, 9.0, float("nan"), "2"],
    "log_alpha_min": [float("-inf"), "low", None],
    "penalty": [0, -1, float("nan"), float("inf"), "much", None],
    "multiplier_step": [0, -1, float("inf")],
    "penalty_growth": [0, -1],
    "warmup": [-0.1, 1.1, float("nan"), "half"],
    "sharpening": [-1, float("nan"), float("inf"), None],
    "sharpening_start": [-0.1, 1.5],
    "averaged": [0, -0.1, 1.1, float("nan")],
    "refine_evaluations": [-1, 0.5],
    "retrieval": [-0.1, 1.1, float("nan"), "single", None],
    "refine_sequences": [0, -1],
    "checkpoint_every": [0, 2.5],
    "gradient_checkpointing": [1, None],
    "compile": ["no", 0],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_a_bad_setting_is_refused_by_name(name: str, value: Any):
    with pytest.raises(ConsaError, match=name) as caught:
        LearnConfig(**{name: value})
    message = str(caught.value)
    assert "\n" not in message
    assert (repr(value) if not isinstance(value, float) else str(value)) in message


@pytest.mark.parametrize(
    "options",
    [{"kv_budget": 10}, {"context": 10}, {"kv_budget": 0, "context": 5}, {"kv_budget": 5, "context": 0}],
    ids=str,
)
def test_budget_and_context_belong_together(options: dict[str, int]):
    with pytest.raises(ConsaError, match=r"kv_budget|context"):
        LearnConfig(**options)


def test_the_table_of_bad_settings_is_whole():
    known = {"kv_budget", "context", "log_alpha_min", "log_alpha_max"}
    assert LearnConfig.__dataclass_fields__.keys() == BAD.keys() | known
    with pytest.raises(TypeError):
        LearnConfig(0.5)  # type: ignore[misc]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"method": "qlora"}, "method must be one of full, lora, got 'qlora'"),
        ({"cross_entropy": 0.0}, "all 0; give one of them a weight"),
        ({"distillation": -1.0}, r"distillation must be a number >= 0, got -1\.0"),
        ({"learning_rate": 0.0}, r"learning_rate must be a positive number, got 0\.0"),
        ({"warmup": 1.5}, r"warmup must be a share in \[0, 1\], got 1\.5"),
        ({"num_steps": 0}, "num_steps must be an integer >= 1, got 0"),
        ({"micro_batch": 3}, r"micro_batch must divide sequences_per_step \(2\), got 3"),
        ({"method": "lora", "parallel": "fsdp"}, "parallel must be ddp with method lora"),
        ({"retrieval": 1.5}, r"retrieval must be a share in \[0, 1\], got 1\.5"),
        ({"lora_targets": " , "}, "lora_targets must name linear layers, got ' , '"),
    ],
)
def test_a_bad_setting_of_adaptation_is_refused_by_name(changes: dict[str, Any], named: str):
    with pytest.raises(ConsaError, match=named):
        AdaptConfig(**{"sequences_per_step": 2} | changes)


def test_the_allocation_says_where_it_comes_from():
    allocation = learn(tiny(), text(), changed(seed=3), identity={"model": "a", "revision": "b"}).allocation
    record = allocation.provenance
    assert (record["model"], record["revision"], record["method"]) == ("a", "b", "consa")
    assert record["config"]["seed"] == 3 and {"torch", "consa"} <= record["versions"].keys()
    assert Allocation.from_json(allocation.to_json()) == allocation
