"""Python by name: the same folders as the commands write, and results as objects."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import consa
from consa import Allocation, ConsaError, LearnConfig
from consa.model import load
from tests.cli.test_cli import consa_cli

SMALL: dict[str, Any] = {"seq_len": 96, "num_heldout": 2, "device": "cpu"}
STEPS: dict[str, Any] = {"num_steps": 2, "sequences_per_step": 1}
LEARN = {**SMALL, **STEPS, "window": 8, "refine_evaluations": 0}


@pytest.fixture(scope="module")
def run(tiny_model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("runs") / "learned"
    return consa.learn(tiny_model_folder, data=text_folder, sparsity=0.5, out=folder, **LEARN)


def test_learning_by_name_returns_what_the_folder_holds(run: Any, text_folder: Path):
    assert run.allocation == Allocation.load(run.folder) and run.allocation.sparsity == 0.5
    assert [record["step"] for record in run.history] == [1, 2]
    assert run.measured.line("learned").loss.mean == run.summary["losses"]["final"]
    assert run.verdict in (run.folder / "summary.md").read_text()
    command = json.loads((run.folder / "config.json").read_text())["command"]
    assert f"--data {text_folder}" in command and "--sparsity 0.5" in command


def test_the_recorded_command_continues_the_folder(run: Any):
    words = run.summary["command"].split()[1:]
    assert consa_cli(*words, "--out", run.folder).exit_code == 0  # a different run would be refused


def test_a_loaded_model_learns_as_before(tiny_model_folder: Path):
    model = load.load_model(str(tiny_model_folder), device="cpu").model
    sequences = np.arange(4 * 96).reshape(4, 96) % 50
    config = LearnConfig(window=8, seq_len=96, sparsity=0.5, refine_evaluations=0, **STEPS)
    result = consa.learn(model, sequences, config)
    assert result.allocation.sparsity == 0.5 and len(result.history) == 2


def test_an_allocation_is_adapted_and_measured(run: Any, tiny_model_folder: Path, text_folder: Path, tmp_path: Path):
    given = {"data": text_folder, **SMALL}
    adapted = consa.adapt(tiny_model_folder, allocation=run.allocation, out=tmp_path / "adapted", **given, **STEPS)
    assert adapted.adapted and adapted.verdict is None and len(adapted.history) == 2
    assert adapted.measured is not None and adapted.measured.line("adapted").cache_bytes > 0
    assert (tmp_path / "adapted" / "model" / "config.json").exists()
    table = consa.evaluate(tiny_model_folder, [run.folder, "top"], out=tmp_path / "eval", **given)
    assert [line.name for line in table.lines] == ["dense", "all_swa", str(run.folder), "top"]
    assert table.line(str(run.folder)).loss == run.measured.line("learned").loss


def test_a_sweep_returns_its_points(tiny_model_folder: Path, text_folder: Path, tmp_path: Path):
    given = {"data": text_folder, **SMALL, "window": 8}
    frontier = consa.sweep(tiny_model_folder, methods=["top", "bottom"], sparsity=[0.5, 0.75], out=tmp_path, **given)
    assert {(point.method, point.sparsity) for point in frontier.points} == {
        (method, sparsity) for method in ("top", "bottom") for sparsity in (0.5, 0.75)
    }


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"sparsitty": 0.5}, "sparsitty is no setting; did you mean sparsity?"),
        ({"zzz": 1}, "zzz is no setting"),
        ({"sparsity": 2}, "sparsity must be a share"),
        ({"data": "./nowhere"}, "names no file"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], named: str, tiny_model_folder: Path, tmp_path: Path):
    with pytest.raises(ConsaError, match=named):
        consa.learn(tiny_model_folder, out=tmp_path / "out", **settings)
    with pytest.raises(ConsaError, match="adapt needs allocation"):
        consa.adapt(tiny_model_folder)
    assert not (tmp_path / "out").exists()
