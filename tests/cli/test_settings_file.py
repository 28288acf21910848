"""`--config FILE`, `--rules`, lists, completion and the length of help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from consa.config import LearnConfig, RunConfig
from tests.cli import test_cli
from tests.cli.test_cli import ROOT, SMALL, consa_cli, refused

caught = test_cli.caught


def learned(caught: list[tuple[Any, ...]], *arguments: object) -> tuple[RunConfig, LearnConfig, Path]:
    result = consa_cli("learn", *arguments)
    assert result.exit_code == 0, result.output
    return caught.pop()[:3]


def test_a_file_holds_options_and_the_command_line_overrides_them(caught: list[tuple[Any, ...]], tmp_path: Path):
    path = tmp_path / "run.yaml"
    path.write_text("model: some/model\nsparsity: 0.5\nseq-len: 512\ncompile: true\nout: here\ndata: [a.txt, b.txt]\n")
    where, config, folder = learned(caught, "--config", path)
    assert (where.model, where.data) == ("some/model", "a.txt,b.txt")
    assert (config.sparsity, config.seq_len, config.compile, str(folder)) == (0.5, 512, True, "here")
    where, config, _ = learned(caught, "other/model", "--sparsity", 0.25, "--no-compile", "--config", path)
    assert (where.model, config.sparsity, config.seq_len, config.compile) == ("other/model", 0.25, 512, False)


@pytest.mark.parametrize("name", ["run", "run/config.json", "run.yaml"])
def test_a_run_is_such_a_file(name: str, caught: list[tuple[Any, ...]], tmp_path: Path):
    from dataclasses import asdict

    where, config = RunConfig(model="m", num_heldout=3), LearnConfig(kv_budget=2**20, context=99, seed=5)
    record = {
        "run": asdict(where),
        "learn": asdict(config),
        "command": "c",
        "hardware": "h",
        "versions": {"torch": "2"},
    }
    (tmp_path / "run").mkdir()
    for path in (tmp_path / "run" / "config.json", tmp_path / "run.yaml"):  # JSON is YAML
        path.write_text(json.dumps(record))
    assert learned(caught, "--config", tmp_path / name)[:2] == (where, config)
    assert learned(caught, "--config", tmp_path / name, "--seed", 6)[1].seed == 6


@pytest.fixture
def run(tmp_path: Path, tiny_model_folder: Path, text_folder: Path) -> Path:
    """The folder of a learning run with settings of its own."""
    folder = tmp_path / "run"
    given = ["learn", tiny_model_folder, *SMALL, "--data", text_folder, "--sparsity", 0.5, "--num-sink-tokens", 2]
    assert consa_cli(*given, "--rules", "none", "--refine-evaluations", 0, "--out", folder).exit_code == 0
    return folder


def test_other_commands_take_what_they_share_with_a_run(run: Path, tmp_path: Path):
    said: list[str] = []

    def measured(*more: object) -> dict[str, Any]:
        result = consa_cli("eval", "--config", run, "--out", tmp_path / "out", *more)
        assert result.exit_code == 0, result.output
        said[:] = [line for line in result.stderr.splitlines() if line.startswith("Taken from ")]
        return json.loads((tmp_path / "out" / "eval-config.json").read_text())

    record = measured("--allocation", run)  # whose file has a sparsity of its own, and is not refused
    shared = {"sparsity": 0.5, "granularity": "kv_head", "window": 8, "num_sink_tokens": 2, "seq_len": 96}
    assert {name: record["eval"][name] for name in shared} == shared
    assert said == [
        f"Taken from {run / 'config.json'}: --sparsity 0.5, --granularity kv_head, --window 8, --num-sink-tokens 2,"
        " --seq-len 96"
    ]
    record = measured("--allocation", "top", "--seq-len", 64)
    assert (record["eval"]["window"], record["eval"]["seq_len"]) == (8, 64)
    again = consa_cli("eval", "--config", tmp_path / "out", "--out", tmp_path / "again")
    assert again.exit_code == 0 and json.loads((tmp_path / "again" / "eval-config.json").read_text())[
        "allocations"
    ] == ["top"]
    result = consa_cli("sweep", "--config", run, "--methods", "top", "--out", tmp_path / "sweep")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "sweep" / "config.json").read_text())
    assert record["eval"]["window"] == 8 and record["sweep"]["sparsity"] == "0.5,0.75,0.9"
    given = ["--allocation", run, "--num-steps", 1, "--sequences-per-step", 1, "--out", tmp_path / "adapted"]
    assert consa_cli("adapt", "--config", run, *given).exit_code == 0
    assert json.loads((tmp_path / "adapted" / "config.json").read_text())["adapt"]["seq_len"] == 96
    # What is typed, or stands in a file for this command, is still refused beside an allocation of its own.
    assert "applies to rules" in refused("eval", "--config", run, "--allocation", run, "--sparsity", 0.25)
    (tmp_path / "e.yaml").write_text(f"model: {record['run']['model']}\nsparsity: 0.25\nallocation: [{run}]\n")
    assert "applies to rules" in refused("eval", "--config", tmp_path / "e.yaml")


def test_a_budget_decided_the_sparsity(tmp_path: Path):
    from dataclasses import asdict

    config = LearnConfig(kv_budget=2**20, context=99, window=9)
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"run": asdict(RunConfig(model="m")), "learn": asdict(config)}))
    out = tmp_path / "rules"
    given = ["rules", "--config", tmp_path, "--out", out]
    assert "'m'" in refused(*given), "the model of the run"
    path.write_text(json.dumps({"learn": asdict(config) | {"sparsity": 0.1}}))
    assert consa_cli(*given, "--layers", 4, "--kv-heads", 2).exit_code == 0
    top = json.loads((out / "top.json").read_text())
    assert top["window"] == 9 and sum(row.count("1") for row in top["full_attention"]) == 2


def test_every_command_takes_a_file(tmp_path: Path):
    path = tmp_path / "rules.yaml"
    path.write_text(f"layers: 4\nkv_heads: 2\nsparsity: 0.5\nout: {tmp_path / 'rules'}\n")
    assert consa_cli("rules", "--config", path).exit_code == 0
    assert (tmp_path / "rules" / "top.json").exists()
    path.write_text("runs: [smollm2-135m/layer-0.5]\n" + f"out: {tmp_path / 'page.html'}\n")
    assert consa_cli("report", "--config", path).exit_code == 0 and (tmp_path / "page.html").exists()
    commands = test_cli.cli.typer.main.get_command(test_cli.cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for name, command in commands.items():
        assert ("config" in {p.name for p in command.params}) == (name != "cli-docs")


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("colour: red\n", ["'colour'", "consa learn --help"]),
        ("- a\n- b\n", ["must map options to values", "list"]),
        ("a: [\n", ["neither YAML nor JSON"]),
        ("run: 3\n", ["run must hold settings", "3"]),
        ("model: m\nsparsity: high\n", ["--sparsity", "'high'"]),
        ("model: m\nsparsity: 7\n", ["--sparsity", "7"]),
        ("model: m\nsparsity: 0.5\nkv_budget: 2GiB\ncontext: 9\n", ["--kv-budget", "only one of them"]),
    ],
)
def test_bad_files_are_refused(text: str, named: list[str], tmp_path: Path):
    (tmp_path / "c.yaml").write_text(text)
    line = refused("learn", "--config", tmp_path / "c.yaml")
    assert all(part in line for part in named), line
    assert "cannot read" in refused("learn", "--config", tmp_path / "absent.yaml")


@pytest.mark.parametrize("which", ["best", "none"])
def test_the_rules_to_compare_with(which: str, tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    from consa.rules import RULES

    given = ["learn", tiny_model_folder, *SMALL, "--data", text_folder, "--out", tmp_path, "--rules", which]
    result = consa_cli(*given)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "summary.json").read_text())
    rules = [row["name"] for row in summary["rows"] if row["name"] in RULES]
    assert rules == ([] if which == "none" else [summary["best_rule"]["rule"]])
    assert ("no rule was measured" in result.stdout) == (which == "none")
    # What is compared with is no part of what is learned: the same folder goes on.
    assert consa_cli(*given[:-1], "all").exit_code == 0
    everything = json.loads((tmp_path / "summary.json").read_text())
    assert which == "none" or everything["best_rule"] == summary["best_rule"]
    assert len(everything["rows"]) == 3 + len(RULES)


def test_help_fits_three_screens():
    done = subprocess.run(
        [sys.executable, "-m", "consa", "learn", "--help"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=os.environ | {"COLUMNS": "80"},
    )
    lines = done.stdout.splitlines()
    assert len(lines) <= 120 and max(map(len, lines)) <= 80
    assert "--no-compile" not in done.stdout and "--compile" in done.stdout


def test_shells_complete_commands():
    words = {"_CONSA_COMPLETE": "complete_bash", "COMP_WORDS": "consa insp", "COMP_CWORD": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "consa"], cwd=ROOT, capture_output=True, text=True, env=os.environ | words
    )
    assert done.stdout.split() == ["inspect"]


def test_device_and_dtype_reach_the_weights(tmp_path: Path, tiny_model_folder: Path):
    options = ["--allocation", "top", "--window", 8, "--out", tmp_path / "hybrid"]
    assert consa_cli("convert", tiny_model_folder, *options).exit_code == 0
    record = json.loads((tmp_path / "hybrid" / "config.json").read_text())
    result = consa_cli("convert", tiny_model_folder, *options[:-1], tmp_path / "b", "--dtype", "bfloat16")
    assert result.exit_code == 0 and "checkpoint in bfloat16 (" in result.stdout, result.output
    halved = json.loads((tmp_path / "b" / "config.json").read_text())
    assert (record["dtype"], halved["dtype"]) == ("float32", "bfloat16")
    assert "The weights are bfloat16." in (tmp_path / "b" / "README.md").read_text()
    sizes = [(tmp_path / name / "model.safetensors").stat().st_size for name in ("hybrid", "b")]
    assert sizes[1] < 0.6 * sizes[0]
    assert "'int8'" in refused("convert", tiny_model_folder, *options[:-1], tmp_path / "c", "--dtype", "int8")
    assert "'gpu7'" in refused("convert", tiny_model_folder, *options[:-1], tmp_path / "c", "--device", "gpu7")
    gguf = ["convert", "model.gguf", "--kind", "gguf", "--allocation", "top", "--out", tmp_path / "c.gguf"]
    assert "--kind gguf copies" in refused(*gguf, "--dtype", "bfloat16")
    assert "'gpu7'" in refused("demo", "--device", "gpu7", "--out", tmp_path / "demo")
    said = ["generate", tmp_path / "hybrid", "--prompt", "a", "--max-new-tokens", 2, "--device", "cpu"]
    assert consa_cli(*said, "--dtype", "bfloat16").exit_code == 0
    assert "'int8'" in refused(*said, "--dtype", "int8")
    assert "'gpu7'" in refused("bench", tmp_path / "hybrid", "--device", "gpu7")
    assert "engine transformers" in refused("bench", tmp_path / "hybrid", "--engine", "vllm", "--dtype", "float32")


def test_allocations_may_stand_in_a_list(tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    small = ["--data", text_folder, "--seq-len", 96, "--window", 8, "--num-heldout", 2, "--device", "cpu"]
    result = consa_cli("eval", tiny_model_folder, *small, "--allocation", "top,bottom", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    names = [line["name"] for line in json.loads((tmp_path / "out" / "eval.json").read_text())["lines"]]
    assert names == ["dense", "all_swa", "top", "bottom"]
