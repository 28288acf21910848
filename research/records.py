"""What the studies share: their options, held-out losses, files of rows that are continued, and allocations in them."""

from __future__ import annotations

import argparse
import datetime
import json
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common import environment, parser_of, write_json
from consa.allocation import Allocation
from consa.data.questions import Example, examples
from consa.evaluation.answers import ask
from consa.evaluation.losses import heldout_losses
from consa.model.load import LoadedModel
from consa.provenance import hardware

RESULTS = Path(__file__).parent / "results"
# Tokens per second of SmolLM2-135M on one H100, four sequences at once: for estimates alone.
FORWARD, FORWARD_AND_BACKWARD = 450_000, 150_000
TOKENS_AT_ONCE = 2**18  # of the prompts that a GPU answers at once
Task = TypeVar("Task")


def study_parser(description: str | None, *, shared: bool = False, resumes: bool = True) -> argparse.ArgumentParser:
    """A parser with the options of every study on text; `shared` and `resumes` add some for scripts that can."""
    parser = parser_of(description)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--num-heldout", type=int, default=48, help="held-out sequences")
    parser.add_argument("--start", type=int, default=1024, help="first position that counts")
    if resumes:
        parser.add_argument("--seconds", type=float, default=float("inf"), help="start nothing later than that")
    parser.add_argument("--out", type=Path, required=True)
    if shared:
        parser.add_argument("--share", default="1/1", metavar="I/N", help="part I of N processes on one GPU")
        parser.add_argument("--estimate", action="store_true", help="print the expected cost; run nothing")
    return parser


def tokens_of(path: str) -> np.ndarray:
    """The sequences that research/tokens.py wrote, int `(num_sequences, seq_len)`."""
    return np.load(path, mmap_mode="r", allow_pickle=False)


@dataclass
class Heldout:
    """Held-out sequences, and the loss of a model on them."""

    tokens: np.ndarray  # int (num_sequences, seq_len)
    start: int  # first position that counts
    at_once: int  # sequences

    @classmethod
    def of(cls, options: argparse.Namespace, at_once: int = 1) -> Heldout:
        """As the options of a study say."""
        return cls(tokens_of(options.heldout)[: options.num_heldout], options.start, at_once)

    def losses(self, model: PreTrainedModel, allocation: Allocation | None) -> np.ndarray:
        """Mean loss of each sequence under the allocation, or dense, float64, nats per token."""
        losses = heldout_losses(model, self.tokens, allocation, batch_size=self.at_once)
        return losses[:, self.start :].mean(1, dtype=np.float64)

    def measured(self, model: PreTrainedModel, allocation: Allocation | None) -> dict[str, Any]:
        """Mean loss of all sequences, and of each, as rows keep them."""
        each = self.losses(model, allocation)
        return {"loss": round(float(each.mean()), 5), "losses": each.round(5).tolist()}


@dataclass
class Questions:
    """Retrieval questions, and the share that a model answers."""

    at: dict[int, dict[str, list[Example]]]  # by tokens, then by name: `multi_key 4096`; `4096` is `single`

    @classmethod
    def of(cls, options: argparse.Namespace, tokenizer: Any) -> Questions:
        """As the options of a study say: tasks, lengths and examples, which may be 0."""
        lengths = [int(text) for text in options.lengths.split(",")] if options.examples else []
        tasks = {task: "" if task == "single" else f"{task} " for task in options.tasks.split(",")}
        return cls(
            {
                length: {
                    f"{prefix}{length}": examples(task, tokenizer, length=length, count=options.examples, seed=1)
                    for task, prefix in tasks.items()
                }
                for length in lengths
            }
        )

    def answered(self, loaded: LoadedModel, allocation: Allocation) -> dict[str, float]:
        """The share of answers that the model finds under an allocation."""
        shares: dict[str, float] = {}
        for length, asked in self.at.items():  # all tasks together, which saves steps of decoding
            at_once = max(1, TOKENS_AT_ONCE // length) if torch.cuda.is_available() else 1
            scores = ask(loaded, allocation, list(chain(*asked.values())), batch_size=at_once)["scores"]
            means = np.reshape(scores, (len(asked), -1)).mean(1)
            shares |= {name: round(float(mean), 4) for name, mean in zip(asked, means, strict=True)}
        return shares


class Rows(dict[str, dict[str, Any]]):
    """Named rows in a JSON file: written as soon as measured, and never measured again.

    `path` is that of the file, and `record` what it holds beside the rows.
    """

    def __init__(self, path: Path, settings: dict[str, Any], **header: Any) -> None:
        self.path = path
        self.record = environment() | {"settings": settings} | header | {"rows": {}}
        self.record |= measured_before(path, settings)
        super().__init__(self.record["rows"])

    def add(self, name: str, row: dict[str, Any]) -> None:
        """Keep a row, and print its numbers."""
        self[name] = row
        self.write()
        shown = {key: value for key, value in row.items() if not isinstance(value, (dict, list))}
        print(name, shown, flush=True)

    def write(self) -> None:
        """Write all rows, with what else the record holds now."""
        write_json(self.path, self.record | {"rows": dict(self)})


def measured_before(path: Path, settings: dict[str, Any]) -> dict[str, Any]:
    """What an earlier run left at `path`, for the record of this one; stops if its settings were others.

    Returns:
        `rows` and whatever else was measured or remarked. `earlier`, where present, counts the rows that were measured
        on other hardware or on another day.
    """
    if not path.exists():
        return {"rows": {}}
    before = json.loads(path.read_text())
    if before["settings"] != settings:
        raise SystemExit(f"{path} was measured with {before['settings']}; choose another --out")
    earlier = list(before.get("earlier", []))
    if (before["hardware"], before["date"]) != (hardware(), datetime.date.today().isoformat()):
        number = len(before["rows"]) - sum(entry["rows"] for entry in earlier)
        earlier.append({"rows": number, "hardware": before["hardware"], "date": before["date"]})
    kept = {name: before[name] for name in ("rows", "killed", "remark") if name in before}
    return kept | ({"earlier": earlier} if earlier else {})


def run_missing(
    tasks: Iterable[Task], is_done: Callable[[Task], bool], run: Callable[[Task], None], *, began: float, seconds: float
) -> None:
    """Run the tasks that are not done; start none later than `seconds` after `began`, and say what is left."""
    left = 0
    for task in tasks:
        if is_done(task):
            continue
        if time.perf_counter() - began > seconds:
            left += 1
        else:
            run(task)
    print(f"{left} runs left: run the same command again" if left else "complete")


def shares(seconds: Sequence[float], number: int) -> list[list[int]]:
    """Split runs among processes, in order: each run goes to the process with the least to do so far."""
    parts: list[list[int]] = [[] for _ in range(number)]
    for place in range(len(seconds)):
        min(parts, key=lambda part: sum(seconds[other] for other in part)).append(place)
    return parts


def overrides(items: list[str]) -> dict[str, Any]:
    """`name=value` arguments as settings: numbers as numbers, the rest as text."""
    values = {}
    for name, value in (item.split("=", 1) for item in items):
        try:
            values[name] = json.loads(value)
        except ValueError:
            values[name] = value
    return values


def read(name: str) -> dict[str, Any]:
    """A record of research/results."""
    return json.loads((RESULTS / f"{name}.json").read_text())


def digits_of(allocation: Allocation) -> list[str]:
    """A string of each layer: 1 for a KV head on FA, 0 for one on SWA."""
    return ["".join("01"[int(full)] for full in layer) for layer in allocation.full_attention]


def mask_of(digits: list[str]) -> np.ndarray:
    """The inverse of `digits_of`, bool `(layers, kv_heads)`."""
    return np.array([[head == "1" for head in layer] for layer in digits])


def allocation_in(record: dict[str, Any], name: str) -> Allocation:
    """The allocation in a row of a record of research/methods.py."""
    row, budget = record["rows"][name], record["settings"]["budget"]
    return Allocation(
        full_attention=mask_of(row["allocation"]),
        granularity=row["granularity"],
        window=budget["window"],
        num_sink_tokens=budget["num_sink_tokens"],
        provenance={"method": row["method"], "name": name},
    )


def learned_allocations(record: dict[str, Any]) -> list[Allocation]:
    """The allocations learned in a record of research/allocations.py, one for each seed, refined, with their scores."""
    settings = record["settings"]
    return [
        Allocation(
            full_attention=mask_of(row["allocation"]),
            granularity=settings["granularity"],
            window=settings["window"],
            num_sink_tokens=settings["num_sink_tokens"],
            scores=np.array(row["scores"]),
            provenance={"method": "consa", "model": "smollm2-135m", "name": row["name"]},
        )
        for row in record["rows"]
        if row["scores"] is not None and not row["name"].endswith("gates alone")
    ]


def gates_alone(allocation: Allocation) -> Allocation:
    """The decision before refinement: the same number of units on FA, those with the highest scores."""
    assert allocation.scores is not None
    heads = allocation.num_kv_heads if allocation.granularity == "layer" else 1
    scores = allocation.scores.reshape(-1, heads)[:, 0]
    full = np.zeros(len(scores), dtype=bool)
    full[np.argsort(-scores, kind="stable")[: allocation.full_attention.sum() // heads]] = True
    return replace(allocation, full_attention=full.repeat(heads).reshape(allocation.full_attention.shape))
