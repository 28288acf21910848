"""ConSA beside every other way to choose: quality kept, retrieval, and what the choice cost.

    python benchmarks/methods.py --train TRAIN.npy --heldout HELDOUT.npy --out benchmarks/results/methods.json

TRAIN and HELDOUT are tokens, int `(num_sequences, seq_len)`, as benchmarks/tokens.py writes them. What is run and in
which order is in `PLAN`: seed 0 of everything, then the other seeds of what draws. Every row is written as soon as it
is measured, and a row that the file already holds is not measured again: `--seconds 500` stops before the first run
that begins later than that, and the same command goes on from there.

`--estimate` prints what every run will cost, and runs nothing. `--share 1/4` to `--share 4/4`, each with its own --out,
are four processes side by side on one GPU, each with about a quarter of the estimated seconds;
benchmarks/merge.py makes one file of theirs. `--budget micro_batch=4` computes four sequences at once, and
`--budget compile=true` compiles the layers that gates are trained in.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from common import digits_of, environment, measured_before, overrides, parser_of, print_table, write_json

from consa import rules
from consa.allocation import Allocation, Granularity
from consa.config import ChoiceConfig
from consa.data.questions import examples
from consa.evaluation.answers import ask
from consa.evaluation.losses import heldout_losses
from consa.methods import METHODS
from consa.methods.duo_attention import SHORTEST
from consa.model.layout import AttentionLayout
from consa.model.load import LoadedModel, load_model, read_layout
from consa.runs.sweep import Choice, make
from consa.training.learning import learn, units_of


class Entry(NamedTuple):
    """A line of the plan: at which granularities a method runs, whether seeds matter, and its own budget."""

    granularities: tuple[Granularity, ...]
    draws: bool
    budget: dict[str, int]


BOTH: tuple[Granularity, ...] = ("kv_head", "layer")
HEADS: tuple[Granularity, ...] = ("kv_head",)
# In order of interest. Those that search evaluate on half as many sequences as ConSA's refinement: the time for all is
# limited, and with four sequences they can afford the more moves.
PLAN = {
    "consa": Entry(BOTH, True, {}),
    **{name: Entry(BOTH, name in rules.DRAWN, {}) for name in rules.RULES},
    "nll_guided": Entry(BOTH, False, {}),
    "duo_attention": Entry(HEADS, True, {}),
    "prulong": Entry(HEADS, True, {}),
    "bosch": Entry(HEADS, True, {"evaluation_sequences": 4}),
    "greedy": Entry(HEADS, False, {"evaluation_sequences": 4}),
    "nested": Entry(HEADS, True, {}),
    "attention_mass": Entry(BOTH, False, {}),
    "retrieval_score": Entry(BOTH, False, {}),
    "lazy_layers": Entry(BOTH, False, {}),
}
# SmolLM2-135M on one H100, four sequences at once, for the estimates alone: tokens per second, and seconds of a row's
# answers.
FORWARD, FORWARD_AND_BACKWARD = 450_000, 150_000
ANSWERING = 1.5


def main() -> None:
    options = parse()
    began = time.perf_counter()
    lengths = [int(text) for text in options.lengths.split(",")] if options.examples else []
    heldout = _tokens(options.heldout)[: options.num_heldout]
    evaluation = heldout.size + options.examples * sum(lengths)  # tokens forward, of each row
    evaluation_seconds = evaluation / FORWARD + (ANSWERING if lengths else 0)
    seq_len = heldout.shape[1]
    layout = read_layout(options.model)
    runs = list(planned(options))
    costs = {run[0].origin: estimate(run[0], layout, seq_len) for run in runs}
    seconds = [in_seconds(*costs[run[0].origin]) + len(run) * evaluation_seconds for run in runs]
    index, number = (int(part) for part in options.share.split("/"))
    mine = shares(seconds, number)[index - 1]
    if options.estimate:
        rows = [
            [
                runs[i][0].name,
                len(runs[i]),
                *(f"{n / 1e6:.2f}" for n in costs[runs[i][0].origin]),
                f"{seconds[i]:.0f}",
            ]
            for i in mine
        ]
        print_table(["run", "rows", "Mtokens forward", "of them backward too", "seconds"], rows)
        total = sum(seconds[i] for i in mine)
        print(
            f"\n{total:.0f} seconds, {sum(len(runs[i]) for i in mine)} rows at {evaluation / 1e6:.2f} Mtokens each"
        )
        return
    bench = Benchmark(options, load_model(options.model), _tokens(options.train), heldout, lengths, number)
    left = 0
    for place in mine:
        if all(choice.name in bench.rows for choice in runs[place]):
            continue
        if time.perf_counter() - began > options.seconds:
            left += 1
            continue
        forward, backward = costs[runs[place][0].origin]
        print(
            f"{runs[place][0].name}: {forward / 1e6:.2f} Mtokens forward, {backward / 1e6:.2f} of them backward too,"
            f" about {seconds[place]:.0f} s alone",
            flush=True,
        )
        bench.add(runs[place])
    print(f"{left} runs left: run the same command again" if left else "complete")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, text=True)
    parser.add_argument("--methods", default=",".join(PLAN), help="names of the plan, commas between")
    parser.add_argument("--sparsity", default="0.733,0.5,0.9")
    parser.add_argument("--seeds", type=int, default=3, help="of what draws")
    parser.add_argument("--budget", action="append", default=[], metavar="NAME=VALUE", help="of ChoiceConfig")
    parser.add_argument("--lengths", default="2048,4096,8192", help="tokens of the retrieval questions")
    parser.add_argument("--examples", type=int, default=8, help="questions per length; 0 for none")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no run after that many")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="the I-th of N processes on one GPU")
    parser.add_argument("--estimate", action="store_true", help="print what it will cost; run nothing")
    parser.add_argument("--out", type=Path, required=True)
    return parser.parse_args()


def _tokens(path: str) -> np.ndarray:
    return np.load(path, mmap_mode="r", allow_pickle=False)


def planned(options: argparse.Namespace) -> Iterator[list[Choice]]:
    """The rows asked for, those of one run together: of the first seed all, of others those that draw."""
    sparsities = [float(text) for text in options.sparsity.split(",")]
    for seed in range(options.seeds):
        for name in options.methods.split(","):
            if name not in PLAN:
                raise SystemExit(f"--methods takes some of {','.join(PLAN)}, got {name!r}")
            entry = PLAN[name]
            for granularity in entry.granularities:
                if (seed and not entry.draws) or (
                    name in rules.RULES and name not in rules.names(granularity)
                ):
                    continue
                settings: dict[str, Any] = {"granularity": granularity, "seed": seed} | entry.budget
                settings |= overrides(options.budget)
                runs: dict[Any, list[Choice]] = {}
                for sparsity in sparsities:
                    choice = Choice(method=name, config=ChoiceConfig(sparsity=sparsity, **settings))
                    runs.setdefault(choice.origin, []).append(choice)
                yield from runs.values()


def estimate(choice: Choice, layout: AttentionLayout, seq_len: int) -> tuple[int, int]:
    """Tokens that a run sends forward through the model, and those of them that it sends backward too.

    Searches that end before their budget cost less.
    """
    config = choice.config
    steps = config.num_steps * config.sequences_per_step * seq_len
    one = config.evaluation_sequences * seq_len
    questions = config.num_steps * config.sequences_per_step * (min(SHORTEST, seq_len) + seq_len) // 2
    learned = config.for_learning()
    return {
        "consa": (steps + learned.refine_evaluations * one, steps),
        "prulong": (steps, steps),
        "nested": (steps, steps),
        "duo_attention": (2 * questions, questions),
        "bosch": (config.evaluations * one, 0),
        "greedy": (config.evaluations * one, 0),
        "nll_guided": ((units_of(layout, config.granularity).count + 1) * one, 0),
    }.get(choice.method, (one if choice.method in METHODS else 0, 0))


def in_seconds(forward: int, backward: int) -> float:
    """On one H100, for a process alone."""
    return (forward - backward) / FORWARD + backward / FORWARD_AND_BACKWARD


def shares(seconds: Sequence[float], number: int) -> list[list[int]]:
    """Runs shared out in order, each to the process that has least to do so far."""
    found: list[list[int]] = [[] for _ in range(number)]
    for place in range(len(seconds)):
        min(found, key=lambda share: sum(seconds[other] for other in share)).append(place)
    return found


class Benchmark:
    """A JSON file of rows, and what measures them."""

    def __init__(
        self,
        options: argparse.Namespace,
        loaded: LoadedModel,
        train: np.ndarray,
        heldout: np.ndarray,
        lengths: list[int],
        processes: int,
    ) -> None:
        self.loaded, self.train, self.heldout = loaded, train, heldout
        self.out, self.start, self.processes = options.out, options.start, processes
        self.measured: dict[bytes, dict[str, Any]] = {}
        kept = ("model", "train", "heldout", "start", "lengths", "examples")
        settings = {name: getattr(options, name) for name in kept} | {
            "num_heldout": len(heldout),
            "seq_len": heldout.shape[1],
            "budget": asdict(ChoiceConfig(**overrides(options.budget))),
            "budgets": {name: entry.budget for name, entry in PLAN.items() if entry.budget},
        }
        self.compiled = settings["budget"].pop("compile")  # one file may hold rows of both kinds
        self.record: dict[str, Any] = environment() | {"settings": settings, "rows": {}}
        self.record |= measured_before(self.out, settings)
        self.questions = {
            length: examples("single", loaded.tokenizer, length=length, count=options.examples, seed=1)
            for length in lengths
        }
        if torch.cuda.is_available():  # so that no row pays for compiling kernels
            warm_up = replace(ChoiceConfig(**overrides(options.budget)), num_steps=2)
            learn(loaded.model, train, warm_up.for_learning(refine_evaluations=1))
        window = {name: settings["budget"][name] for name in ("window", "num_sink_tokens")}
        layout = loaded.layout
        shape = (layout.num_layers, layout.num_kv_heads)
        for name, end_of in (("dense", rules.dense), ("all_swa", rules.all_swa)):
            if name not in self.rows:
                end = end_of(*shape, native_windows=layout.native_windows, **window)
                self._write(name, {"method": name} | self._measure(end))

    @property
    def rows(self) -> dict[str, Any]:
        """By the choices' names."""
        return self.record["rows"]

    def add(self, run: list[Choice]) -> None:
        """Choose, measure, write."""
        for choice, allocation in zip(run, make(run, self.loaded, self.train), strict=True):
            floor, dense = self.rows["all_swa"]["loss"], self.rows["dense"]["loss"]
            measured = self._measure(allocation)
            row = {
                "method": choice.method,
                "granularity": choice.config.granularity,
                "sparsity": choice.config.sparsity,
                "seed": choice.config.seed,
                "achieved": round(allocation.sparsity, 4),
                "recovered": round((floor - measured["loss"]) / (floor - dense), 4),
                "seconds": round(allocation.provenance["seconds"], 1),
                "processes": self.processes,
                "compiled": self.compiled,
                "of_one_run": len(run),
                "cost": allocation.provenance.get("cost", {"forward_tokens": 0, "backward_tokens": 0}),
            }
            shown = {name: value for name, value in (row | measured).items() if name != "losses"}
            print(shown, flush=True)
            self._write(choice.name, row | measured | {"allocation": digits_of(allocation)})

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        write_json(self.out, self.record)

    def _measure(self, allocation: Allocation) -> dict[str, Any]:
        """Held-out loss from `start` on, nats, also of each sequence; share of answers found at each length; KV cache.

        Some methods decide alike; what is already measured is not measured again.
        """
        mask = allocation.full_attention.tobytes()
        if mask not in self.measured:
            on_gpu = torch.cuda.is_available()
            losses = heldout_losses(
                self.loaded.model, self.heldout, allocation, batch_size=4 if on_gpu else 1
            )
            found = {
                str(length): ask(self.loaded, allocation, questions, batch_size=8 if on_gpu else 1)["scores"]
                for length, questions in self.questions.items()
            }
            cache = allocation.kv_cache_bytes(self.heldout.shape[1], head_dim=self.loaded.layout.head_dim)
            each = losses[:, self.start :].mean(1, dtype=np.float64)
            self.measured[mask] = {
                "loss": round(float(each.mean()), 5),
                "losses": each.round(5).tolist(),
                "retrieval": {length: round(float(np.mean(scores)), 4) for length, scores in found.items()},
                "cache_bytes": cache,
            }
        return self.measured[mask]


if __name__ == "__main__":
    main()
