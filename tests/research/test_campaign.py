"""benchmarks/campaign.py: which GPUs its jobs get, in which order, and when it stops."""

from __future__ import annotations

import time
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"


@pytest.fixture
def campaign(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    module = import_module("campaign")
    monkeypatch.setattr(module, "POLL_SECONDS", 0.02)
    return module


def test_jobs_share_gpus_in_order(campaign: Any, tmp_path: Path):
    """One that needs both waits for both, and nothing overtakes it; what fails keeps nothing else from being run."""
    trace = tmp_path / "trace"
    alone = f"echo begin $CUDA_VISIBLE_DEVICES >> {trace}; {{}}; echo end >> {trace}"
    met = f"until [ $(grep -c begin {trace}) = 3 ]; do sleep 0.02; done"  # ends only beside the other
    wanted = [
        campaign.Job("first", (alone.format("sleep 0.1"), "false", f"echo third {{left}} >> {trace}")),
        campaign.Job("both", (f"echo both $CUDA_VISIBLE_DEVICES >> {trace}",), gpus=2),
        campaign.Job("last", (alone.format(met),)),
        campaign.Job("other", (alone.format(met),)),
        campaign.Job("too large", (f"echo never >> {trace}",), gpus=3),
    ]
    said: list[str] = []
    campaign.run(wanted, 2, 1000.0, tmp_path / "logs", said.append)
    lines = trace.read_text().splitlines()
    assert lines[:2] == ["begin 0", "end"] and 900 < int(lines[2].removeprefix("third ")) <= 1000
    assert lines[3] == "both 0,1"
    assert sorted(lines[4:6]) == ["begin 0", "begin 1"] and lines[6:] == ["end", "end"]
    assert any("first, 2: exit code 1" in line for line in said)
    assert "false" in (tmp_path / "logs" / "first.log").read_text()


def test_nothing_begins_late(campaign: Any, tmp_path: Path):
    said: list[str] = []
    began = time.monotonic()
    slow = campaign.Job("slow", ("sleep 1", "sleep 60"))
    campaign.run([slow, campaign.Job("next", ("sleep 60",))], 1, 0.5, tmp_path, said.append)
    assert time.monotonic() - began < 30 and "s: slow, 1: exit code 0" in said[-1]
    assert "not begun: next" in said


def test_every_command_names_what_exists(campaign: Any):
    for job in campaign.jobs():
        for command in job.commands:
            scripts = [
                word for word in command.split() if word.startswith("benchmarks/") and word[-3:] == ".py"
            ]
            assert all((BENCHMARKS.parent / script).is_file() for script in scripts)
            assert scripts or "recipes.from_scratch" in command
