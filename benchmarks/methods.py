"""ConSA beside every other way to choose, at a matched budget: quality kept, retrieval, and what the choice cost.

    python benchmarks/methods.py --train TRAIN.npy --heldout HELDOUT.npy --out benchmarks/results/methods.json

TRAIN and HELDOUT are tokens, int `(num_sequences, seq_len)`. Every row is written as soon as it is measured, and a row
that the file already holds is not measured again: `--seconds 500` stops before the first row that begins later than
that, and the same command goes on from there. `--methods consa,rules` measures some; `--budget num_steps=100` sets any
field of ChoiceConfig. Every seed beyond the first is for what is random.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, overrides, print_table, write_json

from consa.allocation import Allocation
from consa.evaluation.perplexity import heldout_losses
from consa.evaluation.retrieval import ask
from consa.methods import METHODS, ChoiceConfig, method_named
from consa.methods.nested import nested
from consa.model import LoadedModel, load_model
from consa.retrieval import examples
from consa.rules import RULES

RANDOM = {"consa", "prulong", "duo_attention", "bosch", "nested", "random_units"}
COLUMNS = [
    "method",
    "granularity",
    "sparsity",
    "seed",
    "recovered",
    "retrieval",
    "seconds",
    "Mtokens forward/backward",
]


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--train", required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument(
        "--methods", default="rules,all,nested", help="names; rules and all stand for several"
    )
    parser.add_argument("--sparsity", default="0.733,0.5,0.9")
    parser.add_argument("--granularity", default="kv_head,layer")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--budget", action="append", default=[], metavar="NAME=VALUE")
    parser.add_argument("--num-heldout", type=int, default=40)
    parser.add_argument("--start", type=int, default=1024, help="first position that counts")
    parser.add_argument("--lengths", default="2048,4096,8192", help="tokens of the retrieval questions")
    parser.add_argument("--examples", type=int, default=8, help="questions per length; 0 for none")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no row after that many")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()

    began = time.perf_counter()
    train, heldout = (
        np.load(path, mmap_mode="r", allow_pickle=False) for path in (options.train, options.heldout)
    )
    bench = Benchmark(options, load_model(options.model), train, heldout[: options.num_heldout])
    sparsities = [float(text) for text in options.sparsity.split(",")]
    left = 0
    for name, config in wanted(options, sparsities):
        if bench.has(name, config):
            continue
        if time.perf_counter() - began > options.seconds:
            left += 1
        elif name == "nested":
            bench.add_nested(config, sparsities)
        else:
            bench.add(name, config)
    rows = [row for row in bench.record["rows"].values() if row["method"] not in ("dense", "all_swa")]
    rows.sort(key=lambda row: (row["granularity"], row["sparsity"], -row["recovered"]))
    print_table(COLUMNS, [cells(row) for row in rows])
    print(f"{left} rows left: run the same command again" if left else "complete")


def wanted(options: argparse.Namespace, sparsities: list[float]) -> Iterator[tuple[str, ChoiceConfig]]:
    """The rows asked for: of the first seed all, of others those that are random."""
    names: dict[str, None] = {}
    for name in options.methods.split(","):
        if name not in ("rules", "all", "nested", *RULES):
            method_named(name)
        names |= dict.fromkeys({"rules": RULES, "all": METHODS}.get(name, [name]))
    base = ChoiceConfig(**overrides(options.budget))
    for seed in range(options.seeds):
        for sparsity in sparsities:
            for granularity in options.granularity.split(","):
                for name in names:
                    if (seed == 0 or name in RANDOM) and (name, granularity) != ("uniform_heads", "layer"):
                        yield name, replace(base, sparsity=sparsity, granularity=granularity, seed=seed)


class Benchmark:
    """A JSON file of rows, and what measures one."""

    def __init__(
        self, options: argparse.Namespace, loaded: LoadedModel, train: np.ndarray, heldout: np.ndarray
    ) -> None:
        self.loaded, self.train, self.heldout = loaded, train, heldout
        self.out, self.start = options.out, options.start
        lengths = [int(text) for text in options.lengths.split(",")] if options.examples else []
        config = ChoiceConfig(**overrides(options.budget))
        kept = ("model", "train", "heldout", "num_heldout", "start", "lengths", "examples")
        settings = {name: getattr(options, name) for name in kept} | {"budget": asdict(config)}
        self.record: dict[str, Any] = environment() | {"settings": settings, "rows": {}}
        if self.out.exists():
            before = json.loads(self.out.read_text())
            if before["settings"] != settings:
                raise SystemExit(f"{self.out} was measured with {before['settings']}; choose another --out")
            self.record["rows"] = before["rows"]
        self.questions = {
            length: examples("single", loaded.tokenizer, length=length, count=options.examples, seed=1)
            for length in lengths
        }
        if "dense" not in self.record["rows"]:
            shape = (loaded.layout.num_layers, loaded.layout.num_kv_heads)
            all_swa = Allocation(
                full_attention=np.zeros(shape, dtype=bool),
                window=config.window,
                num_sink_tokens=config.num_sink_tokens,
                native_windows=loaded.layout.native_windows,
            )
            ends = {
                name: {"method": name} | self._measure(a)
                for name, a in (("all_swa", all_swa), ("dense", None))
            }
            self.record["rows"] |= ends
            write_json(self.out, self.record)

    def has(self, name: str, config: ChoiceConfig) -> bool:
        """Whether that row is measured."""
        return key(name, config) in self.record["rows"]

    def add(self, name: str, config: ChoiceConfig) -> None:
        """Choose, measure, write."""
        began = seconds()
        layout = self.loaded.layout
        if name in METHODS:
            allocation = METHODS[name](self.loaded, self.train, config)
        else:
            allocation = RULES[name](
                layout.num_layers,
                layout.num_kv_heads,
                sparsity=config.sparsity,
                granularity=config.granularity,
                window=config.window,
                num_sink_tokens=config.num_sink_tokens,
                native_windows=layout.native_windows,
                **({"seed": config.seed} if name in RANDOM else {}),
            )
        self._write(name, config, allocation, seconds() - began)

    def add_nested(self, config: ChoiceConfig, sparsities: list[float]) -> None:
        """One run for all sparsities; each row has its seconds."""
        began = seconds()
        found = nested(self.loaded, self.train, config, sparsities)
        took = seconds() - began
        for sparsity, allocation in found.items():
            self._write("nested", replace(config, sparsity=sparsity), allocation, took)

    def _write(self, name: str, config: ChoiceConfig, allocation: Allocation, took: float) -> None:
        rows = self.record["rows"]
        measured = self._measure(allocation)
        floor, dense = rows["all_swa"]["loss"], rows["dense"]["loss"]
        row = {
            "method": name,
            "granularity": config.granularity,
            "sparsity": config.sparsity,
            "seed": config.seed,
            "achieved": round(allocation.sparsity, 4),
            "recovered": round((floor - measured["loss"]) / (floor - dense), 4),
            "seconds": round(took, 1),
            "cost": allocation.provenance.get("cost", {"forward_tokens": 0, "backward_tokens": 0}),
        }
        print(row | measured, flush=True)
        heads = ["".join("01"[int(full)] for full in layer) for layer in allocation.full_attention]
        rows[key(name, config)] = row | measured | {"allocation": heads}
        write_json(self.out, self.record)

    def _measure(self, allocation: Allocation | None) -> dict[str, Any]:
        """Held-out loss from `start` on, nats, and the share of answers found at each length."""
        batch = 4 if torch.cuda.is_available() else 1
        losses = heldout_losses(self.loaded.model, self.heldout, allocation, batch_size=batch)
        found = {
            str(length): round(float(np.mean(ask(self.loaded, allocation, questions)["scores"])), 4)
            for length, questions in self.questions.items()
        }
        return {"loss": round(float(losses[:, self.start :].mean(dtype=np.float64)), 5), "retrieval": found}


def key(name: str, config: ChoiceConfig) -> str:
    return f"{name}/{config.granularity}/{config.sparsity:g}/seed{config.seed}"


def seconds() -> float:
    """Now, with nothing left under way on the GPU."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def cells(row: dict[str, Any]) -> list[Any]:
    spent = row["cost"]
    return [
        *(row[name] for name in COLUMNS[:5]),
        " ".join(f"{share:.2f}" for share in row["retrieval"].values()),
        row["seconds"],
        f"{spent['forward_tokens'] / 1e6:.1f}/{spent['backward_tokens'] / 1e6:.1f}",
    ]


if __name__ == "__main__":
    main()
