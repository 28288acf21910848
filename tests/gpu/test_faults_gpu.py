"""On a CUDA device: what a command says when its memory is spent."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from consa import rules

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
ROOT = Path(__file__).parent.parent.parent
LIMITED = """
import sys, torch
torch.cuda.set_per_process_memory_fraction(48 * 2**20 / torch.cuda.get_device_properties(0).total_memory)
from consa.cli import commands as cli
sys.exit(main())
"""


@pytest.mark.parametrize("command", ["learn", "adapt"])
def test_spent_memory_is_one_line_that_names_options(command: str, tiny_model_folder: Path, tmp_path: Path):
    for index in range(20):
        (tmp_path / f"{index}.txt").write_text(f"{index} is followed by {index + 1}. " * 400)
    given = [str(tiny_model_folder), "--data", str(tmp_path / "*.txt"), "--out", str(tmp_path / "out")]
    given += ["--seq-len", "4096", "--sequences-per-step", "8", "--micro-batch", "8", "--num-heldout", "1"]
    if command == "adapt":
        rules.interleaved(4, 3, sparsity=0.5, window=16).save(tmp_path / "allocation.json")
        given += ["--allocation", str(tmp_path / "allocation.json")]
    done = subprocess.run(
        [sys.executable, "-c", LIMITED, command, *given], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("error: out of memory; ") and "--micro-batch" in last
    assert "Traceback" not in done.stderr
