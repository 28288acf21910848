"""What the tests of adaptation share: short settings, text, an allocation, and a way to stop a run."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from consa import Allocation, rules
from consa.config import AdaptConfig
from consa.model.attach import attached
from tests.models import allocate, tiny, tokens

QUICK = AdaptConfig(
    seq_len=24,
    num_steps=5,
    sequences_per_step=2,
    learning_rate=3e-3,
    lora_rank=2,
    lora_alpha=4,
    evaluate_every=2,
    checkpoint_every=2,
)
OBJECTIVES: dict[str, dict[str, Any]] = {
    "cross_entropy": {},
    "distillation": {"cross_entropy": 0.0, "distillation": 1.0},
    "all": {"cross_entropy": 0.3, "distillation": 0.5, "hidden_loss": 2.0},
}
METHODS = ("full", "lora")


@cache
def text() -> np.ndarray:
    return tokens(7, 24).numpy().astype(np.uint16)


def changed(**changes: Any) -> AdaptConfig:
    return replace(QUICK, **changes)


def allocation(window: int = 3, sinks: int = 1) -> Allocation:
    return allocate(tiny(), window=window, num_sink_tokens=sinks)


def all_full() -> Allocation:
    return rules.bottom(4, 3, sparsity=0.0, window=3, num_sink_tokens=0)


def distance_to_dense(model: PreTrainedModel) -> float:
    ids = torch.from_numpy(text().astype(np.int64))
    with attached(model, allocation()), torch.no_grad():
        q = model(ids, use_cache=False).logits.log_softmax(-1)
    p = tiny()(ids).logits.detach().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())


class Interrupted(Exception):
    pass


def interrupt_at(number: int) -> Any:
    def on_step(record: dict[str, float]) -> None:
        if record["step"] == number:
            raise Interrupted

    return on_step
