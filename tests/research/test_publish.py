"""research/publish.py writes ConSA's rows of a record of methods under names that say what they are."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from consa import published
from consa.allocation import Allocation
from consa.report import facts
from research import publish

HEADS = ["11", "00", "10", "00"] * 7


def record() -> dict[str, Any]:
    def row(method: str, heads: list[str], seed: int = 0, granularity: str = "kv_head") -> dict[str, Any]:
        chosen = {"method": method, "granularity": granularity, "sparsity": 0.75, "seed": seed, "allocation": heads}
        return chosen | {"loss": 1.5, "recovered": 0.8, "retrieval": {"4096": 1.0}, "losses": [1.5]}

    return {
        "command": "python -m research.methods --model Qwen.gguf",
        "hardware": "GPU",
        "date": "2026-12-01",
        "versions": {"torch": "2"},
        "settings": {
            "model": "Qwen.gguf",
            "weights": "abc",
            "budget": {"sparsity": 0.5, "granularity": "kv_head", "window": 1024, "num_sink_tokens": 4, "seed": 0},
        },
        "rows": {
            "dense": {"method": "dense", "loss": 1.0, "retrieval": {"4096": 0.9}},
            "consa-kv_head-0.75-seed0": row("consa", HEADS),
            "consa-kv_head-0.75-seed0-other": row("consa", HEADS[::-1]),
            "consa-kv_head-0.75-seed1": row("consa", HEADS[::-1], seed=1),
            "consa-layer-0.75-seed0": row("consa", ["11", "00", "00", "00"] * 7, granularity="layer"),
            "top-kv_head-0.75-seed0": row("top", HEADS[::-1]),
        },
    }


@pytest.mark.parametrize("ending", ["", "-other"])
def test_rows_of_methods_become_files(ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for module in (publish, published):
        monkeypatch.setattr(module, "FOLDER", tmp_path / "allocations")
    path = tmp_path / "methods-qwen2.5-coder-1.5b-window1024.json"
    path.write_text(json.dumps(record()))
    monkeypatch.setattr(sys, "argv", ["publish.py", str(path), f"--ending={ending}"])
    publish.main()
    heads = "qwen2.5-coder-1.5b/kv_head-0.75-window1024"
    layers = [] if ending else ["qwen2.5-coder-1.5b/layer-0.75-window1024"]
    assert published.fitting("qwen2", (28, 2)) == [heads, *layers] == published.names()
    allocation = Allocation.load(heads)
    assert allocation.full_attention[0].tolist() == ([False, False] if ending else [True, True])
    assert (allocation.window, allocation.num_sink_tokens, allocation.granularity) == (1024, 4, "kv_head")
    origin = allocation.provenance
    assert origin["model"] == "qwen2.5-coder-1.5b" and (origin["weights"], origin["sha256"]) == ("Qwen.gguf", "abc")
    assert origin["config"]["sparsity"] == 0.75 and origin["config"]["seed"] == 0
    assert origin["row"] == f"consa-kv_head-0.75-seed0{ending}" and origin["command"] == record()["command"]
    assert origin["measured"] == {"loss": 1.5, "recovered": 0.8, "retrieval": {"4096": 1.0}}
    assert ("quality", "recovers 0.800, finds 1.00 of single needles (dense 0.90)") in facts.of(heads, tokens=100)


def test_quality_counts_tasks_and_not_lengths():
    row = {"recovered": 0.5, "retrieval": {"4096": 1.0, "8192": 1.0, "multi_key 4096": 0.5, "multi_key 8192": 0.0}}
    dense = {"retrieval": {"4096": 1.0, "multi_key 4096": 0.5}}
    assert publish.quality(row, dense) == "recovers 0.500, finds 0.62 of the answers of 2 retrieval tasks (dense 0.75)"
