"""One line of at most 80 columns, with the time left."""

from __future__ import annotations

import io
import sys
import time

import pytest

from consa import progress


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.4, "0s"), (59, "59s"), (60, "1m"), (3599, "59m"), (3600, "1h 00m"), (3 * 3600 + 5 * 60, "3h 05m")],
)
def test_durations(seconds: float, text: str):
    assert progress.duration(seconds) == text


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    now = [100.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])
    return now


def test_time_left_counts_what_this_process_has_done(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with progress.progress("Learning", 100) as update:
        clock[0] += 30
        update(41, "loss 2.000")  # an earlier process did the first 40
        clock[0] += 30
        update(42, "loss 1.000")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Learning 41/100, 29m left: loss 2.000", "Learning 42/100, 29m left: loss 1.000"]


def test_a_job_is_named_before_its_first_unit(clock: list[float], capsys: pytest.CaptureFixture[str]):
    with progress.progress("Choosing", 2) as update:
        update(0, "consa-seed0")
        clock[0] += 60
        update(1, "bosch-seed0")
    lines = capsys.readouterr().err.splitlines()
    assert lines == ["Choosing 0/2: consa-seed0", "Choosing 1/2, 1m left: bosch-seed0"]


@pytest.mark.parametrize("terminal", [False, True])
def test_lines_fit_a_terminal(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    class Screen(io.StringIO):
        def isatty(self) -> bool:
            return terminal

    screen = Screen()
    monkeypatch.setattr(sys, "stderr", screen)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    with progress.progress("Measuring", 3) as update:
        update(1, "a very long name of an allocation, " * 5)
    shown = screen.getvalue()
    assert "Measuring 1/3, 0s left: a very long" in shown
    assert len([line for line in shown.splitlines() if "long" in line]) == 1
    assert "\x1b" in shown if terminal else max(map(len, shown.splitlines())) < 80


def test_the_longest_lines_of_training_need_no_cut():
    """Six digits of steps' speed and days of work still fit."""
    for title, middle in (("Learning", "sparsity 0.712"), ("Adapting", "held-out 2.123")):
        line = f"{title} 123/200, 12m left: loss 2.345, {middle}, 12345 tokens/s, 8.1 GiB"
        assert progress.shortened(line) == line
