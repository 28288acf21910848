"""Methods that need no training: rules of thumb, and searches by forward passes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from consa import rules
from consa.allocation import Allocation
from consa.config import ChoiceConfig
from consa.methods import Method, SearchingMethod
from consa.methods.problem import Problem, Text
from consa.model.layout import AttentionLayout
from consa.settings import option
from consa.training.learning import asked_of, units_of
from consa.training.refinement import Exchange, refine


@dataclass(frozen=True, kw_only=True)
class Rule(Method):
    """One of `consa.rules.RULES`, which decide from the shape of a model alone; its `name` is that of the rule."""

    name: str  # pyright: ignore[reportIncompatibleVariableOverride]

    @property
    def draws(self) -> bool:  # pyright: ignore[reportIncompatibleVariableOverride]
        """Whether the rule draws the units at random."""
        return self.name in rules.DRAWN

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        config, layout = problem.config, problem.loaded.layout
        asked = asked_of(config, layout)
        return rules.by_name(self.name, *layout.shape, seed=config.seed, sparsity=config.sparsity, **asked)


@dataclass(frozen=True, kw_only=True)
class Greedy(SearchingMethod):
    """Probe each unit of `rules.middle` once, then exchange units by `training.refinement.refine`.

    What ConSA's last stage finds without the gates before it.
    """

    name = "greedy"

    def num_probes(self, layout: AttentionLayout, config: ChoiceConfig) -> int:
        """One for each unit."""
        return units_of(layout, config.granularity).count

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        texts = problem.sample(self.evaluation_sequences, self.retrieval)
        full = problem.gather(Rule(name="middle").choose(problem).full_attention)
        before = problem.loss(full, texts)
        worth = np.zeros(problem.units.count)
        for unit in range(len(worth)):
            change = problem.loss(full ^ (np.arange(len(full)) == unit), texts) - before
            worth[unit] = change if full[unit] else -change
        full = exchanged(problem, problem.decide(self, worth, full), texts, self.evaluations - problem.units.count - 1)
        return problem.decide(self, worth, full, start="middle")


@dataclass(frozen=True, kw_only=True)
class Bosch(SearchingMethod):
    """Probe each layer, share the FA units out over buckets of layers, and search within each bucket by exchanges.

    The stages are those of BOSCH (arXiv 2604.05942), a large-neighbourhood search. No code is published, and the
    abstract names no constants: the defaults, the exchanges as moves and the next-token loss as objective are consa's.
    """

    name = "bosch"
    num_buckets: int = option(3, "Groups of layers, by sensitivity.", ge=1)
    mean_exchange: float = option(2.0, "Units that a move exchanges, on average.", ge=1)

    def num_probes(self, layout: AttentionLayout, config: ChoiceConfig) -> int:
        """One for each layer."""
        return len(units_of(layout, config.granularity).layers)

    def choose(self, problem: Problem) -> Allocation:
        """See `Method.choose`."""
        units, texts = problem.units, problem.sample(self.evaluation_sequences, self.retrieval)
        layer = np.arange(units.count) // units.per_layer  # of each unit
        dense = problem.loss(np.ones(units.count, dtype=bool), texts)
        rise = np.array([problem.loss(layer != one, texts) - dense for one in range(len(units.layers))])
        buckets = buckets_of(rise, units.per_layer, self.num_buckets)
        full = np.zeros(units.count, dtype=bool)
        weights = [float(np.maximum(rise[layer[bucket]], 0).sum()) for bucket in buckets]
        for bucket, share in zip(buckets, apportion(problem.num_full, weights, list(map(len, buckets))), strict=True):
            full[bucket[:share]] = True
        current, rng = problem.loss(full, texts), np.random.default_rng(problem.config.seed)
        # The last neighbourhood is all units, so that what the probes got wrong can still be put right.
        neighbourhoods = [*(b for b in buckets if 0 < full[b].sum() < len(b)), np.arange(units.count)]
        begun = len(units.layers) + 2  # dense, a probe of each layer, and the start of the search
        for spent in range(begun, self.evaluations):
            units_here = neighbourhoods[spent % len(neighbourhoods)]
            kept, closed = units_here[full[units_here]], units_here[~full[units_here]]
            size = min(int(rng.geometric(1 / self.mean_exchange)), len(kept), len(closed))
            trial = full.copy()
            trial[rng.choice(kept, size, replace=False)] = False
            trial[rng.choice(closed, size, replace=False)] = True
            value = problem.loss(trial, texts)
            if value < current:
                full, current = trial, value
        return problem.decide(self, rise[layer], full)


def exchanged(problem: Problem, start: Allocation, texts: list[Text], max_evaluations: int) -> np.ndarray:
    """The units on full attention, bool `(units,)`, after exchanges from `start` by `training.refinement.refine`."""
    exchanges: list[Exchange] = []
    refined = refine(
        problem.loaded.model,
        start,
        problem.together(texts),
        max_evaluations=max_evaluations,
        batch_size=problem.config.micro_batch,
        on_exchange=exchanges.append,
    )
    evaluations = exchanges[-1].evaluations if exchanges else 1
    problem.forward_tokens += evaluations * len(texts) * problem.sequences.shape[1]
    return problem.gather(refined.full_attention)


def buckets_of(rise: np.ndarray, per_layer: int, num_buckets: int) -> list[np.ndarray]:
    """The units of equal groups of layers, the most sensitive layers first, within a bucket too."""
    order = np.argsort(-rise, kind="stable")
    groups = np.array_split(order, min(num_buckets, len(order)))
    return [(group[:, None] * per_layer + np.arange(per_layer)).T.flatten() for group in groups]


def apportion(total: int, weights: list[float], room: list[int]) -> list[int]:
    """Whole shares of `total` near proportion to `weights`, none above its `room` (D'Hondt's highest averages)."""
    shares = [0] * len(weights)
    for _ in range(total):
        free = [index for index in range(len(room)) if shares[index] < room[index]]
        shares[max(free, key=lambda index: (weights[index] / (shares[index] + 1), -index))] += 1
    return shares
