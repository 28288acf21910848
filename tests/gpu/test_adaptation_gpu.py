"""On a CUDA device: adaptation is repeatable bit for bit, goes on so, and follows float32 in bfloat16."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from consa import rules
from consa.config import AdaptConfig
from consa.training.adaptation import adapt
from tests.models import tiny, tokens

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
TEXT = tokens(8, 192).numpy()
KEPT = rules.interleaved(4, 3, sparsity=0.5, window=32, num_sink_tokens=0)
SHAPE: dict[str, Any] = {"head_dim": 32, "hidden_size": 192}
SETTINGS: dict[str, Any] = {"seq_len": 192, "num_steps": 6, "sequences_per_step": 2, "micro_batch": 2}
SETTINGS |= {"learning_rate": 1e-3, "distillation": 1.0, "gradient_checkpointing": True, "checkpoint_every": 2}


class Interrupted(Exception):
    pass


def trained(
    config: AdaptConfig, dtype: torch.dtype, run_dir: Path | None = None, stop: int | None = None
) -> tuple[list[dict[str, float]], dict[str, torch.Tensor]]:
    def on_step(record: dict[str, float]) -> None:
        if record["step"] == stop:
            raise Interrupted

    model = tiny(**SHAPE).to("cuda", dtype)
    history = adapt(model, TEXT, KEPT, config, run_dir=run_dir, on_step=on_step)
    return history, model.state_dict()


@pytest.mark.parametrize(
    "change", [{"method": "full"}, {"method": "lora"}, {"compile": True, "gradient_checkpointing": False}], ids=str
)
def test_repeatable_resumable_and_near_float32(change: dict[str, Any], tmp_path: Path):
    config = AdaptConfig(**SETTINGS | change)
    history, weights = trained(config, torch.bfloat16)
    with pytest.raises(Interrupted):
        trained(config, torch.bfloat16, tmp_path, stop=3)
    for again in (trained(config, torch.bfloat16), trained(config, torch.bfloat16, tmp_path)):
        assert again[0] == history
        assert all(torch.equal(value, weights[name]) for name, value in again[1].items())
    exact, _ = trained(config, torch.float32)
    losses, wanted = ([record["loss"] for record in found] for found in (history, exact))
    assert losses == pytest.approx(wanted, rel=3e-2)


def test_no_memory_stays_behind():
    trained(AdaptConfig(**SETTINGS), torch.bfloat16)  # libraries keep workspaces of their own
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    trained(AdaptConfig(**SETTINGS), torch.bfloat16)
    assert torch.cuda.memory_allocated() <= before
