"""Pictures of an allocation in characters and HTML."""

from __future__ import annotations

import re

import numpy as np
import pytest

from consa import Allocation, picture, rules


def test_a_column_is_a_layer_and_a_row_a_kv_head():
    full = np.zeros((12, 2), bool)
    full[3, 1] = full[11, 0] = True
    drawn = picture.characters(Allocation(full_attention=full, window=8)).splitlines()
    assert drawn[:3] == ["    layer 0         10", "KV head 0 ···········█", "KV head 1 ···█········"]
    assert drawn[-1] == "█ full attention   · sliding window"


def test_whole_layers_take_one_row_and_native_windows_show():
    allocation = rules.top(4, 2, sparsity=0.5, granularity="layer", window=8, native_windows={1: 5})
    drawn = picture.characters(allocation, symbols=picture.ASCII).splitlines()
    assert drawn[1].startswith("all KV heads ") and drawn[1].count("=") == 1
    assert len(drawn) == 4 and drawn[-1].endswith("= native window") and drawn[1].isascii()


def test_units_near_the_decision_differ():
    scores = np.array([[5.0], [0.5], [-0.5], [-5.0]])
    allocation = Allocation(full_attention=scores > 0, window=8, scores=scores, provenance={"method": "consa"})
    assert "█▓░·" in picture.characters(allocation) and "near the decision" in picture.characters(allocation)


@pytest.mark.parametrize("layers", [60, 61, 126])
def test_deep_models_fit_the_terminal(layers: int):
    drawn = picture.characters(rules.uniform_heads(layers, 2, sparsity=0.5, granularity="kv_head"))
    assert max(map(len, drawn.splitlines())) <= 80
    assert len(re.findall("KV head 0", drawn)) == -(-layers // 60)
    for line in drawn.splitlines():  # marks stand above their layers
        for mark in re.finditer(r"\d+", line) if "layer" in line else ():
            assert mark.start() - len("KV head 0 ") == int(mark[0]) % 60


def test_a_notebook_shows_the_same():
    full = np.array([[True, False], [False, False], [False, False]])
    scores = np.where(full, 2.0, -1.0)
    html = Allocation(full_attention=full, window=8, native_windows={2: 4}, scores=scores)._repr_html_()
    titles = re.findall('title="([^"]*)"', html)
    assert sorted(titles)[:2] == [
        "layer 0, KV head 0: full attention, score 2.00",
        "layer 0, KV head 1: sliding window, score -1.00",
    ]
    assert len(titles) == 6 and sum("native window" in title for title in titles) == 2
    assert html.count("<tr>") == html.count("</tr>") == 2
