"""Other ways to choose an allocation, side by side with ConSA: one file each, one function each, one interface.

A method takes a loaded model, text and a `ChoiceConfig`, and returns an `Allocation` at exactly the config's sparsity.
Its provenance says what the choice cost, in tokens sent forward and backward through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields, replace
from importlib import import_module
from typing import TYPE_CHECKING, Any

import numpy as np

from consa.allocation import Allocation, Granularity
from consa.config import LearnConfig
from consa.errors import ConsaError

if TYPE_CHECKING:
    from consa.model import LoadedModel


@dataclass(frozen=True, kw_only=True)
class ChoiceConfig:
    """What all methods share. What only one of them knows is a constant of its file, with its source.

    At the defaults the methods that train and those that search cost about the same: 200 steps of 4 sequences and the
    refinement's 40 evaluations of 8 are 340 evaluations of 8, if a backward pass counts as two forward ones.

    Attributes:
        sparsity: share of units to put on SWA, in [0, 1].
        granularity: what is decided as one: "layer" or "kv_head".
        window: tokens an SWA query sees, itself included.
        num_sink_tokens: first tokens that stay visible on top of the window.
        seed: of whatever a method draws.
        num_steps: optimiser steps of a method that trains.
        sequences_per_step: sequences, or questions, of each of them.
        evaluations: budget of a method that searches, in forward evaluations.
        evaluation_sequences: sequences, or questions, of each of them, and of what measures attention.
        micro_batch: sequences of one length computed at once; on a GPU, as many as fit.
        compile: compile layers where gates are trained on sequences; takes seconds and makes steps faster.

    Raises:
        ConsaError: a value out of range; the message names it.
    """

    sparsity: float = 0.75
    granularity: Granularity = "kv_head"
    window: int = 128
    num_sink_tokens: int = 4
    seed: int = 0
    num_steps: int = 200
    sequences_per_step: int = 4
    evaluations: int = 340
    evaluation_sequences: int = 8
    micro_batch: int = 1
    compile: bool = False

    def __post_init__(self) -> None:
        for name in ("evaluations", "evaluation_sequences"):
            value = getattr(self, name)
            if not isinstance(value, int) or value < 1:
                raise ConsaError(f"{name} must be an integer >= 1, got {value!r}")
        self.for_learning()

    def for_learning(self, **other: Any) -> LearnConfig:
        """The settings of `consa.learning.learn` that these stand for, but for `other`."""
        alike = {item.name for item in fields(self)} & {item.name for item in fields(LearnConfig)}
        settings: dict[str, Any] = {name: getattr(self, name) for name in alike}
        settings["refine_sequences"] = self.evaluation_sequences
        return LearnConfig(**settings | other)


Method = Callable[["LoadedModel", np.ndarray, ChoiceConfig], Allocation]
"""`(loaded, sequences, config)`; sequences are int tokens `(num_sequences, seq_len)`, each from one document."""


def _method(name: str) -> Method:
    """The function of that name in the module of that name, imported when it is called."""

    def choose(loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig) -> Allocation:
        return getattr(import_module(f"{__name__}.{name}"), name)(loaded, sequences, config)

    return choose


METHODS: dict[str, Method] = {
    name: _method(name)
    for name in (
        *("consa", "prulong", "duo_attention", "nested"),  # train gates
        *("bosch", "greedy", "nll_guided"),  # search by forward passes
        *("lazy_layers", "attention_mass", "retrieval_score"),  # look at the dense model's attention
    )
}

RANKINGS = {
    *("nested", "duo_attention", "nll_guided"),
    *("lazy_layers", "attention_mass", "retrieval_score"),
}
"""Methods that only rank the units, so that one run gives the allocations of all sparsities; see `choose`."""


def method_named(name: str) -> Method:
    """The method of that name.

    Raises:
        ConsaError: there is none; the message lists those that there are.
    """
    if name not in METHODS:
        raise ConsaError(f"method must be one of {', '.join(METHODS)}, got {name!r}")
    return METHODS[name]


def choose(
    name: str,
    loaded: LoadedModel,
    sequences: np.ndarray,
    config: ChoiceConfig,
    sparsities: Iterable[float],
) -> dict[float, Allocation]:
    """The allocations of one method for several sparsities; that of the config does not count.

    A method of `RANKINGS` runs once, at the largest sparsity; the cost in each provenance is that of the one run. The
    others run once for each sparsity.

    Raises:
        ConsaError: there is no such method, or as the method.
    """
    method = method_named(name)
    asked = {sparsity: replace(config, sparsity=sparsity) for sparsity in sparsities}
    if name not in RANKINGS:
        return {sparsity: method(loaded, sequences, config) for sparsity, config in asked.items()}
    from consa.methods.problem import Problem

    ranked = method(loaded, sequences, asked[max(asked)])
    return {sparsity: Problem(loaded, sequences, config).cut(ranked) for sparsity, config in asked.items()}
