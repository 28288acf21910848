"""What the processes of tests/test_distributed.py run: `torchrun ... tests/distributed_job.py JSON`, a list of jobs."""

from __future__ import annotations

import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch

from consa import distributed
from consa.adaptation import adapt
from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.learning import learn
from tests.models import allocate, tiny, tokens


def job(
    verb: str,
    settings: dict[str, Any],
    out: str,
    kill: int | None = None,
    run_dir: str | None = None,
    dtype: str = "float32",
) -> None:
    """Learn or adapt a tiny model, and write what comes of it. The last process may die at a step."""

    def on_step(record: dict[str, float]) -> None:
        if record["step"] == kill and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    model, text = tiny().to(getattr(torch, dtype)), tokens(9, 24).numpy()
    folder = None if run_dir is None else Path(run_dir)
    if verb == "learn":
        result = learn(model, text, LearnConfig(**settings), run_dir=folder, on_step=on_step)
        found = {"allocation": result.allocation.full_attention.tolist(), "history": result.history}
    else:
        kept = allocate(model, window=3)
        found = {
            "history": adapt(model, text, kept, AdaptConfig(**settings), run_dir=folder, on_step=on_step)
        }
    if distributed.is_main():
        torch.save(model.state_dict(), f"{out}.pt")
        Path(out).write_text(json.dumps(found))


if __name__ == "__main__":
    try:
        with distributed.group("cpu"):
            for options in json.loads(sys.argv[1]):
                job(**options)
    except ConsaError as error:
        sys.exit(f"error: {error}")
