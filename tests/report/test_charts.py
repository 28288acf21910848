"""The rows of the report's charts."""

from __future__ import annotations

import numpy as np

from consa import Allocation
from consa.behaviour.record import MEASURES, OPTIONAL, Behaviour
from consa.report import charts


def test_attention_by_distance_is_that_of_decided_units():
    by_distance = np.array([[[1, 0, 0, 0]], [[0, 0.5, 0.5, 0]], [[0, 0, 0, 1]]], dtype=np.float32)
    measures = {name: np.zeros((3, 1), np.float32) for name in MEASURES if name not in OPTIONAL}
    found = Behaviour(measures=measures, by_distance=by_distance, window=8, num_sink_tokens=4)
    full = np.array([[True], [False], [False]])
    rows = charts.distances(Allocation(full_attention=full, window=8, native_windows={2: 4}), found)
    assert rows["decision"] == ["FA"] * 4 + ["SWA"] * 4
    assert rows["bucket"] == ["0", "1", "2\N{EN DASH}3", "4\N{EN DASH}7"] * 2
    assert rows["share"] == [1, 0, 0, 0, 0, 0.5, 0.5, 0]


def test_steps_of_a_long_run_are_means():
    names = ("step", "loss", "expected_sparsity", "target", "multiplier", "fractional")
    found = charts.history([dict.fromkeys(names, float(n)) for n in range(2 * charts.MAX_POINTS)], adapted=False)
    assert all(list(found[name][:3]) == [0.5, 2.5, 4.5] and len(found[name]) == 400 for name in names)


def test_a_layer_decided_as_one_has_the_mean_of_its_heads():
    measures = {name: np.zeros((2, 2), np.float32) for name in MEASURES if name not in OPTIONAL}
    measures["copy"] = np.array([[0.25, 0.75], [0, 1]], dtype=np.float32)
    by_distance = np.full((2, 2, 4), 0.25, np.float32)
    found = Behaviour(measures=measures, by_distance=by_distance, window=8, num_sink_tokens=4)
    chosen = Allocation(full_attention=np.array([[True] * 2, [False] * 2]), granularity="layer", window=8)
    assert charts.units(chosen, found)["copy"] == [0.5, 0.5]
