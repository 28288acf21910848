"""research/distributed.py on a tiny model and CPU processes: what a record compares."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from research import distributed
from research.records import read


@pytest.mark.skipif(distributed.ON_GPU, reason="a GPU's rows have speeds")
def test_two_processes_give_units_the_scores_of_one(
    tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    np.save(tmp_path / "train.npy", np.random.default_rng(0).integers(2, 250, (20, 200)))
    given = ["--model", str(tiny_model_folder), "--seq-len", "160", "--tokens-per-step", "320", "--steps", "4"]
    given += ["--train", str(tmp_path / "train.npy"), "--verbs", "learn", "--out", str(tmp_path / "out.json")]
    monkeypatch.setattr(sys, "argv", ["distributed", *given])
    distributed.main()
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    name = f"learn {tiny_model_folder.name}, 160 tokens, ddp"
    assert distributed.table(rows) == [[name, number, "yes", "yes", 0.0] for number in "12"]
    assert np.shape(rows[f"{name} @2"]["scores"]) == (4, 3)
    changed = copy.deepcopy(rows)
    changed[f"{name} @2"]["scores"][0][0] += 1e-15
    assert distributed.table(changed)[1] == [name, "2", "yes", "NO", 0.0]


def test_rows_of_gpus_have_speeds(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "ON_GPU", True)
    record = read("distributed")  # older than the column of scores
    assert [line[:-2] + line[-1:] for line in distributed.table(record["rows"])] == record["table"]
