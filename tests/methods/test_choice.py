"""Methods by name and from a user's own file, and their settings from text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from consa import Allocation, ConsaError
from consa.config import EvalConfig, SweepConfig
from consa.methods.choice import Choice, choices, method_named
from tests.cli.test_cli import apart, consa_cli, refused  # noqa: F401 (apart is a fixture, for every test)

OWN = '''
from dataclasses import dataclass
import numpy as np
from consa.methods import Method
from consa.settings import option

@dataclass(frozen=True, kw_only=True)
class LeaveOneOut(Method):
    """Close every unit alone; those that raise the loss most keep full attention."""
    name = "leave_one_out"
    ranks = True
    texts: int = option(2, "Sequences of each evaluation.", ge=1)

    def choose(self, problem):
        texts, full = problem.sample(self.texts), np.ones(problem.units.count, dtype=bool)
        closed = (full & (np.arange(len(full)) != unit) for unit in range(len(full)))
        return problem.decide(self, np.array([problem.loss(rest, texts) for rest in closed]))
'''
assert len(OWN.strip().splitlines()) <= 20
SMALL = ["--seq-len", "96", "--window", "8", "--num-heldout", "3", "--device", "cpu", "--granularity", "layer"]


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a user's method, whose file lies in the working directory."""
    (tmp_path / "a_users_file.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    return "a_users_file:LeaveOneOut"


def chosen(**settings: Any) -> list[Choice]:
    return list(choices(SweepConfig(sparsity="0.5", **settings), EvalConfig(window=8, num_sink_tokens=2)))


def test_a_users_file_adds_a_method(own: str, tmp_path: Path, tiny_model_folder: Path, text_folder: Path):
    command = ["sweep", tiny_model_folder, *SMALL, "--data", text_folder, "--out", tmp_path / "out"]
    command += ["--methods", f"{own},top", "--sparsity", "0.5,0.75", "--settings", "leave_one_out.texts=1"]
    result = consa_cli(*command)
    assert result.exit_code == 0, result.output
    assert "leave_one_out" in result.stdout
    folder = tmp_path / "out" / "allocations"
    found = [Allocation.load(folder / f"leave_one_out-layer-{share}-seed0.json") for share in (0.5, 0.75)]
    assert [allocation.sparsity for allocation in found] == [0.5, 0.75]
    assert found[0].provenance["settings"] == {"texts": 1}
    # One run for both: an evaluation of each of the 4 layers.
    assert {allocation.provenance["cost"]["forward_tokens"] for allocation in found} == {4 * 96}
    record = json.loads((tmp_path / "out" / "config.json").read_text())
    assert record["sweep"]["methods"] == f"{own},top"


def test_a_method_from_a_file_that_does_not_work_is_one_line(own: str, tmp_path: Path):
    (tmp_path / "broken.py").write_text("import nothing_of_this_name\n")
    (tmp_path / "empty.py").write_text("class Plain: pass\n")
    (tmp_path / "nameless.py").write_text(OWN.replace('    name = "leave_one_out"\n', ""))
    for name, said in (
        ("broken:X", "cannot import the method 'broken:X': No module named 'nothing_of_this_name'"),
        ("not_there:X", "No module named 'not_there'"),
        ("empty:X", "has no attribute 'X'"),
        ("empty:Plain", "derive the class from consa.methods.Method"),
        ("nameless:LeaveOneOut", "needs a class attribute `name`"),
    ):
        assert said in refused("sweep", "m", "--methods", name, "--data", own, "--out", tmp_path / "out")


def test_settings_reach_the_methods_that_have_them():
    by_name = {choice.method.name: choice.method for choice in chosen(methods="consa,bosch,top", num_steps=7)}
    assert by_name["consa"] == method_named("consa", num_steps=7)
    assert by_name["bosch"] == method_named("bosch")
    (choice,) = chosen(methods="prulong", settings="prulong.learning_rate=0.5, prulong.compile=true")
    assert choice.method == method_named("prulong", learning_rate=0.5, compile=True)
    assert choice.name == "prulong-kv_head-0.5-seed0" and choice.config.window == 8


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ("learning_rate=1", "settings must look like method.setting=value, got 'learning_rate=1'"),
        ("bosch.num_buckets=3", "settings must name methods of this sweep (prulong), got 'bosch'"),
        ("prulong.rate=3", "prulong has the settings num_steps, "),
        ("prulong.num_steps=1.5", "prulong.num_steps must be an integer, got '1.5'"),
        ("prulong.compile=1", "prulong.compile must be true or false, got '1'"),
        ("prulong.lr_warmup=2", "lr_warmup must be a share in [0, 1], got 2.0"),
    ],
)
def test_bad_settings_are_refused_by_name(settings: str, said: str):
    with pytest.raises(ConsaError) as caught:
        chosen(methods="prulong", settings=settings)
    assert said in str(caught.value)


def test_seeds_are_for_what_draws():
    found = chosen(methods="consa,random_units,top", seeds=3)
    assert [choice.method.name for choice in found] == ["consa"] * 3 + ["random_units"] * 3 + ["top"]
