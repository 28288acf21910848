"""Run the whole study on the GPUs of this machine, each job as soon as GPUs are free for it.

    python -m research.campaign --seconds 1500

It expects `train.npy` and `heldout.npy` (research/tokens.py), with their domains, and `prepared/`
(research/from_scratch.py) in the working folder. Finished runs are skipped and interrupted ones resume. `--seconds`
starts nothing later than that; the same command continues. Where `models/SIZE` is missing, that model is trained anew,
and the records of the old one are deleted. Output goes to runs/campaign/NAME.log.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.common import parser_of
from consa.rules import RULES

RESULTS = "research/results"
ON_TEXT = "--train train.npy --heldout heldout.npy"
COMPILED = "--budget micro_batch=4 --budget compile=true"
OF_SCRATCH = ",".join(["consa", *RULES, "nll_guided", "duo_attention", "bosch", "prulong", "greedy"])
TRAINED = (
    "dense,all_swa/4,kv_head/4/0.9,interleaved_layer/4/0.9,layer/4/0.9,kv_head/4/0.5,top/4/0.5,layer/4/0.5"
    ",kv_head/4/0.733,interleaved_late/4/0.733,layer/4/0.733"
)
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """Commands that run one after another on the same GPUs; a failure does not stop those that follow."""

    name: str  # of its log
    commands: tuple[str, ...]  # shell commands; `{left}` becomes the seconds that are left
    gpus: int = 1  # how many it needs


def jobs() -> list[Job]:
    """All jobs, the most interesting first."""

    def run(module: str, options: str, out: str, *, once: bool = False) -> str:
        """A command that writes a record; `once` for scripts that cannot continue one."""
        path = f"{RESULTS}/{out}.json"
        command = f"{shlex.quote(sys.executable)} -m research.{module} {options} --out {path}"
        return f"test -e {path} || {command}" if once else command

    until = "--seconds {left}"
    constrained = "--granularity kv_head --full-heads-per-layer"
    several = run("distributed", "--train train.npy --steps 6 --processes 1,2 --kill 2", "distributed")
    chosen = [Job("several", (several,), gpus=2)]
    for size, tokens in (("60m", "150e6"), ("30m", "200e6")):
        text = f"--model models/{size} --train prepared/train.npy --heldout prepared/heldout.npy"
        alike = "sequences_per_step=8", "micro_batch=8", "compile=true"
        budget, settings = (" ".join(f"--{word} {item}" for item in alike) for word in ("budget", "set"))
        records = " ".join(f"{RESULTS}/{name}-{size}.json" for name in ("methods", "constraints"))
        training = (
            f"test -e models/{size}/training.json || {{ {shlex.quote(sys.executable)} -m research.from_scratch train"
            f" prepared --size {size} --tokens {tokens} --out models/{size} && rm -f {records}; }}"
        )
        copied = f"cp models/{size}/training.json {RESULTS}/training-{size}.json"
        constraints = f"{text} --sparsity 0.75 {constrained} any,even,uniform --set seq_len=4096 {settings}"
        methods = f"{text} --lengths 1024,2048,4096 {budget} --methods {OF_SCRATCH} {until} --seeds"
        commands = (
            f"{training} && {copied}",
            run("allocations", constraints, f"constraints-{size}", once=True),
            *(run("methods", f"{methods} {seeds}", f"methods-{size}") for seeds in (1, 3)),
        )
        chosen.append(Job(size, commands))
    again = f"{ON_TEXT} {COMPILED} --methods consa --sparsity 0.733 --seeds 1 {until}"
    uniform = f"{ON_TEXT} --sparsity 0.667 {constrained} any,uniform --set micro_batch=4 --set compile=true"
    rerun = run("methods", again, "rerun"), run("allocations", uniform, "constraints-long", once=True)
    adaptation = f"{ON_TEXT} --rows {TRAINED} --compile {until}"
    return [
        *chosen,
        Job("rerun", rerun),
        Job("adaptation", (run("adaptation", adaptation, "adaptation-sparsity"),)),
        Job("study", (run("study", f"{ON_TEXT} --compile {until}", "study"),)),
        Job("methods", (run("methods", f"{ON_TEXT} {COMPILED} {until}", "methods"),)),
    ]


def main() -> None:
    known = {job.name: job for job in jobs()}
    parser = parser_of(__doc__)
    parser.add_argument("--jobs", default=",".join(known), help="names, comma-separated")
    parser.add_argument("--seconds", type=float, default=1e6, help="start nothing later than that")
    options = parser.parse_args()
    wanted = options.jobs.split(",")
    if unknown := set(wanted) - known.keys():
        parser.error(f"--jobs takes some of {', '.join(known)}, got {', '.join(unknown)}")
    run([known[name] for name in wanted], torch.cuda.device_count(), options.seconds, Path("runs/campaign"))


def run(wanted: Sequence[Job], num_gpus: int, seconds: float, logs: Path, say: Callable[[str], None] = print) -> None:
    """Run the jobs in order; a job that waits for several GPUs is not overtaken."""
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    free = set(range(num_gpus))
    waiting = [job for job in wanted if job.gpus <= num_gpus]
    running: list[tuple[Job, int, set[int], subprocess.Popen[bytes]]] = []  # the int is the command's place

    def left() -> float:
        return seconds - (time.monotonic() - began)

    def start(job: Job, place: int, on: set[int]) -> None:
        command = job.commands[place].replace("{left}", str(max(0, round(left()))))
        visible = {"CUDA_VISIBLE_DEVICES": ",".join(map(str, sorted(on)))}
        with (logs / f"{job.name}.log").open("ab") as log:
            log.write(f"$ {command}\n".encode())
            log.flush()
            process = subprocess.Popen(
                command, shell=True, env=os.environ | visible, stdout=log, stderr=subprocess.STDOUT
            )
        running.append((job, place, on, process))

    while waiting or running:
        for entry in [entry for entry in running if entry[3].poll() is not None]:
            running.remove(entry)
            job, place, on, process = entry
            say(f"{time.monotonic() - began:.0f} s: {job.name}, {place + 1}: exit code {process.returncode}")
            if place + 1 < len(job.commands) and left() > 0:
                start(job, place + 1, on)
            else:
                free |= on
        while waiting and left() > 0 and len(free) >= waiting[0].gpus:
            on = set(sorted(free)[: waiting[0].gpus])
            free -= on
            say(f"{time.monotonic() - began:.0f} s: {waiting[0].name} on {sorted(on)}")
            start(waiting.pop(0), 0, on)
        if left() <= 0 and waiting:
            say(f"not started: {', '.join(job.name for job in waiting)}")
            waiting.clear()
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
