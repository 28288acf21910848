"""What moves a learned allocation: windows, sinks, text, length, budget, and each part of the algorithm.

    python -m research.study --train train.npy --heldout heldout.npy --out research/results/study.json

TRAIN and HELDOUT are token files of research/tokens.py, with the domains beside them. Each cell of `cells` learns on
TRAIN, or on one domain of it, and is measured on HELDOUT, before its refinement ("gates") and after it. A row keeps the
mean loss of each held-out sequence, for paired intervals and for domains. The group `methods` measures the allocations
of research/results/methods.json in the same way; of the rules, only the best.

An interrupted run continues with the first missing cell; `--seconds 500` starts no cell later than that. `--share 1/3`
to `--share 3/3`, each with its own --out, divide the cells among three processes on one GPU, and research/merge.py
joins their files. `--estimate` prints the seconds that each cell takes alone on an H100, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import print_table
from consa import rules
from consa.allocation import Allocation
from consa.config import LearnConfig
from consa.model.layout import attention_layout
from consa.model.load import load_model
from consa.rules import RULES
from consa.training import gates
from consa.training.learning import learn
from research.records import (
    FORWARD,
    FORWARD_AND_BACKWARD,
    Heldout,
    Rows,
    allocation_in,
    gates_alone,
    read,
    run_missing,
    shares,
    study_parser,
    tokens_of,
)
from research.variants import VARIANTS

SPARSITY = 0.733
PUBLISHED = (0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class Cell:
    """One run of learning."""

    group: str  # the question it belongs to
    name: str  # within the group
    config: dict[str, Any]  # its settings, where they differ from the defaults
    domain: str = ""  # of the text it learns on; all text if empty
    variant: str = ""  # a name in research/variants.py; the plain algorithm if empty

    @property
    def key(self) -> str:
        """The name of its row."""
        return f"{self.group}/{self.name}"


def cells() -> list[Cell]:
    """All cells, in the order in which they run."""
    short = {"num_steps": 100, "refine_evaluations": 0}
    chosen = [Cell("steps", str(steps), {"num_steps": steps}) for steps in (100, 6, 12, 25, 50, 200, 400, 600)]
    for granularity, sparsity in product(("kv_head", "layer"), PUBLISHED):
        config = {"granularity": granularity, "sparsity": sparsity}
        chosen.append(Cell("published", f"{granularity}-{sparsity:g}", config))
    chosen += [Cell("window", str(window), short | {"window": window}) for window in (64, 256, 512, 1024)]
    chosen += [Cell("sinks", str(sinks), short | {"num_sink_tokens": sinks}) for sinks in (0, 1, 16)]
    chosen += [Cell("domain", domain, short, domain=domain) for domain in ("code", "doc", "prose")]
    for seq_len in (2048, 4096):
        config = short | {"seq_len": seq_len, "sequences_per_step": 4 * 8192 // seq_len}
        chosen.append(Cell("length", str(seq_len), config))
    chosen += [Cell("seed", str(seed), short | {"seed": seed}) for seed in (1, 2)]
    shorter = {"seq_len": 2048, "sequences_per_step": 16}
    evaluations = 3 * LearnConfig.refine_evaluations
    whole: dict[str, tuple[dict[str, Any], str]] = {
        "16 sequences of 2,048 a step": (shorter | {"refine_sequences": 32}, ""),
        "1 sequence a step, 800 steps": ({"sequences_per_step": 1, "num_steps": 800}, ""),
        "candidates by all steps": ({}, "candidates_by_all_steps"),
        "distant tokens": ({}, "distant_tokens"),
        f"{evaluations} evaluations": ({"refine_evaluations": evaluations}, ""),
    }
    for (name, (config, variant)), sparsity in product(whole.items(), (0.9, 0.733, 0.5)):
        own = config | {"sparsity": sparsity}
        chosen.append(Cell("whole", f"{name}/{sparsity:g}", own, variant=variant))
    parts: dict[str, tuple[dict[str, Any], str]] = {
        "two multipliers": ({}, "two_multipliers"),
        "sampled sparsity": ({}, "sampled_sparsity"),
        "independent draws": ({}, "independent_draws"),
        "distillation": ({}, "distillation"),
        "warm-up 0.4": ({"warmup": 0.4}, ""),
        "warm-up 0.2": ({"warmup": 0.2}, ""),
        "no growth": ({"penalty_growth": 1.0}, ""),
        "no sharpening": ({"sharpening": 0.0}, ""),
        "start at 0": ({"initial_log_alpha": 0.0}, ""),
        "gate lr 0.3": ({"gate_lr": 0.3}, ""),
        "1 draw a step": ({"sequences_per_step": 1, "num_steps": 400}, ""),
        "16 draws a step": ({"sequences_per_step": 16, "num_steps": 25}, ""),
        "16 draws of 2,048 tokens": (shorter, ""),
        "16 draws of 2,048 tokens, 200 steps": (shorter | {"num_steps": 200}, ""),
        "8 draws of 2,048 tokens, 200 steps": ({**shorter, "sequences_per_step": 8, "num_steps": 200}, ""),
        "4 draws of 2,048 tokens, 400 steps": ({**shorter, "sequences_per_step": 4, "num_steps": 400}, ""),
        "32 draws of 1,024 tokens": ({"seq_len": 1024, "sequences_per_step": 32}, ""),
    }
    for seed, (name, (config, variant)) in product((0, 1), parts.items()):
        chosen.append(Cell("part", f"{name}/{seed}", short | config | {"seed": seed}, variant=variant))
    return chosen


def main() -> None:
    options = parse()
    began = time.perf_counter()
    chosen = [cell for cell in cells() if cell.group in options.groups.split(",")]
    seconds = [estimate(_config(cell, options)) for cell in chosen]
    index, number = (int(part) for part in options.share.split("/"))
    mine = shares(seconds, number)[index - 1]
    if options.estimate:
        print_table(["cell", "seconds"], [[chosen[place].key, round(seconds[place])] for place in mine])
        print(f"\n{sum(seconds[place] for place in mine):.0f} seconds")
        return
    study = Study(options)
    if "methods" in options.groups.split(",") and index == number:
        study.add_methods()
    run_missing(
        (chosen[place] for place in mine),
        lambda cell: cell.key in study.rows,
        study.add,
        began=began,
        seconds=options.seconds,
    )


def parse() -> argparse.Namespace:
    parser = study_parser(__doc__, shared=True)
    groups = ",".join([*dict.fromkeys(cell.group for cell in cells()), "methods"])
    parser.add_argument("--groups", default=groups, help="of cells (default: %(default)s)")
    parser.add_argument("--tokens-at-once", type=int, default=4 * 8192, help="in learning and measuring")
    parser.add_argument("--compile", action="store_true", help="compile the layers while gates learn")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps, for a trial")
    return parser.parse_args()


def _config(cell: Cell, options: argparse.Namespace) -> LearnConfig:
    given: dict[str, Any] = {"sparsity": SPARSITY} | cell.config
    config = LearnConfig(**given)
    at_once = min(config.sequences_per_step, max(1, options.tokens_at_once // config.seq_len))
    while config.sequences_per_step % at_once:
        at_once -= 1
    steps = max(2, round(options.scale * config.num_steps))
    return replace(config, num_steps=steps, micro_batch=at_once, compile=options.compile)


def estimate(config: LearnConfig) -> float:
    """Seconds of learning and measuring, for a process alone on an H100."""
    learned = config.num_steps * config.sequences_per_step * config.seq_len
    searched = config.refine_evaluations * config.refine_sequences * config.seq_len
    measured = (2 if searched else 1) * 48 * 8192
    speed = FORWARD_AND_BACKWARD * (1.45 if config.compile else 1)
    return learned / speed + (searched + measured) / FORWARD


def worth_measuring(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The rows of methods, and of the best rule at each sparsity and granularity, out of all rows of methods.json."""
    chosen = {name: row for name, row in rows.items() if "recovered" in row}
    best: dict[tuple[float, str], dict[str, Any]] = {}
    for row in chosen.values():
        if row["method"] in RULES:
            other = best.setdefault((row["sparsity"], row["granularity"]), row)
            if row["recovered"] > other["recovered"]:
                best[row["sparsity"], row["granularity"]] = row
    return {
        name: row
        for name, row in chosen.items()
        if row["method"] not in RULES or row is best[row["sparsity"], row["granularity"]]
    }


class Study:
    """The rows, and what measures one."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.processes = int(options.share.split("/")[1])
        self.model = load_model(options.model).model
        self.train, self.heldout = tokens_of(options.train), Heldout.of(options)
        self.heldout.at_once = max(1, options.tokens_at_once // self.heldout.tokens.shape[1])
        self.train_domains, domains = (
            Path(path).with_suffix(".domains.txt").read_text().split("\n")[:-1]
            for path in (options.train, options.heldout)
        )
        free = ("groups", "seconds", "share", "estimate", "out")
        settings = {name: str(value) for name, value in vars(options).items() if name not in free}
        self.rows = Rows(options.out, settings, domains=domains[: len(self.heldout.tokens)])
        self._end("dense", None)
        if torch.cuda.is_available():  # so that no cell pays for compiling kernels
            learn(self.model, self.train, replace(_config(cells()[0], options), num_steps=2))

    def add(self, cell: Cell) -> None:
        """Learn, measure, write."""
        config = _config(cell, self.options)
        self._end(f"all_swa/{config.window}/{config.num_sink_tokens}", config)
        wanted = [place for place, domain in enumerate(self.train_domains) if cell.domain in ("", domain)]
        text = self.train[wanted][:, : self.train.shape[1] // config.seq_len * config.seq_len]
        text = text.reshape(-1, config.seq_len)
        began = time.perf_counter()
        result = VARIANTS[cell.variant](self.model, text, config)
        took = time.perf_counter() - began
        by_gates = gates_alone(result.allocation)
        gates_losses = self._losses(by_gates)
        refined = bool((by_gates.full_attention != result.allocation.full_attention).any())
        assert result.allocation.scores is not None
        is_open = gates.probability_open(torch.tensor(result.allocation.scores))
        row: dict[str, Any] = {
            "seconds": round(took, 1),
            "processes": self.processes,
            "tokens": config.num_steps * config.sequences_per_step * config.seq_len,
            "expected_sparsity": round(1 - float(is_open.mean()), 4),
            "fractional": round(result.history[-1]["fractional"], 4),
            "gates_losses": gates_losses,
            "losses": self._losses(result.allocation) if refined else gates_losses,
            "allocation": json.loads(result.allocation.to_json()),
            "gates_allocation": json.loads(by_gates.to_json())["full_attention"],
        }
        self.rows.add(cell.key, row)

    def add_methods(self) -> None:
        """Measure what research/methods.py chose."""
        record = read("methods")
        measured: dict[str, list[float]] = {}
        for name, row in worth_measuring(record["rows"]).items():
            if f"methods/{name}" not in self.rows:
                key = str(row["allocation"])
                if key not in measured:
                    measured[key] = self._losses(allocation_in(record, name))
                self.rows.add(f"methods/{name}", {"losses": measured[key]})

    def _end(self, name: str, config: LearnConfig | None) -> None:
        """Measure all-SWA with the window and sinks of `config`, or the dense model."""
        if name not in self.rows:
            shape = attention_layout(self.model).shape
            if config:
                end = rules.all_swa(*shape, window=config.window, num_sink_tokens=config.num_sink_tokens)
            else:
                end = rules.dense(*shape)
            self.rows.add(name, {"losses": self._losses(end)})

    def _losses(self, allocation: Allocation) -> list[float]:
        return self.heldout.losses(self.model, allocation).round(5).tolist()


if __name__ == "__main__":
    main()
