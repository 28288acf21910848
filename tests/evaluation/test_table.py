"""The words around the table of measurements."""

from __future__ import annotations

import math

import pytest

from consa.evaluation.intervals import Estimate
from consa.evaluation.table import Line, Table


@pytest.mark.parametrize(
    ("end", "says"), [(0.0, "with 95 % confidence intervals"), (math.nan, "without confidence intervals")]
)
def test_the_caption_promises_only_intervals_that_are_there(end: float, says: str):
    none = {f"{kind}by_{part}": {} for kind in ("", "differences_") for part in ("position", "domain")}
    line = Line(
        **{"name": "dense", "kind": "dense", "sparsity": 0.0, "cache_bytes": 1, "recovered": 1.0},
        **{"loss": Estimate(1.0, end, end), "difference": Estimate(0.0, end, end), **none},
    )
    title = next(Table(start=1, cache_tokens=8, lines=(line,), how={}).sections()).title
    assert says in title
