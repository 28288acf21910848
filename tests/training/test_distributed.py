"""Several processes do what one would, go on where another number of them was, and fail together."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from consa.config import AdaptConfig, LearnConfig, RunConfig
from consa.errors import ConsaError
from consa.runs.adaptation import run_adaptation
from consa.runs.learning import run_learning
from consa.training import distributed
from consa.training.loop import METRICS
from tests.compare import assert_close
from tests.compiler import COMPILES, needs_compiler
from tests.models import allocate, tiny
from tests.training.distributed_job import job, launch, results

ADAPT = {"num_steps": 4, "sequences_per_step": 4, "learning_rate": 3e-3, "checkpoint_every": 2}
LEARN = {"sparsity": 0.5, "window": 3, "num_sink_tokens": 1, "num_steps": 6, "sequences_per_step": 4}
LEARN |= {"gate_lr": 0.5, "refine_evaluations": 4, "refine_sequences": 3, "checkpoint_every": 2}


COMPILED = "fsdp-compiled"
JOBS: dict[str, tuple[str, dict[str, Any]]] = {
    "frozen": ("learn", LEARN),
    "layers": ("learn", LEARN | {"granularity": "layer", "micro_batch": 2}),
    "joint": ("learn", LEARN | {"mode": "joint", "weight_lr": 1e-3}),
    "joint-fsdp": ("learn", LEARN | {"mode": "joint", "weight_lr": 1e-3, "parallel": "fsdp"}),
    "adapt": ("adapt", ADAPT),
    COMPILED: ("adapt", ADAPT | {"parallel": "fsdp", "compile": True}),
    "lora": ("adapt", ADAPT | {"method": "lora", "distillation": 1.0}),
    "fsdp": ("adapt", ADAPT | {"parallel": "fsdp", "distillation": 1.0, "gradient_checkpointing": True}),
}


BFLOAT16: dict[str, Any] = {
    "verb": "adapt",
    "settings": ADAPT | {"parallel": "fsdp", "learning_rate": 1e-4, "num_steps": 8},
    "dtype": "bfloat16",
}
FROZEN_BFLOAT16: dict[str, Any] = {"verb": "learn", "settings": LEARN, "dtype": "bfloat16"}


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What two processes made of every job."""
    folder = tmp_path_factory.mktemp("two")
    jobs = [
        {"verb": verb, "settings": settings, "out": str(folder / name)}
        for name, (verb, settings) in JOBS.items()
        if name != COMPILED or COMPILES
    ]
    auto = {"verb": "adapt", "settings": ADAPT | {"micro_batch": "auto"}, "out": str(folder / "auto")}
    half = [BFLOAT16 | {"out": str(folder / "bfloat16")}, FROZEN_BFLOAT16 | {"out": str(folder / "frozen-bfloat16")}]
    done = launch(*jobs, *half, auto)
    assert done.returncode == 0, done.stderr
    return folder


def assert_alike(one: Any, other: Any, verb: str) -> None:
    assert one[0].get("allocation") == other[0].get("allocation")
    for record, wanted in zip(one[0]["history"], other[0]["history"], strict=True):
        assert record == pytest.approx(wanted, rel=1e-4 if verb == "adapt" else 1e-6, abs=1e-6)
    for name, value in one[1].items():
        assert_close(value, other[1][name], 1e-3, name)


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=needs_compiler if name == COMPILED else ()) for name in JOBS]
)
def test_two_processes_do_what_one_does(name: str, two: Path, tmp_path: Path):
    verb, settings = JOBS[name]
    job(verb, settings, str(tmp_path / "one"))
    found, wanted = results(two / name), results(tmp_path / "one")
    assert_alike(found, wanted, verb)
    if name in ("frozen", "layers"):
        assert found[0] == wanted[0], "gates alone: the same bits"


def test_each_tries_its_own_sequences(two: Path, tmp_path: Path):
    job("adapt", ADAPT, str(tmp_path / "one"))
    found, wanted = results(two / "auto"), results(tmp_path / "one")
    for record, other in zip(found[0]["history"], wanted[0]["history"], strict=True):
        assert record.pop("micro_batch") == ADAPT["sequences_per_step"] // 2 > other.pop("micro_batch") == 1
    assert_alike(found, wanted, "adapt")


def test_sharded_bfloat16_trains_float32_masters(two: Path, tmp_path: Path):
    """Both compute in bfloat16, and round in other places."""
    job(**BFLOAT16, out=str(tmp_path / "one"))
    (one, weights), (found, others) = results(tmp_path / "one"), results(two / "bfloat16")
    losses, wanted = ([record["loss"] for record in history] for history in (found["history"], one["history"]))
    assert losses == pytest.approx(wanted, rel=5e-3)
    for name, value in others.items():
        assert value.dtype == torch.bfloat16
        assert_close(value.float(), weights[name].float(), 1e-2, name)


def test_gates_of_a_bfloat16_model_get_the_same_bits(two: Path, tmp_path: Path):
    job(**FROZEN_BFLOAT16, out=str(tmp_path / "one"))
    assert results(tmp_path / "one")[0] == results(two / "frozen-bfloat16")[0]


@pytest.mark.parametrize("name", ["frozen", "joint-fsdp", "fsdp"])
def test_goes_on_with_another_number_of_processes(name: str, two: Path, tmp_path: Path):
    """Of two processes one is killed, and the other ends too, with a word; one goes on alone."""
    verb, settings = JOBS[name]
    common = {"verb": verb, "run_dir": str(tmp_path / "run")}
    done = launch({**common, "settings": settings, "out": str(tmp_path / "killed"), "kill": 3})
    assert done.returncode != 0 and "SIGKILL" in done.stderr
    assert not (tmp_path / "killed").exists()
    assert len((tmp_path / "run" / METRICS).read_text().splitlines()) == 2, "what there is to go on from"
    job(settings=settings | {"parallel": "ddp"}, out=str(tmp_path / "one"), **common)
    found, wanted = results(tmp_path / "one"), results(two / name)
    assert_alike(found, wanted, verb)
    assert name != "frozen" or found[0] == wanted[0], "gates alone: the same bits"


def test_more_processes_than_sequences(
    tiny_model_folder: Path, text_folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
):
    """Found before anything is loaded or written."""
    monkeypatch.setattr(distributed, "world_size", lambda: 2)
    where = RunConfig(model=str(tiny_model_folder), data=str(text_folder), device="cpu")
    kept, folder = allocate(tiny(), window=3), tmp_path / "run"
    one: dict[str, Any] = {"sequences_per_step": 1, "seq_len": 96}
    for attempt in (
        lambda: job("adapt", ADAPT | one, str(tmp_path / "out")),
        lambda: job("learn", LEARN | one, str(tmp_path / "out")),
        lambda: run_adaptation(where, kept, AdaptConfig(**one), folder, command="c"),
        lambda: run_learning(where, LearnConfig(window=8, **one), folder, command="c"),
    ):
        with pytest.raises(ConsaError, match="multiple of 2 processes x micro_batch 1, got 1; start fewer"):
            attempt()
    assert not list(tmp_path.iterdir())


def test_one_process_needs_no_group(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.group("cpu"), distributed.main_first():
        assert (distributed.rank(), distributed.world_size(), distributed.is_main()) == (0, 1, True)
        assert not torch.distributed.is_initialized()
        assert list(range(8))[distributed.share(8)] == list(range(8))
        tensor = torch.ones(3)
        assert distributed.all_reduce(tensor) is tensor and tensor.tolist() == [1, 1, 1]
        distributed.check_same(object(), "anything")
        distributed.check_divides(AdaptConfig().sequences_per_step, 1)


def test_shares_cover_without_overlap(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(distributed, "world_size", lambda: 4)
    taken = []
    for rank in range(4):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        taken += range(12)[distributed.share(12)]
    assert taken == list(range(12))


def test_one_gpu_for_all_is_refused(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with (
        pytest.raises(ConsaError, match="not name a single GPU for 2 processes, got 'cuda:1'"),
        distributed.group("cuda:1"),
    ):
        pass
