"""Losses by position and domain, intervals, retrieval and the table that `consa eval` shows."""

from __future__ import annotations

import csv
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from consa import ConsaError, convert, rules
from consa.config import EvalConfig, RunConfig
from consa.data import questions
from consa.data.questions import Example, answered, examples, num_answer_tokens
from consa.data.sequences import load_sequences
from consa.evaluation import answers as asking
from consa.evaluation import cells, losses, suite
from consa.evaluation.answers import ask
from consa.evaluation.intervals import Estimate, bootstrap
from consa.evaluation.losses import buckets_of, heldout_losses
from consa.evaluation.table import Table
from consa.model.layout import attention_layout
from consa.model.load import load_model
from consa.runs import inputs
from consa.runs.evaluation import run_evaluation
from tests.models import byte_tokenizer, exact, tiny

CONFIG = EvalConfig(
    **{"sparsity": 0.5, "granularity": "kv_head", "window": 8, "num_sink_tokens": 2, "seq_len": 96},
    **{"retrieval": "single,multi_key", "lengths": "600,900", "examples": 2, "cache_tokens": 1000},
)


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> None:
    monkeypatch.setenv("CONSA_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def where(tiny_model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> RunConfig:
    """Thirty documents of two domains, in one file."""
    path = tmp_path_factory.mktemp("text") / "text.jsonl"
    documents = [
        {
            "text": " ".join(f"{(n * 37 + place * place) % 101:x}" for place in range(90)),
            "domain": ("code", "prose")[n % 2],
        }
        for n in range(30)
    ]
    path.write_text("\n".join(map(json.dumps, documents)))
    return RunConfig(model=str(tiny_model_folder), data="./absent", heldout_data=str(path), num_heldout=6, device="cpu")


@pytest.fixture(scope="module")
def finished(where: RunConfig, tmp_path_factory: pytest.TempPathFactory):
    folder = tmp_path_factory.mktemp("finished")
    table, paths = run_evaluation(where, CONFIG, ["middle", "random_units"], folder, command="c")
    return folder, table, paths


# Intervals.


def test_intervals_cover_the_mean_about_as_often_as_they_say():
    rng = np.random.default_rng(0)
    hits = 0
    for draw in range(200):
        shared = rng.normal(size=30)  # sequences of a document are alike: as independent they would look certain
        values = np.repeat(shared, 4) + 0.1 * rng.normal(size=120)
        estimate = bootstrap(values, np.repeat(np.arange(30), 4), seed=draw)
        assert estimate.mean == pytest.approx(values.mean())
        hits += estimate.low <= 0 <= estimate.high
    assert 0.88 <= hits / 200 <= 0.98


def test_intervals_are_the_same_for_the_same_seed_and_need_two_documents():
    values, documents = np.arange(40.0) ** 2, np.arange(40) // 2
    assert bootstrap(values, documents) == bootstrap(values, documents)
    assert bootstrap(values, documents) != bootstrap(values, documents, seed=1)
    alone = bootstrap(values, np.zeros(40, int))
    assert alone.mean == 513.5 and math.isnan(alone.low) and str(alone) == "513.500"
    constant = bootstrap(np.full(40, 2.0), documents)
    assert constant == Estimate(2, 2, 2) and str(constant) == "2.000"


@pytest.mark.parametrize("positions", [63, 64, 65, 500, 8191])
def test_buckets_cover_every_position_once(positions: int):
    covered = [position for first, end in buckets_of(positions) for position in range(first, end)]
    assert covered == list(range(positions))


# Cells.


def test_a_cell_is_computed_once_and_again_if_damaged_or_about_something_else(tmp_path: Path):
    computed = []

    def cell(**depends_on: Any) -> cells.Cell:
        def compute(advance: Any) -> dict[str, Any]:
            computed.append(depends_on)
            advance(1)
            return {"value": depends_on["x"]}

        return cells.Cell(allocation="a", measure="m", depends_on=depends_on, size=1, compute=compute)

    for _ in range(2):
        assert cells.run_cells([cell(x=1)], tmp_path) == {("a", "m"): {"value": 1}}
    assert cells.run_cells([cell(x=2)], tmp_path) == {("a", "m"): {"value": 2}}
    assert computed == [{"x": 1}, {"x": 2}]
    cell(x=1).path(tmp_path).write_bytes(cell(x=1).path(tmp_path).read_bytes()[:-9])
    cells.run_cells([cell(x=1), cell(x=2)], tmp_path)
    assert computed[2:] == [{"x": 1}]


# Retrieval.


def test_generation_for_retrieval_is_the_exact_hybrids(tiny_model_folder: Path):
    loaded = load_model(str(tiny_model_folder), device="cpu")
    allocation = rules.middle(4, 3, sparsity=0.5, granularity="kv_head", window=8, num_sink_tokens=2)
    (example,) = asked = examples("single", loaded.tokenizer, length=600, count=1)
    ids: Any = loaded.tokenizer(example.prompt, return_tensors="pt")["input_ids"]
    new = num_answer_tokens(example, loaded.tokenizer)
    said = {}
    for chosen in (None, allocation):
        model: Any = loaded.model
        options: Any = {"max_new_tokens": new, "do_sample": False, "pad_token_id": 0, "use_cache": False}
        if chosen is None:
            out = model.generate(ids, **options)
        else:
            with exact(model, chosen):
                out = model.generate(ids, **options)
        said[chosen] = loaded.tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
        assert ask(loaded, chosen, asked) == {
            "scores": [answered(example, said[chosen])],
            "continuations": [said[chosen]],
        }
    assert said[None] != said[allocation]
    half = Example(example.prompt, (said[None][:4], "not there"))
    assert ask(loaded, None, [half])["scores"] == [0.5]


def test_questions_asked_together_are_answered_as_alone(tiny_model_folder: Path):
    loaded = load_model(str(tiny_model_folder), device="cpu")
    allocation = rules.middle(4, 3, sparsity=0.5, granularity="kv_head", window=8, num_sink_tokens=2)
    asked = examples("multi_key", loaded.tokenizer, length=600, count=5)
    assert len({len(example.prompt) for example in asked}) > 1
    for chosen in (None, allocation):
        done: list[int] = []
        together = ask(loaded, chosen, asked, batch_size=3, on_example=done.append)
        assert together == ask(loaded, chosen, asked) and done == [3, 2]


# The suite.


def test_the_table_says_what_was_measured(finished: Any, where: RunConfig):
    _, table, _ = finished
    assert [line.name for line in table.lines] == ["dense", "all_swa", "middle", "random_units"]
    loaded = load_model(where.model, device="cpu")
    heldout = load_sequences(str(where.heldout_data), loaded.tokenizer, 96).spread(6)
    start = table.start
    assert start == max(4 * 8, 96 // 8)
    dense, middle = table.line("dense"), table.line("middle")
    allocation = rules.middle(4, 3, sparsity=0.5, granularity="kv_head", window=8, num_sink_tokens=2)
    own, base, floor = (
        heldout_losses(loaded.model, heldout.tokens, chosen).astype(np.float64)
        for chosen in (allocation, None, rules.bottom(4, 3, sparsity=1.0, window=8, num_sink_tokens=2))
    )
    assert middle.loss.mean == pytest.approx(own[:, start:].mean())
    assert middle.difference.mean == pytest.approx((own - base)[:, start:].mean())
    paired = bootstrap((own - base)[:, start:].mean(1), heldout.documents)
    assert [middle.difference.low, middle.difference.high] == pytest.approx([paired.low, paired.high])
    assert middle.by_position.keys() == {0, 64}
    assert middle.differences_by_position[64].mean == pytest.approx((own - base)[:, 64:].mean())
    for domain in ("code", "prose"):
        rows = np.array(heldout.domains) == domain
        assert middle.by_domain[domain].mean == pytest.approx(own[rows, start:].mean())
        assert middle.differences_by_domain[domain].mean == pytest.approx((own - base)[rows, start:].mean())
    means = [losses[:, start:].mean() for losses in (floor, own, base)]
    assert middle.recovered == pytest.approx((means[0] - means[1]) / (means[0] - means[2]))
    assert (dense.recovered, table.line("all_swa").recovered, dense.difference.mean) == (1, 0, 0)
    assert middle.cache_bytes == allocation.kv_cache_bytes(1000, head_dim=8)
    assert dense.cache_bytes == 2 * 1000 * 4 * 3 * 8 * 2
    assert {task: list(lengths) for task, lengths in middle.retrieval.items()} == {
        "single": [600, 900],
        "multi_key": [600, 900],
    }


def test_the_files_hold_the_table(finished: Any):
    folder, table, paths = finished
    assert [path.name for path in paths] == ["eval.json", "eval.csv", "eval.png"]
    record = json.loads(paths[0].read_text())
    assert [line["name"] for line in record["lines"]] == [line.name for line in table.lines]
    assert record["lines"][2]["difference"]["mean"] == table.line("middle").difference.mean
    again = Table.from_record(record)
    assert again.to_record() == record and again.line("middle") == table.line("middle")
    assert {"versions", "hardware", "model", "command", "heldout_documents"} <= record["how"].keys()
    rows = list(csv.DictReader(paths[1].read_text().splitlines()))
    assert float(rows[2]["by_domain.code.mean"]) == table.line("middle").by_domain["code"].mean
    assert float(rows[3]["retrieval.single.900"]) == table.line("random_units").retrieval["single"][900]
    assert paths[2].read_bytes().startswith(b"\x89PNG")
    for title, columns, rows in table.sections():
        assert all(len(row) == len(columns) for row in rows)
        assert len(rows) == (1 if title == "Loss above that of middle (nats)" else 4)
    assert len(list(table.sections())) == 5
    assert len(list((folder / "cells").iterdir())) == 4 * (1 + 4)


def test_nothing_is_measured_twice(finished: Any, where: RunConfig, monkeypatch: pytest.MonkeyPatch):
    folder, table, _ = finished
    done = []

    def count(*arguments: Any, **options: Any) -> Any:
        done.append(arguments[2])
        return heldout_losses(*arguments, **options)

    monkeypatch.setattr(losses, "heldout_losses", count)
    monkeypatch.setattr(asking, "ask", None)
    again, _ = run_evaluation(where, CONFIG, ["middle", "random_units"], folder, command="c")
    assert again == table and not done
    more, _ = run_evaluation(where, replace(CONFIG, retrieval=None), ["top", "middle"], folder, command="c")
    assert len(done) == 1 and more.line("middle") == replace(
        table.line("middle"), retrieval={}, to_first=more.line("middle").to_first
    )


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_of_a_converted_hybrid_the_dense_model_is_measured(family: str, where: RunConfig, tmp_path: Path):
    model, config = tiny(family, vocab_size=300), replace(CONFIG, retrieval=None)
    tokenizer = byte_tokenizer()
    layers = model.config.num_hidden_layers
    native = attention_layout(model).native_windows
    kept = rules.top(layers, 3, sparsity=0.5, window=8, num_sink_tokens=2, native_windows=native)
    model.save_pretrained(tmp_path / "dense")
    tokenizer.save_pretrained(tmp_path / "dense")
    convert(model, kept, tmp_path / "hybrid", tokenizer=tokenizer, kind="hybrid")
    kept.save(tmp_path / "kept.json")
    losses = []
    for name in ("dense", "hybrid"):
        of = replace(where, model=str(tmp_path / name))
        table, _ = run_evaluation(of, config, [str(tmp_path / "kept.json")], tmp_path / f"of {name}", command="c")
        losses.append([line.loss.mean for line in table.lines])
        assert [line.kind for line in table.lines] == ["dense", "all-SWA", "other"]
    np.testing.assert_allclose(losses[0], losses[1], rtol=1e-6)
    assert len(set(losses[0])) == 3


def test_questions_are_made_once_for_all_allocations(where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    made: list[int] = []
    examples_of = questions.examples

    def count(*arguments: Any, **options: Any) -> Any:
        made.append(options["length"])
        return examples_of(*arguments, **options)

    monkeypatch.setattr(questions, "examples", count)
    run_evaluation(where, replace(CONFIG, retrieval="single"), ["top", "middle"], tmp_path, command="c")
    assert made == [600, 900]


def test_each_window_has_an_all_swa_of_its_own(where: RunConfig, tmp_path: Path):
    other = rules.top(4, 3, sparsity=0.5, window=4, num_sink_tokens=1)
    other.save(tmp_path / "other.json")
    names = [str(tmp_path / "other.json"), "all_swa", "dense", "bottom"]
    config = replace(CONFIG, retrieval=None)
    with pytest.raises(ConsaError, match=r"holds files of something else \(other\.json\)"):
        run_evaluation(where, config, names, tmp_path, command="c")
    table, _ = run_evaluation(where, config, names, tmp_path / "eval", command="c")
    assert [line.name for line in table.lines] == [
        "dense",
        "all_swa 4+1",
        "all_swa 8+2",
        f"{names[0]} 4+1",
        "bottom 8+2",
    ]
    floors = {name: table.line(name) for name in ("all_swa 4+1", "all_swa 8+2")}
    assert floors["all_swa 4+1"].loss.mean != floors["all_swa 8+2"].loss.mean
    assert all(line.recovered == 0 for line in floors.values())
    gap = floors["all_swa 4+1"].loss.mean - table.line("dense").loss.mean
    closed = floors["all_swa 4+1"].loss.mean - table.line(f"{names[0]} 4+1").loss.mean
    assert table.line(f"{names[0]} 4+1").recovered == pytest.approx(closed / gap)


def test_a_peers_file_is_an_allocation(tmp_path: Path, where: RunConfig):
    path = tmp_path / "full_attention_heads.tsv"
    path.write_text("\n".join("\t".join(str((row + column) % 2) for column in range(3)) for row in range(4)))
    layout = load_model(where.model, device="cpu").layout
    allocation = suite.named(str(path), "m", layout, CONFIG)
    assert allocation and allocation.window == 8 and allocation.num_sink_tokens == 2
    assert allocation.full_attention.tolist() == [[(r + c) % 2 == 1 for c in range(3)] for r in range(4)]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"retrieval": "single,needle"}, "one of single, multi_key, .* got 'needle'"),
        ({"lengths": "1k"}, "lengths must be integers .* got '1k'"),
        ({"lengths": "0"}, "lengths must be integers .* got '0'"),
        ({"lengths": ""}, "lengths .* got ''"),
        ({"examples": 0}, "examples must be an integer >= 1, got 0"),
        ({"sparsity": 2.0}, "sparsity .* got 2.0"),
        ({"granularity": "head"}, "granularity .* got 'head'"),
    ],
)
def test_bad_settings_are_refused(changes: dict[str, Any], named: str):
    with pytest.raises(ConsaError, match=named):
        replace(CONFIG, **changes)


def test_what_does_not_fit_is_refused_before_the_text_is_read(
    where: RunConfig, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(inputs, "heldout_text", None)
    rules.top(5, 3, sparsity=0.5).save(tmp_path / "other.json")
    (tmp_path / "bad.json").write_text("{}")
    given: Any
    for given, named in (
        (["nowhere"], "'nowhere' is neither a file nor one of dense, all_swa, interleaved"),
        ([str(tmp_path / "other.json")], "other.json: .*5 layers x 3 KV heads"),
        ([str(tmp_path / "bad.json")], "bad.json: schema"),
        (replace(CONFIG, lengths="600,5000"), "lengths must be at most the 4096 positions of .* got 5000"),
        (replace(CONFIG, seq_len=4097), "seq_len must be at most the 4096 positions of .* got 4097"),
        (replace(CONFIG, window=94), "window . num_sink_tokens .* seq_len .96., got 94 . 2"),
        (replace(CONFIG, window=96), "window . num_sink_tokens must be smaller than seq_len .96., got 96 . 2"),
        (replace(where, device="gpu7"), "device must be .* 'gpu7'"),
        (replace(where, heldout_data="./nowhere"), "./nowhere"),
    ):
        names, config, run = [], CONFIG, where
        if isinstance(given, list):
            names = given
        elif isinstance(given, EvalConfig):
            config = given
        else:
            run = given
        with pytest.raises(ConsaError, match=named):
            run_evaluation(run, config, names, tmp_path / "out", command="c")


@pytest.mark.slow
@pytest.mark.parametrize("length", [512, 2048])
def test_the_real_model_finds_what_is_hidden_and_a_window_alone_does_not(length: int):
    loaded = load_model("smollm2-135m", device="cpu", dtype=torch.float32)
    asked = examples("single", loaded.tokenizer, length=length, count=6)
    assert np.mean(ask(loaded, None, asked)["scores"]) >= 0.8
    window = rules.bottom(30, 3, sparsity=1.0, window=256, num_sink_tokens=4)
    far = asked[:3]  # in the first half
    assert ask(loaded, window, far)["scores"] == [0.0] * 3


@pytest.mark.parametrize(
    "change", [{"dtype": "bfloat16"}, {"start": 60}, {"num_heldout": 5}], ids=lambda change: next(iter(change))
)
def test_what_changes_a_loss_has_it_measured_again(
    change: dict[str, Any], finished: Any, where: RunConfig, tmp_path: Path
):
    folder, _, _ = finished
    shutil.copytree(folder / "cells", tmp_path / "kept" / "cells")
    config, asked = replace(CONFIG, retrieval=None), replace(where, **change)
    kept, fresh = (
        run_evaluation(asked, config, ["middle"], tmp_path / name, command="c")[0] for name in ("kept", "fresh")
    )
    assert [line.loss for line in kept.lines] == [line.loss for line in fresh.lines]


def test_the_largest_window_says_where_counting_starts(where: RunConfig):
    allocations = {str(window): rules.top(4, 3, sparsity=0.5, window=window) for window in (4, 16, 8)}
    assert suite.start_of(where, replace(CONFIG, seq_len=512), allocations) == 64
    with pytest.raises(ConsaError, match=r"window . num_sink_tokens .* seq_len .96., got 94 . 4"):
        suite.start_of(where, CONFIG, {"a": rules.top(4, 3, sparsity=0.5, window=94)})


def test_a_rule_that_draws_takes_the_seed(where: RunConfig):
    layout = load_model(where.model, device="cpu").layout
    for seed in (0, 3):
        found = suite.named("random_units", "m", layout, replace(CONFIG, seed=seed))
        wanted = rules.random_units(4, 3, sparsity=0.5, granularity="kv_head", seed=seed)
        assert found and np.array_equal(found.full_attention, wanted.full_attention)


def test_others_are_paired_with_the_first_that_was_given(finished: Any):
    _, table, _ = finished
    first, other = table.line("middle"), table.line("random_units")
    assert other.to_first.mean == pytest.approx(other.loss.mean - first.loss.mean)
    assert other.to_first.low < other.to_first.mean < other.to_first.high
    unpaired = (other.loss.high - other.loss.low) + (first.loss.high - first.loss.low)
    assert other.to_first.high - other.to_first.low < unpaired
    assert all(math.isnan(line.to_first.mean) for line in table.lines if line is not other)


def test_the_terminal_says_what_was_measured(finished: Any):
    _, table, _ = finished
    sections = {title.partition(",")[0]: (columns, rows) for title, columns, rows in table.sections()}
    (((_, ours),),) = sections.pop("Loss above that of middle (nats)")[1:]
    assert ours == str(table.line("random_units").to_first)
    for title, (columns, rows) in sections.items():
        assert columns[0] == "allocation" and [row[0] for row in rows] == [line.name for line in table.lines]
        for line, (_, *said) in zip(table.lines, rows, strict=True):
            if title.startswith("Held-out loss"):
                cache = f"{line.cache_bytes / table.lines[0].cache_bytes:.1%}"
                numbers = [f"{line.sparsity:.4f}", cache, f"{line.loss.mean:.4f}", str(line.difference)]
                assert said == [*numbers, f"{line.recovered:.3f}"]
            elif title.endswith("(nats)"):
                assert said == [f"{found.mean:.4f}" for found in line.differences_by_position.values()]
            elif title.startswith("Loss above"):
                assert said == [str(line.differences_by_domain[domain]) for domain in columns[1:]]
            else:
                shares = [share for lengths in line.retrieval.values() for share in lengths.values()]
                assert said == [f"{share:.2f}" for share in shares]


def test_what_was_retrieved_is_the_mean_over_tasks_and_lengths(finished: Any):
    line = finished[1].line("middle")
    assert replace(line, retrieval={"a": {600: 1.0, 900: 0.0}, "b": {600: 0.5, 900: 0.0}}).retrieved == 0.375
    assert math.isnan(replace(line, retrieval={}).retrieved)


def test_what_was_learned_is_told_from_the_rest():
    top = rules.top(4, 3, sparsity=0.5)
    learned = replace(top, provenance={"method": "consa"})
    given = (None, rules.all_swa(4, 3), learned, top)
    assert [suite._kind_of(one) for one in given] == ["dense", "all-SWA", "learned", "other"]


def test_intervals_are_over_documents_of_several_sequences(where: RunConfig, tmp_path: Path):
    whole, config = replace(where, num_heldout=99), replace(CONFIG, retrieval=None)
    table, _ = run_evaluation(whole, config, ["middle"], tmp_path, command="c")
    loaded = load_model(where.model, device="cpu")
    heldout = load_sequences(str(where.heldout_data), loaded.tokenizer, 96).spread(99)
    assert len(np.unique(heldout.documents)) < len(heldout.documents)
    losses = heldout_losses(loaded.model, heldout.tokens)[:, table.start :].mean(1, dtype=np.float64)
    wanted, found = bootstrap(losses, heldout.documents), table.line("dense").loss
    assert [found.mean, found.low, found.high] == pytest.approx([wanted.mean, wanted.low, wanted.high])


def test_what_is_asked_is_part_of_what_an_answer_depends_on(where: RunConfig):
    loaded = load_model(where.model, device="cpu")
    first, again, other = (
        {one.name: one.settings for one in asking.measures(loaded, replace(CONFIG, seed=seed))} for seed in (0, 0, 1)
    )
    assert first == again
    assert all(first[name] != other[name] for name in first) and len(first) == 4


def test_every_document_is_as_likely_to_be_drawn():
    """A document of one sequence beside one of 99: a quarter of the draws holds the first alone."""
    estimate = bootstrap(np.r_[0.0, np.ones(99)], np.r_[0, np.ones(99, int)])
    assert (estimate.mean, estimate.low, estimate.high) == (0.99, 0, 1)


def test_the_longest_answer_says_how_many_tokens_all_may_take(tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch):
    given: list[int] = []
    silent = lambda *a, max_new_tokens, **_: given.append(max_new_tokens) or [""] * len(a[2])  # noqa: E731
    monkeypatch.setattr(asking, "generate_texts", silent)
    loaded = load_model(str(tiny_model_folder), device="cpu")
    short, long = Example("a", ("1",)), Example("b", ("1234567", "7654321"))
    assert ask(loaded, None, [short, long, short])["scores"] == [0, 0, 0]
    assert given == [num_answer_tokens(long, loaded.tokenizer)] * 3


def test_intervals_are_of_the_mean_over_sequences():
    documents = np.repeat(np.arange(40), [1, 9] * 20)
    estimate = bootstrap((documents % 2).astype(float), documents)
    assert estimate.mean == 0.9 and 0.7 < estimate.low < 0.9 < estimate.high
