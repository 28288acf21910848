"""lm-evaluation-harness on hybrids, with tasks and data made here."""

from __future__ import annotations

import copy
import json
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from consa import Allocation, ConsaError, rules
from consa.config import EvalConfig, RunConfig
from consa.evaluation import harness
from consa.evaluation.cells import Cell, run_cells
from consa.evaluation.harness import find_tasks, run_task
from consa.model.load import load_model
from consa.runs import evaluation
from consa.runs.evaluation import run_evaluation

pytest.importorskip("lm_eval", reason="lm-eval is not installed")

TASKS = {
    "choice": """
output_type: multiple_choice
target_delimiter: ""
doc_to_target: label
doc_to_choice: choices
metric_list: [{metric: acc}]
""",
    "continue": """
output_type: generate_until
doc_to_target: answer
generation_kwargs: {until: ["\\n"], max_gen_toks: 6, do_sample: false}
metric_list: [{metric: exact_match}]
""",
    "perplexity": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: text
metric_list: [{metric: word_perplexity}]
""",
}


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path):
    loaded = load_model(str(tiny_model_folder), device="cpu")
    loaded.tokenizer.pad_token = loaded.tokenizer.eos_token = "!"
    return loaded


def likelihood(loaded: Any, text: str, choice: str) -> float:
    """Log probability of `choice` after `text`, from one forward pass."""
    start = len(loaded.tokenizer(text)["input_ids"])
    ids = loaded.tokenizer(text + choice, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        logits = loaded.model(ids).logits[0, :-1].log_softmax(-1)
    return float(logits.gather(1, ids[0, 1:, None])[start - 1 :].sum())


@pytest.fixture(scope="module")
def manager(loaded: Any, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Tasks with documents longer than a window. Labels are the dense model's choices, half the answers its own."""
    folder = tmp_path_factory.mktemp("tasks")
    documents = []
    choices = [" a", " b", " c"]
    for number in range(8):
        text = " ".join(f"{(number * 31 + place * place) % 89:x}" for place in range(40))
        ids = loaded.tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            out = loaded.model.generate(ids, max_new_tokens=6, do_sample=False, pad_token_id=0)
        said = loaded.tokenizer.decode(out[0, ids.shape[1] :]).split("\n")[0]
        label = max(range(3), key=lambda index: likelihood(loaded, text, choices[index]))
        answer = said if number % 2 else "?"
        documents.append({"text": text, "choices": choices, "label": label, "answer": answer})
    (folder / "documents.json").write_text("\n".join(map(json.dumps, documents)))
    for name, body in TASKS.items():
        data = f"dataset_path: json\ndataset_kwargs: {{data_files: {{test: {folder / 'documents.json'}}}}}\n"
        text = "" if "doc_to_text" in body else 'doc_to_text: "{{text}}"\n'
        (folder / f"{name}.yaml").write_text(f"task: tiny_{name}\n{data}test_split: test\n{text}{body}")
    names = [f"tiny_{name}" for name in TASKS]
    return find_tasks(names, include_path=str(folder), include_defaults=False)


@pytest.mark.parametrize("name", TASKS)
def test_a_hybrid_without_swa_scores_as_the_dense_model_and_one_with_it_does_not(name: str, loaded, manager):
    def run(allocation: Allocation | None) -> dict[str, float]:
        return run_task(loaded, allocation, f"tiny_{name}", manager=manager)

    full, none = (rules.bottom(4, 3, sparsity=share, window=4, num_sink_tokens=1) for share in (0.0, 1.0))
    before, dense = copy.copy(vars(loaded.model.config)), run(None)
    assert run(full) == dense
    if name != "perplexity":
        assert dense == ({"tiny_choice acc": 1.0} if name == "choice" else {"tiny_continue exact_match": 0.5})
    assert run(none) != pytest.approx(dense, rel=1e-3)
    assert vars(loaded.model.config) == before


def test_the_limit_is_passed_on(loaded, manager):
    scores = [
        run_task(loaded, None, "tiny_continue", manager=manager, limit=n)["tiny_continue exact_match"] for n in (1, 2)
    ]
    assert scores == [0.0, 0.5]


def test_padding_changes_nothing(loaded, manager):
    hybrid = rules.middle(4, 3, sparsity=0.5, granularity="kv_head", window=8, num_sink_tokens=2)
    alone, together = (run_task(loaded, hybrid, "tiny_continue", manager=manager, batch_size=size) for size in (1, 3))
    assert alone == together


def test_the_suite_runs_tasks_once(
    loaded, manager, tiny_model_folder: Path, text_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    asked = []

    def find(names: Any, **options: Any) -> Any:
        asked.append((names, options["metadata"]["max_seq_lengths"]))
        return manager

    monkeypatch.setenv("CONSA_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(harness, "find_tasks", find)
    monkeypatch.setattr(evaluation, "load", lambda *_: loaded)
    where = RunConfig(model=str(tiny_model_folder), data=str(text_folder), num_heldout=2, device="cpu")
    config = EvalConfig(seq_len=96, window=8, tasks="tiny_continue,tiny_choice", lengths="512", limit=2)
    table, _ = run_evaluation(where, config, ["middle"], tmp_path, command="c")
    assert asked == [(("tiny_continue", "tiny_choice"), [512])]
    for line, allocation in zip(
        table.lines,
        (None, *(rules.middle(4, 3, sparsity=s, granularity="kv_head", window=8) for s in (1.0, 0.75))),
        strict=True,
    ):
        assert line.tasks == {
            metric: value
            for task in ("tiny_continue", "tiny_choice")
            for metric, value in run_task(loaded, allocation, task, manager=manager, limit=2).items()
        }
    monkeypatch.setattr(harness, "run_task", None)
    assert run_evaluation(where, config, ["middle"], tmp_path, command="c")[0] == table


def test_an_unknown_task_is_refused_with_those_near_it(manager, tmp_path: Path):
    (tmp_path / "a.yaml").write_text("task: some_task\ndataset_path: json\n")
    with pytest.raises(ConsaError, match="no task 'some_tusk' among its 1; similar names are some_task"):
        find_tasks(["some_tusk"], include_path=str(tmp_path), include_defaults=False)


def test_a_task_without_its_data_is_refused(loaded, tmp_path: Path):
    (tmp_path / "a.yaml").write_text(
        f"task: absent\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {tmp_path / 'absent'}}}}}\n"
        "test_split: test\ndoc_to_text: text\ndoc_to_target: text\n"
    )
    manager = find_tasks(["absent"], include_path=str(tmp_path), include_defaults=False)
    with pytest.raises(ConsaError, match=r"task 'absent' cannot be run: .*absent"):
        run_task(loaded, None, "absent", manager=manager)


def test_without_the_package_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(ConsaError, match=r"pip install 'consa.lm-eval.'"):
        find_tasks(["arc_easy"])


def test_another_limit_or_seed_is_measured_anew(loaded, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    asked: list[tuple[Any, Any]] = []

    def scores(*_: Any, limit: Any, seed: int, **__: Any) -> dict[str, float]:
        asked.append((limit, seed))
        return {"tiny acc": 0.0}

    monkeypatch.setattr(harness, "run_task", scores)
    config = EvalConfig(seq_len=16, window=8, tasks="tiny")
    for limit, seed in ((1, 0), (2, 0), (2, 1), (1, 0)):
        (measure,) = harness.measures(loaded, replace(config, limit=limit, seed=seed), None)
        cell = Cell(
            allocation="a",
            measure=measure.name,
            depends_on=measure.settings,
            size=1,
            compute=partial(measure.compute, None),
        )
        run_cells([cell], tmp_path)
    assert asked == [(1, 0), (2, 0), (2, 1)]
