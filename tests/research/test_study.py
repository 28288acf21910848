"""benchmarks/study.py on a tiny model: every group of cells runs, resumes, and says what it did."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from consa.allocation import Allocation

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH = 256


@pytest.fixture
def study(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark with some arguments; returns its record."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rng = np.random.default_rng(0)
    for name, count in (("train", 4), ("heldout", 3)):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, 250, (count, LENGTH)).astype(np.uint16))
        (tmp_path / f"{name}.domains.txt").write_text("code\ndoc\nprose\ncode\n")
    given = ["--model", str(tiny_model_folder), "--start", "32", "--scale", "0.001"]
    given += ["--train", str(tmp_path / "train.npy"), "--heldout", str(tmp_path / "heldout.npy")]
    given += ["--tokens-at-once", "512", "--out", str(tmp_path / "study.json")]
    module = import_module("study")
    short = {"seq_len": 128, "sequences_per_step": 2, "refine_evaluations": 2, "refine_sequences": 1}
    cells = [
        module.Cell(
            cell.group,
            cell.name,
            short | {"window": 8} | cell.config | {"seq_len": 128},
            cell.domain,
            cell.variant,
        )
        for cell in module.cells()
        if cell.name in ("100", "kv_head-0.5", "64", "1", "code", "1 draw a step/0")
        or (cell.variant and cell.group == "part")
        or cell.name == "candidates by all steps/0.5"
    ]
    monkeypatch.setattr(module, "cells", lambda: cells)

    def run(*more: str) -> dict[str, Any]:
        monkeypatch.setattr(sys, "argv", ["study.py", *given, *more])
        module.main()
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
    page = "\n".join(import_module("sections.study").study(first))
    for shown in (
        "| 0.00 | 100 |",
        "| base |",
        "| text: code |",
        "| two multipliers | 2 |",
        "| 1 sinks | 1 |",
    ):
        assert shown in page, page
    assert import_module("sections.study").places_figure(first).startswith(b"\x89PNG")


def test_gains_are_paired(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rows = {"dense": 1.0, "all_swa/128/4": 2.0, "methods/interleaved-kv_head-0.5-seed0": 1.6}
    rows |= {f"methods/consa-kv_head-0.5-seed{seed}": 1.2 + 0.1 * seed for seed in range(2)}
    rows |= {"methods/top-kv_head-0.5-seed0": 1.9, "methods/consa-layer-0.5-seed0": 1.45}
    rows["whole/120 evaluations/0.5"] = 1.15
    document = np.array([0.0, 0.3, 0.9])  # harder or easier for all alike
    record = {"rows": {name: {"losses": (document + loss).tolist()} for name, loss in rows.items()}}
    section = import_module("sections.study")
    page = "\n".join(section._advantages(record))
    assert "| 0.5 | KV heads | interleaved, the best rule | 0.350 [0.350, 0.350] |" in page
    assert "| 0.5 | KV heads | layers, learned | 0.200 [0.200, 0.200] |" in page
    assert "| 120 evaluations | 0.5 | 0.100 [0.100, 0.100] |" in "\n".join(section._whole(record))
    answers = import_module("sections.answers")
    assert answers._whole(record, shorter=True) == []
    assert "by: with 120 evaluations 0.100 [0.100, 0.100] at 0.5." in answers._whole(record, shorter=False)[0]


def test_differences_on_models_from_scratch_need_no_losses_of_sequences(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    losses = {"dense": 1.0, "all_swa": 2.0, "top-kv_head-0.5-seed0": 1.5, "bosch-kv_head-0.5-seed0": 1.3}
    losses["consa-kv_head-0.5-seed0"] = 1.2
    answers = import_module("sections.answers")
    whole = {"methods-30m": {"rows": {name: {"loss": loss} for name, loss in losses.items()}}}
    assert "KV heads: 0.300 at 0.5." in answers._scales(whole)[0]
    assert "30M: 0.100 (bosch) at 0.5." in answers._peers_of_scales(whole)[0]
    each = {name: {"loss": loss, "losses": [loss - 0.1, loss, loss + 0.1]} for name, loss in losses.items()}
    each["bosch-kv_head-0.5-seed0"]["losses"] = [1.2, 1.4, 1.3]
    (said,) = answers._peers_of_scales({"methods-30m": {"rows": each}})
    assert "30M: 0.100 [" in said


def test_a_variant_changes_what_is_learned_and_leaves_no_trace(study: Any):
    variants = [cell for cell in study.cells if cell.variant and cell.name.endswith("/0")]
    assert len(variants) == 4
    rows = study("--groups", "part,steps")["rows"]
    scores = {cell.name: rows[f"part/{cell.name}"]["allocation"]["scores"] for cell in variants}
    plain = rows["steps/100"]["allocation"]["scores"]
    assert all(found != plain for found in scores.values())
    assert len({json.dumps(found) for found in scores.values()}) == 4


def test_candidates_by_all_steps_are_those_whose_gates_stayed_open(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    variants, learning = import_module("variants"), import_module("consa.training.learning")
    ordered: list[np.ndarray] = []

    def refine(model: Any, allocation: Allocation, *_: Any, **__: Any) -> Allocation:
        assert allocation.scores is not None
        ordered.append(allocation.scores)
        return allocation

    monkeypatch.setattr(learning, "refine", refine)
    monkeypatch.setattr(learning, "_update", lambda state, *_: {"step": 0.0})
    allocation = Allocation(full_attention=np.eye(2, dtype=bool), window=4, scores=np.zeros((2, 2)))
    with variants.candidates_by_all_steps(None):
        for step in range(3):
            learning._update(SimpleNamespace(log_alpha=torch.tensor([3.0, -7.0, 2.0 - step, -7.0])))
        learning.refine(None, allocation)
    np.testing.assert_allclose(ordered[0], [[3, -7], [1, -7]])
    assert learning.refine is refine


def test_of_rules_only_the_best_are_measured_again(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    recovered = {"consa": (0.1, 0.1), "middle": (0.2, 0.2), "top": (0.3, 0.0), "bosch": (0.0, 0.0)}
    rows: dict[str, Any] = {"dense": {"method": "dense"}}
    for method, values in recovered.items():
        for granularity, value in zip(("kv_head", "layer"), values, strict=True):
            row = {"method": method, "granularity": granularity, "sparsity": 0.5, "recovered": value}
            rows[f"{method}-{granularity}"] = row
    methods = {f"{method}-{unit}" for method in ("consa", "bosch") for unit in ("kv_head", "layer")}
    found = import_module("study").worth_measuring(rows)
    assert found.keys() == methods | {"top-kv_head", "middle-layer"}
