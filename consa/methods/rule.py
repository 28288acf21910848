"""Rules of thumb as methods: what `consa.rules` decides from the shape of a model alone."""

from __future__ import annotations

from dataclasses import dataclass

from consa import rules
from consa.allocation import Allocation
from consa.methods import Method
from consa.methods.problem import Problem


@dataclass(frozen=True, kw_only=True)
class Rule(Method):
    """One of `consa.rules.RULES`.

    Attributes:
        name: of the rule.
    """

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the rule draws the units at random."""
        return self.name in rules.DRAWN

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        config, layout = problem.config, problem.loaded.layout
        return rules.by_name(
            self.name,
            *layout.shape,
            seed=config.seed,
            sparsity=config.sparsity,
            granularity=config.granularity,
            window=config.window,
            num_sink_tokens=config.num_sink_tokens,
            native_windows=layout.native_windows,
        )
