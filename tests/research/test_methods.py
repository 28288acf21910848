"""research/methods.py on a tiny model: what it runs, what it foretells, and that its parts make one table."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consa.config import ChoiceConfig
from consa.errors import ConsaError
from consa.methods import METHODS
from consa.methods.problem import Problem
from consa.model.load import load_model, read_layout
from consa.rules import RULES
from research import merge, methods, variants
from research.variants import Distilled

LENGTH = 600
BUDGET = ("num_steps=2", "sequences_per_step=2", "evaluations=8", "evaluation_sequences=2", "window=6")
BUDGET += ("num_lengths=1", "per_length=2")


@pytest.fixture
def call(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark with some arguments, writing to a file of that name."""
    rng = np.random.default_rng(0)
    for name, count in (("train", 3), ("heldout", 2)):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, 250, (count, LENGTH)).astype(np.uint16))
    given = ["--model", str(tiny_model_folder), "--sparsity", "0.5,0.75", "--seeds", "2", "--start", "100"]
    given += ["--train", str(tmp_path / "train.npy"), "--heldout", str(tmp_path / "heldout.npy")]
    given += ["--lengths", str(LENGTH), "--examples", "1", *(f"--budget={item}" for item in BUDGET)]

    def run(out: str, *more: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["methods.py", *given, "--out", str(tmp_path / out), *more])
        methods.main()
        return tmp_path / out

    return run


def rows_of(path: Path) -> dict[str, Any]:
    return {name: row for name, row in json.loads(path.read_text())["rows"].items() if name not in ("dense", "all_swa")}


def test_the_plan_holds_every_method_and_every_rule_and_later_seeds_of_what_draws(
    call: Any, capsys: pytest.CaptureFixture[str]
):
    plan = methods.PLAN
    assert set(plan) == set(METHODS) | set(RULES) and next(iter(plan)) == "consa"
    call("none.json", "--estimate")
    runs = [line.split("|")[1].strip() for line in capsys.readouterr().out.splitlines() if "-seed" in line]
    first = [name for name in runs if name.endswith("seed0")]
    assert runs[: len(first)] == first and {name.split("-")[0] for name in first} == set(plan)
    draws = {"consa", "prulong", "duo_attention", "bosch", "nested", "random_units"}
    assert {name.split("-")[0] for name in runs[len(first) :]} == draws


@pytest.mark.timeout(600)
def test_shares_make_one_table_that_costs_what_was_foretold(
    call: Any,
    tiny_model_folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
):
    chosen = "--methods=consa,middle,random_units,nll_guided,duo_attention,bosch,nested,lazy_layers"
    call("none.json", "--estimate", "--seeds=1", chosen)
    last = capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "none.json").exists()
    planned = list(methods.planned(methods.parse()))
    parts = [call(f"{i}.json", f"--share={i}/2", "--seeds=1", chosen) for i in (1, 2)]
    assert not set(rows_of(parts[0])) & set(rows_of(parts[1]))
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, parts), "--out", str(tmp_path / "all.json")])
    merge.main()
    rows = rows_of(tmp_path / "all.json")
    command = json.loads((tmp_path / "all.json").read_text())["command"]
    assert "--share=I/2" in command and f"--out {tmp_path / 'all.json'}" in command
    assert set(rows) == {choice.name for run in planned for choice in run} and f" {len(rows)} rows" in last
    layout = read_layout(str(tiny_model_folder))
    for run in planned:
        assert len(run) == (2 if run[0].method.ranks else 1)
        foretold = methods.estimate(run[0], layout, LENGTH)
        for choice in run:
            row = rows[choice.name]
            assert (row["of_one_run"], row["processes"]) == (len(run), 2)
            assert row["retrieval"].keys() == {str(LENGTH)}
            spent = tuple(row["cost"][f"{direction}_tokens"] for direction in ("forward", "backward"))
            if choice.method.name == "consa":  # its refinement may end early
                assert spent[0] <= foretold[0] and spent[1] == foretold[1]
            elif choice.method.name in ("duo_attention", "nll_guided"):  # a question is shorter by up to a sentence
                assert all(0.75 * most <= took <= most for took, most in zip(spent, foretold, strict=True))
            else:
                assert spent == foretold

    monkeypatch.setattr(methods, "make", None)  # nothing is left to do
    before = rows_of(parts[0])
    call("1.json", "--share=1/2", "--seeds=1", chosen)
    assert rows_of(parts[0]) == before
    with pytest.raises(SystemExit, match="was measured with"):
        call("1.json", "--seeds=1", "--examples=2")


@pytest.mark.timeout(600)
def test_shares_of_retrieval_are_rows_of_their_own_and_tasks_are_told_apart(call: Any):
    asked = ("--tasks=single,multi_value", "--methods=consa,lazy_layers", "--granularity=kv_head", "--sparsity=0.5")
    rows = rows_of(call("mixed.json", "--seeds=1", "--retrieval=0,1", *asked))
    first = "consa-kv_head-0.5-seed0"
    assert list(rows) == [first, f"{first}-retrieval1", "lazy_layers-kv_head-0.5-seed0"]
    assert [row["retrieval_share"] for row in rows.values()] == [0, 1, 0]
    assert list(rows[first]["retrieval"]) == [str(LENGTH), f"multi_value {LENGTH}"]


@pytest.mark.timeout(600)
def test_methods_that_are_not_in_the_plan_run_by_their_class(call: Any, capsys: pytest.CaptureFixture[str]):
    methods = "--methods=research.variants:Distilled,research.variants:Backward"
    asked = (methods, "--granularity=kv_head", "--sparsity=0.5", "--seeds=1", "--retrieval=0,1", "--examples=0")
    asked += ("--budget=num_tried=2", "--budget=evaluations=25", "--budget=refine_evaluations=1")
    call("others.json", *asked, "--estimate")
    assert "distilled-kv_head-0.5-seed0-retrieval1" in capsys.readouterr().out
    rows = rows_of(call("others.json", *asked))
    names = [f"{name}-kv_head-0.5-seed0" for name in ("distilled", "backward")]
    assert list(rows) == [name + end for name in names for end in ("", "-retrieval1")]
    assert [row["cost"]["backward_tokens"] for row in rows.values()] == [2 * 2 * LENGTH] * 2 + [0, 0]


def test_distilled_gates_follow_the_dense_model(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    loaded = load_model(str(tiny_model_folder), device="cpu")
    problem = Problem(loaded, np.arange(1300).reshape(2, 650) % 250, ChoiceConfig(window=6))
    objective = Distilled(retrieval=0.25).objective(problem)
    assert objective.factors == {"distillation": 1.0} and objective.needs_dense
    assert objective.drawn(problem.sequences, 0, range(1)).weights is not None
    provenance = Distilled(num_steps=1, refine_evaluations=0).choose(problem).provenance
    assert provenance["replaced"] == ["Mixture(distillation=1.0)"]


def test_backward_closes_what_costs_least_and_then_exchanges(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    costs = np.random.default_rng(0).random(12)
    monkeypatch.setattr(Problem, "loss", lambda problem, full, texts: float(costs[~full].sum()))
    left: list[int] = []

    def exchanged(problem: Problem, start: Any, texts: Any, max_evaluations: int) -> np.ndarray:
        left.append(max_evaluations)
        return problem.gather(start.full_attention)

    monkeypatch.setattr(variants, "exchanged", exchanged)
    problem = Problem(load_model(str(tiny_model_folder), device="cpu"), np.ones((2, 20), int), ChoiceConfig())
    allocation = variants.Backward(evaluations=40, num_tried=2).choose(problem)
    assert (problem.gather(allocation.full_attention) == (costs >= np.sort(costs)[-3])).all()
    assert left == [40 - 1 - 12 - 8 * 2]
    with pytest.raises(ConsaError, match="evaluations must be at least 30 for backward"):
        variants.Backward(evaluations=29, num_tried=2).check(problem.loaded.layout, problem.config)


def test_what_is_not_in_the_plan_is_refused(call: Any):
    with pytest.raises(SystemExit, match=r"--methods takes some of consa,.*got 'duo'"):
        call("none.json", "--methods=duo")
