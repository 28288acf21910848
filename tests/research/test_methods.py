"""benchmarks/methods.py on a tiny model: what it runs, what it foretells, and that its parts make one table."""

from __future__ import annotations

import json
import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from consa.methods import METHODS, RANKINGS, duo_attention
from consa.model.load import read_layout
from consa.rules import RULES

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
LENGTH = 600
BUDGET = ("num_steps=2", "sequences_per_step=2", "evaluations=8", "evaluation_sequences=2", "window=6")


@pytest.fixture
def call(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the benchmark with some arguments, writing to a file of that name."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    monkeypatch.setattr(duo_attention, "NUM_LENGTHS", 1)
    monkeypatch.setattr(duo_attention, "PER_LENGTH", 2)
    rng = np.random.default_rng(0)
    for name, count in (("train", 3), ("heldout", 2)):
        np.save(tmp_path / f"{name}.npy", rng.integers(2, 250, (count, LENGTH)).astype(np.uint16))
    given = ["--model", str(tiny_model_folder), "--sparsity", "0.5,0.75", "--seeds", "2", "--start", "100"]
    given += ["--train", str(tmp_path / "train.npy"), "--heldout", str(tmp_path / "heldout.npy")]
    given += ["--lengths", str(LENGTH), "--examples", "1", *(f"--budget={item}" for item in BUDGET)]

    def run(out: str, *more: str) -> Path:
        monkeypatch.setattr(sys, "argv", ["methods.py", *given, "--out", str(tmp_path / out), *more])
        import_module("methods").main()
        return tmp_path / out

    return run


def rows_of(path: Path) -> dict[str, Any]:
    return {
        name: row
        for name, row in json.loads(path.read_text())["rows"].items()
        if name not in ("dense", "all_swa")
    }


def test_the_plan_holds_every_method_and_every_rule_and_later_seeds_of_what_draws(
    call: Any, capsys: pytest.CaptureFixture[str]
):
    plan = import_module("methods").PLAN
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
    benchmark = import_module("methods")
    chosen = "--methods=consa,middle,random_units,nll_guided,duo_attention,bosch,nested,lazy_layers"
    call("none.json", "--estimate", "--seeds=1", chosen)
    last = capsys.readouterr().out.splitlines()[-1]
    assert not (tmp_path / "none.json").exists()
    planned = list(benchmark.planned(benchmark.parse()))
    parts = [call(f"{i}.json", f"--share={i}/2", "--seeds=1", chosen) for i in (1, 2)]
    assert not set(rows_of(parts[0])) & set(rows_of(parts[1]))
    monkeypatch.setattr(sys, "argv", ["merge.py", *map(str, parts), "--out", str(tmp_path / "all.json")])
    import_module("merge").main()
    rows = rows_of(tmp_path / "all.json")
    command = json.loads((tmp_path / "all.json").read_text())["command"]
    assert "--share=I/2" in command and f"--out {tmp_path / 'all.json'}" in command
    assert set(rows) == {choice.name for run in planned for choice in run} and f" {len(rows)} rows" in last
    layout = read_layout(str(tiny_model_folder))
    for run in planned:
        assert len(run) == (2 if run[0].method in RANKINGS else 1)
        foretold = benchmark.estimate(run[0], layout, LENGTH)
        for choice in run:
            row = rows[choice.name]
            assert (row["of_one_run"], row["processes"]) == (len(run), 2)
            assert row["retrieval"].keys() == {str(LENGTH)}
            spent = tuple(row["cost"][f"{direction}_tokens"] for direction in ("forward", "backward"))
            if choice.method == "consa":  # its refinement may end early
                assert spent[0] <= foretold[0] and spent[1] == foretold[1]
            elif choice.method in (
                "duo_attention",
                "nll_guided",
            ):  # a question is shorter by up to a sentence
                assert all(0.75 * most <= took <= most for took, most in zip(spent, foretold, strict=True))
            else:
                assert spent == foretold

    record = json.loads((tmp_path / "all.json").read_text())
    page = import_module("results_page").methods(record)
    for sparsity in ("0.5", "0.75"):
        start = page.index(f"Sparsity {sparsity}:") + 4  # after the table's head
        lines = page[start : page.index("", start)]
        medians = [float(line.split("|")[3].strip(" *")) for line in lines]
        assert len(lines) == 13 and medians == sorted(medians, reverse=True)
        assert ["**" in line for line in lines] == [value == medians[0] for value in medians]
    assert import_module("results_page").frontier(record).startswith(b"\x89PNG")

    monkeypatch.setattr(benchmark, "make", None)  # nothing is left to do
    before = rows_of(parts[0])
    call("1.json", "--share=1/2", "--seeds=1", chosen)
    assert rows_of(parts[0]) == before
    with pytest.raises(SystemExit, match="was measured with"):
        call("1.json", "--seeds=1", "--examples=2")


def test_what_is_not_in_the_plan_is_refused(call: Any):
    with pytest.raises(SystemExit, match=r"--methods takes some of consa,.*got 'duo'"):
        call("none.json", "--methods=duo")


def test_the_cost_of_shared_runs_counts_once(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    cost = import_module("sections.cost")
    together = {f"nested-{i}": {"seconds": 90.0, "processes": 3, "of_one_run": 3} for i in range(3)}
    rows = {"dense": {"loss": 2.0}, "joint": {"seconds": 60.0, "learning_seconds": 30.0}, **together}
    record = {"rows": rows, "hardware": "NVIDIA H100"}
    assert cost.gpu_seconds(record) == pytest.approx(120)
    learned = [
        {"name": "consa/seed0", "seconds": 60.0},
        {"name": "consa/seed0, gates alone", "seconds": 60.0},
    ]
    records = {"methods": record, "learned": {"rows": learned, "hardware": "NVIDIA H200"}}
    records["cpu"] = {"rows": learned, "hardware": "AMD EPYC"}
    page = cost.cost(records)
    assert "| methods.json | 5 | 2.0 |" in page and "| total |  | 3.0 |" in page
    assert not any("cpu" in line for line in page)


def test_rows_keep_where_and_when_they_were_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Each run's number of rows, the hardware and the day, however often a file is continued."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    common, source = import_module("common"), import_module("sections.text").source
    path, settings = tmp_path / "out.json", {"start": 1}
    assert common.measured_before(path, settings) == {"rows": {}}
    record = common.environment() | {"settings": settings, "rows": {"a": 1, "b": 2}}
    common.write_json(path, record)
    assert common.measured_before(path, settings) == {"rows": record["rows"]}, "the same day and machine"
    common.write_json(path, record | {"hardware": "an abacus", "date": "1999-12-31", "remark": "Slow."})
    found = common.measured_before(path, settings)
    assert found["rows"] == record["rows"] and found["remark"] == "Slow."
    assert found["earlier"] == [{"rows": 2, "hardware": "an abacus", "date": "1999-12-31"}]
    common.write_json(path, record | found | {"rows": {"a": 1, "b": 2, "c": 3}, "date": "2000-01-01"})
    record |= common.measured_before(path, settings)
    assert [(entry["rows"], entry["date"]) for entry in record["earlier"]] == [
        (2, "1999-12-31"),
        (1, "2000-01-01"),
    ]
    assert "2 of the rows on an abacus, 1999-12-31. 1 of the rows on" in source(record)[0]
    with pytest.raises(SystemExit, match="was measured with"):
        common.measured_before(path, {"start": 2})
