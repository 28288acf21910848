"""research/study.py on a tiny model: every group of cells runs, resumes, and says what it did."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consa.allocation import Allocation
from research import analysis, figures
from research import study as study_module

LENGTH = 256


@pytest.fixture
def study(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark with some arguments; returns its record."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 4), ("heldout", 3)):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, 250, (count, LENGTH)).astype(np.uint16))
        (tmp_path / f"{name}.domains.txt").write_text("code\ndoc\nprose\ncode\n")
    given = ["--model", str(tiny_model_folder), "--start", "32", "--scale", "0.001"]
    given += ["--train", str(tmp_path / "train.npy"), "--heldout", str(tmp_path / "heldout.npy")]
    given += ["--tokens-at-once", "512", "--out", str(tmp_path / "study.json")]
    short = {"seq_len": 128, "sequences_per_step": 2, "refine_evaluations": 2, "refine_sequences": 1}
    cells = [
        study_module.Cell(
            cell.group, cell.name, short | {"window": 8} | cell.config | {"seq_len": 128}, cell.domain, cell.variant
        )
        for cell in study_module.cells()
        if cell.name in ("100", "kv_head-0.5", "64", "1", "code", "1 draw a step/0")
        or (cell.variant and cell.group == "part")
        or cell.name == "candidates by all steps/0.5"
    ]
    monkeypatch.setattr(study_module, "cells", lambda: cells)

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["study.py", *given, *more])
        study_module.main()
        return json.loads((tmp_path / "study.json").read_text())

    run.cells = cells  # pyright: ignore[reportFunctionMemberAccess]
    return run


def test_every_cell_is_measured_once(study: Any, capsys: pytest.CaptureFixture[str]):
    groups = ",".join({cell.group for cell in study.cells})
    first = study("--groups", groups)
    names = {f"{cell.group}/{cell.name}" for cell in study.cells}
    assert names <= first["rows"].keys() and "dense" in first["rows"]
    assert {name for name in first["rows"] if name.startswith("all_swa")} >= {"all_swa/64/4", "all_swa/8/1"}
    for name in names:
        row = first["rows"][name]
        assert len(row["losses"]) == len(row["gates_losses"]) == 3 and np.isfinite(row["losses"]).all()
        assert Allocation.from_json(json.dumps(row["allocation"])).scores is not None
        assert 0 <= row["expected_sparsity"] <= 1
    capsys.readouterr()
    assert study("--groups", groups)["rows"] == first["rows"]
    assert capsys.readouterr().out.strip() == "complete"
    record = analysis.in_order(first)
    assert len(analysis.parts(record)["two multipliers"]) == 2
    assert {"base", "text: code", "window of 64", "sinks: 1"} <= analysis.located(record).keys()
    assert figures.places(first).startswith(b"\x89PNG")


def test_a_variant_changes_what_is_learned_and_leaves_no_trace(study: Any):
    variants = [cell for cell in study.cells if cell.variant and cell.name.endswith("/0")]
    assert len(variants) == 4
    rows = study("--groups", "part,steps")["rows"]
    scores = {cell.name: rows[f"part/{cell.name}"]["allocation"]["scores"] for cell in variants}
    plain = rows["steps/100"]["allocation"]["scores"]
    assert all(found != plain for found in scores.values())
    assert len({json.dumps(found) for found in scores.values()}) == 4


def test_of_rules_only_the_best_are_measured_again():
    recovered = {"consa": (0.1, 0.1), "middle": (0.2, 0.2), "top": (0.3, 0.0), "bosch": (0.0, 0.0)}
    rows: dict[str, Any] = {"dense": {"method": "dense"}}
    for method, values in recovered.items():
        for granularity, value in zip(("kv_head", "layer"), values, strict=True):
            row = {"method": method, "granularity": granularity, "sparsity": 0.5, "recovered": value}
            rows[f"{method}-{granularity}"] = row
    methods = {f"{method}-{unit}" for method in ("consa", "bosch") for unit in ("kv_head", "layer")}
    assert study_module.worth_measuring(rows).keys() == methods | {"top-kv_head", "middle-layer"}
