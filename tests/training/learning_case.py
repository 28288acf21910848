"""A small run of learning, and ways to stop it: what several files of tests share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from consa.config import LearnConfig
from tests.models import tokens

ROOT = Path(__file__).parents[2]
QUICK = LearnConfig(
    sparsity=0.5,
    window=3,
    num_sink_tokens=1,
    seq_len=16,
    num_steps=6,
    sequences_per_step=2,
    gate_lr=0.5,
    refine_evaluations=0,
    checkpoint_every=1,
)


@cache
def text() -> np.ndarray:
    return tokens(7, 16).numpy().astype(np.uint16)


def changed(**changes: Any) -> LearnConfig:
    return replace(QUICK, **changes)


class Interrupted(Exception):
    pass


def at_step(number: int, act: Callable[[], Any]) -> Callable[[dict[str, float]], None]:
    def on_step(record: dict[str, float]) -> None:
        if record["step"] == number:
            act()

    return on_step


def interrupt() -> None:
    raise Interrupted
