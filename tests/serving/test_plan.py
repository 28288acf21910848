"""Unused places make the FA heads one cache group; test_planner.py asks vLLM's own planner."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from consa.serving.plan import unused_places


@given(st.integers(0, 300), st.integers(0, 300))
def test_unused_places_make_full_heads_the_size_of_a_group(num_full: int, num_sliding: int):
    unused = unused_places(num_full, num_sliding)
    assert 0 <= unused < max(num_full, 1)
    if num_full:
        assert (num_sliding + unused) % num_full == 0
