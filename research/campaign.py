"""The runs of the study, side by side on the GPUs of this machine: each as soon as one is free for it.

    python -m research.campaign --seconds 1500

It expects `train.npy` and `heldout.npy` of research/tokens.py, with their domains, and `prepared/` of
research/from_scratch.py in the working folder. A run that is there already is skipped and a part of one continued, as
the benchmarks themselves do; `--seconds` begins nothing later than that, and the same command goes on from there. Where
`models/SIZE` is missing, that model is trained anew, and what was recorded of the old one is deleted. What the runs
print goes to runs/campaign/NAME.log, and what they need is in `jobs`.
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
TRAINED = ",".join(
    [
        *("dense", "all_swa/4"),
        *("kv_head/4/0.9", "interleaved_layer/4/0.9", "layer/4/0.9"),
        *("kv_head/4/0.5", "top/4/0.5", "layer/4/0.5"),
        *("kv_head/4/0.733", "interleaved_late/4/0.733", "layer/4/0.733"),
    ]
)
POLL_SECONDS = 0.5


@dataclass(frozen=True)
class Job:
    """Commands that follow each other on the same GPUs; one that fails does not keep the others from being run.

    Attributes:
        name: of its log.
        commands: for the shell; `{left}` in one becomes the seconds until nothing is to be begun any more.
        gpus: how many it needs.
    """

    name: str
    commands: tuple[str, ...]
    gpus: int = 1


def jobs() -> list[Job]:
    """In order of interest."""
    python = shlex.quote(sys.executable)
    several = f"{python} -m research.distributed --train train.npy --steps 6 --out {RESULTS}/distributed.json"
    found = [Job("several", (f"{several} --processes 1,2 --kill 2",), gpus=2)]
    for size, tokens in (("60m", "150e6"), ("30m", "200e6")):
        text = f"--model models/{size} --train prepared/train.npy --heldout prepared/heldout.npy"
        alike = "sequences_per_step=8", "micro_batch=8", "compile=true"
        budget, settings = (" ".join(f"--{word} {item}" for item in alike) for word in ("budget", "set"))
        training = (  # and what was measured on weights that are no more goes
            f"test -e models/{size}/training.json || {{ {python} -m research.from_scratch train prepared --size {size}"
            f" --tokens {tokens} --out models/{size} && rm -f {RESULTS}/methods-{size}.json"
            f" {RESULTS}/constraints-{size}.json; }}"
        )
        methods = (
            f"{python} -m research.methods {text} --lengths 1024,2048,4096 {budget} --methods {OF_SCRATCH}"
            f" --seconds {{left}} --out {RESULTS}/methods-{size}.json"
        )
        constraints = (
            f"test -e {RESULTS}/constraints-{size}.json || {python} -m research.allocations {text} --sparsity 0.75"
            f" --granularity kv_head --full-heads-per-layer any,even,uniform --set seq_len=4096 {settings}"
            f" --out {RESULTS}/constraints-{size}.json"
        )
        copied = f"cp models/{size}/training.json {RESULTS}/training-{size}.json"
        found.append(
            Job(
                size, (f"{training} && {copied}", constraints, f"{methods} --seeds 1", f"{methods} --seeds 3")
            )
        )
    again = (
        f"{python} -m research.methods {ON_TEXT} {COMPILED} --methods consa --sparsity 0.733 --seeds 1"
        f" --seconds {{left}} --out {RESULTS}/rerun.json"
    )
    uniform = (
        f"test -e {RESULTS}/constraints-long.json || {python} -m research.allocations {ON_TEXT} --sparsity 0.667"
        " --granularity kv_head --full-heads-per-layer any,uniform --set micro_batch=4 --set compile=true"
        f" --out {RESULTS}/constraints-long.json"
    )
    adaptation = (
        f"{python} -m research.adaptation {ON_TEXT} --rows {TRAINED} --compile --seconds {{left}}"
        f" --out {RESULTS}/adaptation-sparsity.json"
    )
    study = f"{python} -m research.study {ON_TEXT} --compile --seconds {{left}} --out {RESULTS}/study.json"
    methods = (
        f"{python} -m research.methods {ON_TEXT} {COMPILED} --seconds {{left}} --out {RESULTS}/methods.json"
    )
    return [
        *found,
        Job("rerun", (again, uniform)),
        Job("adaptation", (adaptation,)),
        Job("study", (study,)),
        Job("methods", (methods,)),
    ]


def main() -> None:
    parser = parser_of(__doc__)
    parser.add_argument("--jobs", default=",".join(job.name for job in jobs()), help="names, commas between")
    parser.add_argument("--seconds", type=float, default=1e6, help="begin nothing after that many")
    options = parser.parse_args()
    wanted = options.jobs.split(",")
    if unknown := set(wanted) - {job.name for job in jobs()}:
        parser.error(
            f"--jobs takes some of {', '.join(job.name for job in jobs())}, got {', '.join(unknown)}"
        )
    chosen = sorted((job for job in jobs() if job.name in wanted), key=lambda job: wanted.index(job.name))
    run(chosen, torch.cuda.device_count(), options.seconds, Path("runs/campaign"))


def run(
    wanted: Sequence[Job], num_gpus: int, seconds: float, logs: Path, say: Callable[[str], None] = print
) -> None:
    """Run the jobs in order, one that needs several GPUs before those behind it."""
    logs.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    free = set(range(num_gpus))
    waiting = [job for job in wanted if job.gpus <= num_gpus]
    running: list[tuple[Job, int, set[int], subprocess.Popen[bytes]]] = []  # with the command's place

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
            say(f"not begun: {', '.join(job.name for job in waiting)}")
            waiting.clear()
        time.sleep(POLL_SECONDS)


if __name__ == "__main__":
    main()
