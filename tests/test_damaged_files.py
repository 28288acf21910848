"""The smallest inputs of failures that the campaigns found: now refused in one line, or made again."""

from __future__ import annotations

import errno
import json
import os
import re
import struct
import tracemalloc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import SafetensorError
from typer.testing import CliRunner

from consa import ConsaError, convert, rules
from consa.cli import commands as cli
from consa.cli import terminal
from consa.config import EvalConfig, LearnConfig, RunConfig, SweepConfig
from consa.data.sequences import load_sequences
from consa.evaluation.cells import Cell, run_cells
from consa.files import SEAL_BYTES, is_sealed, read_json, read_sealed, read_text, write_sealed
from consa.model.convert import verify
from consa.model.gguf import check_header
from consa.model.layout import AttentionLayout
from consa.model.load import load_model, read_layout
from consa.runs import folder
from consa.runs import sweep as sweeping
from consa.runs.learning import run_learning
from consa.training.loop import CHECKPOINT, METRICS, Checkpoint
from tests.models import allocate, byte_tokenizer, tiny, write_gguf

DEEP = "[" * 100_000 + "]" * 100_000


def refuses(call: Callable[[], Any], *parts: str) -> None:
    with pytest.raises(ConsaError) as caught:
        call()
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert len(message.splitlines()) == 1


# Text and JSON.


def test_a_message_is_one_line_whatever_it_quotes():
    assert str(ConsaError("a\nname\r\nb")) == "a name b"


def test_reading_takes_no_more_memory_than_the_file(tmp_path: Path):
    (tmp_path / "a").write_text("text")
    tracemalloc.start()
    assert read_text(tmp_path / "a", max_bytes=2**30) == "text"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2**23
    refuses(lambda: read_text(Path("/dev/zero"), max_bytes=2**20), "/dev/zero", str(2**20))


@pytest.mark.parametrize("text", ["", "{", DEEP, f'{{"a": {"9" * 5000}}}', "[]", "null", "\ufeff{}"])
def test_what_is_no_json_object_is_refused(text: str, tmp_path: Path):
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    refuses(lambda: read_json(tmp_path / "a.json", max_bytes=2**20), "a.json is damaged")


# A run that is continued.


@pytest.mark.parametrize("damage", [b"\x01", None])
def test_a_checkpoint_with_a_flipped_bit_is_refused(damage: bytes | None, tmp_path: Path):
    import torch

    run = Checkpoint(tmp_path, {"a": 1})
    run.save({"log_alpha": torch.arange(4.0)}, 2, [{"step": 1, "loss": 2.0}, {"step": 2, "loss": 1.5}])
    assert run.load()
    if damage:
        content = (tmp_path / CHECKPOINT).read_bytes()
        place = len(content) - SEAL_BYTES - 1
        (tmp_path / CHECKPOINT).write_bytes(content[:place] + damage + content[place + 1 :])
    else:
        text = (tmp_path / METRICS).read_text()
        (tmp_path / METRICS).write_text(text.replace("1.5", "1.7"))
    refuses(run.load, CHECKPOINT, "damaged", "delete the folder")


def test_a_checkpoint_of_an_older_version_is_refused(tmp_path: Path):
    run = Checkpoint(tmp_path, {"a": 1})
    assert run.load() is None
    (tmp_path / "checkpoint.safetensors").touch()
    refuses(run.load, "another version of consa", "delete the folder")


@pytest.mark.parametrize("text", [DEEP, '{"run": [], "learn": []}', '{"run": null, "learn": 0}', "{}", "[]"])
def test_a_damaged_record_of_a_run_is_refused(text: str, tmp_path: Path):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "text").write_text("text")
    where, config = RunConfig(model="./nowhere", data=str(tmp_path / "text")), LearnConfig()
    refuses(lambda: run_learning(where, config, tmp_path, command=""), "config.json: damaged")


@pytest.mark.parametrize("text", [DEEP, '{"run": {}, "sweep": {}, "eval": null}', '{"run": 0.5}'])
def test_a_damaged_record_of_a_sweep_is_refused(text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "config.json").write_text(text)
    (tmp_path / "text").write_text("text")
    monkeypatch.setattr(sweeping, "read_layout", lambda model: AttentionLayout(("attention",), 1, 1, 8))
    where = RunConfig(model="./nowhere", data=str(tmp_path / "text"))
    refuses(lambda: sweeping.sweep(where, SweepConfig(), EvalConfig(), tmp_path, command=""), "config.json: damaged")


@pytest.mark.parametrize("text", [None, "{"])
def test_an_allocation_that_no_sweep_chose_is_refused(text: str | None, tmp_path: Path):
    (choice,) = sweeping.choices(SweepConfig(sparsity="0.5", methods="middle"), EvalConfig())
    path = tmp_path / "allocations" / f"{choice.name}.json"
    rules.middle(4, 3, sparsity=0.5).save(path)  # says nothing of seconds
    if text:
        path.write_text(text)
    refuses(
        lambda: sweeping._choose([choice], None, None, 96, tmp_path),  # pyright: ignore
        path.name,
        "delete the file",
    )


@pytest.mark.parametrize("damage", ["list", "deep", "digit", "string"])
def test_a_damaged_cell_is_measured_again(damage: str, tmp_path: Path):
    cell = Cell(allocation="a", measure="m", depends_on={}, size=1, compute=lambda advance: {"all": 1.5})
    wanted = run_cells([cell], tmp_path)
    path = cell.path(tmp_path)
    text = path.read_text()
    texts = {"list": '["result"]', "deep": DEEP, "digit": text.replace("1.5", "1.7"), "string": '"result"'}
    path.write_text(texts[damage])
    assert run_cells([cell], tmp_path) == wanted
    assert path.read_text() == text


@pytest.mark.parametrize("content", [b"", b"text", bytes(range(256)) * 5000])
def test_a_sealed_file_is_read_whole_or_not_at_all(content: bytes, tmp_path: Path):
    path = tmp_path / "a"
    assert read_sealed(path) is None and not is_sealed(path)
    write_sealed(path, content)
    assert read_sealed(path) == content and is_sealed(path)
    whole = path.read_bytes()
    for damaged in (
        content,
        whole[:-1],
        whole[1:],
        whole + b"\n",
        b"x" + whole,
        whole[:-SEAL_BYTES] + b"?" + whole[-SEAL_BYTES:],
        bytes([whole[0] ^ 1]) + whole[1:],
        whole[:-2] + bytes([whole[-2] ^ 1]) + whole[-1:],
    ):
        path.write_bytes(damaged)
        assert read_sealed(path) is None and not is_sealed(path)


def test_a_damaged_token_cache_is_made_again(tmp_path: Path):
    (tmp_path / "a.txt").write_text("the quick brown fox " * 20)
    read = lambda: load_sequences(str(tmp_path / "a.txt"), byte_tokenizer(), 16, cache_dir=tmp_path)  # noqa: E731
    wanted = np.array(read().tokens)
    (record,) = (tmp_path / "sequences").glob("*.json")
    record.write_text(DEEP)
    assert np.array_equal(read().tokens, wanted)


def test_what_a_killed_writer_left_is_removed_by_the_next_run(tmp_path: Path):
    left = [tmp_path / ".checkpoint.safetensors.0123456789abcdef", tmp_path / ".model.0123456789abcdef"]
    left[0].write_bytes(b"half")
    left[1].mkdir()
    (left[1] / "model.safetensors").write_bytes(b"half")
    (left[1] / ".allocation.json.0123456789abcdef").write_bytes(b"half")
    (tmp_path / ".mine").write_text("kept")
    with folder.claimed(tmp_path):
        assert {path.name for path in tmp_path.iterdir()} == {".lock", ".mine"}


# Models.


def test_names_that_no_file_can_have_are_refused(tmp_path: Path):
    refuses(lambda: verify(tmp_path / ("9" * 5000)), "consa.json")
    model = tiny()
    convert(model, allocate(model), tmp_path / "out")
    manifest = json.loads((tmp_path / "out" / "consa.json").read_text())
    manifest["files"]["9" * 5000] = ""
    (tmp_path / "out" / "consa.json").write_text(json.dumps(manifest))
    refuses(lambda: verify(tmp_path / "out"), "is missing", "convert the model again")
    refuses(lambda: read_layout("9" * 5000), "cannot load model")


@pytest.mark.parametrize("layers", [0, -1, 2**31])
def test_a_config_of_absurdly_many_layers_is_refused(layers: int, tmp_path: Path):
    config = tiny().config.to_dict() | {"num_hidden_layers": layers}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refuses(lambda: read_layout(str(tmp_path)))


def test_a_device_that_is_none_is_refused(tiny_model_folder: Path):
    refuses(lambda: load_model(str(tiny_model_folder), device="[!]"), "device", "'[!]'")


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    pytest.importorskip("gguf")
    return write_gguf(tmp_path / "model.gguf")


def test_a_whole_gguf_header_passes(gguf: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "cache"))
    check_header(gguf)
    assert load_model(str(gguf), device="cpu").layout.num_layers == 2


@pytest.mark.parametrize("size", [2**32, 2**64 - 1])
def test_a_gguf_array_longer_than_its_file_is_refused(size: int, gguf: Path):
    content = gguf.read_bytes()
    place = content.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
    gguf.write_bytes(content[:place] + struct.pack("<Q", size) + content[place + 8 :])
    refuses(lambda: load_model(str(gguf)), "damaged", "announced")


def test_a_gguf_of_more_layers_than_tensors_is_refused(tmp_path: Path):
    pytest.importorskip("gguf")
    path = write_gguf(tmp_path / "model.gguf", block_count=2**31)
    refuses(lambda: load_model(str(path)), "damaged", f"{2**31} layers")


@pytest.mark.parametrize("order", "<>")
def test_gguf_headers_of_either_byte_order(order: str, tmp_path: Path):
    pytest.importorskip("gguf")
    array = struct.pack(f"{order}IQ", 4, 2) + bytes(8)
    longer = struct.pack(f"{order}IQ", 4, 2**40) + bytes(8)
    # A whole header gets as far as the missing tensors.
    for value, message in ((array, "no tensors"), (longer, "announced"), (array[:-1], "announced")):
        field = struct.pack(f"{order}Q", 1) + b"a" + struct.pack(f"{order}I", 9) + value
        (tmp_path / "a.gguf").write_bytes(b"GGUF" + struct.pack(f"{order}IQQ", 3, 0, 1) + field)
        with pytest.raises(ValueError, match=message):
            check_header(tmp_path / "a.gguf")


def test_a_disk_that_fills_up_under_the_weights_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    model = tiny()

    def fail(*_: Any, **__: Any) -> None:
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

    monkeypatch.setattr(type(model), "save_pretrained", fail)
    refuses(lambda: convert(model, allocate(model), tmp_path / "out"), "No space left", "with room")
    assert not list(tmp_path.iterdir())


# The page.


@pytest.mark.parametrize("model", [7, "half of a pair: \ud800", ["a"]])
def test_a_page_of_a_model_without_a_proper_name(model: Any, tmp_path: Path):
    from consa.report import page

    rules.middle(4, 3, sparsity=0.5).save(tmp_path / "a.json")
    record = json.loads((tmp_path / "a.json").read_text())
    record["provenance"]["model"] = model
    (tmp_path / "a.json").write_text(json.dumps(record))
    page.write([tmp_path / "a.json"], tmp_path / "page.html", command="consa report a.json")
    assert (tmp_path / "page.html").read_text(encoding="utf-8").startswith("<!doctype html>")


# The command line.


def test_rules_of_absurd_shapes_are_refused():
    refuses(lambda: rules.middle(10**9, 10**9, sparsity=0.5), "num_layers=1000000000")


def test_too_little_memory_is_answered_with_options_that_there_are():
    group: Any = cli.typer.main.get_command(cli.app)
    for verb, advice in terminal.LIGHTER.items():
        options = {name for parameter in group.commands[verb].params for name in parameter.opts}
        assert set(re.findall(r"--[a-z-]+", advice)) <= options, verb


def test_what_the_system_refuses_is_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO), "a/file")

    monkeypatch.setattr("consa.model.load.read_layout", fail)
    (tmp_path / "a").touch()
    given = ["convert", "m", "--allocation", str(tmp_path / "a"), "--out", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, given)
    assert (result.exit_code, result.stderr) == (2, "error: a/file: Input/output error\n")


def test_an_interrupt_outside_a_command_is_one_line(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    def fail(*_: Any, **__: Any) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", fail)
    with pytest.raises(SystemExit) as stop:
        cli.main()
    assert stop.value.code == 130
    assert capsys.readouterr().err == "error: interrupted\n"
    monkeypatch.undo()
    monkeypatch.setattr(terminal.TyperGroup, "parse_args", fail)
    result = CliRunner().invoke(cli.app, ["rules"])
    assert result.exit_code == 130 and result.stderr.startswith("error: interrupted")
    assert len(result.stderr.splitlines()) == 1
