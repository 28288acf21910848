"""The same runs on one GPU and on several: speed, memory, whether they end alike, and what a killed process does.

    python -m research.distributed --train train.npy --kill 2 --out research/results/distributed.json
    python -m research.distributed --train train.npy --model smollm2-135m --seq-len 256 --tokens-per-step 1024 --steps 2
      --kill 2 --out research/results/distributed-cpu.json

TRAIN is a token file of research/tokens.py. `torchrun` starts each number of processes, one GPU each, or one thread
each where there is no GPU. A step's sequences are the same on any number of processes, so all rows of a case compute
the same. Qwen3-0.6B has random weights and random tokens. `speed-up` is over one process, divided by the number of
processes; `memory` is the peak allocation of the fullest GPU; a CPU's rows have neither. `same scores` says whether
every unit's averaged log_alpha has the bits that one process gives it; `largest difference` is that of the losses from
those of one process, relative. With `--kill 2`, one of two processes is killed, and half as many resume the run. Rows
that the file holds are not measured again.
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
from transformers import AutoModelForCausalLM, PreTrainedModel, Qwen3Config

from benchmarks.common import QWEN3_06B, environment, parser_of, print_table, write_json
from consa import rules
from consa.config import AdaptConfig, LearnConfig
from consa.errors import ConsaError
from consa.model.layout import attention_layout
from consa.model.load import load_model
from consa.training import distributed
from consa.training.adaptation import adapt
from consa.training.learning import learn
from research.records import measured_before, tokens_of

WARM_UP = 3  # steps that compile, and are not timed
ON_GPU = torch.cuda.is_available()  # a CPU's speed is of no interest here
SPEED = ["tokens/s", "speed-up", "memory, GB"] if ON_GPU else []
COLUMNS = ["run", "processes", *SPEED, "same allocation", "same scores", "largest difference"]


@dataclass(frozen=True)
class Case:
    """A run, and where it may be killed."""

    model: str
    seq_len: int
    verb: str  # learn, joint learn or adapt
    parallel: str
    kill: int | None = None  # the step at which the last process dies
    folder: str | None = None  # to resume from

    @property
    def name(self) -> str:
        """The name of its rows."""
        return f"{self.verb} {Path(self.model).name}, {self.seq_len:,} tokens, {self.parallel}"


def cases(settings: dict[str, Any]) -> list[Case]:
    """The runs of the chosen model, or of all."""
    shapes = [("smollm2-135m", 8192), ("qwen3-0.6b", 32768), ("qwen3-0.6b", 8192)]
    joint = [Case(*shapes[-1], "joint learn", "fsdp")]
    if settings["model"]:
        shapes, joint = [(settings["model"], settings["seq_len"])], []
    verbs = [("learn", "ddp"), ("adapt", "ddp"), ("adapt", "fsdp")]
    every = [*(Case(*shape, *verb) for shape in shapes for verb in verbs), *joint]
    return [case for case in every if case.verb.split()[-1] in settings["verbs"].split(",")]


def main() -> None:
    if "RANK" in os.environ:
        work()
        return
    parser = parser_of(__doc__)
    parser.add_argument("--train", required=True)
    parser.add_argument("--model", help="this one alone, a name or a file (default: SmolLM2-135M and Qwen3-0.6B)")
    parser.add_argument("--seq-len", type=int, default=8192, help="tokens of a sequence, with --model")
    parser.add_argument("--verbs", default="learn,adapt", help="those of the cases to run")
    parser.add_argument("--processes", default="1,2")
    parser.add_argument("--kill", type=int, metavar="N", help="of so many processes, one")
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--tokens-per-step", type=int, default=2**17)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    numbers = [int(number) for number in options.processes.split(",")]
    free = ("processes", "kill", "out")
    settings = {name: value for name, value in vars(options).items() if name not in free}
    record: dict[str, Any] = environment() | {"settings": settings, "killed": None}
    record |= measured_before(options.out, settings)
    for number in numbers:
        missing = [case for case in cases(settings) if f"{case.name} @{number}" not in record["rows"]]
        if missing:
            done, rows = launch(number, missing, settings)
            record["rows"] |= {f"{name} @{number}": row for name, row in rows.items()}
            write_json(options.out, record | {"columns": COLUMNS, "table": table(record["rows"])})
            if done.returncode:
                raise SystemExit(done.stderr)
    if options.kill and not record["killed"]:
        record["killed"] = killed(options.kill, cases(settings)[:3][-1], settings)
        write_json(options.out, record | {"columns": COLUMNS, "table": table(record["rows"])})
    print_table(COLUMNS, table(record["rows"]))
    print(record["killed"])


def launch(number: int, wanted: list[Case], settings: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Run cases on that many processes; returns the ended launcher, and the rows of finished cases by name."""
    with tempfile.TemporaryDirectory() as folder:
        jobs = json.dumps([asdict(case) for case in wanted])
        start = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={number}"]
        environ = os.environ | {"NCCL_NVLS_ENABLE": "0", "OMP_NUM_THREADS": "1"}  # no NVLink multicast
        done = subprocess.run(
            [*start, "-m", "research.distributed", jobs, json.dumps(settings), folder],
            env=environ,
            stderr=subprocess.PIPE,
            text=True,
        )
        rows = [json.loads(path.read_text()) for path in sorted(Path(folder).iterdir())]
    return done, {row.pop("name"): row for row in rows}


def killed(number: int, case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """Kill one of `number` processes in a run, resume on half as many, and compare with an undisturbed run."""
    at = steps_of(case, settings) // 2 + 1
    with tempfile.TemporaryDirectory() as folder:
        there = replace(case, folder=folder)
        done, _ = launch(number, [replace(there, kill=at)], settings)
        errors = [line for line in done.stderr.splitlines() if "SIGKILL" in line or line.startswith("error:")]
        resumed, rows = launch(max(1, number // 2), [there], settings)
        if resumed.returncode:
            raise SystemExit(resumed.stderr)
        _, alone = launch(number, [case], settings)
    found, wanted = rows[case.name], alone[case.name]
    return {
        "run": case.name,
        "processes": number,
        "at_step": at,
        "exit_code": done.returncode,
        "said": [line.strip() for line in errors],
        "continued_on": max(1, number // 2),
        "same": same(found, wanted),
        "largest_difference": largest_difference(found["losses"], wanted["losses"]),
    }


def steps_of(case: Case, settings: dict[str, Any]) -> int:
    """Steps of a run; a small model takes more, because its steps are short."""
    return settings["steps"] * (4 if case.model.startswith("smollm") else 1)


def table(rows: dict[str, dict[str, Any]]) -> list[list[Any]]:
    """The rows of the table, each compared with the one of a single process."""
    lines = []
    keys = (key.rpartition(" @") for key in rows)
    for name, _, number in sorted(keys, key=lambda key: (key[0], int(key[2]))):
        row, one = rows[f"{name} @{number}"], rows.get(f"{name} @1")
        speed: list[Any] = []
        if ON_GPU:
            speed_up = one and round(row["tokens_per_second"] / one["tokens_per_second"] / int(number), 3)
            speed = [round(row["tokens_per_second"]), speed_up, row["peak_gb"]]
        alike = same(row, one) if one else ["", ""]
        apart = one and largest_difference(row["losses"], one["losses"])
        lines.append(["" if cell is None else cell for cell in [name, number, *speed, *alike, apart]])
    return lines


def same(row: dict[str, Any], wanted: dict[str, Any]) -> list[str]:
    """Whether both have the same allocation, and to the last bit the same scores; empty if there are none."""
    return ["" if key not in wanted else ("NO", "yes")[row[key] == wanted[key]] for key in ("allocation", "scores")]


def largest_difference(losses: list[float], wanted: list[float]) -> float:
    return float(f"{max(abs(a / b - 1) for a, b in zip(losses, wanted, strict=True)):.1e}")


def work() -> None:
    """Run cases in one of the processes that the launcher started."""
    wanted, settings, folder = (*map(json.loads, sys.argv[1:3]), Path(sys.argv[3]))
    try:
        with distributed.group():
            for place, case in enumerate(Case(**fields) for fields in wanted):
                row = run(case, settings)
                if distributed.is_main():
                    write_json(folder / f"{place:03}.json", row | {"name": case.name})
    except ConsaError as error:
        sys.exit(f"error: {error}")


def run(case: Case, settings: dict[str, Any]) -> dict[str, Any]:
    """Run one case in this process; returns its row, over all processes."""
    model, text = model_and_text(case, settings)
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
        "micro_batch": 4 if ON_GPU and case.model.startswith("smollm") else 1,
        "gradient_checkpointing": case.model.startswith("qwen"),
        "parallel": case.parallel,
        "checkpoint_every": num_steps // 3,
    }
    options: dict[str, Any] = {"run_dir": case.folder and Path(case.folder), "on_step": on_step}
    if ON_GPU:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    if case.verb != "adapt":
        joint: dict[str, Any] = {"mode": "joint", "weight_lr": 1e-4} if case.verb == "joint learn" else {}
        config = LearnConfig(**common, **joint, sparsity=0.733, window=128, refine_evaluations=4)
        result = learn(model, text, config, **options)
        allocation, history = result.allocation, result.history
    else:
        layout = attention_layout(model)
        allocation = rules.interleaved(
            layout.num_layers, layout.num_kv_heads, sparsity=0.733, granularity="kv_head", window=128
        )
        history = adapt(model, text, allocation, AdaptConfig(**common, learning_rate=1e-4), **options)
    row: dict[str, Any] = {"losses": [record["loss"] for record in history]}
    row["allocation"] = allocation.full_attention.tolist()
    if allocation.scores is not None:
        row["scores"] = allocation.scores.tolist()
    if ON_GPU:
        peak = torch.tensor(float(torch.cuda.max_memory_allocated()), device=model.device)
        row["tokens_per_second"] = statistics.harmonic_mean(speeds[WARM_UP:] or [1.0])
        row["peak_gb"] = round(largest(peak) / 1e9, 2)
    return row


def largest(value: torch.Tensor) -> float:
    """The largest value over all processes."""
    if distributed.world_size() > 1:
        torch.distributed.all_reduce(value, op=torch.distributed.ReduceOp.MAX)
    return float(value)


def model_and_text(case: Case, settings: dict[str, Any]) -> tuple[PreTrainedModel, np.ndarray]:
    """The case's model and text."""
    if case.model != "qwen3-0.6b":
        with distributed.main_first():
            model = load_model(case.model).model
        return model, tokens_of(settings["train"])[:, : case.seq_len]
    torch.manual_seed(0)
    with torch.device("cuda"):
        model = AutoModelForCausalLM.from_config(Qwen3Config(**QWEN3_06B), dtype=torch.bfloat16)
    text = np.random.default_rng(0).integers(0, QWEN3_06B["vocab_size"], (32, case.seq_len))
    return model.eval(), text


if __name__ == "__main__":
    main()
