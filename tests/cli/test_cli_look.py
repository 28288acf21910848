"""`consa inspect` and `consa compare`."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from consa import Allocation
from tests.cli.test_cli import SMALL, consa_cli, refused


@pytest.fixture(scope="module")
def made(tiny_model_folder: Path, text_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run and what its last line says to make of it."""
    folder = tmp_path_factory.mktemp("made")
    learned = consa_cli("learn", tiny_model_folder, *SMALL, "--data", text_folder, "--out", folder / "run")
    verb, *words = learned.stdout.splitlines()[-1].removeprefix("Next: consa ").split()
    assert consa_cli(verb, *words).exit_code == 0
    return folder


def facts(name: object, *options: object) -> dict[str, str]:
    result = consa_cli("inspect", name, *options)
    assert result.exit_code == 0, result.output
    lines = result.stdout.split("\n\n")[-1].splitlines()
    return {line[:10].strip(): line[10:] for line in lines}


def test_a_run_tells_everything(made: Path, tiny_model_folder: Path):
    known = facts(made / "run", "--tokens", 1000)
    allocation = Allocation.load(made / "run")
    size = allocation.kv_cache_bytes(1000, head_dim=8)
    assert known["what"] == "run of consa learn"
    assert known["sparsity"].startswith("0.7500: 3 of 12 KV heads")
    assert known["window"] == "8 tokens and 4 sink tokens"
    assert f"{size / 2**20:.1f} MiB" in known["KV cache"] and "head dimension 8" in known["KV cache"]
    assert known["model"] == tiny_model_folder.name and "seed 0" in known["method"]
    summary = json.loads((made / "run" / "summary.json").read_text())
    assert known["command"] == summary["command"]
    assert known["verdict"] in (made / "run" / "summary.md").read_text()


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("run/hybrid", "converted folder (hybrid checkpoint)"),
        ("run/allocation.json", "file of an allocation"),
        ("smollm2-135m/layer-0.5", "published allocation"),
    ],
)
def test_everything_with_an_allocation_can_be_inspected(name: str, kind: str, made: Path):
    known = facts(name if name.startswith("smol") else made / name)
    assert known["what"] == kind
    assert ("head dimension 8" in known["KV cache"]) == (name == "run/hybrid")
    assert "--head-dim gives bytes" in known["KV cache"] or name == "run/hybrid"
    assert "head dimension 3" in facts(name if name.startswith("smol") else made / name, "--head-dim", 3)["KV cache"]


def test_the_first_lines_are_the_picture(made: Path):
    shown = consa_cli("inspect", made / "run").stdout.splitlines()
    assert shown[0].split() == ["layer", "0"] and [line[:9] for line in shown[1:4]] == [
        f"KV head {h}" for h in range(3)
    ]
    full = Allocation.load(made / "run").full_attention
    assert [[c in "█▓" for c in line[10:]] for line in shown[1:4]] == full.T.tolist()


def save(path: Path, rows: list[str]) -> Path:
    Allocation(full_attention=np.array([[c == "1" for c in row] for row in rows]), window=8).save(path)
    return path


def test_two_are_compared(tmp_path: Path, made: Path):
    one, two = (
        save(tmp_path / "1.json", ["110", "000", "001", "000"]),
        save(tmp_path / "2.json", ["100", "001", "001", "000"]),
    )
    shown = consa_cli("compare", one, two).stdout
    assert "KV heads with full attention: 0.500" in shown  # 2 of the 4 that either keeps
    assert f"Only in A, {one}: 1 KV heads (layer.head): 0.1\n" in shown
    assert f"Only in B, {two}: 1 KV heads (layer.head): 1.2\n" in shown
    assert "KV head 0 #...\nKV head 1 A...\nKV head 2 .B#.\n" in shown
    assert "\n  loss " not in shown
    with_run = consa_cli("compare", one, made / "run").stdout
    loss = json.loads((made / "run" / "summary.json").read_text())["losses"]["final"]
    assert f"{loss:.3f}" in with_run and "unknown" in with_run
    assert "attention: 1.000" in consa_cli("compare", one, one).stdout


def test_what_has_no_allocation_is_refused(tmp_path: Path, made: Path):
    small = save(tmp_path / "small.json", ["10"])
    assert "(4, 3)" in refused("compare", small, made / "run")
    assert "./nowhere" in refused("inspect", "./nowhere") or "nowhere" in refused("inspect", "./nowhere")
    assert "--tokens" in refused("inspect", small, "--tokens", 0)
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "bench.json").write_text("{}")
    assert "holds no allocation" in refused("inspect", tmp_path / "bare")


def test_compare_sends_a_rule_to_eval():
    line = refused("compare", "smollm2-135m/kv_head-0.75", "interleaved")
    assert "interleaved is a rule" in line and "consa eval" in line
