"""On two CUDA devices, through NCCL: what two processes learn and train is what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.compare import assert_close
from tests.training.distributed_job import job, launch, results

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")]
ADAPT = {"num_steps": 4, "sequences_per_step": 4, "learning_rate": 3e-3, "checkpoint_every": 2, "micro_batch": 1}
LEARN = {"sparsity": 0.5, "window": 3, "num_sink_tokens": 1, "num_steps": 8, "sequences_per_step": 4}
LEARN |= {"gate_lr": 0.5, "refine_evaluations": 4, "refine_sequences": 3, "checkpoint_every": 2, "micro_batch": 1}
JOBS: dict[str, dict[str, Any]] = {
    "frozen": {"verb": "learn", "settings": LEARN, "dtype": "bfloat16"},
    "layers": {"verb": "learn", "settings": LEARN | {"granularity": "layer", "micro_batch": 2}},
    "joint": {"verb": "learn", "settings": LEARN | {"mode": "joint", "weight_lr": 1e-3, "parallel": "fsdp"}},
    "adapt": {"verb": "adapt", "settings": ADAPT},
    "fsdp": {"verb": "adapt", "settings": ADAPT | {"parallel": "fsdp"}},
}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every job."""
    folder = tmp_path_factory.mktemp("two")
    done = launch(*(wanted | {"out": str(folder / name)} for name, wanted in JOBS.items()), device="cuda")
    assert done.returncode == 0, done.stderr
    return folder


@pytest.mark.parametrize("name", JOBS)
def test_two_gpus_do_what_one_does(name: str, two: Path, tmp_path: Path):
    job(**JOBS[name], out=str(tmp_path / "one"), device="cuda")
    (found, weights), (wanted, others) = results(two / name), results(tmp_path / "one")
    if name in ("frozen", "layers"):
        assert found == wanted, "gates alone: the same bits"
    assert found.get("allocation") == wanted.get("allocation")
    for record, other in zip(found["history"], wanted["history"], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
    for key, value in weights.items():
        assert_close(value.float(), others[key].float(), 1e-2, key)


def test_one_goes_on_where_two_were_killed(two: Path, tmp_path: Path):
    common = JOBS["fsdp"] | {"run_dir": str(tmp_path / "run")}
    done = launch(common | {"out": str(tmp_path / "killed"), "kill": 3}, device="cuda")
    assert done.returncode != 0 and "Signal 9" in done.stderr and not (tmp_path / "killed").exists()
    job(**common | {"out": str(tmp_path / "one")}, device="cuda")
    (found, _), (wanted, _) = results(tmp_path / "one"), results(two / "fsdp")
    for record, other in zip(found["history"], wanted["history"], strict=True):
        assert record["loss"] == pytest.approx(other["loss"], rel=1e-4)
