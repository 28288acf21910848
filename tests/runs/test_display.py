"""What a run shows while it works."""

from __future__ import annotations

from pathlib import Path

import pytest

from consa.runs.display import Display
from consa.training.refinement import Exchange


@pytest.mark.parametrize(
    ("exchange", "text"),
    [
        (Exchange(3, None, 0.002, False, 1), "loss +0.00200, one unit tried alone"),
        (Exchange(3, 4, -0.002, True, 1), "loss -0.00200, exchange kept"),
        (Exchange(3, 4, 0.002, False, 1), "loss +0.00200, exchange undone"),
    ],
)
def test_a_unit_that_is_only_tried_is_not_reported_as_a_failed_exchange(
    exchange: Exchange, text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    with Display("Learning", 1, str, tmp_path, ()) as display:
        display.on_exchange(1, exchange)
    assert text in capsys.readouterr().err
