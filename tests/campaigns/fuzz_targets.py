"""The targets of `python -m tests.campaigns.fuzz`: one per reader of consa."""

# pyright: reportPrivateUsage=false

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np

from consa import Allocation, ConsaError, rules
from consa.config import EvalConfig, LearnConfig, RunConfig, SweepConfig
from consa.files import SEAL_BYTES
from tests.campaigns.mutations import (
    NUMBERS,
    TEXTS,
    damaged_bytes,
    damaged_json,
    damaged_lines,
    damaged_safetensors,
    damaged_words,
)

SIZES = [0, 1, 3, 7, 64, 1000, 2**20, 2**31 - 1, 2**32 - 1]
Attempt = Callable[[Random], None]  # makes one input and reads it; raises ConsaError if consa refuses it
RUN = RunConfig(model="./nowhere", data="text", num_heldout=2, device="cpu", dtype="float32")
LEARN = LearnConfig(
    **{"sparsity": 0.5, "window": 8, "seq_len": 96, "num_steps": 2, "sequences_per_step": 1},
    **{"checkpoint_every": 1, "refine_evaluations": 4, "refine_sequences": 1},
)


@dataclass(frozen=True)
class Target:
    """A reader.

    Attributes:
        name: name of the reader.
        share: share of all inputs; larger for cheaper readers.
        prepare: writes the files for the attempts to an empty folder, the working directory.
    """

    name: str
    share: float
    prepare: Callable[[Path], Attempt]


def _allocation() -> Allocation:
    found = rules.random_units(4, 3, sparsity=0.5, granularity="kv_head", window=8, num_sink_tokens=2)
    return replace(found, scores=found.full_attention + 0.25, provenance=found.provenance | {"seconds": 1.5})


def allocation(folder: Path) -> Attempt:
    """`Allocation.load`; an accepted allocation must be equal after saving and loading."""
    sliding = rules.bottom(4, 3, sparsity=0.5, native_windows={1: 5}, window=8, num_sink_tokens=2)
    valid = [json.loads(found.to_json()) for found in (_allocation(), sliding)]
    path = folder / "allocation.json"

    def attempt(random: Random) -> None:
        path.write_bytes(damaged_json(random, random.choice(valid)))
        found = Allocation.load(path)
        assert Allocation.from_json(found.to_json()) == found
        found.kv_cache_bytes(1000, head_dim=8)

    return attempt


def tsv(folder: Path) -> Attempt:
    """Head patterns of DuoAttention and PruLong."""
    from consa.data.tsv import read_tsv

    rows = np.random.default_rng(0).random((4, 3)).round(4)
    valid = "\n".join("\t".join(map(str, row)) for row in rows) + "\n"
    path = folder / "masks_sp0.5.tsv"

    def attempt(random: Random) -> None:
        path.write_bytes(damaged_lines(random, valid.encode()))
        found = read_tsv(path, num_layers=4, num_kv_heads=3, sparsity=random.choice([None, 0.5]))
        assert found.full_attention.shape == (4, 3)

    return attempt


def run_config(folder: Path) -> Attempt:
    """config.json in the folder of a run that is resumed."""
    from consa.runs import inputs
    from consa.runs.learning import run_learning

    settings = {"run": vars(RUN) | {"data": "text"}, "learn": vars(LEARN)}
    (folder / "text").write_text("text")
    (folder / "run").mkdir()

    def attempt(random: Random) -> None:
        (folder / "run" / "config.json").write_bytes(damaged_json(random, settings))
        with contextlib.suppress(_Accepted), mock.patch.object(inputs, "load_model", _accept):
            run_learning(RUN, LEARN, folder / "run", command="")

    return attempt


def sweep_config(folder: Path) -> Attempt:
    """config.json in the folder of a sweep that is resumed."""
    from consa.runs import sweep as verb

    config, measured = SweepConfig(), EvalConfig(window=8, seq_len=96)
    settings = {"run": vars(RUN), "sweep": vars(config), "eval": vars(measured), "command": ""}
    (folder / "text").write_text("text")
    (folder / "sweep").mkdir()

    def attempt(random: Random) -> None:
        (folder / "sweep" / "config.json").write_bytes(damaged_json(random, settings))
        with (
            contextlib.suppress(_Accepted),
            mock.patch.object(verb, "read_layout"),
            mock.patch.object(verb.evaluation, "load", _accept),
        ):
            verb.sweep(RUN, config, measured, folder / "sweep", command="")

    return attempt


class _Accepted(Exception):
    """A reader accepted its input and started the work."""


def _accept(*_: Any, **__: Any) -> Any:
    raise _Accepted


def text(folder: Path) -> Attempt:
    """Training text: .txt, .jsonl, and both as .zst."""
    import zstandard

    from consa.data.sequences import load_sequences
    from tests.models import byte_tokenizer

    words = "the quick brown fox jumps over the lazy dog, and on " * 3
    lines = "".join(json.dumps({"text": words * n, "domain": "d"}) + "\n" for n in range(1, 4))
    press = zstandard.ZstdCompressor().compress
    valid = {"a.txt": words.encode(), "a.jsonl": lines.encode()}
    valid |= {f"{name}.zst": press(content) for name, content in valid.items()}
    bomb = press(bytes(2**22)) * 100  # 400 MiB of zeros, in 60 KB
    tokenizer = byte_tokenizer()

    def attempt(random: Random) -> None:
        name = random.choice(list(valid))
        path = folder / name
        if name == "a.jsonl" and random.randrange(2):
            path.write_bytes(damaged_json(random, json.loads(lines.partition("\n")[0]), indent=None))
        elif random.randrange(300) == 0:
            path.write_bytes(bomb)
        elif name.endswith(".zst") and random.randrange(2):
            path.write_bytes(press(damaged_bytes(random, valid[name.removesuffix(".zst")])))
        else:
            path.write_bytes(damaged_bytes(random, valid[name]))
        split = random.choice(["all", "all", "train"])
        try:
            found = load_sequences(str(path), tokenizer, 16, split=split, cache_dir=folder / "cache", workers=1)
            assert found.tokens.shape == (len(found.domains), 16)
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)

    return attempt


def text_cache(folder: Path) -> Attempt:
    """Cached tokens; damaged ones are made again."""
    from consa.data.sequences import load_sequences
    from tests.models import byte_tokenizer, write_texts

    (folder / "text").mkdir()
    tokenizer, data = byte_tokenizer(), str(write_texts(folder / "text", 3))
    read = lambda: load_sequences(data, tokenizer, 16, cache_dir=folder / "cache", workers=1)  # noqa: E731
    wanted = np.array(read().tokens)
    kept = {path: path.read_bytes() for path in (folder / "cache").rglob("*") if path.is_file()}

    def attempt(random: Random) -> None:
        path = random.choice(list(kept))
        if path.suffix == ".json" and random.randrange(2):
            path.write_bytes(damaged_json(random, json.loads(kept[path][:-SEAL_BYTES]), indent=None))
        else:
            path.write_bytes(damaged_bytes(random, kept[path]))
        assert np.array_equal(read().tokens, wanted)

    return attempt


def checkpoint(folder: Path) -> Attempt:
    """checkpoint.sealed and metrics.jsonl of a killed run; it resumes to the same result, or is refused."""
    from consa.training.learning import learn
    from tests.models import tiny, tokens

    model, sequences = tiny(), tokens(3, 96).numpy()
    run = lambda: learn(model, sequences, LEARN, run_dir=folder)  # noqa: E731
    wanted = run().allocation.to_json()
    kept = {name: (folder / name).read_bytes() for name in ("checkpoint.sealed", "metrics.jsonl")}

    def attempt(random: Random) -> None:
        for name, content in kept.items():
            (folder / name).write_bytes(content)
        if random.randrange(3):
            damaged = damaged_safetensors(random, kept["checkpoint.sealed"])
            (folder / "checkpoint.sealed").write_bytes(damaged)
        else:
            (folder / "metrics.jsonl").write_bytes(damaged_bytes(random, kept["metrics.jsonl"]))
        assert run().allocation.to_json() == wanted

    return attempt


def cells(folder: Path) -> Attempt:
    """The cells of an evaluation or a sweep; damaged ones are measured again."""
    from consa.evaluation.cells import Cell, run_cells

    result = {"all": [1.5, 2.25], "0": [1.0, 3.0]}
    cell = Cell(allocation="a", measure="losses", depends_on={"seed": 1}, size=1, compute=lambda advance: dict(result))
    wanted = run_cells([cell], folder)
    path = cell.path(folder)
    kept = path.read_bytes()

    def attempt(random: Random) -> None:
        damaged = (
            damaged_bytes(random, kept) if random.randrange(2) else damaged_json(random, json.loads(kept[:-SEAL_BYTES]))
        )
        path.write_bytes(damaged)
        assert run_cells([cell], folder) == wanted

    return attempt


def sweep_allocations(folder: Path) -> Attempt:
    """Stored allocations of a sweep, up to its table."""
    from consa.runs import sweep as verb

    config, measured = SweepConfig(sparsity="0.5", methods="middle"), EvalConfig(window=8, num_sink_tokens=2)
    (choice,) = verb.choices(config, measured)
    path = folder / "allocations" / f"{choice.name}.json"
    path.parent.mkdir()
    table = mock.Mock()  # made from cells, which are another target's
    table.line.return_value.cache_bytes = 5
    table.lines = [table.line.return_value]

    def attempt(random: Random) -> None:
        path.write_bytes(damaged_json(random, json.loads(_allocation().to_json())))
        found = verb._choose([choice], mock.Mock(), RUN, 96, folder)
        list(verb._points([choice], found, table))

    return attempt


def behaviour(folder: Path) -> Attempt:
    """behaviour.safetensors."""
    from consa.behaviour.record import MEASURES, Behaviour

    rng = np.random.default_rng(0)
    shares = rng.random((2, 3, 4), dtype=np.float32)
    measures = {name: rng.random((2, 3), dtype=np.float32) for name in MEASURES}
    found = Behaviour(
        by_distance=shares / shares.sum(-1, keepdims=True),
        measures=measures,
        window=8,
        num_sink_tokens=2,
        provenance={"model": "m"},
    )
    path = folder / "behaviour.safetensors"
    found.save(path)
    kept = path.read_bytes()

    def attempt(random: Random) -> None:
        path.write_bytes(damaged_safetensors(random, kept))
        read = Behaviour.load(path)
        assert read.by_distance.ndim == 3

    return attempt


def report(folder: Path) -> Attempt:
    """All inputs of a report page."""
    from consa.report import page
    from tests.report.report_case import make_line, make_table

    run = folder / "run"
    run.mkdir()
    dense, floor, learned = (
        make_line(name, kind, rise)
        for name, kind, rise in (("dense", "dense", 0), ("all_swa", "all-SWA", 1), ("learned", "learned", 0.2))
    )
    summary = {
        "model": {"model": "m", "revision": "r"},
        **{"granularity": "kv_head", "sparsity": 0.5, "window": 8, "num_sink_tokens": 2, "seq_len": 96},
        **{"seed": 0, "heldout_sequences": 2, "heldout_documents": 2, "start": 32},
        "table": make_table(dense, floor, learned).to_record(),
        "losses": {"dense": 2.0, "stochastic": 2.1, "final": 2.2},
        **{"expected_sparsity": 0.5, "fractional": 0.1, "seconds": {"learning": 1.0, "evaluation": 1.0}},
        **{"run": vars(RUN), "learn": vars(LEARN), "command": "consa learn m", "hardware": "h"},
        "versions": {"consa": "1"},
    }
    step = {"step": 1, "loss": 2.0, "expected_sparsity": 0.1, "target": 0.1, "multiplier": 0, "fractional": 1}
    valid: dict[str, Any] = {
        "allocation.json": json.loads(_allocation().to_json()),
        "summary.json": summary,
        "metrics.jsonl": step,
    }

    _page_once(folder)

    def attempt(random: Random) -> None:
        for name, value in valid.items():
            (run / name).write_text(json.dumps(value) + "\n")
        name = random.choice(list(valid))
        (run / name).write_bytes(damaged_json(random, valid[name], indent=None))
        page.write([run], folder / "report.html", command="consa report run")

    return attempt


def _page_once(folder: Path) -> None:
    """Load the page's library in advance: its engine takes more address space than one input may."""
    from consa.report import page

    _allocation().save(folder / "warm.json")
    page.write([folder / "warm.json"], folder / "warm.html", command="")


def _damage_one(random: Random, folder: Path, kept: dict[str, bytes]) -> str:
    """Restore a folder, damage one of its files, and return the name of that file."""
    for name, content in kept.items():
        (folder / name).write_bytes(content)
    name = random.choice(list(kept))
    content = kept[name]
    if name.endswith(".json") and random.randrange(3):
        damaged = damaged_json(random, json.loads(content))
    elif name.endswith(".safetensors"):
        damaged = damaged_safetensors(random, content)
    else:
        damaged = damaged_bytes(random, content)
    (folder / name).write_bytes(damaged)
    return name


def model_folder(folder: Path) -> Attempt:
    """A model folder of transformers: config, tokenizer and weights."""
    from consa.model.load import load_model
    from tests.models import save_tiny

    save_tiny(folder / "model")
    kept = {path.name: path.read_bytes() for path in (folder / "model").iterdir()}

    def attempt(random: Random) -> None:
        _damage_one(random, folder / "model", kept)
        load_model(str(folder / "model"), device="cpu")

    return attempt


def converted_folder(folder: Path) -> Attempt:
    """A folder of `consa convert`, with the original hashes or with hashes that match the damage."""
    from consa.files import sha256_of
    from consa.model.convert import convert
    from consa.model.generate import load_with_tokenizer
    from tests.models import byte_tokenizer, tiny

    model = folder / "model"
    convert(tiny(vocab_size=300), _allocation(), model, tokenizer=byte_tokenizer())
    kept = {path.name: path.read_bytes() for path in model.iterdir()}

    def attempt(random: Random) -> None:
        name = _damage_one(random, model, kept)
        if name != "consa.json" and random.randrange(3):
            manifest = json.loads(kept["consa.json"])
            manifest["files"][name] = sha256_of(model / name)
            (model / "consa.json").write_text(json.dumps(manifest))
        load_with_tokenizer(model)

    return attempt


def gguf(folder: Path) -> Attempt:
    """A GGUF file, loaded as a model."""
    from consa.model.load import load_model
    from tests.models import write_gguf

    kept = write_gguf(folder / "whole.gguf").read_bytes()
    header = kept[: kept.rfind(b"output_norm.weight") + 50]
    os.environ["CONSA_CACHE"] = str(folder / "cache")
    names = ["block_count", "context_length", "embedding_length", "feed_forward_length", "head_count"]
    names += ["head_count_kv", "vocab_size", "bos_token_id"]

    def attempt(random: Random) -> None:
        path, kind = folder / "damaged.gguf", random.randrange(4)
        if kind == 0:
            named = {random.choice(names): random.choice(SIZES) for _ in range(random.randrange(1, 3))}
            write_gguf(path, **named)
        else:
            damaged = damaged_bytes(random, header) if kind == 1 else damaged_words(random, header)
            path.write_bytes(damaged + kept[len(header) :])
        try:
            load_model(str(path), device="cpu")
        finally:
            shutil.rmtree(folder / "cache", ignore_errors=True)

    return attempt


def command_line(folder: Path) -> Attempt:
    """Options and arguments of every command; accepted ones stop before the work starts."""
    import typer

    from consa.cli import commands as cli
    from consa.report import vega
    from consa.runs import inputs

    _page_once(folder)
    _allocation().save(folder / "allocation.json")
    (folder / "text").write_text("text")
    (folder / "damaged.json").write_text('{"schema": 1')
    group: Any = typer.main.get_command(cli.app)
    common = "2GiB 1e3 1.5MiB -1 1,2 0.5,0.9 layer kv_head uniform any even joint rules consa,rules frozen full lora"
    paths = "allocation.json damaged.json text nowhere . hf:a/b hf: * [ [!] a/b smollm -- -f"
    words = [*TEXTS, *map(str, NUMBERS), *common.split(), *paths.split()]
    given = {"--sparsity": "0.5", "--layers": "8", "--kv-heads": "2", "--allocation": "allocation.json"}
    given |= {"--data": "text", "--seq-len": "96", "--window": "8", "--out": "out"}

    def arguments(random: Random) -> list[str]:
        name = random.choice([name for name in group.commands if name != "demo"])
        line = [name]
        for parameter in group.commands[name].params:
            if parameter.param_type_name == "argument":
                line += [random.choice([*words, "./nowhere", "."])] * random.choice([0, 1, 1, 1, 2])
                continue
            option = random.choice([*parameter.opts, *parameter.secondary_opts])
            if option == "--help" or (random.randrange(3) and not parameter.required):
                continue
            line.append(option)
            if not parameter.is_flag and random.randrange(20):
                keep = option in given and random.randrange(2)
                line.append(given[option] if keep else random.choice(words))
        if random.randrange(10) == 0:
            line.insert(random.randrange(len(line) + 1), random.choice(words))
        return line

    def attempt(random: Random) -> None:
        line = [word for word in arguments(random) if word != "demo"]
        said = io.StringIO()
        with (
            mock.patch.object(inputs, "load_model", _accept),
            mock.patch.object(os, "execv", _accept),
            mock.patch.object(vega, "draw", _accept),
            contextlib.redirect_stderr(said),
            contextlib.redirect_stdout(io.StringIO()),
            _emptied(folder / "out"),
        ):
            try:
                group.main(line, prog_name="consa")
                raise AssertionError("the command did not exit")
            except _Accepted:
                return
            except SystemExit as stop:
                status = stop.code
        if status == 0:
            return
        last = said.getvalue().splitlines()[-1:]
        assert status == 2 and last and last[0].startswith("error: "), (status, line, said.getvalue())
        raise ConsaError(last[0])

    return attempt


@contextlib.contextmanager
def _emptied(folder: Path) -> Iterator[None]:
    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


TARGETS = [
    Target("allocation JSON", 0.36, allocation),
    Target("TSV of DuoAttention and PruLong", 0.16, tsv),
    Target("config.json of a run", 0.07, run_config),
    Target("config.json of a sweep", 0.07, sweep_config),
    Target("text, JSON lines, zstd", 0.07, text),
    Target("cached tokens", 0.02, text_cache),
    Target("checkpoint of a killed run", 0.04, checkpoint),
    Target("cells of eval and sweep", 0.06, cells),
    Target("allocations of a sweep", 0.04, sweep_allocations),
    Target("behaviour.safetensors", 0.03, behaviour),
    Target("folders for the page", 0.006, report),
    Target("model folder", 0.004, model_folder),
    Target("converted folder", 0.006, converted_folder),
    Target("GGUF file", 0.006, gguf),
    Target("command line", 0.03, command_line),
]
