"""The documents' blocks run as they stand, on a tiny model and a little text.

The models of Qwen, `smollm2-135m` and `books/*.txt` are stand-ins in the working folder. Commands get the options of
`SMALL` in addition to their own. Commands that `NOT_RUN` lists are only parsed.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer
from typer.main import get_command
from typer.testing import CliRunner

from consa import methods, rules
from consa.cli import commands as cli
from consa.cli.terminal import UsageError
from consa.model import load
from consa.serving import limits
from tests import models

ROOT = Path(__file__).parent.parent
DOCUMENTS = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
RECORDS = ("CHANGELOG.md", "RESULTS.md", "LOG.md")  # of what there was then, with the options of then
WITH_BLOCKS = {"README.md", "CONTRIBUTING.md", "SECURITY.md", "DESIGN.md", "EXTENDING.md", "SERVING.md", "TUTORIAL.md"}

TRAINING = "--seq-len 96 --num-steps 2 --sequences-per-step 4 --num-heldout 2 --device cpu"
SMALL = {
    "learn": f"{TRAINING} --window 8 --refine-evaluations 4 --refine-sequences 1",
    "adapt": TRAINING,
    "eval": "--seq-len 96 --window 8 --num-heldout 2 --lengths 600 --examples 1 --device cpu",
    "behaviour": "--seq-len 96 --device cpu",
    "bench": "--contexts 64 --decode-tokens 2 --repeats 1",
    "generate": "--max-new-tokens 3",
    "sweep": "--seq-len 96 --window 8 --num-heldout 2 --evaluation-sequences 2 --device cpu",
}
NOT_RUN = {  # how a command begins, and why it does not run here; what consa takes of it is parsed all the same
    "git clone ": "the network; there is nothing to parse",
    "cd ": "would leave the folder",
    "make ": "installs, and runs these tests; but there must be such a target",
    "pip install ": "the network; but there must be such extras",
    "curl ": "a server; but its JSON must be such",
    "torchrun ": "8 GPUs",
}
VLLM_OPTIONS = (  # which vLLM alone can parse
    *("--disable-hybrid-kv-cache-manager", "--dtype", "--enforce-eager", "--max-num-batched-tokens"),
    *("--model-impl", "--tensor-parallel-size", "--watermark"),
)


# What a document holds.


@dataclass(frozen=True)
class Block:
    kind: str  # as its fence says; "sh" where there is none
    text: str
    line: int


def blocks(document: str) -> Iterator[Block]:
    """The fenced and the indented blocks of a document, in order."""
    fenced = r"^```(?P<kind>\w*)\n(?P<fenced>(?:(?!```).*\n)*)```$"
    indented = r"(?<=\n\n)(?P<indented>(?: {4}.*\n|\n(?= {4}))+)"
    for match in re.finditer(f"{fenced}|{indented}", document, re.MULTILINE):
        line = document.count("\n", 0, match.start()) + 1
        if match["indented"]:
            yield Block("sh", match["indented"], line)
        else:
            yield Block(match["kind"], match["fenced"], line + 1)


def commands(block: Block) -> list[str]:
    """One a line, or with && between."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [command.strip() for line in lines for command in line.split(" && ") if command.strip()]


def words_of(command: str, folder: Path) -> list[str]:
    """The words of a command as a shell in that folder passes them on, without what it sets for the environment."""
    shown = subprocess.run(
        ["bash", "-c", f"show() {{ printf '%s\\0' \"$@\"; }}; show {command}"],
        cwd=folder,
        capture_output=True,
        check=True,
    )
    words = shown.stdout.decode().split("\0")[:-1]
    while "=" in words[0]:
        words.pop(0)
    return words


def inline(document: str) -> Iterator[list[str]]:
    """The words of each `...` in the running text."""
    text = re.sub(r"^```.*?^```$", "", document, flags=re.MULTILINE | re.DOTALL)
    for span in re.findall(r"(?<!`)`([^`]+)`(?!`)", text):
        yield span.split()


# What is done with it.


def parse(words: list[str], *, partly: bool = False) -> None:
    """Have a command's own parser read what follows `consa`, and no more.

    Args:
        words: verb, arguments and options.
        partly: what is required may be left out.
    """
    group: Any = get_command(cli.app)
    if words[0] in {option for p in group.params for option in p.opts}:  # of `consa` itself
        return
    try:
        group.commands[words[0]].make_context(words[0], words[1:])
    except UsageError as error:
        if not (partly and type(error).__name__ == "MissingParameter"):
            raise


def check(command: str, folder: Path) -> None:
    """What can be said of a command of `NOT_RUN`."""
    if command.startswith(("git clone ", "cd ")):
        return
    words = words_of(command, folder)
    if "consa" in words:
        parse(words[words.index("consa") + 1 :], partly="..." in words)
    elif words[0] == "make":
        subprocess.run([*words, "--dry-run"], cwd=ROOT, capture_output=True, check=True)
    elif words[0] == "pip":
        extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
        named = re.findall(r"\[(.*)\]", words[-1])
        assert {name for names in named for name in names.split(",")} <= extras.keys(), words
    elif words[0] == "curl":
        assert json.loads(words[words.index("-d") + 1])["prompt"]


def run(words: list[str], servers: list[Any]) -> str:
    """Run `consa` in this process, small; returns what it printed."""
    assert words[0] == "consa", f"neither a command of consa's nor in NOT_RUN: {words}"
    small = SMALL.get(words[1], "").split()
    before = len(servers)
    result = CliRunner().invoke(cli.app, [*words[1:], *small])
    if result.exception and not isinstance(result.exception, SystemExit):
        raise result.exception
    assert result.exit_code == 0, f"{words}: {result.output}"
    assert len(servers) == before + (words[1] == "serve")
    return result.output


def keywords() -> dict[str, dict[str, Any]]:
    """`SMALL` for Python: `small` of `consa.learn`, `small_text` of `consa.evaluate`."""

    def of(command: str) -> dict[str, Any]:
        words = SMALL[command].split()
        pairs = zip(words[::2], words[1::2], strict=True)
        return {k[2:].replace("-", "_"): int(v) if v.isdigit() and k != "--lengths" else v for k, v in pairs}

    return {"small": of("learn"), "small_text": of("eval")}


def skeleton(text: str) -> set[str]:
    """Of a command's output, the lines that are the same whatever was measured."""
    lines = (" ".join(line.split()) for line in text.splitlines())
    return {line for line in lines if line and not re.search(r"\d|─|\.\.\.", line)}


@pytest.fixture
def servers(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The servers that `consa serve` would have become; the engine passes for installed."""
    started: list[Any] = []
    monkeypatch.setattr(limits, "vllm_version", lambda: f"{limits.VERSIONS[0]}.0")
    monkeypatch.setattr(os, "execv", lambda program, words: started.append(words))
    return started


@pytest.fixture(autouse=True)
def tables() -> Iterator[None]:
    """What examples add to is afterwards as before."""
    tables: tuple[dict[str, Any], ...] = rules.RULES, methods.METHODS, models.FAMILIES
    before = [dict(table) for table in tables]
    yield
    for table, content in zip(tables, before, strict=True):
        table.clear()
        table.update(content)


@pytest.fixture
def folder(tmp_path: Path, tiny_model_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory of a reader, with stand-ins under the names in the documents."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_folder)
    qwen = models.tiny("qwen3", vocab_size=len(tokenizer), bos_token_id=None, pad_token_id=None)
    for path, name in product((qwen, tokenizer), ("Qwen3-0.6B", "Qwen2.5-Coder-0.5B-Instruct")):
        path.save_pretrained(tmp_path / "Qwen" / name)
    shutil.copytree(tiny_model_folder, tmp_path / "smollm2-135m")
    shutil.copytree(text_folder, tmp_path / "books")
    monkeypatch.setattr(load, "PACKAGED_MODELS", {})
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.chdir(tmp_path)
    return tmp_path


# The tests.


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_blocks_run(path: Path, folder: Path, servers: list[Any]):
    names: dict[str, Any] = {"input_ids": models.tokens(1, 20), **keywords()}
    output, found = "", list(blocks(path.read_text(encoding="utf-8")))
    assert bool(found) == (path.name in WITH_BLOCKS)
    for block in found:
        where = f"{path.name}:{block.line}"
        if block.kind == "sh":
            output = ""
            for command in commands(block):
                if command.startswith(tuple(NOT_RUN)):
                    check(command, folder)
                else:
                    output += run(words_of(command, folder), servers)
        elif block.kind == "python":
            if named := re.match(r"# (\w+\.py)\n", block.text):  # commands may import it
                (folder / named[1]).write_text(block.text)
            exec(compile(block.text, where, "exec"), names)
        else:
            assert block.kind == "text", f"{where}: say what this is: sh, python or text"
            missing = skeleton(block.text) - skeleton(output)
            assert not output or not missing, f"{where}: {missing} not in\n{output}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_options_in_the_text_exist(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name in ("hybrid", "plain"):  # a command refuses a folder that does not exist
        (tmp_path / name).mkdir()
    for run in ("runs/qwen", "runs/coder"):
        (tmp_path / run).mkdir(parents=True)
        (tmp_path / run / "config.json").write_text("{}")  # of --config
    monkeypatch.chdir(tmp_path)
    if path.name in RECORDS:
        pytest.skip("a record")
    known = set(VLLM_OPTIONS)
    group: Any = get_command(cli.app)
    for command in group.commands.values():
        known |= {option for p in command.params for option in (*p.opts, *p.secondary_opts)}
    for words in inline(path.read_text(encoding="utf-8")):
        if words[0] == "consa" and len(words) > 1:
            parse(words[1:], partly=True)
        assert not words[0].startswith("--") or words[0] in {*known, "--"}, words


def test_a_renamed_option_is_noticed(tmp_path: Path):
    with pytest.raises(UsageError, match="--sparsitty"):
        parse(words_of("consa learn model --sparsitty 0.5", tmp_path)[1:], partly=True)
    with pytest.raises(UsageError, match=r"(?i)missing"):
        parse(["convert", "model"])


def test_what_does_not_run_is_there():
    everything = [
        command
        for path in DOCUMENTS
        for block in blocks(path.read_text(encoding="utf-8"))
        for command in commands(block)
    ]
    for start in NOT_RUN:
        assert any(command.startswith(start) for command in everything), f"no document has {start!r}"
