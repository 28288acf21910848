"""The folder of a run: one process at a time, and whose failure is whose."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from consa import ConsaError
from consa.runs import folder


def test_a_lock_that_its_last_holder_has_just_removed_is_none(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    fcntl = pytest.importorskip("fcntl", reason="an open file cannot be removed on Windows")
    lock, flock = tmp_path / ".lock", fcntl.flock

    def after_another(file: Any, how: int) -> None:
        lock.unlink()
        lock.touch()  # and yet another process has begun
        flock(file, how)

    monkeypatch.setattr(fcntl, "flock", after_another)
    with pytest.raises(ConsaError, match="in use by another process"), folder.claimed(tmp_path):
        raise AssertionError("it must not begin")


def test_what_fails_within_is_not_put_down_to_the_folder(tmp_path: Path):
    with pytest.raises(ConnectionResetError), folder.claimed(tmp_path / "run"):
        raise ConnectionResetError("peer")
    assert not (tmp_path / "run").exists()
