from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from filelock import FileLock

from consa import Allocation, ConsaError, rules
from consa.config import AdaptConfig, EvalConfig, LearnConfig, RunConfig, SweepConfig
from consa.data.sequences import SequenceSet, load_sequences
from consa.evaluation import losses
from consa.evaluation.losses import heldout_losses, sampled_losses
from consa.evaluation.suite import Suite
from consa.evaluation.table import Table
from consa.model.convert import verify
from consa.model.load import load_model
from consa.rules import RULES
from consa.runs import display, inputs, learning
from consa.runs import folder as run_folder
from consa.runs.adaptation import run_adaptation
from consa.runs.evaluation import run_evaluation
from consa.runs.learning import run_learning
from consa.runs.sweep import sweep

ROOT = Path(__file__).parents[2]
SETTINGS = {
    **{"sparsity": 0.5, "window": 8, "seq_len": 96, "num_steps": 8, "sequences_per_step": 2},
    **{"checkpoint_every": 3, "refine_evaluations": 16, "refine_sequences": 2},
}
CONFIG = LearnConfig(**SETTINGS)
NO_TEXT = SequenceSet(
    tokens=np.zeros((0, 96), int), domains=(), documents=np.zeros(0, int), num_documents=0, num_skipped=0
)
RESULTS = {
    *("allocation.json", "checkpoint.sealed", "config.json", "curves.png", "heatmap.png", "cells"),
    *("metrics.jsonl", "summary.json", "summary.md", ".lock"),
}


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def where(tiny_model_folder: Path, text_folder: Path) -> RunConfig:
    return RunConfig(model=str(tiny_model_folder), data=str(text_folder), num_heldout=4, device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def finished(where: RunConfig, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    folder = tmp_path_factory.mktemp("finished")
    return folder, run_learning(where, CONFIG, folder, command="consa learn it")


def test_the_folder_holds_the_result(finished: tuple[Path, dict[str, Any]], where: RunConfig):
    folder, summary = finished
    assert {path.name for path in folder.iterdir()} == RESULTS
    allocation = Allocation.load(folder / "allocation.json")
    assert allocation.sparsity == 0.5 and allocation.window == 8
    assert allocation.provenance["model"] == where.model and len(allocation.provenance["revision"]) == 64
    config = json.loads((folder / "config.json").read_text())
    assert config["run"] == asdict(where) and config["learn"] == asdict(CONFIG)
    assert {"python", "torch", "transformers", "consa"} <= config["versions"].keys()
    assert config["command"] == "consa learn it" and config["hardware"]
    assert json.loads((folder / "summary.json").read_text()) == summary
    steps = [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]
    assert steps == list(range(1, 9))


def test_the_summary_says_what_was_measured(finished: tuple[Path, dict[str, Any]], where: RunConfig):
    folder, summary = finished
    assert [row["name"] for row in summary["rows"]] == ["dense", "all_swa", *RULES, "learned"]
    rows = {row["name"]: row for row in summary["rows"]}
    assert (rows["dense"]["recovered"], rows["all_swa"]["recovered"]) == (1, 0)
    assert all(rows[name]["sparsity"] == 0.5 for name in [*RULES, "learned"])
    assert summary["start"] == max(4 * 8, 96 // 8)
    assert summary["heldout_sequences"] == summary["heldout_documents"] == 4
    assert summary["losses"]["dense"] == rows["dense"]["loss"]
    assert summary["losses"]["final"] == rows["learned"]["loss"]
    assert 0 <= summary["fractional"] <= 1
    markdown = (folder / "summary.md").read_text()
    for name in [*rows, "consa learn it", "stochastic gates", f"{rows['learned']['loss']:.4f}"]:
        assert name in markdown

    # The learned row, from what is public.
    loaded = load_model(where.model, device="cpu")
    heldout = load_sequences(where.data, loaded.tokenizer, 96, split="heldout")
    firsts = np.unique(heldout.documents, return_index=True)[1][:4]
    losses = heldout_losses(loaded.model, heldout.tokens[firsts], Allocation.load(folder / "allocation.json"))
    assert rows["learned"]["loss"] == pytest.approx(float(losses[:, 32:].mean()), rel=1e-6)


def test_a_finished_run_is_not_done_again(
    finished: tuple[Path, dict[str, Any]], where: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("measured again")

    folder, summary = finished
    before = (folder / "allocation.json").read_bytes()
    monkeypatch.setattr(losses, "heldout_losses", fail)
    monkeypatch.setattr(losses, "sampled_losses", fail)
    again = run_learning(where, CONFIG, folder, command="consa learn it")
    assert (folder / "allocation.json").read_bytes() == before
    assert again | {"seconds": None} == summary | {"seconds": None}


def test_eval_takes_what_a_run_has_measured(
    finished: tuple[Path, Any], where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    folder, summary = finished
    shutil.copytree(folder, tmp_path / "run")
    monkeypatch.setattr(losses, "heldout_losses", None)
    names = ["middle", str(folder)]
    config = EvalConfig(seq_len=96, window=8, sparsity=0.5)
    table, _ = run_evaluation(where, config, names, tmp_path / "run", command="c")
    measured = Table.from_record(summary["table"])
    assert table.line("middle") == measured.line("middle")
    own = table.line(str(folder))
    assert own == replace(measured.line("learned"), name=str(folder), to_first=own.to_first)
    intervals = [line.difference for line in measured.lines[1:]]
    assert all(each.low < each.mean < each.high for each in intervals)


def test_damaged_losses_are_measured_again(
    finished: tuple[Path, dict[str, Any]], where: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    folder, summary = finished
    for path in (folder / "cells").iterdir():
        path.write_bytes(path.read_bytes()[:100])
    assert run_learning(where, CONFIG, folder, command="c")["rows"] == summary["rows"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "learn.seed was 0, now 1"),
        ({"sparsity": 0.25}, "learn.sparsity was 0.5, now 0.25"),
        ({"data": "stdlib"}, "run.data was"),
    ],
)
def test_another_run_does_not_touch_the_folder(
    finished: tuple[Path, dict[str, Any]],
    where: RunConfig,
    changes: dict[str, Any],
    named: str,
    monkeypatch: pytest.MonkeyPatch,
):
    folder, _ = finished
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    monkeypatch.setattr(inputs, "load_model", None)  # refused before that
    learn_changes = {name: value for name, value in changes.items() if hasattr(CONFIG, name)}
    where = replace(where, **{name: changes[name] for name in changes.keys() - learn_changes})
    with pytest.raises(ConsaError, match=f"a different run .{named}"):
        run_learning(where, replace(CONFIG, **learn_changes), folder, command="c")
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


def test_a_folder_of_another_command_is_not_called_damaged(finished: tuple[Path, dict[str, Any]], where: RunConfig):
    folder, _ = finished
    allocation = Allocation.load(folder / "allocation.json")
    with pytest.raises(ConsaError, match=r"a different run \(of another command\); choose another folder"):
        run_adaptation(where, allocation, AdaptConfig(seq_len=96), folder, command="c")
    with pytest.raises(ConsaError, match=r"a different sweep \(of another command\); choose another"):
        sweep(where, SweepConfig(), EvalConfig(seq_len=96, window=8), folder, command="c")


def test_a_path_that_is_no_text_ends_in_the_summary(where: RunConfig, tmp_path: Path):
    (folder := tmp_path / "caf\udce9").mkdir()
    (folder / "a.txt").write_text("Once upon a time there was a river. " * 200)
    config = replace(CONFIG, sparsity=1.0)
    run_learning(
        replace(where, data=str(folder), heldout_data=where.data, num_heldout=1),
        config,
        tmp_path / "out",
        command=f"consa learn --data {folder}",
    )
    assert "caf\\udce9" in (tmp_path / "out" / "summary.md").read_text()


def test_more_may_be_measured_later(where: RunConfig, tmp_path: Path):
    config = replace(CONFIG, num_steps=2, refine_evaluations=0)
    first = run_learning(where, config, tmp_path, command="c")
    content = (tmp_path / "allocation.json").read_bytes()
    second = run_learning(replace(where, num_heldout=2, start=50), config, tmp_path, command="c")
    assert (second["heldout_sequences"], second["start"]) == (2, 50)
    assert first["rows"] != second["rows"]
    assert (tmp_path / "allocation.json").read_bytes() == content


KILLED = """
import json, os, signal, sys
from pathlib import Path
from consa.config import LearnConfig, RunConfig
from consa.evaluation import losses
from consa.runs.learning import run_learning

model, data, folder, moment, settings = sys.argv[1:]

def kill(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

if moment == "learning":  # past the checkpoints of steps 3 and 6, in the middle of writing a file
    replace, steps = os.replace, []
    def replace_or_kill(source, target):
        steps.append(target)
        if len([path for path in steps if Path(path).name == "checkpoint.sealed"]) == 3:
            kill()
        replace(source, target)
    os.replace = replace_or_kill
else:
    measure, calls = losses.heldout_losses, []
    def measure_or_kill(*args, **options):
        calls.append(1)
        return kill() if len(calls) == 4 else measure(*args, **options)
    losses.heldout_losses = measure_or_kill
config = LearnConfig(**json.loads(settings))
where = RunConfig(model=model, data=data, num_heldout=4, device="cpu", dtype="float32")
run_learning(where, config, Path(folder), command="consa learn it")
"""


def test_killed_twice_it_ends_the_same(
    finished: tuple[Path, dict[str, Any]], where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    undisturbed, summary = finished
    threads = {"OMP_NUM_THREADS": str(torch.get_num_threads())}
    for moment in ("learning", "measuring"):
        done = subprocess.run(
            [sys.executable, "-c", KILLED, where.model, where.data, str(tmp_path), moment, json.dumps(SETTINGS)],
            cwd=ROOT,
            capture_output=True,
            env=os.environ | threads,
            timeout=120,
        )
        assert done.returncode == -signal.SIGKILL, done.stderr.decode()
        assert (tmp_path / "allocation.json").exists() == (moment == "measuring")
    measured = []
    monkeypatch.setattr(
        losses, "heldout_losses", lambda *args, **options: measured.append(1) or heldout_losses(*args, **options)
    )
    again = run_learning(where, CONFIG, tmp_path, command="consa learn it")
    assert len(measured) == len(RULES) + 3 - 3  # dense, all-SWA, learned; three were there
    for name in ("allocation.json", "metrics.jsonl", "heatmap.png", "curves.png"):
        assert (tmp_path / name).read_bytes() == (undisturbed / name).read_bytes()
    assert again["rows"] == summary["rows"] and again["losses"] == summary["losses"]


def test_a_folder_in_use_is_refused(where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "load_model", None)
    with FileLock(tmp_path / ".lock"), pytest.raises(ConsaError, match="in use by another process"):
        run_learning(where, CONFIG, tmp_path, command="c")


def test_what_killed_writers_left_goes_but_nothing_of_another_run(
    where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    left = ".name.json.0123456789abcdef"
    (tmp_path / "cells").mkdir()
    (tmp_path / f".model.{left[-16:]}").mkdir()
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lock").touch()
    gone = [tmp_path / left, tmp_path / "cells" / left, tmp_path / f".model.{left[-16:]}" / left]
    kept = [tmp_path / "other" / left, tmp_path / ".hidden", tmp_path / "cells" / "0123456789abcdef.json"]
    for path in (*gone, *kept):
        path.touch()
    monkeypatch.setattr(run_folder, "check_same", lambda *_, **__: (_ for _ in ()).throw(ConsaError("enough")))
    with pytest.raises(ConsaError, match="enough"):
        run_learning(where, CONFIG, tmp_path, command="c")
    assert all(path.exists() for path in kept) and not any(path.exists() for path in gone)


def test_a_run_that_cannot_begin_leaves_nothing(tmp_path: Path, where: RunConfig):
    for missing in ("a/b", "."):  # a folder of its own, and one that was there
        with pytest.raises(ConsaError, match="nowhere"):
            run_learning(replace(where, model="./nowhere"), CONFIG, tmp_path / missing, command="c")
        assert [path.name for path in tmp_path.iterdir()] in ([], [".lock"])


def test_a_folder_of_something_else_is_left_alone(where: RunConfig, tmp_path: Path):
    (tmp_path / "book.txt").write_text("Once upon a time")
    with pytest.raises(ConsaError, match=r"holds files of something else \(book\.txt\); choose another"):
        run_learning(where, CONFIG, tmp_path, command="c")
    with pytest.raises(ConsaError, match="holds files of something else"):
        sweep(where, SweepConfig(), EvalConfig(seq_len=96, window=8), tmp_path, command="c")
    assert [path.name for path in tmp_path.iterdir()] == ["book.txt"]


def test_a_run_that_cannot_begin_says_so_beside_one_that_does(
    tmp_path: Path, where: RunConfig, monkeypatch: pytest.MonkeyPatch
):
    def fail(*_: Any, **__: Any) -> None:
        (tmp_path / "runs" / "other").mkdir()
        raise ConsaError("no such model")

    monkeypatch.setattr(inputs, "load", fail)
    with pytest.raises(ConsaError, match="no such model"):
        run_learning(where, CONFIG, tmp_path / "runs" / "own", command="c")
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["other"]


@pytest.mark.parametrize(
    ("changes", "settings"),
    [
        ({}, {"granularity": "layer", "refine_evaluations": 5}),
        ({}, {"mode": "joint"}),
        ({}, {"sparsity": 1.0}),
        ({}, {"sparsity": 0.0}),
        ({"heldout_data": "stdlib", "max_tokens": 2000}, {}),
    ],
)
def test_other_settings_go_all_the_way(
    where: RunConfig, changes: dict[str, Any], settings: dict[str, Any], tmp_path: Path
):
    config = replace(CONFIG, **{"num_steps": 2, "refine_evaluations": 0} | settings)
    summary = run_learning(replace(where, **{"num_heldout": 2} | changes), config, tmp_path, command="c")
    names = [row["name"] for row in summary["rows"]]
    assert ("uniform_heads" in names) == (config.granularity == "kv_head")
    assert (summary["losses"]["stochastic"] is None) == (config.sparsity in (0, 1))
    assert Allocation.load(tmp_path / "allocation.json").sparsity == config.sparsity
    assert "nan" not in (tmp_path / "summary.md").read_text().lower()


def test_a_budget_is_checked_before_text_is_read(where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(inputs, "load_sequences", None)
    with pytest.raises(ConsaError, match="KV budget of 1 bytes is too small for 100 tokens"):
        run_learning(where, replace(CONFIG, kv_budget=1, context=100), tmp_path, command="c")


def test_gates_that_are_certain_draw_the_decision(where: RunConfig):
    loaded = load_model(where.model, device="cpu")
    tokens = np.random.default_rng(0).integers(0, 256, (3, 40))
    for granularity in ("kv_head", "layer"):
        decided = rules.random_units(4, 3, sparsity=0.5, granularity=granularity, window=4)
        certain = replace(decided, scores=np.where(decided.full_attention, 40.0, -40.0))
        expected = heldout_losses(loaded.model, tokens, decided)
        np.testing.assert_array_equal(sampled_losses(loaded.model, tokens, certain, batch_size=2), expected)
    uncertain = replace(decided, scores=np.zeros((4, 3)))
    draws = [sampled_losses(loaded.model, tokens, uncertain, seed=seed) for seed in (0, 0, 1)]
    np.testing.assert_array_equal(draws[0], draws[1])
    assert not np.array_equal(draws[0], draws[2])
    with pytest.raises(ConsaError, match="no scores"):
        sampled_losses(loaded.model, tokens, decided)


def test_nothing_is_recovered_if_the_dense_model_is_no_better():
    assert all(np.isnan(losses.recovered(loss, dense=3.0, floor=2.5)) for loss in (3.0, 2.5, 3.5))


@pytest.mark.parametrize(
    ("window", "seq_len", "given", "expected"),
    [
        (64, 1024, None, 256),
        (128, 8192, None, 1024),
        (300, 1024, None, 512),
        (1, 16, None, 4),
        (64, 99, 0, 0),
        (1, 2, None, 0),
    ],
)
def test_where_counting_starts(window: int, seq_len: int, given: int | None, expected: int):
    config = LearnConfig(window=window, num_sink_tokens=0, seq_len=seq_len)
    assert RunConfig(model="m", start=given).start_for(config) == expected


def test_tensorboard_writes_what_it_is_told(where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import types

    written: list[tuple[str, float, int]] = []

    class SummaryWriter:
        def __init__(self, folder: str, purge_step: int) -> None:
            assert (folder, purge_step) == (str(tmp_path / "tensorboard"), 1)

        def add_scalar(self, name: str, value: float, step: int) -> None:
            written.append((name, value, step))

        def close(self) -> None:
            written.append(("closed", 0, 0))

    module = types.ModuleType("torch.utils.tensorboard")
    module.SummaryWriter = SummaryWriter  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", module)
    monkeypatch.setattr(display, "find_spec", lambda name: True)
    run_learning(where, replace(CONFIG, num_steps=2), tmp_path, command="c", boards=["tensorboard"])
    assert {name for name, _, _ in written} >= {"loss", "expected_sparsity", "target", "multiplier", "closed"}
    assert {step for _, _, step in written[:-1]} == {1, 2}


def test_wandb_continues_the_run_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    import types

    calls: list[tuple[Any, ...]] = []

    class Run:
        def log(self, record: dict[str, float], step: int) -> None:
            calls.append((record, step))

        def finish(self) -> None:
            calls.append(("finished",))

    def init(**settings: Any) -> Run:
        calls.append((settings["name"], settings["id"], settings["resume"]))
        return Run()

    module = types.ModuleType("wandb")
    module.init = init  # pyright: ignore[reportAttributeAccessIssue]
    monkeypatch.setitem(sys.modules, "wandb", module)
    record = {"step": 3, "loss": 2.0, "tokens_per_second": 1.0}
    for folder in ("a", "a", "b"):
        with display.Display("Learning", 9, lambda _: "", tmp_path / folder, ["wandb"]) as shown:
            shown.on_step(record)
    (first, again, other) = calls[::3]
    assert first == again and first[0] == "a" and other[1] != first[1] and first[2] == "allow"
    assert calls[1::3] == [({"loss": 2.0, "tokens_per_second": 1.0}, 3)] * 3 and calls[2::3] == [("finished",)] * 3


def test_boards_must_be_known_and_installed(where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(display, "find_spec", lambda name: None)
    for name, message in (("colour", "tensorboard, wandb"), ("wandb", "consa.wandb.")):
        with pytest.raises(ConsaError, match=message):
            run_learning(where, CONFIG, tmp_path / "out", command="c", boards=[name])
    assert not (tmp_path / "out").exists()


def test_losses_are_kept_for_nothing_but_what_they_are_of(
    where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    loaded = load_model(where.model, device="cpu")
    decided = rules.random_units(4, 3, sparsity=0.5, granularity="kv_head", window=4)
    text, other = np.random.default_rng(0).integers(0, 256, (2, 2, 40))
    drawn, also = (replace(decided, scores=np.full((4, 3), score)) for score in (0.0, 0.5))
    done: list[str] = []
    for kind in ("heldout_losses", "sampled_losses"):
        zeros = lambda *_, kind=kind, **__: done.append(kind) or np.zeros((2, 39), np.float32)  # noqa: E731
        monkeypatch.setattr(losses, kind, zeros)
    config = EvalConfig(seq_len=40, window=4)
    both = ["heldout_losses", "sampled_losses"]
    for tokens, learned, weights, wanted in (
        (text, drawn, None, both),
        (text, drawn, None, []),
        (other, drawn, None, both),
        (text, also, None, both[1:]),  # the same decision of other gates
        (text, drawn, {"seed": 1}, both),
    ):
        done.clear()
        heldout = SequenceSet(tokens=tokens, domains=("",) * 2, documents=np.arange(2), num_documents=2, num_skipped=0)
        suite = Suite(loaded=loaded, heldout=heldout, config=config, folder=tmp_path, start=8)
        gates = losses.sampled(loaded, tokens, learned, start=8, batch_size=1)
        suite.measure({"learned": learned}, also={"learned": gates}, trained=weights)
        assert done == wanted


def test_losses_that_are_not_finite_are_refused_and_not_kept(
    where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lost = lambda model, tokens, *_, **__: np.full((len(tokens), 95), np.nan, np.float32)  # noqa: E731
    monkeypatch.setattr(losses, "heldout_losses", lost)
    config = replace(CONFIG, num_steps=1, refine_evaluations=0)
    with pytest.raises(ConsaError, match="dense: held-out losses are not finite; use float32"):
        run_learning(where, config, tmp_path, command="c")
    assert not list(tmp_path.glob("cells/*")) and not (tmp_path / "summary.json").exists()


def test_stochastic_gates_are_measured_on_the_same_positions(finished: tuple[Path, dict[str, Any]], where: RunConfig):
    folder, summary = finished
    loaded = load_model(where.model, device="cpu")
    heldout = load_sequences(where.data, loaded.tokenizer, 96, split="heldout").spread(4)
    drawn = sampled_losses(loaded.model, heldout.tokens, Allocation.load(folder / "allocation.json"))
    wanted = float(drawn[:, summary["start"] :].mean())
    assert summary["losses"]["stochastic"] == pytest.approx(wanted, rel=1e-6)


def test_under_a_budget_rules_are_measured_at_the_sparsity_it_affords(where: RunConfig, tmp_path: Path):
    layout = load_model(where.model, device="cpu").layout
    affordable = rules.bottom(*layout.shape, sparsity=0.75, granularity="kv_head", window=8)
    budget = affordable.kv_cache_bytes(1000, head_dim=layout.head_dim)
    config = replace(CONFIG, kv_budget=budget, context=1000, num_steps=1, refine_evaluations=0)
    summary = run_learning(replace(where, num_heldout=1), config, tmp_path, command="c")
    assert {row["sparsity"] for row in summary["rows"][2:]} == {0.75}


def test_joint_learning_leaves_a_hybrid_even_where_plain_would_do(where: RunConfig, tmp_path: Path):
    config = replace(CONFIG, mode="joint", granularity="layer", num_sink_tokens=0, num_steps=1)
    run_learning(where, replace(config, refine_evaluations=0), tmp_path, command="c")
    assert verify(tmp_path / "model") == ("hybrid", Allocation.load(tmp_path / "allocation.json"))
    assert "All rows are of the weights that this run trained" in (tmp_path / "summary.md").read_text()


@pytest.mark.parametrize("granularity", ["kv_head", "layer"])
def test_what_a_run_is_compared_with_has_its_limits(granularity: Any, where: RunConfig, tmp_path: Path):
    loaded = load_model(where.model, device="cpu")
    config = replace(CONFIG, granularity=granularity, window=9, num_sink_tokens=3)
    config_of = EvalConfig(granularity=granularity, window=9, num_sink_tokens=3)
    suite = Suite(loaded=loaded, heldout=NO_TEXT, config=config_of, folder=tmp_path, start=1)
    found = suite.with_ends(learning._rules(loaded, config, 0.5))
    assert found.pop("dense") is None and found["all_swa"] is not None
    for allocation in found.values():
        assert allocation is not None
        assert (allocation.window, allocation.num_sink_tokens) == (9, 3)
        assert allocation.granularity == granularity


def test_the_summary_says_losses_by_position(finished: tuple[Path, dict[str, Any]]):
    folder, summary = finished
    markdown = (folder / "summary.md").read_text()
    assert "| allocation | 0-63 | 64-94 |" in markdown
    for row in summary["rows"]:
        assert f"| {row['name']} | {' | '.join(f'{loss:.3f}' for loss in row['by_position'])} |" in markdown


def test_what_text_there_is_is_said(where: RunConfig, tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    texts = tmp_path / "texts"
    texts.mkdir()
    (texts / "long.txt").write_text("word " * 200)
    (texts / "short.txt").write_text("word")
    (texts / "bytes.txt").write_bytes(b"\xff\x00" * 50)
    loaded = load_model(where.model, device="cpu")
    inputs.training_text(replace(where, data=str(texts), heldout_data=where.data), 96, loaded)
    said = capsys.readouterr().err
    assert re.search(r"Found \d+ sequences of 96 tokens in 3 documents, 2 of them too short or not text", said), said
    inputs.warn_if_repeated(3, replace(CONFIG, num_steps=5, sequences_per_step=3))
    assert "Little text: each training sequence is used 5.0 times" in capsys.readouterr().err
