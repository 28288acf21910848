"""eval and sweep as commands: what they write and print, and what they refuse in one line."""

from __future__ import annotations

import json
import shlex
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest

from consa import Allocation, rules
from consa.cli import commands as cli
from consa.config import EvalConfig, RunConfig, SweepConfig
from consa.errors import ConsaError
from consa.model import convert
from consa.runs import adaptation, inputs
from consa.settings import help_of
from tests.cli.test_cli import apart, consa_cli, refused  # noqa: F401 (apart is a fixture, for every test)

SMALL = ["--seq-len", "96", "--window", "8", "--num-heldout", "3", "--device", "cpu"]


def test_every_setting_is_an_option():
    commands = cli.typer.main.get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for verb, own, configs in (
        ("eval", {"allocation"}, (EvalConfig, RunConfig)),
        ("sweep", set(), (EvalConfig, RunConfig, SweepConfig)),
    ):
        parameters = {parameter.name: parameter for parameter in commands[verb].params}
        for field in {field.name: field for config in configs for field in fields(config)}.values():
            parameter = parameters.pop(field.name)
            assert parameter.help == help_of(field)
            assert field.default is MISSING or parameter.default == field.default
        assert parameters.keys() - {"help"} == {"out", "config", *own}


def test_eval_measures_what_is_named(tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    rules.top(4, 3, sparsity=0.25, window=8).save(tmp_path / "mine.json")
    names = ["middle", "all_swa", tmp_path / "mine.json"]
    command = ["eval", tiny_model_folder, *SMALL, "--data", text_folder, "--sparsity", 0.5]
    command += ["--retrieval", "single", "--lengths", "500", "--examples", 1, "--out", tmp_path / "out"]
    result = consa_cli(*command, *(word for name in names for word in ("--allocation", name)))
    assert result.exit_code == 0, result.output
    for part in ("dense", "all_swa", "middle", "recovered", "single 500", "by first position", "eval.png"):
        assert part in result.stdout
    assert "Measuring 16/16" in result.stderr
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [line["sparsity"] for line in record["lines"]] == [0, 1, 0.5, 0.25]
    again = consa_cli(*shlex.split(record["how"]["command"])[1:], "--out", tmp_path / "out")
    assert again.exit_code == 0 and again.stdout == result.stdout and "Measuring" not in again.stderr
    assert not (tmp_path / "out" / "config.json").exists()  # a folder of `consa learn` keeps its own


def test_sweep_draws_the_frontier(tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    command = ["sweep", tiny_model_folder, *SMALL, "--data", text_folder, "--methods", "top,random_units"]
    command += ["--sparsity", "0.25,0.5", "--granularity", "layer,kv_head", "--seeds", 2, "--out", tmp_path]
    result = consa_cli(*command)
    assert result.exit_code == 0, result.output
    rows = [line.split()[:3] for line in result.stdout.splitlines() if line.startswith(("  top", "  random"))]
    assert len(rows) == 8 and ["random_units", "kv_head", "0.25"] in rows
    assert (tmp_path / "frontier.png").exists() and str(tmp_path / "frontier.png") in result.stdout
    stored = Allocation.load(tmp_path / "allocations" / "top-layer-0.5-seed0.json")
    assert (stored.sparsity, stored.granularity, stored.window) == (0.5, "layer", 8)
    record = json.loads((tmp_path / "eval.json").read_text())
    again = consa_cli(*shlex.split(record["how"]["command"])[1:], "--out", tmp_path)
    assert again.exit_code == 0 and again.stdout == result.stdout


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["eval", "m", "--retrieval", "needle"], ["single, multi_key", "'needle'"]),
        (["eval", "m", "--lengths", "1k"], ["lengths", "'1k'"]),
        (["eval", "m", "--examples", "0"], ["examples", "0"]),
        (["eval", "m", "--window", "many"], ["--window", "'many'"]),
        (["eval", "m", "--data", "./nowhere"], ["./nowhere"]),
        (["eval", "./nowhere"], ["./nowhere"]),
        (["sweep", "m", "--methods", "guess"], ["rules, consa", "'guess'"]),
        (["sweep", "m", "--sparsity", "0.5,2"], ["sparsity", "2.0"]),
        (["sweep", "m", "--granularity", "head"], ["granularity", "layer, kv_head", "'head'"]),
        (["sweep", "m", "--seeds", "0"], ["seeds", "0"]),
        (["sweep", "m", "--data", "./nowhere"], ["./nowhere"]),
        (["sweep", "./nowhere"], ["./nowhere"]),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    arguments: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "load_model", None)
    line = refused(*arguments, "--out", tmp_path / "out")
    assert all(part in line for part in named), line
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--allocation", "guess"], ["'guess'", "dense, all_swa, interleaved"]),
        (["--allocation", "{0}/cut.json"], ["cut.json", "JSON"]),
        (["--allocation", "{0}/other.json"], ["other.json", "5 layers x 3 KV heads"]),
        (["--allocation", "{0}/other.tsv"], ["other.tsv"]),
        (["--seq-len", "5000"], ["--seq-len", "4096", "5000"]),
        (["--retrieval", "single", "--lengths", "5000"], ["lengths", "4096", "5000"]),
        (["--window", "96"], ["window", "96"]),
    ],
)
def test_what_does_not_fit_the_model_is_refused(
    arguments: list[str],
    named: list[str],
    tmp_path: Path,
    tiny_model_folder: Path,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    other = rules.top(5, 3, sparsity=0.4)
    other.save(tmp_path / "other.json")
    (tmp_path / "cut.json").write_text(other.to_json()[:-40])
    (tmp_path / "other.tsv").write_text("1\t0\n")
    monkeypatch.setattr(inputs, "load_sequences", None)
    given: list[Any] = ["eval", tiny_model_folder, *SMALL, "--data", text_folder, "--out", tmp_path / "out"]
    line = refused(*given, *(argument.format(tmp_path) for argument in arguments))
    assert all(part in line for part in named), line


@pytest.mark.parametrize("verb", ["learn", "adapt", "eval", "sweep", "behaviour"])
def test_longer_sequences_than_positions_are_refused_before_a_model_is_loaded(
    verb: str, tmp_path: Path, tiny_model_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "load_model", None)
    rules.top(4, 3, sparsity=0.25, window=8).save(tmp_path / "allocation.json")
    own = {"adapt": ["--allocation", tmp_path / "allocation.json"], "sweep": ["--methods", "top"]}.get(verb, [])
    out = tmp_path / ("out.safetensors" if verb == "behaviour" else "out")
    line = refused(verb, tiny_model_folder, "--data", text_folder, "--seq-len", 5000, *own, "--out", out)
    assert "--seq-len must be at most the 4096 positions" in line and "5000" in line


def test_rules_are_measured_at_the_window_of_the_files_beside_them(
    tmp_path: Path, tiny_model_folder: Path, text_folder: Path
):
    rules.top(4, 3, sparsity=0.25, window=8, num_sink_tokens=2).save(tmp_path / "a.json")
    names = ["--allocation", "middle", "--allocation", tmp_path / "a.json"]
    command = ["eval", tiny_model_folder, "--seq-len", "96", "--num-heldout", "3", "--data", text_folder, *names]
    result = consa_cli(*command, "--device", "cpu", "--out", tmp_path / "out")
    assert result.exit_code == 0, result.output
    record = json.loads((tmp_path / "out" / "eval.json").read_text())
    assert [line["name"] for line in record["lines"]] == ["dense", "all_swa", "middle", str(tmp_path / "a.json")]
    result = consa_cli(*command, "--device", "cpu", "--window", 9, "--out", tmp_path / "other")
    assert "all_swa 9+4" in result.stdout and "all_swa 8+2" in result.stdout
    assert "Windows or sink tokens differ" in result.stderr


def test_a_sparsity_that_no_rule_takes_is_refused(tmp_path: Path):
    rules.top(4, 3, sparsity=0.25, window=8).save(tmp_path / "a.json")
    line = refused("eval", "m", "--sparsity", 0.5, "--allocation", tmp_path / "a.json", "--out", tmp_path / "out")
    assert "sparsity applies to rules" in line


@pytest.mark.parametrize("verb", ["adapt", "convert"])
@pytest.mark.parametrize(
    ("name", "options", "want"),
    [
        ("top", ["--sparsity", "0.5", "--window", "9"], (0.5, 9)),
        ("all_swa", ["--window", "9"], (1.0, 9)),
        ("dense", [], (0.0, None)),
        ("{0}/a.tsv", ["--window", "9"], (0.5, 9)),
    ],
)
def test_adapt_and_convert_take_the_allocations_that_eval_takes(
    verb: str,
    name: str,
    options: list[str],
    want: tuple[float, int | None],
    tmp_path: Path,
    tiny_model_folder: Path,
    text_folder: Path,
    monkeypatch: pytest.MonkeyPatch,
):
    (tmp_path / "a.tsv").write_text("\n".join(["1\t1\t1", "0\t0\t0"] * 2))
    given: list[Any] = []

    def stop(*args: Any, **_: Any) -> None:
        given.extend(x for x in args if isinstance(x, Allocation))
        raise ConsaError("stopped")

    monkeypatch.setattr(adaptation, "run_adaptation", stop)
    monkeypatch.setattr(convert, "convert", stop)
    words = [verb, tiny_model_folder, "--allocation", name.format(tmp_path), *options, "--out", tmp_path / "out"]
    if verb == "adapt":
        words += ["--data", text_folder]
    assert "stopped" in refused(*words)
    assert given[0].sparsity == want[0] and want[1] in (None, given[0].window)


@pytest.mark.parametrize("verb", ["adapt", "convert"])
@pytest.mark.parametrize("option", ["--sparsity", "--window"])
def test_options_of_rules_are_refused_beside_a_file(verb: str, option: str, tmp_path: Path, tiny_model_folder: Path):
    rules.top(4, 3, sparsity=0.25, window=8).save(tmp_path / "a.json")
    number = {"--sparsity": "0.5", "--window": "9"}[option]
    line = refused(
        verb, tiny_model_folder, "--allocation", tmp_path / "a.json", option, number, "--out", tmp_path / "out"
    )
    assert option in line and "a.json" in line and "keeps its own" in line
