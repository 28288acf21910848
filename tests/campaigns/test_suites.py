"""What the tests of transformers see of a hybrid's cache, against a plain loop."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from consa.cache.layer import HybridLayer
from consa.cache.split import HeadSplit
from consa.cache.static import StaticHybridLayer
from tests.campaigns.suites import _kept

TOKENS, PREFILL, CAPACITY = 12, 7, 20


@pytest.mark.parametrize("first", [None, torch.tensor([0, 4])], ids=["no padding", "left padding"])
@pytest.mark.parametrize(
    "split",
    [HeadSplit((0, 2), (1, 3), 3, 1), HeadSplit((), (0, 1, 2, 3), 3, 0), HeadSplit((0, 1, 2, 3), (), 3, 1)],
    ids=["FA and SWA", "SWA", "FA"],
)
@pytest.mark.parametrize(
    ("make", "columns"),
    [(HybridLayer, TOKENS), (lambda split: StaticHybridLayer(split, CAPACITY), CAPACITY)],
    ids=["growing", "static"],
)
def test_a_layer_shows_the_tokens_that_it_keeps_in_their_columns(
    make: Callable[[HeadSplit], HybridLayer], columns: int, split: HeadSplit, first: Tensor | None
) -> None:
    keys, values = torch.randn(2, 2, 4, TOKENS, 5).unbind()
    layer = make(split)
    assert _kept(layer, 0) is None
    layer.update(keys[:, :, :PREFILL], values[:, :, :PREFILL])
    layer.write(keys[:, :, :PREFILL], values[:, :, :PREFILL], first)
    for t in range(PREFILL, TOKENS):
        layer.append(keys[:, :, t : t + 1], values[:, :, t : t + 1])
    for index, written in enumerate((keys, values)):
        expected = torch.zeros(2, 4, columns, 5)
        for row in range(2):
            start = 0 if first is None else int(first[row])
            for head in range(4):
                for column in range(TOKENS):
                    sink = start <= column < start + split.num_sink_tokens
                    if head in split.full or sink or column >= TOKENS - split.window:
                        expected[row, head, column] = written[row, head, column]
        shown = _kept(layer, index)
        assert shown is not None
        assert torch.equal(shown, expected)
