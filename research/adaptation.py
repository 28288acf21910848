"""Does continued training close the gap? Hybrids and the dense model, trained equally long on the same text.

    python -m research.adaptation --train train.npy --heldout heldout.npy --out research/results/adaptation.json

TRAIN and HELDOUT are token files of research/tokens.py. A row's name is what it trains under, the sinks it is trained
and measured with, and a sparsity, if not --sparsity. `kv_head/4/0.9` and `layer/4/0.9` were learned: they are rows of
--allocations, a record of research/methods.py, which also gives the window. `interleaved/4/0.9` is a rule over KV
heads, `interleaved_layer/4/0.9` over layers. Each row trains all weights of a copy of the model by `adapt`, on the same
sequences in the same order: those of TRAIN that learning has not seen, or all of TRAIN if those are too few. `joint`
learns gates and weights together on the text on which the others learned their gates, and then trains on, under its own
mask, on as much text as they do. `again/4` chooses, adapts for half of the steps, chooses again with the adapted
weights, and adapts for the rest.

Losses are means over the held-out sequences from `--start` on, before and after training. `recovered` is the share of
the gap from all-SWA (with the row's sinks) to the dense model that a row closes: before training, of the gap between
the untrained two; after training, up to the trained dense model, from all-SWA untrained (`recovered`) or trained too
(`recovered_of_trained`). `behind dense` has a paired interval over the held-out sequences. Retrieval is the share of
answers in the model's greedy continuation, of single needles or of all `--tasks`; `found` is the mean.

`--retrieval 0,0.25` trains every row without and with this share of retrieval in the loss. The name of a row with it
ends in `/retrieval0.25`, and it is compared with the dense model and all-SWA trained in the same way.

An interrupted run continues with the first missing row; `--seconds 500` starts no row later than that.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

from benchmarks.common import print_table
from consa import rules
from consa.allocation import Allocation
from consa.config import AdaptConfig, LearnConfig
from consa.evaluation.intervals import bootstrap
from consa.model.load import load_model
from consa.training.adaptation import adapt
from consa.training.learning import learn
from consa.training.objective import order
from research.records import (
    RESULTS,
    Heldout,
    Questions,
    Rows,
    allocation_in,
    digits_of,
    run_missing,
    study_parser,
    tokens_of,
)

COLUMNS = ["row", "loss before", "recovered before", "found before"]
COLUMNS += ["loss", "recovered", "of trained", "found", "behind dense"]
ROWS = [
    *("dense", "kv_head/4", "all_swa/4", "kv_head/0", "layer/4", "interleaved/4", "middle/4", "joint/4"),
    *("all_swa/0", "distilled/4", "layer/0", "interleaved/0", "middle/0"),
]
KINDS = (
    {row.partition("/")[0] for row in ROWS} | rules.RULES.keys() | {f"{rule}_layer" for rule in rules.RULES} | {"again"}
)


def main() -> None:
    options = parse()
    endings = [f"/retrieval{share:g}" if share else "" for share in map(float, options.retrieval.split(","))]
    names = [row + ending for ending in endings for row in options.rows.split(",")]
    if unknown := {name for name in names if name.partition("/")[0] not in KINDS}:
        raise SystemExit(f"--rows must be of {', '.join(ROWS)} or rules, got {', '.join(sorted(unknown))}")
    if options.tokens > 20e6:
        raise SystemExit(f"--tokens must be at most 20 M, got {options.tokens:,.0f}")
    began = time.perf_counter()
    bench = Benchmark(options)
    run_missing(names, lambda name: name in bench.rows, bench.add, began=began, seconds=options.seconds)
    print_table(COLUMNS, [cells(name, bench.rows) for name in bench.rows])


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__)
    parser.add_argument("--rows", default=",".join(ROWS), help="in the order in which they are measured")
    parser.add_argument("--allocations", type=Path, default=RESULTS / "methods.json", help="record of learned ones")
    parser.add_argument("--seed", type=int, default=0, help="of the learned allocations")
    parser.add_argument("--ending", default="", help="of the names of the learned allocations, after the seed")
    parser.add_argument("--sparsity", type=float, default=0.733, help="of rows that name none")
    parser.add_argument("--tokens", type=float, default=5.25e6, help="of each row's training; at most 20 M")
    parser.add_argument("--learning-rate", type=float, default=5e-4, help="peak learning rate")
    parser.add_argument("--joint-rate", type=float, default=1e-4, help="learning rate of the weights in joint learning")
    parser.add_argument("--sequences-per-step", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="compile the layers that train")
    parser.add_argument("--learn-steps", type=int, help="steps of joint learning (default: those of the record)")
    parser.add_argument("--retrieval", default="0", help="shares of retrieval in the loss of the rows' adaptation")
    parser.add_argument("--tasks", default="single", help="retrieval tasks of the questions")
    parser.add_argument("--lengths", default="4096,8192", help="tokens of the retrieval questions")
    parser.add_argument("--examples", type=int, default=50, help="questions per length")
    return parser.parse_args()


class Benchmark:
    """The rows, and what measures one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded = load_model(options.model)
        self.train = tokens_of(options.train)
        self.heldout = Heldout.of(options, at_once=options.micro_batch)
        self.record = json.loads(options.allocations.read_text())
        budget, known = self.record["settings"]["budget"], [item.name for item in fields(LearnConfig)]
        source = LearnConfig(**{name: value for name, value in budget.items() if name in known})
        self.learning = replace(
            source,
            mode="joint",
            granularity="kv_head",
            sparsity=options.sparsity,
            seed=options.seed,
            seq_len=self.train.shape[1],
            weight_lr=options.joint_rate,
            micro_batch=options.micro_batch,
            compile=options.compile,
            num_steps=options.learn_steps or source.num_steps,
        )
        seen = self.learning.num_steps * self.learning.sequences_per_step
        unseen = order(self.train, self.learning.seed, range(seen, len(self.train)))
        seq_len = self.train.shape[1]
        self.adapting = AdaptConfig(
            seq_len=seq_len,
            num_steps=max(1, int(options.tokens) // (options.sequences_per_step * seq_len)),
            sequences_per_step=options.sequences_per_step,
            micro_batch=options.micro_batch,
            learning_rate=options.learning_rate,
            compile=options.compile,
        )
        needed = self.adapting.num_steps * options.sequences_per_step
        self.text = self.train[unseen] if len(unseen) >= needed else self.train
        self.questions = Questions.of(options, self.loaded.tokenizer)
        free = ("rows", "retrieval", "seconds", "out", *(["tasks"] if options.tasks == "single" else []))
        settings = {name: value for name, value in vars(options).items() if name not in free}
        settings |= {"allocations": options.allocations.name, "weights": self.loaded.identity["revision"]}
        self.rows = Rows(
            options.out,
            settings,
            window=self.learning.window,
            seq_len=seq_len,
            steps=self.adapting.num_steps,
            train_sequences=len(self.text),
            heldout_sequences=len(self.heldout.tokens),
            learn_steps=self.learning.num_steps,
            learn_sequences_per_step=self.learning.sequences_per_step,
        )

    def add(self, name: str) -> None:
        """Train, measure, write."""
        plain, _, share = name.partition("/retrieval")
        kind = plain.partition("/")[0]
        model = copy.deepcopy(self.loaded.model)
        config, learning_seconds = replace(self.adapting, retrieval=float(share or 0)), None
        if kind == "distilled":
            config = replace(config, cross_entropy=0.5, distillation=0.5)
        if kind == "joint":
            began = seconds()
            allocation = learn(model, self.train, self.learning).allocation
            learning_seconds = round(seconds() - began, 1)
        else:
            allocation = self.allocation(plain)
        measured = None if kind == "dense" else allocation
        before = self.rows[plain]["before"] if plain in self.rows else self.measure(model, measured)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        if kind == "again":
            config = replace(config, num_steps=max(1, config.num_steps // 2))
            adapt(model, self.text, allocation, config, tokenizer=self.loaded.tokenizer)
            began, again = seconds(), replace(self.learning, mode="frozen", sparsity=allocation.sparsity)
            measured = allocation = learn(model, self.train, again).allocation
            learning_seconds = round(seconds() - began, 1)
            config = replace(config, seed=config.seed + 1)  # another order of the text
        began = seconds()
        history = adapt(model, self.text, allocation, config, tokenizer=self.loaded.tokenizer)
        took = seconds() - began
        tokens = config.num_steps * config.sequences_per_step * config.seq_len
        row = {
            "sinks": None if kind == "dense" else allocation.num_sink_tokens,
            "sparsity": round(allocation.sparsity, 4),
            "before": before,
            "after": self.measure(model, measured),
            "learning_seconds": learning_seconds,
            "seconds": round(took, 1),
            "tokens_per_second": round(tokens / took),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if torch.cuda.is_available() else None,
            "losses": [round(record["loss"], 4) for record in history],
            "allocation": digits_of(allocation),
        }
        compare(self.rows | {name: row})
        self.rows.add(name, row)

    def allocation(self, name: str) -> Allocation:
        """The allocation that a row of this name trains under; joint rows learn theirs."""
        if name == "dense":
            name = "dense/0"
        kind, sinks, *sparsity = name.split("/")
        sparsity = float(*sparsity or [self.options.sparsity])
        if kind in ("kv_head", "layer", "distilled", "again"):
            unit = "layer" if kind == "layer" else "kv_head"
            learned = f"consa-{unit}-{sparsity:g}-seed{self.options.seed}{self.options.ending}"
            return replace(allocation_in(self.record, learned), num_sink_tokens=int(sinks))
        layout = self.loaded.layout
        rule = rules.RULES.get(kind.removesuffix("_layer"), rules.bottom)
        return rule(
            *layout.shape,
            sparsity={"dense": 0.0, "all_swa": 1.0}.get(kind, sparsity),
            granularity="layer" if kind.endswith("_layer") else "kv_head",
            window=self.learning.window,
            num_sink_tokens=int(sinks),
            native_windows=layout.native_windows,
        )

    def measure(self, model: PreTrainedModel, allocation: Allocation | None) -> dict[str, Any]:
        """Held-out loss, and the share of answers found at each length."""
        measured = self.heldout.measured(model, allocation)
        loaded, attended = replace(self.loaded, model=model), allocation or self.allocation("dense")
        return measured | {"retrieval": self.questions.answered(loaded, attended)}


def compare(rows: Mapping[str, dict[str, Any]]) -> None:
    """Compute each row's differences from the dense model and all-SWA, where those are measured."""
    for name, row in rows.items():
        floor, trained, dense = rows.get(f"all_swa/{row['sinks']}"), *alike(name, rows)
        for key, low, of, when in (
            ("recovered_before", floor, "before", "before"),
            ("recovered", floor, "before", "after"),
            ("recovered_of_trained", trained, "after", "after"),
        ):
            row[key] = None
            if low and dense:
                share = (low[of]["loss"] - row[when]["loss"]) / (low[of]["loss"] - dense[when]["loss"])
                row[key] = round(share, 4) + 0.0  # no negative zero
        row["behind_dense"] = dense and round(row["after"]["loss"] - dense["after"]["loss"], 5)


def alike(name: str, rows: Mapping[str, Any]) -> tuple[Any, Any]:
    """The rows of all-SWA and of the dense model that were trained on as much retrieval as a row; None if missing."""
    _, mark, share = name.partition("/retrieval")
    return rows.get(f"all_swa/{rows[name]['sinks']}{mark}{share}"), rows.get(f"dense{mark}{share}")


def cells(name: str, rows: Mapping[str, dict[str, Any]]) -> list[Any]:
    """What the table shows of a row."""
    row, (_, dense) = rows[name], alike(name, rows)
    before, after = row["before"], row["after"]
    found = [f"{np.mean(list(when['retrieval'].values())):.2f}" for when in (before, after)]
    shown = [name, before["loss"], row["recovered_before"], found[0]]
    shown += [after["loss"], row["recovered"], row["recovered_of_trained"], found[1]]
    apart = dense and np.subtract(after["losses"], dense["after"]["losses"])
    return [*shown, None if apart is None else bootstrap(apart, np.arange(len(apart)))]


def seconds() -> float:
    """Now, after the GPU has finished its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
