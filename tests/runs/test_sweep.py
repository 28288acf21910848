"""Choosing by several methods, measuring, and the frontier; the methods are replaced by quick ones."""

from __future__ import annotations

import csv
import json
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from consa import Allocation, ConsaError, methods, rules
from consa.config import ChoiceConfig, EvalConfig, RunConfig, SweepConfig
from consa.evaluation import losses
from consa.methods import Method
from consa.methods.choice import choices
from consa.methods.observing import LazyLayers
from consa.methods.problem import Problem
from consa.runs import evaluation, folder
from consa.runs import sweep as sweeping
from consa.runs.sweep import sweep

CONFIG = SweepConfig(
    sparsity="0.5,0.75", granularity="layer,kv_head", methods="by_loss,middle,random_units", seeds=2, evaluations=3
)
MEASURED = EvalConfig(window=8, num_sink_tokens=2, seq_len=96, cache_tokens=1000, seed=5)
NAMES = [
    f"{method}-{granularity}-{sparsity}-seed{seed}"
    for granularity in ("layer", "kv_head")
    for sparsity in (0.5, 0.75)
    for method, seeds in (("by_loss", 2), ("middle", 1), ("random_units", 2))
    for seed in range(seeds)
]


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[ChoiceConfig]:
    """What the one method was asked for: `by_loss`, which draws."""
    asked: list[ChoiceConfig] = []

    class ByLoss(Method):
        name = "by_loss"

        def choose(self, problem: Problem) -> Allocation:
            assert problem.sequences.ndim == 2 and problem.sequences.shape[1] == 96
            config, layout = problem.config, problem.loaded.layout
            asked.append(config)
            allocation = rules.random_units(
                *layout.shape,
                sparsity=config.sparsity,
                granularity=config.granularity,
                window=config.window,
                num_sink_tokens=config.num_sink_tokens,
                seed=100 + config.seed,
            )
            return replace(allocation, provenance={"method": "by_loss"})

    monkeypatch.setitem(methods.METHODS, "by_loss", f"{__name__}:ByLoss")
    monkeypatch.setitem(sys.modules, __name__, SimpleNamespace(ByLoss=ByLoss))
    return asked


@pytest.fixture
def where(tiny_model_folder: Path, text_folder: Path) -> RunConfig:
    return RunConfig(model=str(tiny_model_folder), data=str(text_folder), num_heldout=4, device="cpu")


def test_a_sweep_chooses_measures_and_goes_on_where_it_was(
    where: RunConfig, asked: list[ChoiceConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    class Killed(BaseException):
        pass

    def kill(*_: Any) -> None:
        if len(asked) == 3:
            raise Killed
        original(*_)

    original = Allocation.save
    monkeypatch.setattr(Allocation, "save", kill)
    with pytest.raises(Killed):
        sweep(where, CONFIG, MEASURED, tmp_path, command="c")
    monkeypatch.setattr(Allocation, "save", original)
    kept = {path: path.stat().st_mtime_ns for path in (tmp_path / "allocations").iterdir()}
    assert len(kept) == NAMES.index("by_loss-layer-0.75-seed0")

    frontier, paths = sweep(where, CONFIG, MEASURED, tmp_path, command="c")
    assert len(asked) == 1 + 8  # what was lost is chosen again, and nothing else
    assert {(c.window, c.num_sink_tokens) for c in asked} == {(8, 2)}
    assert {path.stem for path in (tmp_path / "allocations").iterdir()} == set(NAMES)
    assert all(path.stat().st_mtime_ns == time for path, time in kept.items())
    assert [line.name for line in frontier.table.lines] == ["dense", "all_swa", *NAMES]
    provenance = Allocation.load(tmp_path / "allocations" / f"{NAMES[0]}.json").provenance
    assert {"model", "method", "seconds", "hardware"} <= provenance.keys()

    assert len(frontier.points) == 2 * 2 * 3
    point = next(p for p in frontier.points if (p.method, p.granularity, p.sparsity) == ("by_loss", "kv_head", 0.5))
    lines = [frontier.table.line(f"by_loss-kv_head-0.5-seed{seed}") for seed in (0, 1)]
    recovered = [line.recovered or 0 for line in lines]
    assert point.lines == tuple(lines)
    assert point.recovered == pytest.approx(np.mean(recovered))
    assert point.spread == pytest.approx(abs(recovered[0] - recovered[1]))
    assert point.cache == pytest.approx((6 * 1000 + 6 * 10) / (12 * 1000))
    assert {path.name for path in paths} == {"frontier.csv", "frontier.png", "eval.json", "eval.csv", "eval.png"}
    rows = list(csv.DictReader((tmp_path / "frontier.csv").read_text().splitlines()))
    assert len(rows) == 12 and rows[0]["retrieved"] == "nan" and rows[0]["seeds"] == "2"

    monkeypatch.setattr(losses, "heldout_losses", None)  # nothing is left to do
    again, _ = sweep(where, CONFIG, MEASURED, tmp_path, command="c")
    assert again == frontier


def test_more_may_be_asked_of_a_folder_but_nothing_else(
    where: RunConfig, asked: list[ChoiceConfig], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = replace(CONFIG, sparsity="0.5", granularity="kv_head", methods="by_loss", seeds=1)
    sweep(where, small, MEASURED, tmp_path, command="c")
    more = replace(MEASURED, retrieval="single", lengths="700", examples=1)
    frontier, _ = sweep(where, replace(small, methods="by_loss,top"), more, tmp_path, command="c")
    assert len(asked) == 1 and 0 <= frontier.points[0].retrieved <= 1
    monkeypatch.setattr(evaluation, "load", None)
    for run, config, measured, named in (
        (where, small, replace(MEASURED, window=9), "eval.window was 8, now 9"),
        (where, replace(small, evaluations=4), MEASURED, "sweep.evaluations was 3, now 4"),
        (replace(where, max_tokens=4096), small, MEASURED, "run.max_tokens was None, now 4096"),
    ):
        with pytest.raises(ConsaError, match=f"a different sweep .{named}"):
            sweep(run, config, measured, tmp_path, command="c")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ConsaError, match="damaged"):
        sweep(where, small, MEASURED, tmp_path, command="c")


def test_a_ranking_runs_once_for_all_sparsities_and_again_for_what_is_added(
    where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked, choose = [], LazyLayers.choose

    def counted(self: LazyLayers, problem: Problem) -> Allocation:
        asked.append(problem.config)
        return choose(self, problem)

    monkeypatch.setattr(LazyLayers, "choose", counted)
    config = replace(CONFIG, methods="lazy_layers,top", evaluation_sequences=1)
    sweep(where, config, MEASURED, tmp_path, command="c")
    assert [(c.granularity, c.sparsity, c.seed) for c in asked] == [
        (granularity, 0.75, seed) for granularity in ("layer", "kv_head") for seed in (0, 1)
    ]
    names = [f"lazy_layers-kv_head-{sparsity}-seed0" for sparsity in (0.5, 0.75)]
    half, quarter = (Allocation.load(tmp_path / "allocations" / f"{name}.json") for name in names)
    assert (half.sparsity, quarter.sparsity) == (0.5, 0.75)
    assert (quarter.full_attention <= half.full_attention).all()
    assert half.provenance["cost"] == quarter.provenance["cost"]
    kept = (tmp_path / "allocations" / f"{names[0]}.json").stat().st_mtime_ns
    sweep(where, replace(config, sparsity="0.5,0.25", seeds=1), MEASURED, tmp_path, command="c")
    assert [c.sparsity for c in asked[4:]] == [0.5, 0.5]
    assert (tmp_path / "allocations" / f"{names[0]}.json").stat().st_mtime_ns == kept


def test_a_sparsity_written_in_two_ways_is_one():
    assert SweepConfig(sparsity="0.5,0.50,.9").sparsities == (0.5, 0.9)


def test_all_rules_by_one_word_each_once():
    config = SweepConfig(sparsity="0.5", granularity="layer,kv_head", methods="rules,middle", seeds=3)
    wanted = list(choices(config, MEASURED))
    assert len({choice.name for choice in wanted}) == len(wanted)
    by_granularity = [[c.method.name for c in wanted if c.config.granularity == g] for g in ("layer", "kv_head")]
    assert [set(found) for found in by_granularity] == [set(rules.RULES) - {"uniform_heads"}, set(rules.RULES)]
    assert all(found.count(m) == (3 if m == "random_units" else 1) for found in by_granularity for m in found)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"methods": "consa,guess"}, "one of rules, consa, .* got 'guess'"),
        ({"methods": ","}, "methods is empty"),
        ({"sparsity": "half"}, "sparsity must be shares separated .* got 'half'"),
        ({"sparsity": "0.5,1.5"}, "sparsity .* got 1.5"),
        ({"granularity": "head"}, "granularity .* got 'head'"),
        ({"seeds": 0}, "seeds must be an integer >= 1, got 0"),
        ({"num_steps": 0}, "num_steps .* got 0"),
        (
            {"methods": "uniform_heads", "granularity": "layer"},
            "methods must be some that choose by layer, got 'uniform_heads'",
        ),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    changes: dict[str, Any], named: str, where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(sweeping, "read_layout", None)
    with pytest.raises(ConsaError, match=named):
        sweep(where, replace(CONFIG, **changes), MEASURED, tmp_path / "out", command="c")
    assert not (tmp_path / "out").exists()


def test_a_search_that_cannot_begin_is_refused_before_any_work(where: RunConfig, tmp_path: Path):
    config = replace(CONFIG, methods="top,greedy", granularity="kv_head", evaluations=13)
    with pytest.raises(ConsaError, match="evaluations must be at least 14 for greedy on this model, got 13"):
        sweep(where, config, MEASURED, tmp_path / "out", command="c")
    assert not (tmp_path / "out").exists()


def test_what_was_asked_is_on_record(where: RunConfig, tmp_path: Path):
    config = replace(CONFIG, methods="top", sparsity="0.5", granularity="layer")
    sweep(where, config, MEASURED, tmp_path, command="consa sweep it")
    record = json.loads((tmp_path / "config.json").read_text())
    assert record["command"] == "consa sweep it" and record["sweep"]["methods"] == "top"
    assert json.loads((tmp_path / "eval.json").read_text())["how"]["command"] == "consa sweep it"


def test_one_process_at_a_time(where: RunConfig, tmp_path: Path):
    with folder.claimed(tmp_path), pytest.raises(ConsaError, match="in use by another process"):
        sweep(where, CONFIG, MEASURED, tmp_path, command="c")
    assert not list(tmp_path.glob("*.json"))


def test_a_rule_that_draws_draws_anew_for_every_seed(where: RunConfig, tmp_path: Path):
    config = replace(CONFIG, methods="random_units", sparsity="0.5", granularity="kv_head", seeds=3)
    sweep(where, config, MEASURED, tmp_path, command="c")
    for seed in range(3):
        found = Allocation.load(tmp_path / "allocations" / f"random_units-kv_head-0.5-seed{seed}.json")
        wanted = rules.random_units(4, 3, sparsity=0.5, granularity="kv_head", seed=seed)
        assert np.array_equal(found.full_attention, wanted.full_attention)


@pytest.mark.parametrize(
    "name", ["num_steps", "sequences_per_step", "evaluations", "evaluation_sequences", "micro_batch"]
)
def test_no_budget_may_change_within_a_folder(
    name: str, where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    small = replace(CONFIG, sparsity="0.5", granularity="kv_head", methods="by_loss", seeds=1)
    sweep(where, small, MEASURED, tmp_path, command="c")
    monkeypatch.setattr(evaluation, "load", None)
    with pytest.raises(ConsaError, match=rf"a different sweep .sweep\.{name} was"):
        sweep(where, replace(small, **{name: 2}), MEASURED, tmp_path, command="c")
