"""ConSA and every other way to choose: quality, retrieval, and what the choice costs.

    python -m research.methods --train TRAIN.npy --heldout HELDOUT.npy --out research/results/methods.json

TRAIN and HELDOUT are token files of research/tokens.py. `PLAN` lists what runs, in order: seed 0 of everything, then
further seeds of the methods that use randomness. Each row is written as soon as it is measured, and an interrupted run
continues with the first missing row; `--seconds 500` starts no run later than that.

`--estimate` prints the expected cost of every run. `--share 1/4` to `--share 4/4`, each with its own --out, divide the
work among four processes on one GPU, and research/merge.py joins their files. `--budget micro_batch=4` computes four
sequences at once; `--budget compile=true` compiles the layers while gates are trained. `--retrieval 0,0.25` learns with
each of these shares of retrieval texts; `greedy` and `bosch` judge by such texts too. `--tasks single,multi_value` asks
more than single needles. `--methods research.variants:Distilled` runs a method that is not in the plan.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Mapping
from dataclasses import asdict, fields
from itertools import product
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from benchmarks.common import print_table
from consa import rules
from consa.allocation import Allocation, Granularity
from consa.config import ChoiceConfig
from consa.methods.choice import Choice, make, method_named
from consa.model.layout import AttentionLayout
from consa.model.load import LoadedModel, load_model, read_layout
from consa.training.learning import learn, units_of
from research.records import (
    FORWARD,
    FORWARD_AND_BACKWARD,
    Heldout,
    Questions,
    Rows,
    digits_of,
    overrides,
    run_missing,
    shares,
    study_parser,
    tokens_of,
)


class Entry(NamedTuple):
    """A line of the plan: the granularities to run at, whether to repeat with other seeds, and settings."""

    granularities: tuple[Granularity, ...]
    is_random: bool = False
    settings: Mapping[str, int] = MappingProxyType({})


BOTH: tuple[Granularity, ...] = ("kv_head", "layer")
HEADS: tuple[Granularity, ...] = ("kv_head",)
# The most interesting first. Searches evaluate on half as many sequences as ConSA's refinement does, which buys them
# twice the moves in the same time.
PLAN = {
    "consa": Entry(BOTH, True),
    **{name: Entry(BOTH, name in rules.DRAWN) for name in rules.RULES},
    "nll_guided": Entry(BOTH),
    "duo_attention": Entry(HEADS, True),
    "prulong": Entry(HEADS, True),
    "bosch": Entry(HEADS, True, {"evaluation_sequences": 4}),
    "greedy": Entry(HEADS, False, {"evaluation_sequences": 4}),
    "nested": Entry(HEADS, True),
    "attention_mass": Entry(BOTH),
    "retrieval_score": Entry(BOTH),
    "lazy_layers": Entry(BOTH),
}
SHARED = [item.name for item in fields(ChoiceConfig)]  # settings that all methods have
ANSWERING = 1.5  # seconds of a row's retrieval questions, for estimates


def main() -> None:
    options = parse()
    began = time.perf_counter()
    lengths = [int(text) for text in options.lengths.split(",")] if options.examples else []
    num_tasks = len(options.tasks.split(","))
    heldout = Heldout.of(options, at_once=4 if torch.cuda.is_available() else 1)
    evaluation = heldout.tokens.size + options.examples * num_tasks * sum(lengths)  # tokens forward, for each row
    evaluation_seconds = evaluation / FORWARD + (ANSWERING * num_tasks if lengths else 0)
    layout = read_layout(options.model)
    runs = list(planned(options))
    costs = {run[0].origin: estimate(run[0], layout, heldout.tokens.shape[1]) for run in runs}
    seconds = []  # on one H100, for a process alone
    for run in runs:
        forward, backward = costs[run[0].origin]
        choosing = (forward - backward) / FORWARD + backward / FORWARD_AND_BACKWARD
        seconds.append(choosing + len(run) * evaluation_seconds)
    index, number = (int(part) for part in options.share.split("/"))
    mine = shares(seconds, number)[index - 1]
    if options.estimate:
        rows = [
            [
                name_of(runs[i][0]),
                len(runs[i]),
                *(f"{n / 1e6:.2f}" for n in costs[runs[i][0].origin]),
                round(seconds[i]),
            ]
            for i in mine
        ]
        print_table(["run", "rows", "M tokens forward", "of those also backward", "seconds"], rows)
        print(f"\n{sum(seconds[i] for i in mine):.0f} seconds, {sum(row[1] for row in rows)} rows")
        return
    bench = Benchmark(options, heldout, number)
    run_missing(
        (runs[place] for place in mine),
        lambda run: all(name_of(choice) in bench.rows for choice in run),
        bench.add,
        began=began,
        seconds=options.seconds,
    )


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, shared=True)
    parser.add_argument("--methods", default=",".join(PLAN), help="names of the plan, comma-separated")
    parser.add_argument("--sparsity", default="0.733,0.5,0.9")
    parser.add_argument("--granularity", default=",".join(BOTH), help="units to run at, where a method has them")
    parser.add_argument("--seeds", type=int, default=3, help="of methods that use randomness")
    parser.add_argument("--budget", action="append", default=[], metavar="NAME=VALUE", help="a setting of the methods")
    parser.add_argument("--retrieval", default="0", help="shares of retrieval in what ConSA and searches judge by")
    parser.add_argument("--tasks", default="single", help="retrieval tasks of the questions")
    parser.add_argument("--lengths", default="2048,4096,8192", help="tokens of the retrieval questions")
    parser.add_argument("--examples", type=int, default=8, help="questions per length; 0 for none")
    return parser.parse_args()


def planned(options: argparse.Namespace) -> Iterator[list[Choice]]:
    """The rows asked for, grouped by run: seed 0 of everything, then further seeds of methods that use randomness."""
    sparsities, given = [float(text) for text in options.sparsity.split(",")], overrides(options.budget)
    shared = {name: value for name, value in given.items() if name in SHARED}
    mixed = [float(text) for text in options.retrieval.split(",")]
    for seed in range(options.seeds):
        for name in options.methods.split(","):
            if name not in PLAN and ":" not in name:
                raise SystemExit(f"--methods takes some of {','.join(PLAN)}, or package.module:Class, got {name!r}")
            entry = PLAN.get(name, Entry(HEADS, True))
            methods = (method_named(name, **{**entry.settings, **given, "retrieval": share}) for share in mixed)
            for method, granularity in product(dict.fromkeys(methods), entry.granularities):
                unknown = name in rules.RULES and name not in rules.names(granularity)
                if granularity not in options.granularity.split(",") or unknown or (seed and not entry.is_random):
                    continue
                runs: dict[Any, list[Choice]] = {}
                for sparsity in sparsities:
                    config = ChoiceConfig(**{"sparsity": sparsity, "granularity": granularity, "seed": seed} | shared)
                    choice = Choice(method=method, config=config)
                    runs.setdefault(choice.origin, []).append(choice)
                yield from runs.values()


def name_of(choice: Choice) -> str:
    """The name of its row."""
    share = getattr(choice.method, "retrieval", 0)
    return choice.name + (f"-retrieval{share:g}" if share else "")


def estimate(choice: Choice, layout: AttentionLayout, seq_len: int) -> tuple[int, int]:
    """Tokens a run sends forward through the model, and how many of them also backward.

    A search that ends before its budget costs less.
    """
    settings = asdict(choice.method)
    steps = settings.get("num_steps", 0) * settings.get("sequences_per_step", 0) * seq_len
    if choice.method.name == "duo_attention":
        asked = steps * (min(settings["shortest"], seq_len) + seq_len) // (2 * seq_len)
        return 2 * asked, asked
    evaluations = {"nll_guided": units_of(layout, choice.config.granularity).count + 1}.get(
        choice.method.name, settings.get("refine_evaluations", settings.get("evaluations", 1))
    )
    return steps + evaluations * settings.get("evaluation_sequences", 0) * seq_len, steps


class Benchmark:
    """The rows, and what measures one."""

    def __init__(self, options: argparse.Namespace, heldout: Heldout, processes: int) -> None:
        self.loaded: LoadedModel = load_model(options.model)
        self.train, self.heldout, self.processes = tokens_of(options.train), heldout, processes
        self.measured: dict[bytes, dict[str, Any]] = {}
        given = overrides(options.budget)
        budget = ChoiceConfig(**{name: value for name, value in given.items() if name in SHARED})
        kept = ("model", "train", "heldout", "start", "lengths", "examples", "tasks")
        settings = {name: getattr(options, name) for name in kept} | {
            "weights": self.loaded.identity["revision"],
            "num_heldout": len(heldout.tokens),
            "seq_len": heldout.tokens.shape[1],
            "budget": asdict(budget) | given,
            "budgets": {name: dict(entry.settings) for name, entry in PLAN.items() if entry.settings},
        }
        self.compiled = settings["budget"].pop("compile", False)  # a file may hold rows of both kinds
        self.rows = Rows(options.out, settings)
        self.questions = Questions.of(options, self.loaded.tokenizer)
        if torch.cuda.is_available():  # so that no row pays for compiling kernels
            warm_up: Any = method_named("consa", **given)
            learn(self.loaded.model, self.train, warm_up.learning(budget, num_steps=2, refine_evaluations=1))
        layout = self.loaded.layout
        window = {"window": budget.window, "num_sink_tokens": budget.num_sink_tokens}
        for name, end_of in (("dense", rules.dense), ("all_swa", rules.all_swa)):
            if name not in self.rows:
                end = end_of(*layout.shape, native_windows=layout.native_windows, **window)
                self.rows.add(name, {"method": name} | self._measure(end))

    def add(self, run: list[Choice]) -> None:
        """Choose, measure, write."""
        for choice, allocation in zip(run, make(run, self.loaded, self.train), strict=True):
            floor, dense = self.rows["all_swa"]["loss"], self.rows["dense"]["loss"]
            measured = self._measure(allocation)
            row = {
                "method": choice.method.name,
                "granularity": choice.config.granularity,
                "sparsity": choice.config.sparsity,
                "seed": choice.config.seed,
                "retrieval_share": getattr(choice.method, "retrieval", 0),
                "achieved": round(allocation.sparsity, 4),
                "recovered": round((floor - measured["loss"]) / (floor - dense), 4),
                "seconds": round(allocation.provenance["seconds"], 1),
                "processes": self.processes,
                "compiled": self.compiled,
                "of_one_run": len(run),
                "cost": allocation.provenance.get("cost", {"forward_tokens": 0, "backward_tokens": 0}),
            }
            self.rows.add(name_of(choice), row | measured | {"allocation": digits_of(allocation)})

    def _measure(self, allocation: Allocation) -> dict[str, Any]:
        """Held-out loss, the share of answers found at each length, and the bytes of the KV cache.

        An allocation that several methods chose is measured once.
        """
        mask = allocation.full_attention.tobytes()
        if mask not in self.measured:
            self.measured[mask] = self.heldout.measured(self.loaded.model, allocation) | {
                "retrieval": self.questions.answered(self.loaded, allocation),
                "cache_bytes": allocation.kv_cache_bytes(
                    self.heldout.tokens.shape[1], head_dim=self.loaded.layout.head_dim
                ),
            }
        return self.measured[mask]


if __name__ == "__main__":
    main()
