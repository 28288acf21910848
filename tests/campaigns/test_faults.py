"""A few bad days of each kind; `python -m tests.campaigns.faults` has hundreds."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from tests.campaigns.fault_results import broken
from tests.campaigns.faults import FAULTS

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="forks, and gives up capabilities as Linux has them")
@pytest.mark.parametrize("fault", [name for name in FAULTS if "tmpfs" not in name])
def test_bad_days_end_well(fault: str):
    """In a process of its own: what is forked must have no threads."""
    command = [sys.executable, "-m", "tests.campaigns.faults", "--kills", "3", "--fault", fault]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("allocation.json", b'{"schema": 1}'),
        ("summary.json", b"{"),
        ("metrics.jsonl", b'{"step": 1}\n{"st'),
        ("a.npy", b"\x93NUMPY"),
        ("checkpoint.safetensors", bytes(9)),
        ("curves.png", b"\x89PNG"),
        ("frontier.csv", b"a,b"),
    ],
)
def test_what_is_half_written_is_seen(name: str, content: bytes, tmp_path: Path):
    (tmp_path / f".{name}.0123").write_bytes(content)  # not a final name
    assert not broken(tmp_path)
    (tmp_path / name).write_bytes(content)
    assert name in broken(tmp_path)
