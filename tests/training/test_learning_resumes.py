"""Learning that was killed, or ran into a full disk, and is started again ends as if nothing had happened."""

from __future__ import annotations

import errno
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from consa.config import LearnConfig
from consa.errors import ConsaError
from consa.training.learning import learn
from consa.training.loop import CHECKPOINT, METRICS
from tests.models import tiny
from tests.training.learning_case import QUICK, ROOT, Interrupted, at_step, changed, interrupt, text


def end(folder: Path, config: LearnConfig = QUICK, **options: Any) -> tuple[str, Any, dict[str, Tensor]]:
    model = tiny()
    result = learn(model, text(), config, run_dir=folder, **options)
    return result.allocation.to_json(), result.history, model.state_dict()


def assert_same(one: Any, other: Any) -> None:
    assert one[0] == other[0], "allocations differ"
    assert one[1] == other[1], "histories differ"
    assert all(torch.equal(value, other[2][name]) for name, value in one[2].items()), "weights differ"


@pytest.mark.parametrize(("mode", "every"), [("frozen", 1), ("frozen", 4), ("joint", 2)])
def test_goes_on_after_an_exception_at_any_step_bit_for_bit(mode: Any, every: int, tmp_path: Path):
    config = changed(mode=mode, checkpoint_every=every, refine_evaluations=4, weight_lr=1e-3)
    wanted = end(tmp_path / "undisturbed", config)
    assert_same((*wanted[:2], {}), (*end(tmp_path / "undisturbed", config)[:2], {}))
    steps_done: list[float] = []
    for number in range(1, config.num_steps + 1):
        folder = tmp_path / str(number)
        with pytest.raises(Interrupted):
            end(folder, config, on_step=at_step(number, interrupt))
        steps_done.clear()
        assert_same(end(folder, config, on_step=lambda record: steps_done.append(record["step"])), wanted)
        assert steps_done[0] == (number - 1) // every * every + 1, "it must go on, not start over"
        lines = (folder / METRICS).read_text().splitlines()
        assert [json.loads(line) for line in lines] == wanted[1]


def test_a_finished_run_refines_no_more(tmp_path: Path):
    config = changed(refine_evaluations=4)
    evaluated: list[Any] = []
    wanted = end(tmp_path, config, on_exchange=evaluated.append)
    assert evaluated
    evaluated.clear()
    assert_same((*end(tmp_path, config, on_exchange=evaluated.append)[:2], {}), (*wanted[:2], {}))
    assert not evaluated


def test_goes_on_however_often_it_is_interrupted(tmp_path: Path):
    for number in range(1, QUICK.num_steps + 1):  # one more step each time
        with pytest.raises(Interrupted):
            end(tmp_path / "again", on_step=at_step(number, interrupt))
    assert_same(end(tmp_path / "again"), end(tmp_path / "undisturbed"))


def test_goes_on_after_being_killed_while_writing_a_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted = end(tmp_path / "undisturbed")
    replace_file, calls = os.replace, 0
    for last in range(1, 7):
        calls, folder = 0, tmp_path / str(last)

        def stop(source: Any, target: Any, last: int = last) -> None:
            nonlocal calls
            calls += 1
            if calls == last:
                raise Interrupted
            replace_file(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", stop)
            with pytest.raises(Interrupted):
                end(folder)
        assert_same(end(folder), wanted)


def test_goes_on_after_sigkill_bit_for_bit(tmp_path: Path):
    code = (
        "import os, signal, sys\n"
        "from pathlib import Path\n"
        "from tests.training.test_learning_resumes import QUICK, at_step, end\n"
        "end(Path(sys.argv[1]), on_step=at_step(4, lambda: os.kill(os.getpid(), signal.SIGKILL)))\n"
    )
    command = [sys.executable, "-c", code, str(tmp_path / "killed")]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, timeout=120)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    assert (tmp_path / "killed" / CHECKPOINT).exists()
    steps: list[float] = []
    got = end(tmp_path / "killed", on_step=lambda record: steps.append(record["step"]))
    assert steps == [4, 5, 6]
    assert_same(got, end(tmp_path / "undisturbed"))


@pytest.mark.parametrize(
    ("config", "sequences", "identity", "difference"),
    [
        (changed(seed=1), text(), "a", "config.seed was 0, now 1"),
        (changed(sparsity=0.75), text(), "a", r"config.sparsity was 0\.5, now 0\.75"),
        (changed(num_steps=7), text(), "a", "config.num_steps was 6, now 7"),
        (changed(granularity="layer"), text(), "a", "config.granularity was 'kv_head', now 'layer'"),
        (changed(mode="joint"), text(), "a", "config.mode was 'frozen', now 'joint'"),
        (QUICK, text()[::-1], "a", "sequences was"),
        (QUICK, text()[:6], "a", "sequences was"),
        (QUICK, text(), "b", "model.model was 'a', now 'b'"),
        (QUICK, text(), None, "model was"),
    ],
)
def test_another_run_in_the_folder_is_refused(config, sequences, identity, difference, tmp_path: Path):
    learn(tiny(), text(), QUICK, run_dir=tmp_path, identity={"model": "a"})
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ConsaError, match=difference) as caught:
        learn(tiny(), sequences, config, run_dir=tmp_path, identity=identity and {"model": identity})
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_how_often_to_checkpoint_may_change(tmp_path: Path):
    with pytest.raises(Interrupted):
        end(tmp_path / "a", on_step=at_step(3, interrupt))
    assert_same(end(tmp_path / "a", changed(checkpoint_every=5)), end(tmp_path / "b"))


@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[:100],
        lambda content: content[:-1],
        lambda content: b"\xff" * 64,
        lambda content: content.replace(b"step", b"stop"),
        lambda content: content.replace(b": 6,", b": x,"),
    ],
)
def test_a_damaged_checkpoint_is_refused(damage: Any, tmp_path: Path):
    end(tmp_path)
    path = tmp_path / CHECKPOINT
    before = path.read_bytes()
    path.write_bytes(damage(before))
    assert path.read_bytes() != before
    with pytest.raises(ConsaError, match=rf"cannot continue from .*{CHECKPOINT}: damaged") as caught:
        end(tmp_path)
    assert "\n" not in str(caught.value)


def test_damaged_metrics_are_refused(tmp_path: Path):
    end(tmp_path)
    (tmp_path / METRICS).write_text('{"step": 1\n')
    with pytest.raises(ConsaError, match=r"cannot continue from .*: damaged"):
        end(tmp_path)


@pytest.mark.parametrize("failing", [1, 2, 5, 6])
def test_a_full_disk_keeps_the_previous_checkpoint(failing: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    wanted, calls = end(tmp_path / "undisturbed"), 0

    def full(descriptor: int) -> None:
        nonlocal calls
        calls += 1
        if calls >= failing:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(ConsaError, match=r"cannot write .*: No space left on device; .*") as caught:
            end(tmp_path / "full")
    assert "\n" not in str(caught.value)
    assert {path.name for path in (tmp_path / "full").iterdir()} <= {CHECKPOINT, METRICS}, "half a file is left"
    steps: list[float] = []
    assert_same(end(tmp_path / "full", on_step=lambda record: steps.append(record["step"])), wanted)
    assert steps[0] == (failing - 1) // 2 + 1


def test_a_folder_that_is_a_file(tmp_path: Path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConsaError, match=r"cannot write .*file/"):
        end(tmp_path / "file" / "run")
