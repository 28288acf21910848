"""What moves a learned allocation: windows, sinks, text, length, budget, and each part of the algorithm.

    python benchmarks/study.py --train train.npy --heldout heldout.npy --out benchmarks/results/study.json

TRAIN and HELDOUT are as benchmarks/tokens.py writes them, with their domains beside them. Every cell of `cells` learns
on some of TRAIN and is measured on all of HELDOUT, from `--start` on, before its refinement ("gates") and after, where
it has one; its mean loss on each sequence is kept, for paired intervals and domains. `methods` measures the allocations
of benchmarks/results/methods.json in the same way, of rules only the best.

Every cell is written as soon as it is measured, and one that the file holds is not measured again: `--seconds 500`
begins none later than that, and the same command goes on from there. `--share 1/3` to `--share 3/3`, each with its own
--out, are three processes side by side on one GPU, whose files benchmarks/merge.py puts together. `--estimate` prints
the seconds each cell takes alone on an H100, and runs nothing.
"""

from __future__ import annotations

import argparse
import json
import time
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, gates_alone, mask_of, measured_before, parser_of, print_table, write_json
from methods import FORWARD, FORWARD_AND_BACKWARD, shares
from variants import VARIANTS

from consa.allocation import Allocation
from consa.config import LearnConfig
from consa.evaluation.losses import heldout_losses
from consa.model.load import load_model
from consa.rules import RULES
from consa.training import gates
from consa.training.learning import learn

RESULTS = Path(__file__).parent / "results"
SPARSITY = 0.733
PUBLISHED = (0.25, 0.5, 0.75, 0.9, 0.95)


@dataclass(frozen=True)
class Cell:
    """One run of learning.

    Attributes:
        group: the question it belongs to.
        name: within the group.
        config: its settings, over the benchmark's own.
        domain: of the text that it learns on; all if empty.
        variant: of benchmarks/variants.py, or none.
    """

    group: str
    name: str
    config: dict[str, Any]
    domain: str = ""
    variant: str = ""


def cells() -> list[Cell]:
    """All of them, in the order in which they are run."""
    short = {"num_steps": 100, "refine_evaluations": 0}
    found = [Cell("steps", str(steps), {"num_steps": steps}) for steps in (100, 6, 12, 25, 50, 200, 400, 600)]
    for granularity in ("kv_head", "layer"):
        for sparsity in PUBLISHED:
            config = {"granularity": granularity, "sparsity": sparsity}
            found.append(Cell("published", f"{granularity}-{sparsity:g}", config))
    found += [Cell("window", str(window), short | {"window": window}) for window in (64, 256, 512, 1024)]
    found += [Cell("sinks", str(sinks), short | {"num_sink_tokens": sinks}) for sinks in (0, 1, 16)]
    found += [Cell("domain", domain, short, domain=domain) for domain in ("code", "doc", "prose")]
    for seq_len in (2048, 4096):
        config = short | {"seq_len": seq_len, "sequences_per_step": 4 * 8192 // seq_len}
        found.append(Cell("length", str(seq_len), config))
    found += [Cell("seed", str(seed), short | {"seed": seed}) for seed in (1, 2)]
    shorter = {"seq_len": 2048, "sequences_per_step": 16}
    evaluations = 3 * LearnConfig.refine_evaluations
    whole: dict[str, tuple[dict[str, Any], str]] = {
        "16 sequences of 2,048 a step": (shorter | {"refine_sequences": 32}, ""),
        "1 sequence a step, 800 steps": ({"sequences_per_step": 1, "num_steps": 800}, ""),
        "candidates by all steps": ({}, "candidates_by_all_steps"),
        f"{evaluations} evaluations": ({"refine_evaluations": evaluations}, ""),
    }
    for name, (config, variant) in whole.items():
        for sparsity in (0.9, 0.733, 0.5):
            found.append(
                Cell("whole", f"{name}/{sparsity:g}", config | {"sparsity": sparsity}, variant=variant)
            )
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
    for seed in (0, 1):
        for name, (config, variant) in parts.items():
            own = short | config | {"seed": seed}
            found.append(Cell("part", f"{name}/{seed}", own, variant=variant))
    return found


def main() -> None:
    options = parse()
    began = time.perf_counter()
    chosen = [cell for cell in cells() if cell.group in options.groups.split(",")]
    expected = [estimate(_config(cell, options)) for cell in chosen]
    index, number = (int(part) for part in options.share.split("/"))
    mine = [chosen[place] for place in shares(expected, number)[index - 1]]
    if options.estimate:
        seconds = {id(cell): value for cell, value in zip(chosen, expected, strict=True)}
        print_table(["cell", "seconds"], [[f"{c.group}/{c.name}", round(seconds[id(c)])] for c in mine])
        print(f"\n{sum(seconds[id(cell)] for cell in mine):.0f} seconds")
        return
    study = Study(options)
    left = 0
    for cell in mine:
        if f"{cell.group}/{cell.name}" not in study.rows:
            if time.perf_counter() - began > options.seconds:
                left += 1
            else:
                study.add(cell)
    if "methods" in options.groups.split(",") and index == number:
        study.add_methods()
    print(f"{left} cells left: run the same command again" if left else "complete")


def parse() -> argparse.Namespace:
    parser = parser_of(__doc__, text=True)
    groups = ",".join([*dict.fromkeys(cell.group for cell in cells()), "methods"])
    parser.add_argument("--groups", default=groups, help="of cells (default: %(default)s)")
    parser.add_argument("--tokens-at-once", type=int, default=4 * 8192, help="in learning and measuring")
    parser.add_argument("--compile", action="store_true", help="compile the layers that learn")
    parser.add_argument("--scale", type=float, default=1.0, help="factor on the steps, for a trial")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="begin no cell after that many")
    parser.add_argument("--share", default="1/1", metavar="I/N", help="the I-th of N processes on one GPU")
    parser.add_argument("--estimate", action="store_true", help="print what it will take; run nothing")
    parser.add_argument("--out", type=Path, required=True)
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
    """Seconds of learning and measuring, alone on an H100."""
    learned = config.num_steps * config.sequences_per_step * config.seq_len
    searched = config.refine_evaluations * config.refine_sequences * config.seq_len
    measured = (2 if searched else 1) * 48 * 8192
    speed = FORWARD_AND_BACKWARD * (1.45 if config.compile else 1)
    return learned / speed + (searched + measured) / FORWARD


def worth_measuring(rows: dict[str, dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """Of the rows of benchmarks/methods.py those of methods, and of the best rule at each sparsity and granularity."""
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
    """A JSON file of rows, and what measures them."""

    def __init__(self, options: argparse.Namespace) -> None:
        self.options = options
        self.processes = int(options.share.split("/")[1])
        self.loaded = load_model(options.model)
        self.train, self.heldout = (
            np.load(path, mmap_mode="r", allow_pickle=False) for path in (options.train, options.heldout)
        )
        self.heldout = self.heldout[: options.num_heldout]
        self.train_domains, domains = (
            Path(path).with_suffix(".domains.txt").read_text().split("\n")[:-1]
            for path in (options.train, options.heldout)
        )
        free = ("groups", "seconds", "share", "estimate", "out")
        settings = {name: str(value) for name, value in vars(options).items() if name not in free}
        self.record: dict[str, Any] = environment() | {
            "settings": settings,
            "domains": domains[: len(self.heldout)],
            "rows": {},
        }
        self.record |= measured_before(options.out, settings)
        self._end("dense", 0.0, 128, 4)
        if torch.cuda.is_available():  # so that no cell pays for compiling kernels
            learn(self.loaded.model, self.train, replace(_config(cells()[0], options), num_steps=2))

    @property
    def rows(self) -> dict[str, Any]:
        """By group and name."""
        return self.record["rows"]

    def add(self, cell: Cell) -> None:
        """Learn, measure, write."""
        config = _config(cell, self.options)
        self._end(
            f"all_swa/{config.window}/{config.num_sink_tokens}", 1.0, config.window, config.num_sink_tokens
        )
        wanted = [place for place, domain in enumerate(self.train_domains) if cell.domain in ("", domain)]
        text = self.train[wanted][:, : self.train.shape[1] // config.seq_len * config.seq_len]
        text = text.reshape(-1, config.seq_len)
        began = time.perf_counter()
        with VARIANTS[cell.variant](self.loaded.model) if cell.variant else nullcontext():
            result = learn(self.loaded.model, text, config)
        took = time.perf_counter() - began
        by_gates = gates_alone(result.allocation)
        gates_losses = self._losses(by_gates)
        refined = bool((by_gates.full_attention != result.allocation.full_attention).any())
        assert result.allocation.scores is not None
        open_ = gates.probability_open(torch.tensor(result.allocation.scores))
        row: dict[str, Any] = {
            "seconds": round(took, 1),
            "processes": self.processes,
            "tokens": config.num_steps * config.sequences_per_step * config.seq_len,
            "expected_sparsity": round(1 - float(open_.mean()), 4),
            "fractional": round(result.history[-1]["fractional"], 4),
            "gates_losses": gates_losses,
            "losses": self._losses(result.allocation) if refined else gates_losses,
            "allocation": json.loads(result.allocation.to_json()),
            "gates_allocation": json.loads(by_gates.to_json())["full_attention"],
        }
        self._write(f"{cell.group}/{cell.name}", row)

    def add_methods(self) -> None:
        """Measure what benchmarks/methods.py chose."""
        record = json.loads((RESULTS / "methods.json").read_text())
        budget = record["settings"]["budget"]
        measured: dict[str, list[float]] = {}
        for name, row in worth_measuring(record["rows"]).items():
            if f"methods/{name}" in self.rows:
                continue
            allocation = Allocation(
                full_attention=mask_of(row["allocation"]),
                window=budget["window"],
                num_sink_tokens=budget["num_sink_tokens"],
            )
            key = str(row["allocation"])
            if key not in measured:
                measured[key] = self._losses(allocation)
            self._write(f"methods/{name}", {"losses": measured[key]})

    def _end(self, name: str, sparsity: float, window: int, num_sink_tokens: int) -> None:
        if name not in self.rows:
            layout = self.loaded.layout
            full = np.full((layout.num_layers, layout.num_kv_heads), sparsity == 0.0)
            allocation = Allocation(full_attention=full, window=window, num_sink_tokens=num_sink_tokens)
            self._write(name, {"losses": self._losses(allocation)})

    def _losses(self, allocation: Allocation) -> list[float]:
        """Of each held-out sequence, nats per token."""
        at_once = max(1, self.options.tokens_at_once // self.heldout.shape[1])
        losses = heldout_losses(self.loaded.model, self.heldout, allocation, batch_size=at_once)
        return losses[:, self.options.start :].mean(1, dtype=np.float64).round(5).tolist()

    def _write(self, name: str, row: dict[str, Any]) -> None:
        self.rows[name] = row
        write_json(self.options.out, self.record)
        shown = {key: value for key, value in row.items() if "allocation" not in key and "losses" not in key}
        print(name, round(float(np.mean(row["losses"])), 4), shown, flush=True)


if __name__ == "__main__":
    main()
