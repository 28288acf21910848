from __future__ import annotations

import errno
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner, Result

import consa
from consa import Allocation, rules
from consa.cli import commands as cli
from consa.cli import learn, options
from consa.config import LearnConfig, RunConfig
from consa.rules import RULES
from consa.settings import help_of
from consa.training.loop import CHECKPOINT

ROOT = Path(__file__).parents[2]
SMALL = ["--seq-len", "96", "--window", "8", "--num-steps", "4", "--sequences-per-step", "1"]
SMALL += ["--num-heldout", "2", "--device", "cpu", "--checkpoint-every", "1"]
SMALL += ["--refine-evaluations", "20", "--refine-sequences", "1"]


@pytest.fixture(autouse=True)
def apart(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """A cache of its own, and the environment as before: commands set some of it for their libraries."""
    before = dict(os.environ)
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    yield
    for name in os.environ.keys() - before.keys():
        del os.environ[name]


def consa_cli(*arguments: object) -> Result:
    result = CliRunner().invoke(cli.app, [str(argument) for argument in arguments])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def refused(*arguments: object, status: int = 2) -> str:
    """The one line that a refused command says."""
    result = consa_cli(*arguments)
    assert result.exit_code == status, result.output
    *progress, line = result.stderr.splitlines()
    assert line.startswith("error: ") and not any("rror" in before for before in progress)
    assert not result.stdout
    return line


# Help.


def test_help_is_instant():
    code = (
        "import sys\n"
        "from consa.cli import main\n"
        "sys.argv = ['consa', *sys.argv[1:]]\n"
        "try: main()\n"
        "except SystemExit as stop: assert not stop.code\n"
        "heavy = {'torch', 'transformers', 'matplotlib', 'consa.training.learning'} & set(sys.modules)\n"
        "assert not heavy, heavy\n"
    )
    for arguments in (["--help"], [], ["learn", "--help"], ["--version"]):
        began = time.monotonic()
        done = subprocess.run(
            [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, timeout=60
        )
        assert done.returncode == 0, done.stderr
        assert done.stdout and not done.stderr
        assert time.monotonic() - began < 5  # 0.3 s where nothing else runs


def test_version():
    assert consa_cli("--version").stdout == f"consa {consa.__version__}\n"


def test_every_setting_is_an_option():
    learn = cli.typer.main.get_command(cli.app).commands["learn"]  # pyright: ignore[reportAttributeAccessIssue]
    parameters = {parameter.name: parameter for parameter in learn.params}
    for config in (RunConfig, LearnConfig):
        for field in fields(config):
            parameter = parameters.pop(field.name)
            assert parameter.help == help_of(field)
            if field.default is MISSING:
                assert parameter.required
            else:
                assert parameter.default == field.default
                assert f"--{field.name.replace('_', '-')}" in parameter.opts
    assert parameters.keys() - {"help"} == {"out", "tensorboard", "wandb", "config"}


def test_every_help_line_is_a_sentence_and_stands_in_a_group():
    commands = cli.typer.main.get_command(cli.app).commands  # pyright: ignore[reportAttributeAccessIssue]
    for verb, command in commands.items():
        assert command.callback.__doc__.splitlines()[0].endswith("."), verb
        for parameter in command.params:
            assert parameter.help[0].isupper() or parameter.help.startswith("log_alpha"), parameter.help
            assert parameter.help.endswith("."), parameter.help
    text = consa_cli("learn", "--help").stdout
    order = ["Arguments:", "Options:", "Data options:", "Speed options:", "Solver options:"]
    places = [text.index(f"\n{heading}\n") for heading in order]
    assert places == sorted(places)
    assert places[1] < text.index("--sparsity") < places[2] < text.index("--heldout-data") < places[3]
    assert places[3] < text.index("--micro-batch") < places[4] < text.index("--penalty")
    words = " ".join(text.split())
    assert all(f"({bounds})" in words for bounds in ("between 0 and 1", "at least 2", "above 0"))
    assert consa_cli("learn", "-h").stdout == text and "activation" not in text
    overview = consa_cli("-h").stdout
    assert all(f"\n{group}:\n" in overview for group in cli.VERBS)
    assert all(f"\n  {verb} " in overview for verb in commands if verb != "cli-docs")


@pytest.mark.parametrize("on", [True, False])
def test_former_names_of_options_work(on: bool, caught: list[tuple[Any, ...]]):
    option = "--activation-checkpointing" if on else "--no-activation-checkpointing"
    assert consa_cli("learn", "m", option).exit_code == 0
    assert caught[0][1] == LearnConfig(gradient_checkpointing=on)


def test_the_reference_is_current():
    message = "run `make docs`"
    assert (ROOT / "docs" / "cli.md").read_text(encoding="utf-8") == consa_cli("cli-docs").stdout, message


# What reaches a run.


@pytest.fixture
def caught(monkeypatch: pytest.MonkeyPatch) -> list[tuple[Any, ...]]:
    """What `consa.runs.learning.run_learning` would be called with."""
    from consa.evaluation.intervals import Estimate
    from consa.evaluation.table import Line, Table
    from consa.runs import learning

    loss = Estimate(1.5, 1.4, 1.6)
    line = Line(
        **{"name": "learned", "kind": "learned", "sparsity": 0.0, "cache_bytes": 1, "loss": loss, "difference": loss},
        **{"recovered": 1.0, "by_position": {}, "differences_by_position": {}},
        **{"by_domain": {}, "differences_by_domain": {}},
    )
    table = Table(start=1, cache_tokens=1, lines=(line,), how={}).to_record()

    calls: list[tuple[Any, ...]] = []

    def record(where: RunConfig, config: LearnConfig, folder: Path, **options: Any) -> dict[str, Any]:
        calls.append((where, config, folder, options))
        return {"start": 1, "seq_len": 64, "table": table, "learn": {"mode": "frozen"}, "model": {"model": where.model}}

    monkeypatch.setattr(learning, "run_learning", record)
    return calls


@pytest.mark.parametrize(
    "given",
    [
        ["some/model"],
        ["a model", "--kv-budget", "2GiB", "--context", "131072", "--granularity", "layer"],
        ["m", "--sparsity", "0.5", "--gate-lr", "0.25", "--gradient-checkpointing", "--seed", "3"],
        ["m", "--mode", "joint", "--refine-evaluations", "0", "--dtype", "float32", "--start", "0"],
    ],
)
def test_the_recorded_command_gives_the_same_run(given: list[str], caught: list[tuple[Any, ...]]):
    assert consa_cli("learn", *given).exit_code == 0
    where, config, folder, options = caught[0]
    assert where.model == given[0]
    program, *again = shlex.split(options["command"])
    assert program == "consa" and consa_cli(*again).exit_code == 0
    assert caught[1] == (where, config, folder, options)
    assert folder.parent == Path("runs")


def test_options_arrive(caught: list[tuple[Any, ...]], tmp_path: Path):
    result = consa_cli("learn", "m", "--kv-budget", "2GiB", "--context", 131072, "--out", tmp_path, "--num-heldout", 3)
    (where, config, folder, options) = caught[0]
    assert (config.kv_budget, config.context, where.num_heldout, folder) == (2 * 2**30, 131072, 3, tmp_path)
    assert options["boards"] == ()
    assert "no rule was measured" in result.stdout and str(tmp_path / "heatmap.png") in result.stdout


def test_the_demo_is_a_fixed_run(caught: list[tuple[Any, ...]]):
    assert consa_cli("demo").exit_code == consa_cli("demo", "--seed", 2).exit_code == 0
    assert [call[0] for call in caught] == [learn.DEMO_RUN] * 2
    assert [call[1].seed for call in caught] == [0, 2]
    assert [str(call[2]) for call in caught] == ["runs/demo", "runs/demo-seed2"]
    assert caught[1][3]["command"] == "consa demo --seed 2"


@pytest.mark.parametrize(
    ("text", "expected"),
    [("2GiB", 2**31), ("1.5 KiB", 1536), ("512MB", 512_000_000), ("7", 7), ("7B", 7), ("3k", 3000), ("1TiB", 2**40)],
)
def test_sizes(text: str, expected: int):
    assert options.num_bytes(text) == expected


# What goes wrong.


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (["--sparsity", "1.5"], ["sparsity", "[0, 1]", "1.5"]),
        (["--sparsity", "nan"], ["sparsity", "nan"]),
        (["--sparsity", "half"], ["--sparsity", "half"]),
        (["--granularity", "head"], ["granularity", "layer, kv_head", "'head'"]),
        (["--mode", "hot"], ["mode", "frozen, joint", "'hot'"]),
        (["--window", "0"], ["window", ">= 1", "0"]),
        (["--window", "96", "--seq-len", "96"], ["window", "--seq-len (96)", "96"]),
        (["--num-sink-tokens", "-1"], ["--num-sink-tokens", "-1"]),
        (["--seed", "-1"], ["seed", "-1"]),
        (["--num-heldout", "0"], ["--num-heldout", "0"]),
        (["--max-tokens", "5"], ["--max-tokens", "5"]),
        (["--start", "8192"], ["start", "8191", "8192"]),
        (["--dtype", "int8"], ["dtype", "float32", "'int8'"]),
        (["--device", "gpu7"], ["device", "'gpu7'", "cuda:1"]),
        (["--kv-budget", "2GiB"], ["--kv-budget", "context", "together"]),
        (["--kv-budget", "lots", "--context", "9"], ["2GiB", "'lots'"]),
        (["--kv-budget", "2GiB", "--context", "9", "--sparsity", "0.5"], ["sparsity", "--kv-budget", "one of them"]),
        (["--data", "./nowhere"], ["./nowhere", "names no file"]),
        (["--heldout-data", "./nowhere"], ["./nowhere", "names no file"]),
        (["--colour", "red"], ["--colour"]),
        (["--tensorboard"], ["pip install 'consa[tensorboard]'"]),
        (["--wandb"], ["pip install 'consa[wandb]'"]),
    ],
)
def test_bad_settings_are_refused_before_any_work(
    arguments: list[str], named: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    from consa.runs import display, inputs

    monkeypatch.setattr(inputs, "load_model", None)
    monkeypatch.setattr(display, "find_spec", lambda name: None)
    line = refused("learn", "m", *arguments, "--out", tmp_path / "out")
    assert all(part in line for part in named), line
    assert not list(tmp_path.iterdir())


def test_bad_models_are_refused(tmp_path: Path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.gguf").write_bytes(b"GGUF\x03\x00\x00\x00\x01")
    (tmp_path / "damaged").mkdir()
    (tmp_path / "damaged" / "config.json").write_text("{")
    before = set(tmp_path.rglob("*"))
    for model in ("./nowhere", "some/where-else", "empty", "cut.gguf", "absent.gguf", "damaged"):
        given = model if model in ("./nowhere", "some/where-else") else str(tmp_path / model)
        line = refused("learn", given, "--data", tmp_path / "damaged", "--out", tmp_path / "out")
        assert given in line, line
    assert set(tmp_path.rglob("*")) == before
    assert "MODEL" in refused("learn")


@pytest.mark.parametrize(("text", "named"), [("", "no text"), ("too short", "--seq-len 96 is longer")])
def test_text_without_a_sequence_is_refused(text: str, named: str, tmp_path: Path, tiny_model_folder: Path):
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "b.txt").write_text(text + ".")
    arguments = ["--data", tmp_path / "a.txt", "--heldout-data", tmp_path / "b.txt", "--out", tmp_path / "o"]
    assert named in refused("learn", tiny_model_folder, *SMALL, *arguments)
    assert not (tmp_path / "o").exists()


def test_an_unwritable_folder_is_refused_before_any_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    from consa.runs import inputs

    monkeypatch.setattr(inputs, "load_model", None)
    (tmp_path / "file").touch()
    line = refused("learn", "m", *SMALL, "--out", tmp_path / "file" / "out")
    assert f"cannot write {tmp_path / 'file' / 'out'}" in line and "--out" in line
    assert "file" in refused("rules", "--layers", 2, "--kv-heads", 2, "--out", tmp_path / "file")


def test_a_full_disk_keeps_the_last_checkpoint(
    tmp_path: Path, tiny_model_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from consa.training.loop import Checkpoint

    command = ["learn", tiny_model_folder, *SMALL, "--data", text_folder]
    assert consa_cli(*command, "--out", tmp_path / "whole").exit_code == 0
    fsync, save, saved = os.fsync, Checkpoint.save, []

    def fail(_: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    def save_until_full(self: Checkpoint, *arguments: Any) -> None:
        if len(saved) == 2:
            monkeypatch.setattr(os, "fsync", fail)
        save(self, *arguments)
        saved.append((self.folder / CHECKPOINT).read_bytes())

    with monkeypatch.context() as patch:
        patch.setattr(Checkpoint, "save", save_until_full)
        line = refused(*command, "--out", tmp_path / "full")
    assert "No space left on device" in line and str(tmp_path / "full") in line
    assert (tmp_path / "full" / CHECKPOINT).read_bytes() == saved[-1] and len(saved) == 2
    monkeypatch.setattr(os, "fsync", fsync)
    assert consa_cli(*command, "--out", tmp_path / "full").exit_code == 0
    results = [(tmp_path / name / "allocation.json").read_bytes() for name in ("whole", "full")]
    assert results[0] == results[1]


def test_interrupted_and_out_of_memory(monkeypatch: pytest.MonkeyPatch):
    import torch

    from consa.runs import learning

    def failing(error: BaseException) -> None:
        def fail(*_: Any, **__: Any) -> None:
            raise error

        monkeypatch.setattr(learning, "run_learning", fail)

    failing(KeyboardInterrupt())
    assert "same command resumes" in refused("demo", status=130)
    from consa.model import convert

    monkeypatch.setattr(convert, "check_wish", learning.run_learning)
    words = ("convert", "m", "--allocation", "smollm2-135m/layer-0.5", "--out", "o")
    assert refused(*words, status=130) == "error: interrupted"
    for error in (
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"),
        RuntimeError("CUDA error: out of memory"),
        MemoryError(),
    ):
        failing(error)
        line = refused("learn", "m")
        assert all(name in line for name in ("--micro-batch", "--seq-len", "--gradient-checkpointing"))
        assert "--" not in refused("demo")  # which has no such options
    failing(RuntimeError("a mistake of ours"))
    with pytest.raises(RuntimeError, match="a mistake of ours"):
        consa_cli("demo")


# The whole command.


def test_learn_from_the_shell(tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    command = [sys.executable, "-m", "consa", "learn", str(tiny_model_folder), *SMALL]
    command += ["--data", str(text_folder), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        command, cwd=ROOT, capture_output=True, text=True, timeout=120, env=os.environ | {"COLUMNS": "200"}
    )
    assert done.returncode == 0, done.stderr
    words = {line.split()[0] for line in done.stdout.splitlines() if line.strip()}
    assert {"dense", "all_swa", *RULES, "learned", str(tmp_path / "out" / "heatmap.png")} <= words
    # Nothing but our own lines, and none of a terminal's control codes.
    assert {line.split()[0] for line in done.stderr.splitlines()} == {
        "Loading",
        "Reading",
        "Found",
        "Learning",
        "Refining",
        "Measuring",
    }
    outcome = done.stdout[done.stdout.index("best rule") - 30 :].splitlines()
    assert any(line.startswith("Undecided: ") for line in outcome)
    assert (
        outcome[-1]
        == f"Next: consa convert {tiny_model_folder} --allocation {tmp_path}/out --out {tmp_path}/out/hybrid"
    )
    for part in ("loss", "sparsity", "tokens/s", "GiB", "left"):
        assert part in done.stderr
    assert max(map(len, (line for line in done.stderr.splitlines() if "left: " in line))) < 80
    assert "\x1b" not in done.stdout + done.stderr and "\r" not in done.stderr
    assert Allocation.load(tmp_path / "out" / "allocation.json").num_layers == 4


def test_joint_learning_names_the_model_it_made(tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    out = tmp_path / "out"
    given = ["learn", tiny_model_folder, *SMALL, "--data", text_folder, "--out", out, "--mode", "joint"]
    result = consa_cli(*given)
    assert result.exit_code == 0, result.output
    assert str(out / "model") in result.stdout.split() and (out / "model" / "consa.json").exists()


def test_rules_of_a_shape(tmp_path: Path):
    result = consa_cli("rules", "--layers", 8, "--kv-heads", 2, "--sparsity", 0.5, "--out", tmp_path, "--tokens", 1000)
    assert result.exit_code == 0, result.output
    assert {path.stem for path in tmp_path.iterdir()} == set(RULES)
    for name in RULES:
        allocation = Allocation.load(tmp_path / f"{name}.json")
        assert (allocation.sparsity, allocation.granularity, allocation.window) == (0.5, "kv_head", 128)
        assert name in result.stdout
    size = Allocation.load(tmp_path / "top.json").kv_cache_bytes(1000, head_dim=128)
    assert f"{size / 2**20:.1f} MiB" in result.stdout
    assert (
        consa_cli(
            "rules", "--layers", 8, "--kv-heads", 2, "--granularity", "layer", "--out", tmp_path / "layers"
        ).exit_code
        == 0
    )
    assert {path.stem for path in (tmp_path / "layers").iterdir()} == set(RULES) - {"uniform_heads"}


def test_rules_of_a_model(tmp_path: Path, tiny_model_folder: Path):
    assert consa_cli("rules", tiny_model_folder, "--out", tmp_path).exit_code == 0
    allocation = Allocation.load(tmp_path / "middle.json")
    assert (allocation.num_layers, allocation.num_kv_heads) == (4, 3)
    assert allocation.provenance["model"] == str(tiny_model_folder)


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ([], "MODEL, or both"),
        (["--layers", 4], "MODEL, or both"),
        (["m", "--layers", 4, "--kv-heads", 2], "MODEL, or both"),
        (["--layers", 0, "--kv-heads", 2], "num_layers=0"),
        (["--layers", 4, "--kv-heads", 2, "--sparsity", -1], "-1"),
        (["--layers", 4, "--kv-heads", 2, "--tokens", 0], "tokens"),
        (["./nowhere"], "./nowhere"),
    ],
)
def test_rules_of_nothing_are_refused(arguments: list[Any], named: str, tmp_path: Path):
    assert named in refused("rules", *arguments, "--out", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_ctrl_c_keeps_the_step_and_the_next_run_says_from_where_it_goes_on(
    tmp_path: Path, tiny_model_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch
):
    from consa.runs.display import Display

    show, out = Display.on_step, tmp_path / "caf\udce9"  # a name that is not UTF-8
    command = ["learn", tiny_model_folder, "--data", text_folder, *SMALL, "--checkpoint-every", "100", "--out", out]

    def press(self: Display, record: dict[str, float]) -> None:
        show(self, record)
        if record["step"] == 2:
            os.kill(os.getpid(), signal.SIGINT)

    monkeypatch.setattr(Display, "on_step", press)
    assert "interrupted; the same command resumes" in refused(*command, status=130)
    assert (out / CHECKPOINT).exists() and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    (tmp_path / "done").mkdir()
    rules.top(4, 3, sparsity=0.5).save(tmp_path / "done" / "allocation.json")
    page = tmp_path / "page.html"
    result = consa_cli("report", tmp_path / "done", out, "--out", page)
    assert result.exit_code == 0 and "is not finished" in result.stderr and page.exists()
    monkeypatch.setattr(Display, "on_step", show)
    result = consa_cli(*command)
    assert result.exit_code == 0 and "Resuming after step 2 of 4" in result.stderr
    assert (out / "summary.json").exists()


def test_files_of_a_model_have_the_mode_that_the_umask_gives(tmp_path: Path, tiny_model_folder: Path):
    options = ["--allocation", "top", "--window", "8", "--out", tmp_path / "out"]
    assert consa_cli("convert", tiny_model_folder, *options).exit_code == 0
    (tmp_path / "plain").touch()
    mode = (tmp_path / "plain").stat().st_mode
    assert {path.stat().st_mode for path in (tmp_path / "out").iterdir()} == {mode}
