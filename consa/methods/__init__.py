"""Other ways to choose an allocation, side by side with ConSA: one file each, one function each, one interface.

A method takes a loaded model, text and a `ChoiceConfig`, and returns an `Allocation` at exactly the config's sparsity.
Its provenance says what the choice cost, in tokens sent forward and backward through the model.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from importlib import import_module
from typing import TYPE_CHECKING

import numpy as np

from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.errors import ConsaError

if TYPE_CHECKING:
    from consa.model.layout import AttentionLayout
    from consa.model.load import LoadedModel


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


def check_budget(name: str, layout: AttentionLayout, config: ChoiceConfig) -> None:
    """Make sure that a search can probe a model of this layout and then begin.

    Raises:
        ConsaError: the budget has too few evaluations for that.
    """
    from consa.training.learning import units_of

    units = units_of(layout, config.granularity)
    probes = {"greedy": units.count, "bosch": len(units.layers)}.get(name, 0)
    least = probes + 2  # one before them, and one with which the search begins
    if probes and config.evaluations < least:
        raise ConsaError(
            f"evaluations must be at least {least} for {name} on this model, got {config.evaluations}"
        )


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
