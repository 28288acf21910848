"""Feed damaged input to every reader of consa: `python -m tests.campaigns.fuzz --inputs 100000 --seed 0`.

A reader may accept an input or refuse it with a ConsaError of one line. Everything else is a failure: another
exception, more than `SECONDS` for one input, growth of the process by more than `MEMORY`, or a crash. Each target runs
in its own process. Input n of a target depends only on the seed, the target and n, so `--target NAME --only n` repeats
it.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import math
import mmap
import os
import resource
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

from consa import ConsaError
from consa.provenance import hardware, versions
from tests.campaigns.fuzz_targets import TARGETS, Attempt, Target

SECONDS = 10  # for one input; the machine may be busy
MEMORY = 2**30  # bytes by which an input of some kilobytes may grow the process
LINE = 12_000  # characters of a refusal; it may quote a value of 5,000 characters


class TooSlow(BaseException):
    """One input took longer than `SECONDS`."""


def judge(attempt: Attempt, random: Random) -> str:
    """Read one input; returns "accepted", "refused", or a description of the failure."""
    try:
        attempt(random)
        return "accepted"
    except ConsaError as error:
        message = str(error)
        if len(message) < LINE and len(message.splitlines()) == 1:
            return "refused"
        return f"a refusal of {len(message)} characters in {len(message.splitlines())} lines: {message[:150]!r}"
    except BaseException as error:
        where = [f for f in traceback.extract_tb(error.__traceback__) if "/consa/" in f.filename]
        last = f"{Path(where[-1].filename).name}:{where[-1].lineno}" if where else "tests"
        return f"{type(error).__name__} at {last}: {str(error)[:150]!r}"


def run_target(target: Target, seed: int, numbers: range, place: mmap.mmap) -> dict[str, Any]:
    """Run all inputs of a target; `place` holds the number of the current input."""
    began = time.monotonic()
    with _working_folder() as folder:
        attempt = target.prepare(folder)
        _limit()
        before, results, failures = _peak(), Counter[str](), dict[str, list[Any]]()
        for number in numbers:
            place[:8] = number.to_bytes(8, "little")
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            result = judge(attempt, Random(f"{seed} {target.name} {number}"))
            signal.setitimer(signal.ITIMER_REAL, 0)
            results[result if result in ("accepted", "refused") else "failed"] += 1
            if result not in ("accepted", "refused"):
                kind = result.partition(":")[0]
                failures.setdefault(kind, [result]).append(number)
    grown = (_peak() - before) // 2**20
    return {**results, "seconds": time.monotonic() - began, "MiB": grown, "failures": failures}


@contextlib.contextmanager
def _working_folder() -> Iterator[Path]:
    room = "/dev/shm" if os.access("/dev/shm", os.W_OK) else None  # nothing here has to survive
    folder = Path(tempfile.mkdtemp(prefix="consa-fuzz-", dir=room))
    os.environ["CONSA_CACHE"] = str(folder / "cache")
    os.chdir(folder)
    try:
        yield folder
    finally:
        os.chdir("/")
        shutil.rmtree(folder, ignore_errors=True)


def _limit() -> None:
    def stop(*_: Any) -> None:
        raise TooSlow(f"more than {SECONDS} s")

    signal.signal(signal.SIGALRM, stop)
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def in_a_process(target: Target, seed: int, numbers: range) -> dict[str, Any]:
    """`run_target` in a fork; a crash or a hang of it is a failure too."""
    place = mmap.mmap(-1, 8)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        os.close(reading)
        status = 1
        try:
            quiet = os.open(os.devnull, os.O_WRONLY)
            os.dup2(quiet, 2)
            found = run_target(target, seed, numbers, place)
            with os.fdopen(writing, "w") as file:
                json.dump(found, file)
            status = 0
        except BaseException:
            traceback.print_exc(file=sys.stdout)
            sys.stdout.flush()
        os._exit(status)
    os.close(writing)
    moved, at = time.monotonic(), None
    while os.waitpid(child, os.WNOHANG)[0] == 0:
        if place[:8] != at:
            moved, at = time.monotonic(), place[:8]
        if time.monotonic() - moved > 12 * SECONDS:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.05)
    with os.fdopen(reading) as file:
        text = file.read()
    number = int.from_bytes(place[:8], "little")
    ended = {"failed": 1, "seconds": 0, "MiB": 0, "failures": {"": ["the process ended", number]}}
    return json.loads(text) if text else ended


def main() -> int:
    """Run all targets, or one, and print a table and every kind of failure with inputs that repeat it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--target", help="part of a target's name")
    parser.add_argument("--only", type=int, help="run only this input, with its traceback")
    options = parser.parse_args()
    chosen = [target for target in TARGETS if (options.target or "") in target.name]
    if options.only is not None:
        with _working_folder() as folder:
            attempt = chosen[0].prepare(folder)
            _limit()
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            attempt(Random(f"{options.seed} {chosen[0].name} {options.only}"))
        return 0
    import consa.runs.learning  # noqa: F401 (once, for all forks)

    total = sum(target.share for target in TARGETS)
    print(f"{datetime.date.today()}, {hardware()}, {versions()}")
    print("| reader | inputs | refused | accepted | failed | s | MiB more |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |", flush=True)
    sums, failures = Counter[str](), {}
    for target in chosen:
        count = math.ceil(options.inputs * target.share / total)
        found = in_a_process(target, options.seed, range(count))
        counts = {kind: found.get(kind, 0) for kind in ("refused", "accepted", "failed")}
        read = sum(counts.values())
        sums.update(counts, inputs=read)
        failures[target.name] = found["failures"]
        line = [target.name, read, *counts.values(), round(found["seconds"]), found["MiB"]]
        print(f"| {' | '.join(map(str, line))} |", flush=True)
    print(f"| all | {sums['inputs']} | {sums['refused']} | {sums['accepted']} | {sums['failed']} | | |")
    for name, kinds in failures.items():
        for text, *numbers in kinds.values():
            print(f"{name}: {len(numbers)} such as {numbers[:3]}: {text}")
    return 1 if sums["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
