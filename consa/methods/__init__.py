"""Ways to choose an allocation: ConSA, its nested form, rules of thumb, and the methods of others.

At the defaults methods that train and methods that search cost about the same: 200 steps of 4 sequences and the 40
evaluations of 8 in ConSA's refinement are 340 evaluations of 8, if a backward pass counts as two forward passes.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from consa.config import BATCH_HELP, COMPILE_HELP, ChoiceConfig, LearnConfig
from consa.errors import ConsaError
from consa.settings import Settings, option

if TYPE_CHECKING:
    from consa.allocation import Allocation
    from consa.methods.problem import Problem
    from consa.model.layout import AttentionLayout

METHODS = {
    # They train gates.
    "consa": "consa.methods.training:ConSA",
    "prulong": "consa.methods.training:PruLong",
    "duo_attention": "consa.methods.training:DuoAttention",
    "nested": "consa.methods.training:Nested",
    # They search by forward passes.
    "bosch": "consa.methods.searching:Bosch",
    "greedy": "consa.methods.searching:Greedy",
    "nll_guided": "consa.methods.observing:NLLGuided",
    # They observe the dense model's attention.
    "lazy_layers": "consa.methods.observing:LazyLayers",
    "attention_mass": "consa.methods.observing:AttentionMass",
    "retrieval_score": "consa.methods.observing:RetrievalScore",
}
"""The module and class of each method that comes with consa, by name; rules go by their own names."""


@dataclass(frozen=True, kw_only=True)
class Method(Settings):
    """A way to choose an allocation; its settings are its fields, each declared by `consa.settings.option`."""

    name: ClassVar[str]  # in tables, file names and provenance
    ranks: ClassVar[bool] = False  # whether `choose` only ranks the units, so that one run serves all sparsities
    draws: ClassVar[bool] = True  # whether the seed matters

    def choose(self, problem: Problem) -> Allocation:
        """Choose an allocation with exactly `problem.num_full` units on full attention; see `Problem.decide`."""
        raise NotImplementedError

    def check(self, layout: AttentionLayout, config: ChoiceConfig) -> None:
        """Raise ConsaError if the method cannot work on a model of this layout; called before any work."""


@dataclass(frozen=True, kw_only=True)
class TrainingMethod(Method):
    """Trains gates on the problem's sequences."""

    num_steps: int = option(LearnConfig.num_steps, "Optimizer steps.", ge=1)
    sequences_per_step: int = option(LearnConfig.sequences_per_step, BATCH_HELP, ge=1)
    compile: bool = option(False, COMPILE_HELP, group="speed")

    def check(self, layout: AttentionLayout, config: ChoiceConfig) -> None:
        """Raise ConsaError if micro-batches do not divide the steps' sequences."""
        self.learning(config)

    def learning(self, config: ChoiceConfig, **other: Any) -> LearnConfig:
        """The settings of `consa.training.learning.learn` for this choice; `other` adds to them or replaces them."""
        shared = ("num_steps", "sequences_per_step", "compile")
        return LearnConfig(**asdict(config) | {name: getattr(self, name) for name in shared} | other)


@dataclass(frozen=True, kw_only=True)
class SearchingMethod(Method):
    """Evaluates allocations by forward passes, within a budget."""

    evaluations: int = option(340, "Budget, in forward evaluations.", ge=1)
    evaluation_sequences: int = option(8, "Sequences of each evaluation.", ge=1)
    retrieval: float = option(
        LearnConfig.retrieval, "Share of the loss that asks for facts hidden in the sequences.", ge=0, le=1
    )

    def num_probes(self, layout: AttentionLayout, config: ChoiceConfig) -> int:
        """Evaluations that the method needs before it can begin to search."""
        raise NotImplementedError

    def check(self, layout: AttentionLayout, config: ChoiceConfig) -> None:
        """Raise ConsaError if the budget does not cover the probes."""
        least = self.num_probes(layout, config) + 2  # one before the probes, and one with which the search begins
        if self.evaluations < least:
            advice = f"evaluations must be at least {least} for {self.name} on this model"
            raise ConsaError(f"{advice}, got {self.evaluations}")


@dataclass(frozen=True, kw_only=True)
class ObservingMethod(Method):
    """Measures something of each unit once and ranks the units by it."""

    ranks: ClassVar[bool] = True
    evaluation_sequences: int = option(8, "Sequences, or questions, that are measured on.", ge=1)
