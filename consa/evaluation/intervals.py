"""Confidence intervals of means over documents, by bootstrap."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95
DRAWS = 2000


@dataclass(frozen=True)
class Estimate:
    """A mean and its 95 % confidence interval.

    Attributes:
        mean: over all values.
        low: the interval's lower end; NaN if there is only one document, which leaves nothing to resample.
        high: its upper end.
    """

    mean: float
    low: float
    high: float

    def __str__(self) -> str:
        if math.isnan(self.low) or self.low == self.high:
            return f"{self.mean:.3f}"
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"


def bootstrap(values: np.ndarray, documents: np.ndarray, *, seed: int = 0) -> Estimate:
    """Estimate a mean by the percentile bootstrap over documents; the sequences of a document are drawn together.

    For a paired interval, pass the differences of two measurements on the same sequences.

    Args:
        values: `(num_sequences,)`.
        documents: `(num_sequences,)`, the document that each sequence is from.
        seed: of the draws.
    """
    _, place = np.unique(documents, return_inverse=True)
    counts = np.bincount(place)
    mean = float(values.mean(dtype=np.float64))
    if len(counts) < 2:
        return Estimate(mean, math.nan, math.nan)
    sums = np.bincount(place, values)
    drawn = np.random.default_rng(seed).multinomial(len(counts), np.full(len(counts), 1 / len(counts)), DRAWS)
    means = (drawn @ sums) / (drawn @ counts)
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2])
    return Estimate(mean, float(low), float(high))
