"""Which methods choose what: methods by name, their settings from text, and runs that several choices share."""

from __future__ import annotations

import re
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from importlib import import_module
from itertools import product
from typing import Any

import numpy as np

from consa import rules
from consa.allocation import Allocation
from consa.config import ChoiceConfig, EvalConfig, SweepConfig, at_once
from consa.errors import ConsaError, first_line
from consa.methods import METHODS, Method
from consa.methods.problem import Problem
from consa.methods.searching import Rule
from consa.model.load import LoadedModel
from consa.provenance import hardware
from consa.settings import kinds, parse, words_of


def method_named(name: str, **settings: Any) -> Method:
    """A method by its name, a rule by its name, or the class that `package.module:Class` names.

    Modules are found as Python finds them, and in the working directory. Settings that the method does not have are
    left out.

    Raises:
        ConsaError: there is no such method, its module cannot be imported, or a setting is out of range.
    """
    if name in rules.RULES:
        return Rule(name=name)
    if name not in METHODS and ":" not in name:
        known = ", ".join(["rules", *METHODS, *rules.RULES])
        raise ConsaError(f"method must be one of {known}, or package.module:Class, got {name!r}")
    place = METHODS.get(name, name)
    module, _, class_name = place.partition(":")
    before = list(sys.path)
    sys.path.append("")
    try:
        method = getattr(import_module(module), class_name)
    except Exception as error:  # whatever a user's module raises
        raise ConsaError(f"cannot import the method {place!r}: {first_line(error)}") from error
    finally:
        sys.path[:] = before
    if not isinstance(method, type) or not issubclass(method, Method):
        raise ConsaError(f"{place!r} is not a method; derive the class from consa.methods.Method")
    if not re.fullmatch(r"\w+", getattr(method, "name", "")):
        raise ConsaError(f"{place!r} needs a class attribute `name` of letters, digits and underscores")
    return method(**{key: value for key, value in settings.items() if key in kinds(method)})


def choose(
    method: Method, loaded: LoadedModel, sequences: np.ndarray, config: ChoiceConfig, sparsities: Iterable[float]
) -> dict[float, Allocation]:
    """The allocations of one method at several sparsities; that of the config does not count.

    A method that ranks runs once, at the largest sparsity; the cost in each provenance is that of the one run. Other
    methods run once for each sparsity.

    Raises:
        ConsaError: the method cannot work on this model, or there is no text.
    """
    method.check(loaded.layout, config)
    problems = {sparsity: Problem(loaded, sequences, replace(config, sparsity=sparsity)) for sparsity in sparsities}
    if not method.ranks:
        return {sparsity: method.choose(problem) for sparsity, problem in problems.items()}
    ranked = method.choose(problems[max(problems)])
    return {sparsity: problem.cut(ranked) for sparsity, problem in problems.items()}


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One allocation to choose: by which method, and what is asked for."""

    method: Method
    config: ChoiceConfig

    @property
    def name(self) -> str:
        """The name of its file and of its line in tables."""
        return f"{self.method.name}-{self.config.granularity}-{self.config.sparsity:g}-seed{self.config.seed}"

    @property
    def origin(self) -> tuple[Method, ChoiceConfig]:
        """Choices for which this is equal come from one run of the method."""
        return self.method, replace(self.config, sparsity=0.0) if self.method.ranks else self.config


def make(alike: Sequence[Choice], loaded: LoadedModel, sequences: np.ndarray) -> list[Allocation]:
    """Choose by one run, for choices of the same `origin`; the provenance gets its seconds and the hardware."""
    began = time.monotonic()
    sparsities = [choice.config.sparsity for choice in alike]
    chosen = choose(alike[0].method, loaded, sequences, alike[0].config, sparsities)
    spent = {"seconds": round(time.monotonic() - began, 2), "hardware": hardware()}
    return [
        replace(allocation, provenance=loaded.identity | dict(allocation.provenance) | spent)
        for allocation in chosen.values()
    ]


def choices(config: SweepConfig, measured: EvalConfig) -> Iterator[Choice]:
    """All allocations that a sweep compares; ConsaError if there is no such method, or a value is out of range."""
    for granularity, sparsity, method in product(config.granularities, config.sparsities, _methods(config)):
        if isinstance(method, Rule) and method.name not in rules.names(granularity):
            continue
        for seed in range(config.seeds if method.draws else 1):
            asked = ChoiceConfig(
                sparsity=sparsity,
                granularity=granularity,
                window=measured.window,
                num_sink_tokens=measured.num_sink_tokens,
                seed=seed,
                micro_batch=at_once(config.micro_batch),
            )
            yield Choice(method=method, config=asked)


def _methods(config: SweepConfig) -> list[Method]:
    """The methods of a sweep, each once, with the settings that were given."""
    methods: dict[str, Method] = {}
    for word in words_of(config.methods):
        for name in rules.RULES if word == "rules" else [word]:
            method = method_named(name, **config.budget)
            if type(methods.setdefault(method.name, method)) is not type(method):
                raise ConsaError(f"methods must have different names, got two called {method.name!r}")
    for setting in words_of(config.settings):
        match = re.fullmatch(r"(\w+)\.(\w+)\s*=(.*)", setting)
        if not match:
            raise ConsaError(f"settings must look like method.setting=value, got {setting!r}")
        name, field, text = match.groups()
        if name not in methods:
            raise ConsaError(f"settings must name methods of this sweep ({', '.join(methods)}), got {name!r}")
        method = methods[name]
        known = [item.name for item in fields(method) if item.metadata]
        if field not in known:
            raise ConsaError(f"{name} has the settings {', '.join(known) or 'none'}; got {field!r}")
        value = parse(text.strip(), kinds(type(method))[field], f"{name}.{field}")
        methods[name] = replace(method, **{field: value})
    return list(methods.values())
