"""research/adaptation.py on a tiny model: its rows, that it continues, and what its comparisons mean."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from consa import rules
from consa.evaluation.intervals import bootstrap
from research import adaptation
from research.analysis import best_trained_rule
from research.records import digits_of

LENGTH = 600


@pytest.fixture
def call(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark with more arguments; returns what its file holds then."""
    chosen = {
        f"consa-{granularity}-{sparsity}-seed0": {"method": "consa", "granularity": granularity, "allocation": heads}
        for granularity, sparsity, heads in (
            ("kv_head", 0.5, ["100", "011", "010", "110"]),
            ("kv_head", 0.75, ["100", "010", "001", "000"]),
            ("layer", 0.5, ["111", "000"] * 2),
            ("layer", 0.75, ["000", "111"] * 2),
        )
    }
    budget = {"sparsity": 0.9, "window": 6, "num_sink_tokens": 4, "num_steps": 2, "refine_evaluations": 1}
    (tmp_path / "methods.json").write_text(json.dumps({"settings": {"budget": budget}, "rows": chosen}))
    rng = np.random.default_rng(0)
    for name, count in (("train", 10), ("heldout", 2)):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, 250, (count, LENGTH)).astype(np.uint16))
    given = ["--model", str(tiny_model_folder), "--start", "100", "--out", str(tmp_path / "out.json")]
    given += ["--allocations", str(tmp_path / "methods.json"), "--sparsity", "0.5"]
    given += ["--train", str(tmp_path / "train.npy"), "--heldout", str(tmp_path / "heldout.npy")]
    given += ["--lengths", str(LENGTH), "--examples", "2", "--tokens", "1200", "--sequences-per-step", "2"]

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["adaptation.py", *given, "--micro-batch", "2", *more])
        adaptation.main()
        return json.loads((tmp_path / "out.json").read_text())

    return run


def test_choosing_again_adapts_in_two_halves(call: Any, monkeypatch: pytest.MonkeyPatch):
    runs: list[Any] = []
    monkeypatch.setattr(adaptation, "adapt", lambda *run, **_: runs.append(run) or [])
    monkeypatch.setattr(adaptation, "learn", lambda *run: runs.append(run) or chosen)
    shape = {"window": 6, "num_sink_tokens": 4}
    chosen = SimpleNamespace(allocation=rules.bottom(4, 3, sparsity=0.5, granularity="kv_head", **shape))
    row = call("--rows", "again/4", "--tokens", "4800")["rows"]["again/4"]
    (_, text, first, half), (_, _, learning), (_, same, second, rest) = runs
    assert half.num_steps == rest.num_steps == 2 and half.seed != rest.seed and text is same
    assert digits_of(first) == ["100", "011", "010", "110"] and second is chosen.allocation
    assert learning.mode == "frozen" and learning.sparsity == first.sparsity
    assert row["allocation"] == digits_of(second)


def test_every_row_is_measured_once(call: Any, capsys: pytest.CaptureFixture[str]):
    names = adaptation.ROWS
    call("--rows", ",".join(names[:2]))
    first = call("--seconds", "0")
    assert list(first["rows"]) == names[:2] and "11 runs left" in capsys.readouterr().out
    record = call()
    assert list(record["rows"]) == names and "complete" in capsys.readouterr().out
    assert record["rows"]["dense"] == first["rows"]["dense"]
    assert record["steps"] == 1 and record["train_sequences"] == 10 - 2 * record["learn_sequences_per_step"]
    rows = record["rows"]
    dense, floor, hybrid = (rows[name] for name in ("dense", "all_swa/4", "kv_head/4"))
    assert hybrid["allocation"] == ["100", "011", "010", "110"]
    assert [rows[name]["recovered_before"] for name in ("all_swa/4", "all_swa/0")] == [0, 0]
    assert floor["recovered_of_trained"] == 0 and dense["behind_dense"] == 0
    wanted = floor["before"]["loss"] - hybrid["after"]["loss"]
    wanted /= floor["before"]["loss"] - dense["after"]["loss"]
    assert hybrid["recovered"] == pytest.approx(wanted, abs=1e-4)
    with pytest.raises(SystemExit, match="was measured with"):
        call("--start", "50")


def test_rows_adapt_with_retrieval_beside_the_others(call: Any, capsys: pytest.CaptureFixture[str]):
    tasks = ("--tasks", "single,multi_value", "--examples", "1")
    rows = call("--rows", "dense,all_swa/4,kv_head/4", "--retrieval", "0,0.5", *tasks)["rows"]
    plain, mixed = list(rows)[:3], list(rows)[3:]
    assert mixed == [f"{name}/retrieval0.5" for name in plain]
    for name, other in zip(plain, mixed, strict=True):
        assert rows[name]["before"] == rows[other]["before"] and rows[name]["losses"] != rows[other]["losses"]
        assert list(rows[other]["after"]["retrieval"]) == [str(LENGTH), f"multi_value {LENGTH}"]
    dense, floor, hybrid = (rows[name] for name in mixed)
    assert dense["behind_dense"] == 0 and floor["recovered_of_trained"] == 0
    assert hybrid["behind_dense"] == pytest.approx(hybrid["after"]["loss"] - dense["after"]["loss"], abs=1e-5)
    differences = np.subtract(hybrid["after"]["losses"], dense["after"]["losses"])
    paired = bootstrap(differences, np.arange(2))
    shown = capsys.readouterr().out.splitlines()[-1]
    assert paired.low < paired.high and shown.startswith("| kv_head/4/retrieval0.5 |") and f"| {paired} |" in shown


def test_a_row_can_name_its_sparsity(call: Any):
    record = call("--rows", "dense,all_swa/4,kv_head/4/0.75,layer/4/0.75,top/4/0.75,middle_layer/4/0.75")
    rows = record["rows"]
    assert rows["kv_head/4/0.75"]["allocation"] == ["100", "010", "001", "000"]
    assert rows["layer/4/0.75"]["allocation"] == ["000", "111"] * 2
    assert rows["top/4/0.75"]["allocation"] == ["000"] * 3 + ["111"]
    assert rows["middle_layer/4/0.75"]["allocation"] == ["000", "111", "000", "000"]
    name, best = best_trained_rule(record, "0.75")
    losses = {name: rows[name]["after"]["loss"] for name in ("top/4/0.75", "middle_layer/4/0.75")}
    assert best["after"]["loss"] == losses[name] == min(losses.values())
    with pytest.raises(SystemExit, match=r"or rules, got best/4"):
        call("--rows", "best/4")
