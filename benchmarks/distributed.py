"""The same runs on one process and on several: speed, memory, whether they end alike, and what a dead one leads to.

    python benchmarks/distributed.py --train train.npy --kill 2 --out benchmarks/results/distributed.json
    python benchmarks/distributed.py --toy --tokens-per-step 512 --kill 2 --out distributed.json

TRAIN is tokens, int `(num_sequences, seq_len)`. `torchrun` starts each number of processes, one GPU each (NCCL), or
with `--toy` on the CPU (gloo), on a tiny model and short random text. A step's sequences are the same on any number, so
all rows of a case compute the same; Qwen3-0.6B has random weights and random tokens. `speed-up` is to one process, over
how many there are. `memory` is what the fullest GPU had allocated at most. `largest difference` is that of the losses
to those of one process, relative. With `--kill 2` one of two processes is killed at a step at last, and half as many go
on.

Rows that the file holds are not measured again.
"""

from __future__ import annotations

import json
import os
import signal
import statistics
import subprocess
import sys
import tempfile
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from common import environment, measured_before, parser_of, print_table, write_json
from learning import QWEN3_06B
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedModel, Qwen3Config

from consa import rules
from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.model.layout import attention_layout
from consa.model.load import load_model
from consa.training import distributed
from consa.training.adaptation import adapt
from consa.training.learning import learn

WARM_UP = 3  # steps that compile, and are not timed
COLUMNS = ["run", "processes", "tokens/s", "speed-up", "memory, GB", "same allocation", "largest difference"]
TINY: dict[str, Any] = {
    "vocab_size": 256,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 4,
    "num_attention_heads": 6,
    "num_key_value_heads": 3,
}


@dataclass(frozen=True)
class Case:
    """A run, and where it may be killed."""

    model: str
    seq_len: int
    verb: str  # learn, joint learn or adapt
    parallel: str
    kill: int | None = None  # the step at which the last process dies
    folder: str | None = None  # to go on from

    @property
    def name(self) -> str:
        """Of its rows."""
        return f"{self.verb} {self.model}, {self.seq_len:,} tokens, {self.parallel}"


def cases(toy: bool) -> list[Case]:
    shapes = [("tiny", 64)] if toy else [("smollm2-135m", 8192), ("qwen3-0.6b", 32768), ("qwen3-0.6b", 8192)]
    verbs = [("learn", "ddp"), ("adapt", "ddp"), ("adapt", "fsdp")]
    joint = Case(*shapes[-1], "joint learn", "fsdp")
    return [*(Case(*shape, *verb) for shape in shapes for verb in verbs), joint]


def main() -> None:
    if "RANK" in os.environ:
        work()
        return
    parser = parser_of(__doc__)
    parser.add_argument("--train")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--kill", type=int, metavar="N", help="of so many processes, one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens-per-step", type=int, default=2**17)
    parser.add_argument("--toy", action="store_true", help="on the CPU, tiny")
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    if options.train is None and not options.toy:
        parser.error("give --train, or --toy")
    numbers = [int(number) for number in options.processes.split(",")]
    free = ("processes", "kill", "out")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    record: dict[str, Any] = environment() | {"settings": settings, "killed": None}
    record |= measured_before(options.out, settings)
    for number in numbers:
        missing = [case for case in cases(options.toy) if f"{case.name} @{number}" not in record["rows"]]
        if missing:
            done, found = launch(number, missing, settings)
            record["rows"] |= {f"{name} @{number}": row for name, row in found.items()}
            write_json(options.out, record | {"columns": COLUMNS, "table": table(record["rows"])})
            if done.returncode:
                raise SystemExit(done.stderr)
    if options.kill and not record["killed"]:
        record["killed"] = killed(options.kill, cases(options.toy)[2], settings)
        write_json(options.out, record | {"columns": COLUMNS, "table": table(record["rows"])})
    print_table(COLUMNS, table(record["rows"]))
    print(record["killed"])


def launch(number: int, wanted: list[Case], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Run cases on that many processes; returns how it ended, and what the finished ones found by name."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = json.dumps([asdict(case) for case in wanted])
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        environ = os.environ | {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}  # no NVLink multicast
        done = subprocess.run(
            [*start, __file__, jobs, json.dumps(settings), folder],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        found = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    return done, {row.pop("name"): row for row in found}


def killed(number: int, case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """Kill one of `number` processes in a run, go on with half as many, and compare with a run left alone."""
    at = steps_of(case, settings) // 2 + 1
    with tempfile.TemporaryDirectory() as folder:
        there = replace(case, folder=folder)
        done, _ = launch(number, [replace(there, kill=at)], settings)
        said = [line for line in done.stderr.splitlines() if "SIGKILL" in line or line.startswith("error:")]
        resumed, found = launch(max(1, number // 2), [there], settings)
        if resumed.returncode:
            raise SystemExit(resumed.stderr)
        _, alone = launch(number, [case], settings)
    losses, wanted = (rows[case.name]["losses"] for rows in (found, alone))
    return {
        "run": case.name,
        "processes": number,
        "at_step": at,
        "exit_code": done.returncode,
        "said": [line.strip() for line in said],
        "continued_on": max(1, number // 2),
        "largest_difference": largest_difference(losses, wanted),
    }


def steps_of(case: Case, settings: dict[str, Any]) -> int:
    """Those of a small model are short, so it takes more of them."""
    return settings["steps"] * (4 if case.model.startswith("smollm") else 1)


def table(rows: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """The rows, each beside that of one process."""
    lines = []
    keys = (key.rpartition(" @") for key in rows)
    for name, _, number in sorted(keys, key=lambda key: (key[0], int(key[2]))):
        row, one = rows[f"{name} @{number}"], rows.get(f"{name} @1")
        speed_up = one and round(row["tokens_per_second"] / one["tokens_per_second"] / int(number), 3)
        same = one and ("yes" if row["allocation"] == one["allocation"] else "NO")
        apart = one and largest_difference(row["losses"], one["losses"])
        line = [name, number, round(row["tokens_per_second"]), speed_up, row["peak_gb"], same, apart]
        lines.append(["" if cell is None else cell for cell in line])
    return lines


def largest_difference(found: list[float], wanted: list[float]) -> float:
    return float(f"{max(abs(a / b - 1) for a, b in zip(found, wanted, strict=True)):.1e}")


def work() -> None:
    """What each process does."""
    wanted, settings, folder = (*map(json.loads, sys.argv[1:3]), Path(sys.argv[3]))
    try:
        with distributed.group("cpu" if settings["toy"] else None):
            for place, case in enumerate(Case(**fields) for fields in wanted):
                row = run(case, settings)
                if distributed.is_main():
                    write_json(folder / f"{place:03}.json", row | {"name": case.name})
    except ConsaError as error:
        sys.exit(f"error: {error}")


def run(case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """One case on this process, and what all of them needed."""
    model, text = made(case, settings)
    speeds: list[float] = []

    def on_step(record: dict[str, float]) -> None:
        speeds.append(record["tokens_per_second"])
        if record["step"] == case.kill and distributed.rank() == distributed.world_size() - 1:
            os.kill(os.getpid(), signal.SIGKILL)

    num_steps = steps_of(case, settings)
    common: dict[str, Any] = {
        "seq_len": case.seq_len,
        "num_steps": num_steps,
        "sequences_per_step": settings["tokens_per_step"] // case.seq_len,
        # A small model with one sequence at once makes a GPU wait for its CPU.
        "micro_batch": 4 if case.model.startswith("smollm") else 1,
        "activation_checkpointing": case.model.startswith("qwen"),
        "parallel": case.parallel,
        "checkpoint_every": num_steps // 3,
    }
    window = 8 if settings["toy"] else 128
    options: dict[str, Any] = {
        "run_dir": Path(case.folder) if case.folder else None,
        "on_step": on_step,
    }
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if case.verb != "adapt":
        joint: dict[str, Any] = {"mode": "joint", "weight_lr": 1e-4} if case.verb == "joint learn" else {}
        config = LearnConfig(**common, **joint, sparsity=0.733, window=window, refine_evaluations=4)
        result = learn(model, text, config, **options)
        allocation, history = result.allocation, result.history
    else:
        layout = attention_layout(model)
        allocation = rules.interleaved(
            layout.num_layers, layout.num_kv_heads, sparsity=0.733, granularity="kv_head", window=window
        )
        history = adapt(model, text, allocation, AdaptConfig(**common, learning_rate=1e-4), **options)
    peak = torch.tensor(float(torch.cuda.max_memory_allocated() if torch.cuda.is_available() else 0))
    return {
        "tokens_per_second": statistics.harmonic_mean(speeds[WARM_UP:] or [1.0]),
        "peak_gb": round(largest(peak.to(model.device)) / 1e9, 2) if torch.cuda.is_available() else None,
        "losses": [record["loss"] for record in history],
        "allocation": allocation.full_attention.tolist(),
    }


def largest(value: torch.Tensor) -> float:
    """Over all processes."""
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return float(value)


def made(case: Case, settings: dict[str, Any]) -> tuple[PreTrainedModel, np.ndarray]:
    """The case's model and text."""
    if case.model == "smollm2-135m":
        with distributed.main_first():
            model = load_model(case.model).model
        return model, np.load(settings["train"], mmap_mode="r", allow_pickle=False)
    torch.manual_seed(0)
    config = LlamaConfig(**TINY) if case.model == "tiny" else Qwen3Config(**QWEN3_06B)
    on_gpu = torch.cuda.is_available()
    with torch.device("cuda" if on_gpu else "cpu"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16 if on_gpu else torch.float32)
    text = np.random.default_rng(0).integers(0, config.vocab_size, (32, case.seq_len))
    return model.eval(), text


if __name__ == "__main__":
    main()
