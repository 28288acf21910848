"""What several processes run in tests, `torchrun ... tests/training/distributed_job.py DEVICE JSON`, a list of jobs."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch

from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.training import distributed
from consa.training.adaptation import adapt
from consa.training.learning import learn
from tests.models import allocate, tiny, tokens

ROOT = Path(__file__).parents[2]
SHAPES: dict[str, dict[str, int]] = {"cpu": {}, "cuda": {"head_dim": 32, "hidden_size": 192}}


def launch(*jobs: dict[str, Any], device: str = "cpu") -> Any:
    """Run the jobs in two processes; returns how that ended."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    return subprocess.run(
        [*command, __file__, device, json.dumps(jobs)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
        timeout=120,
    )


def results(out: Path | str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """What a job wrote: its record, and the weights it ended with."""
    return json.loads(Path(out).read_text()), torch.load(f"{out}.pt", weights_only=True, map_location="cpu")


def job(
    verb: str,
    settings: dict[str, Any],
    out: str,
    kill: int | None = None,
    run_dir: str | None = None,
    dtype: str = "float32",
    device: str = "cpu",
) -> None:
    """Learn or adapt a tiny model, and write what comes of it. The last process may die at a step."""

    def on_step(record: dict[str, float]) -> None:
        if record["step"] == kill and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model, text = tiny(**SHAPES[device]).to(device, getattr(torch, dtype)), tokens(9, 24).numpy()
    folder = None if run_dir is None else Path(run_dir)
    if verb == "learn":
        result = learn(model, text, LearnConfig(**settings), run_dir=folder, on_step=on_step)
        found = {"allocation": result.allocation.full_attention.tolist(), "history": result.history}
    else:
        kept = allocate(model, window=3)
        found = {"history": adapt(model, text, kept, AdaptConfig(**settings), run_dir=folder, on_step=on_step)}
    if distributed.is_main():
        torch.save(model.state_dict(), f"{out}.pt")
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        with distributed.group(sys.argv[1]):
            for options in json.loads(sys.argv[2]):
                job(**options, device=sys.argv[1])
    except ConsaError as error:
        sys.exit(f"error: {error}")
