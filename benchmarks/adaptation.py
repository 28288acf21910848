"""Does continued training close the gap? Hybrids beside the dense model, all trained equally long on the same text.

    python benchmarks/adaptation.py --train train.npy --heldout heldout.npy --out benchmarks/results/adaptation.json

TRAIN and HELDOUT are tokens, int `(num_sequences, seq_len)`. The learned allocations are those of `--seed` in
benchmarks/results/allocations-kv_head.json and -layer.json, of 4 sinks. A row's name ends in the sinks that it is
trained and measured with; then in the sparsity, where another than theirs is wanted: `kv_head/4/0.9` is what ConSA
learned in benchmarks/results/methods.json, `interleaved/4/0.9` a rule of KV heads and `interleaved_layer/4/0.9` of
layers. Every row trains all weights of the same model by `adapt`, on the same sequences in the same order: those of
TRAIN that learning, whose settings the files hold, has not seen, or all if those are too few. `joint` learns its gates
and weights together on the text that the others learned their gates on, and then trains on with its mask, on as much
text as they.

Losses are of the held-out sequences, from `--start` on, before and after the training. `recovered` is the share of the
gap that a row closes from all-SWA, with the row's sinks, to the dense model: as both were, before the training; after
it, to the dense model so trained, from all-SWA as it was (`recovered`) and as trained too (`recovered_of_trained`).
Retrieval is the share of single needles whose number the model's greedy continuation begins with.

Every row is written as soon as it is measured, and a row that the file holds is not measured again: `--seconds 500`
begins no row later than that, and the same command goes on from there.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import digits_of, environment, mask_of, measured_before, parser_of, print_table, write_json
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from consa import rules
from consa.allocation import Allocation
from consa.config import AdaptConfig, LearnConfig
from consa.data.questions import examples
from consa.evaluation.losses import heldout_losses
from consa.model import loss
from consa.model.attach import attached
from consa.model.load import load_model
from consa.training import loop
from consa.training.adaptation import adapt
from consa.training.learning import learn

RESULTS = Path(__file__).parent / "results"
COLUMNS = ["row", "loss before", "recovered before", "loss", "recovered", "of trained", "behind dense"]
ROWS = [
    *("dense", "kv_head/4", "all_swa/4", "kv_head/0", "layer/4", "interleaved/4", "middle/4", "joint/4"),
    *("all_swa/0", "distilled/4", "layer/0", "interleaved/0", "middle/0"),
]
KINDS = (
    {row.partition("/")[0] for row in ROWS} | rules.RULES.keys() | {f"{rule}_layer" for rule in rules.RULES}
)


def main() -> None:
    parser = parser_of(__doc__, text=True)
    parser.add_argument("--rows", default=",".join(ROWS), help="in the order in which they are measured")
    parser.add_argument("--seed", type=int, default=0, help="of the learned allocations")
    parser.add_argument("--tokens", type=float, default=5.25e6, help="each row's training; 20 M at most")
    parser.add_argument("--learning-rate", type=float, default=5e-4)
    parser.add_argument("--joint-rate", type=float, default=1e-4, help="of the weights while gates learn")
    parser.add_argument("--sequences-per-step", type=int, default=8)
    parser.add_argument("--micro-batch", type=int, default=4)
    parser.add_argument("--compile", action="store_true", help="compile the layers that train")
    parser.add_argument("--learn-steps", type=int, help="of joint learning; as the files say unless given")
    parser.add_argument("--lengths", default="4096,8192", help="tokens of the retrieval questions")
    parser.add_argument("--examples", type=int, default=50, help="questions per length")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after that many")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    names = options.rows.split(",")
    if unknown := {name for name in names if name.partition("/")[0] not in KINDS}:
        raise SystemExit(f"--rows must be of {', '.join(ROWS)} or rules, got {', '.join(sorted(unknown))}")
    if options.tokens > 20e6:
        raise SystemExit(f"--tokens must be at most 20 M, got {options.tokens:,.0f}")

    began = time.perf_counter()
    bench = Benchmark(options)
    left = 0
    for name in names:
        if name not in bench.record["rows"]:
            if time.perf_counter() - began > options.seconds:
                left += 1
            else:
                bench.add(name)
    rows = bench.record["rows"]
    print_table(COLUMNS, [cells(name, row) for name, row in rows.items()])
    print(f"{left} rows left: run the same command again" if left else "complete")


class Benchmark:
    """A JSON file of rows, and what measures one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.loaded = load_model(options.model)
        self.train, heldout = (
            np.load(path, mmap_mode="r", allow_pickle=False) for path in (options.train, options.heldout)
        )
        self.heldout = heldout[: options.num_heldout]
        self.sources = {name: Source.read(name, options.seed) for name in ("kv_head", "layer")}
        source = self.sources["kv_head"].config
        self.learning = replace(
            source,
            mode="joint",
            weight_lr=options.joint_rate,
            micro_batch=options.micro_batch,
            compile=options.compile,
            num_steps=options.learn_steps or source.num_steps,
        )
        seen = self.learning.num_steps * self.learning.sequences_per_step
        unseen = loop.order(self.train, self.learning, range(seen, len(self.train)))
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
        self.questions = {
            length: Questions.make(self.loaded.tokenizer, int(length), options.examples)
            for length in options.lengths.split(",")
        }
        free = ("rows", "seconds", "out")
        settings = {name: value for name, value in vars(options).items() if name not in free}
        self.record: dict[str, Any] = environment() | {
            "settings": settings,
            "window": source.window,
            "seq_len": seq_len,
            "steps": self.adapting.num_steps,
            "train_sequences": len(self.text),
            "heldout_sequences": len(self.heldout),
            "learn_steps": self.learning.num_steps,
            "learn_sequences_per_step": self.learning.sequences_per_step,
            "rows": {},
        }
        self.record |= measured_before(options.out, settings)

    def add(self, name: str) -> None:
        """Train, measure, write."""
        kind = name.partition("/")[0]
        model = copy.deepcopy(self.loaded.model)
        config, learning_seconds = self.adapting, None
        if kind == "distilled":
            config = replace(config, cross_entropy=0.5, distillation=0.5)
        if kind == "joint":
            began = seconds()
            allocation = learn(model, self.train, self.learning).allocation
            learning_seconds = round(seconds() - began, 1)
        else:
            allocation = self.allocation(name)
        measured = None if kind == "dense" else allocation
        before = self.measure(model, measured)
        if torch.cuda.is_available():
            torch.cuda.reset_peak_memory_stats()
        began = seconds()
        history = adapt(model, self.text, allocation, config)
        took = seconds() - began
        tokens = config.num_steps * config.sequences_per_step * config.seq_len
        self.record["rows"][name] = {
            "sinks": None if kind == "dense" else allocation.num_sink_tokens,
            "sparsity": round(allocation.sparsity, 4),
            "before": before,
            "after": self.measure(model, measured),
            "learning_seconds": learning_seconds,
            "seconds": round(took, 1),
            "tokens_per_second": round(tokens / took),
            "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2)
            if torch.cuda.is_available()
            else None,
            "losses": [round(record["loss"], 4) for record in history],
            "allocation": digits_of(allocation),
        }
        compare(self.record["rows"])
        shown = dict(zip(COLUMNS, cells(name, self.record["rows"][name]), strict=True)) | {
            "seconds": round(took, 1)
        }
        print(name, shown, flush=True)
        write_json(self.options.out, self.record)

    def allocation(self, name: str) -> Allocation:
        """What a row of this name trains under, but for the joint one."""
        if name == "dense":
            name = "dense/0"
        kind, sinks, *sparsity = name.split("/")
        layout, heads = self.loaded.layout, self.sources["kv_head"]
        shape: dict[str, Any] = {"window": heads.config.window, "num_sink_tokens": int(sinks)}
        shape |= {"native_windows": layout.native_windows}
        learned = {"distilled": heads, "kv_head": heads, "layer": self.sources["layer"]}
        if kind in learned:
            granularity = learned[kind].config.granularity
            full = learned[kind].full_attention
            if sparsity:
                full = by_methods(f"consa-{granularity}-{sparsity[0]}-seed{self.options.seed}")
            return Allocation(full_attention=full, granularity=granularity, **shape)
        shape["sparsity"] = {"dense": 0.0, "all_swa": 1.0}.get(
            kind, float(*sparsity or [heads.config.sparsity])
        )
        granularity = "layer" if kind.endswith("_layer") else "kv_head"
        rule = rules.RULES.get(kind.removesuffix("_layer"), rules.bottom)
        return rule(layout.num_layers, layout.num_kv_heads, granularity=granularity, **shape)

    def measure(self, model: PreTrainedModel, allocation: Allocation | None) -> dict[str, Any]:
        """Held-out loss in nats, and the share of answers found at each length."""
        losses = heldout_losses(model, self.heldout, allocation, batch_size=self.options.micro_batch)
        with attached(model, allocation or self.allocation("dense")):
            found = {length: round(asked.found(model), 4) for length, asked in self.questions.items()}
        each = losses[:, self.options.start :].mean(1, dtype=np.float64)
        return {"loss": round(float(each.mean()), 5), "retrieval": found, "losses": each.round(5).tolist()}


@dataclass(frozen=True)
class Source:
    """A learned allocation and what it was learned with."""

    full_attention: np.ndarray  # bool (layers, kv_heads)
    config: LearnConfig

    @classmethod
    def read(cls, granularity: str, seed: int) -> Source:
        """From the results of benchmarks/allocations.py."""
        record = json.loads((RESULTS / f"allocations-{granularity}.json").read_text())
        (row,) = (row for row in record["rows"] if row["name"] == f"consa/{granularity}/seed{seed}")
        return cls(
            mask_of(row["allocation"]),
            LearnConfig(**record["settings"] | {"granularity": granularity, "seed": seed}),
        )


def by_methods(name: str) -> np.ndarray:
    """What benchmarks/methods.py chose, bool `(layers, kv_heads)`."""
    return mask_of(json.loads((RESULTS / "methods.json").read_text())["rows"][name]["allocation"])


@dataclass(frozen=True)
class Questions:
    """Prompts with their answers behind them, and where those are."""

    tokens: list[torch.Tensor]  # (tokens,) int64 each
    num_answer: list[int]  # tokens at the end of each

    @classmethod
    def make(cls, tokenizer: PreTrainedTokenizerBase, length: int, count: int) -> Questions:
        """Single needles of `length` tokens at most, the answer included."""
        tokens, num_answer = [], []
        for example in examples("single", tokenizer, length=length, count=count, seed=1):
            prompt = tokenizer(example.prompt)["input_ids"]
            answer = tokenizer(" " + example.answers[0], add_special_tokens=False)["input_ids"]
            tokens.append(torch.tensor(prompt + answer))
            num_answer.append(len(answer))
        return cls(tokens, num_answer)

    def found(self, model: PreTrainedModel, batch: int = 4) -> float:
        """The share whose answer is what `model` continues the prompt with, token by token the most likely."""
        right, head = 0, loss.output_layer(model)
        for start in range(0, len(self.tokens), batch):
            part = slice(start, start + batch)
            padded = torch.nn.utils.rnn.pad_sequence(self.tokens[part], batch_first=True).to(model.device)
            with torch.no_grad():
                hidden = loss.hidden_states(model, padded)
                for row, asked, count in zip(hidden, self.tokens[part], self.num_answer[part], strict=True):
                    said = head(row[None, len(asked) - count - 1 : len(asked) - 1]).argmax(-1)[0]
                    right += bool((said.cpu() == asked[-count:]).all())
        return right / len(self.tokens)


def compare(rows: dict[str, dict[str, Any]]) -> None:
    """Set each row against the ends that are measured."""
    for row in rows.values():
        floor, dense = rows.get(f"all_swa/{row['sinks']}"), rows.get("dense")
        row |= {"recovered_before": None, "recovered": None, "recovered_of_trained": None}
        row["behind_dense"] = dense and round(row["after"]["loss"] - dense["after"]["loss"], 5)
        if floor and dense:
            for key, when, low, high in (
                ("recovered_before", "before", floor["before"], dense["before"]),
                ("recovered", "after", floor["before"], dense["after"]),
                ("recovered_of_trained", "after", floor["after"], dense["after"]),
            ):
                share = (low["loss"] - row[when]["loss"]) / (low["loss"] - high["loss"])
                row[key] = round(share, 4) + 0.0  # no negative zero


def cells(name: str, row: dict[str, Any]) -> list[Any]:
    derived = (row[key] for key in ("recovered", "recovered_of_trained", "behind_dense"))
    return [name, row["before"]["loss"], row["recovered_before"], row["after"]["loss"], *derived]


def seconds() -> float:
    """Now, with nothing left under way on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


if __name__ == "__main__":
    main()
