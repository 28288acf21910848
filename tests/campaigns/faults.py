"""Inject faults into consa's long commands: `python -m tests.campaigns.faults --kills 50 --seed 0`.

Each command runs on a tiny model in a fork of this process, which has imported everything. The faults are SIGKILL,
Ctrl-C, a full disk, a read-only folder, another run in the folder, a clock that jumps, and too little memory.
Afterwards every file under a final name must be whole, and repeating the command must produce the bytes of an
undisturbed run, except for measured seconds. Needs Linux; a full disk is a small tmpfs, which needs the right to mount.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import datetime
import errno
import fcntl
import io
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from random import Random
from typing import Any

os.environ |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "TOKENIZERS_PARALLELISM": "false"}

import matplotlib.figure
import rich.live
import rich.progress
import rich.table
import torch
import transformers.models.llama.modeling_llama

import consa.evaluation.suite
import consa.methods.training
import consa.model.convert
import consa.runs.adaptation
import consa.runs.learning
import consa.runs.sweep
from consa import rules
from consa.cli import commands as cli
from consa.model import loss
from consa.provenance import hardware, versions
from tests.campaigns.fault_results import broken, results
from tests.models import save_tiny, write_texts

# Imported here so that no fork has to.
LOADED = (rich.live, rich.progress, rich.table, transformers.models.llama.modeling_llama, consa.runs.sweep)
LIMIT = 120  # seconds for one command: a standstill
COMMON = ["--seq-len", "96", "--num-heldout", "2", "--device", "cpu"]
STEPS = ["--num-steps", "4", "--sequences-per-step", "1", "--checkpoint-every", "1"]
SWEEP = ["--methods", "consa,middle", "--sparsity", "0.5,0.75", "--num-steps", "2", "--sequences-per-step", "1"]
SWEEP += ["--evaluations", "2", "--evaluation-sequences", "1", "--cache-tokens", "1000", "--window", "8"]


@dataclass(frozen=True)
class World:
    """Inputs of the commands, and their results without faults.

    Attributes:
        folder: for all of it.
        commands: by verb, without --out.
        wanted: by verb, what `results` finds after an undisturbed run.
        seconds: by verb, what such a run takes.
    """

    folder: Path
    commands: dict[str, list[str]]
    wanted: dict[str, dict[str, bytes]] = field(default_factory=dict)
    seconds: dict[str, float] = field(default_factory=dict)

    @classmethod
    def make(cls, folder: Path) -> World:
        model, text = save_tiny(folder / "model"), folder / "text"
        text.mkdir()
        write_texts(text)
        chosen = folder / "allocation.json"
        rules.random_units(4, 3, sparsity=0.5, granularity="kv_head", window=8, num_sink_tokens=2).save(chosen)
        told = [str(model), *COMMON, "--data", str(text)]
        learn = ["--window", "8", "--refine-evaluations", "8", "--refine-sequences", "1"]
        commands = {
            "learn": ["learn", *told, *STEPS, *learn],
            "adapt": ["adapt", *told, *STEPS, "--evaluate-every", "2", "--allocation", str(chosen)],
            "sweep": ["sweep", *told, *SWEEP],
            "convert": ["convert", str(model), "--allocation", str(chosen)],
        }
        world = cls(folder, commands)
        for verb in commands:
            with world.trial() as trial:
                began = time.monotonic()
                assert trial.run(world, verb) == 0, trial.said()
                world.seconds[verb] = time.monotonic() - began
                world.wanted[verb] = results(trial.out)
        return world

    @contextlib.contextmanager
    def trial(self) -> Iterator[Trial]:
        folder = Path(tempfile.mkdtemp(dir=self.folder))
        try:
            yield Trial(folder)
        finally:
            shutil.rmtree(folder, ignore_errors=True)


@dataclass
class Trial:
    """One output folder, with a cache of its own, and the commands run on it."""

    folder: Path

    @property
    def out(self) -> Path:
        return self.folder / "disk" / "out"

    def start(self, world: World, verb: str, fault: Callable[[], Any] = lambda: None) -> int:
        """Fork a process that runs the command under `fault`; returns its id."""
        (self.folder / "disk").mkdir(exist_ok=True)
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])  # Python's own start is not on trial
        child = os.fork()
        if child:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
            return child
        status: Any = 1
        try:
            for number in (1, 2):
                os.dup2(os.open(self.folder / str(number), os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
            os.environ["CONSA_CACHE"] = str(self.folder / "cache")
            sys.argv = ["consa", *world.commands[verb], "--out", str(self.out)]
            fault()
            signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's & has it ignored
            cli.app = _interruptible(cli.app)
            try:
                cli.main()
            except SystemExit as stop:
                status = stop.code or 0
            except BaseException:
                traceback.print_exc()
            signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(status)

    def run(self, world: World, verb: str, fault: Callable[[], Any] = lambda: None) -> int:
        """The command's exit status, negative for a signal."""
        return wait(self.start(world, verb, fault))

    def said(self) -> str:
        """The stderr of the last command."""
        return (self.folder / "2").read_text(errors="replace")

    def refused(self, status: int, expected: int, *parts: str) -> str:
        """Why the command did not end with one clean line and the expected exit status, or ""."""
        *_, last = self.said().splitlines() or [""]
        if status != expected:
            return f"exit {status}, not {expected}: {self.said()[-300:]!r}"
        if "Traceback" in self.said() or not last.startswith("error: "):
            return f"not one clean line: {self.said()[-300:]!r}"
        missing = [part for part in parts if part not in last]
        return f"{missing[0]!r} is not in {last!r}" if missing else ""

    def ends_well(self, world: World, verb: str) -> str:
        """Why repeating the command does not produce the bytes of the undisturbed run, or ""."""
        done = verb == "convert" and self.out.exists()  # asked again, it would say so
        if status := 0 if done else self.run(world, verb):
            return f"the same command again: exit {status}: {self.said()[-300:]!r}"
        return self.differs(world, verb)

    def differs(self, world: World, verb: str) -> str:
        """The first difference from an undisturbed run, or ""."""
        found, wanted = results(self.out), world.wanted[verb]
        differing = [name for name in sorted(found.keys() | wanted.keys()) if found.get(name) != wanted.get(name)]
        hidden = [path.name for path in self.out.rglob(".*") if path.name != ".lock"]
        if hidden and verb in ("learn", "adapt"):  # whose lock tells them that nobody else is writing
            return f"left behind: {hidden[0]}"
        return f"other bytes: {', '.join(differing)}" if differing else broken(self.folder)


def _interruptible(app: Any) -> Any:
    def begin(*args: Any, **kwargs: Any) -> Any:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        return app(*args, **kwargs)

    return begin


def wait(child: int, limit: float = LIMIT) -> int:
    """Exit status of a process, negative for a signal; kills it after `LIMIT` seconds."""
    until = time.monotonic() + limit
    while True:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            return os.waitstatus_to_exitcode(status)
        if time.monotonic() > until:
            os.kill(child, signal.SIGKILL)
        time.sleep(0.002)


# Faults. Each yields, trial by trial, why it did not go well, or "".


def kills(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """SIGKILL at random moments, half of the runs more than once."""
    while count > 0:
        with world.trial() as trial:
            while True:
                child = trial.start(world, verb)
                time.sleep(random.random() * world.seconds[verb])
                with contextlib.suppress(ProcessLookupError):
                    os.kill(child, signal.SIGKILL)
                if wait(child) != -signal.SIGKILL:
                    break  # it was done before
                count -= 1
                problem = broken(trial.folder)
                again = random.random() < 0.5 and count and not (verb == "convert" and trial.out.exists())
                if problem or not again:
                    yield problem or trial.ends_well(world, verb)
                    break
                yield ""


def interrupts(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """SIGINT at random moments."""
    while count > 0:
        with world.trial() as trial:
            child = trial.start(world, verb)
            time.sleep(random.random() * world.seconds[verb])
            os.kill(child, signal.SIGINT)
            status = wait(child)
            if status == 0:
                continue  # it was done before
            count -= 1
            yield (trial.refused(status, 130, "interrupted") or broken(trial.folder) or trial.ends_well(world, verb))


def full_disks(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """A tmpfs that is too small at first and enlarged later."""
    needed = sum(map(len, world.wanted[verb].values()))
    for _ in range(count):
        with world.trial() as trial:
            disk = trial.folder / "disk"
            disk.mkdir()
            with _mounted(disk, 4096 * random.randrange(1, max(2, needed // 4096))):
                status = trial.run(world, verb)
                if status == 0:
                    problem = ""  # what a disk takes in pages was enough
                else:
                    problem = trial.refused(status, 2, os.strerror(errno.ENOSPC)) or broken(trial.folder)
                subprocess.run(["mount", "-o", "remount,size=1g", disk], check=True)
                yield problem or trial.ends_well(world, verb)


@contextlib.contextmanager
def _mounted(folder: Path, size: int) -> Iterator[None]:
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", folder], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", folder], check=True)


def full_caches(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """A tmpfs too small for the cache of tokens; the command works without the cache."""
    for _ in range(count):
        with world.trial() as trial:
            (trial.folder / "cache").mkdir()
            with _mounted(trial.folder / "cache", 4096):
                yield trial.ends_well(world, verb)


def read_only(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """A folder that becomes read-only, before the run or during it."""
    for number in range(count):
        with world.trial() as trial:
            (trial.folder / "disk").mkdir()
            if number % 2 and verb != "convert":
                child = trial.start(world, verb)
                time.sleep(random.random() * world.seconds[verb])
                os.kill(child, signal.SIGKILL)
                wait(child)
            folders = [path for path in (trial.folder / "disk").rglob("*") if path.is_dir()]
            folders.append(trial.folder / "disk")
            for path in folders:
                path.chmod(0o555)
            before = sorted(trial.folder.rglob("*"))
            status = trial.run(world, verb, bound_by_permissions)
            after = sorted(path for path in trial.folder.rglob("*") if path.name not in ("1", "2", "cache"))
            for path in folders:
                path.chmod(0o755)
            new = [path for path in after if path not in before and "cache" not in path.parts]
            problem = trial.refused(status, 2, os.strerror(errno.EACCES)) or (f"left {new[0]}" if new else "")
            yield problem or trial.ends_well(world, verb)


def bound_by_permissions() -> None:
    """Drop root's capability to ignore file permissions."""

    class Header(ctypes.Structure):
        _fields_ = [("version", ctypes.c_uint32), ("pid", ctypes.c_int)]

    libc, none = ctypes.CDLL(None, use_errno=True), (ctypes.c_uint32 * 6)()
    if libc.capset(ctypes.byref(Header(0x20080522, 0)), ctypes.byref(none)):
        raise OSError(ctypes.get_errno(), "capset")


def held(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """A second run in the folder of a stopped run: refused; on file systems without locks, both end."""
    while count > 0:
        with world.trial() as trial, world.trial() as other:
            child = trial.start(world, verb)
            time.sleep(random.uniform(0.1, 0.7) * world.seconds[verb])
            os.kill(child, signal.SIGSTOP)
            if not os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1]):
                continue  # it was done before
            count -= 1
            began = _is_held(trial.out / ".lock")
            other.folder, kept = trial.folder / "second", other.folder
            other.folder.mkdir()
            (other.folder / "disk").symlink_to(trial.folder / "disk")
            status = other.run(world, verb)
            os.kill(child, signal.SIGCONT)
            first, problem = wait(child), ""
            if began and (first == 0):
                problem = other.refused(status, 2, "in use by another process")
            elif status:
                problem = f"the second: exit {status}: {other.said()[-200:]}"
            elif first not in (0, 2):
                problem = f"the first: exit {first}: {trial.said()[-200:]}"
            shutil.rmtree(other.folder)
            other.folder = kept
            yield problem or trial.ends_well(world, verb)


def _is_held(lock: Path) -> bool:
    if lock.exists():
        with lock.open() as file:
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return True
    return False


def clock_jumps(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """time.time jumps back and forth by up to ten years."""
    real = time.time

    def jump() -> None:
        time.time = lambda: real() + random.uniform(-3e8, 3e8)

    for _ in range(count):
        with world.trial() as trial:
            status = trial.run(world, verb, jump)
            yield f"exit {status}: {trial.said()[-200:]}" if status else trial.differs(world, verb)


def out_of_memory(world: World, verb: str, random: Random, count: int) -> Iterator[str]:
    """torch.OutOfMemoryError in a forward or backward pass, or for convert while moving weights."""
    options = _options(verb)
    for _ in range(count):
        left = random.randrange(6)

        def fail(function: Callable[..., Any]) -> Callable[..., Any]:
            def failing(*args: Any, **kwargs: Any) -> Any:
                nonlocal left
                left -= 1
                if left < 0:
                    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0")
                return function(*args, **kwargs)

            return failing

        def lack() -> None:
            loss.backward, loss.token_losses = fail(loss.backward), fail(loss.token_losses)
            if verb == "convert":
                transformers.PreTrainedModel.to = fail(lambda self, device: self)  # pyright: ignore
                nonlocal left
                left = 0

        with world.trial() as trial:
            status = trial.run(world, verb, lack)
            problem = trial.refused(status, 2, "out of memory")
            named = set(re.findall(r"--[a-z-]+", trial.said().splitlines()[-1]))
            if not problem and (named - options or (not named and verb != "convert")):
                problem = f"of {sorted(named)}, consa {verb} has {sorted(named & options)}"
            yield problem or broken(trial.folder) or trial.ends_well(world, verb)


def _options(verb: str) -> set[str]:
    group: Any = cli.typer.main.get_command(cli.app)
    return {name for parameter in group.commands[verb].params for name in parameter.opts}


FAULTS: dict[str, tuple[Callable[..., Iterator[str]], float, tuple[str, ...]]] = {
    # name: what happens, trials for each of --kills, commands
    "SIGKILL at a random moment": (kills, 1, ("learn", "adapt", "sweep", "convert")),
    "Ctrl-C at a random moment": (interrupts, 0.4, ("learn", "adapt", "sweep", "convert")),
    "disk full (tmpfs)": (full_disks, 0.2, ("learn", "adapt", "sweep", "convert")),
    "cache's disk full (tmpfs)": (full_caches, 0.04, ("learn", "adapt", "sweep")),
    "folder not writable": (read_only, 0.08, ("learn", "adapt", "sweep", "convert")),
    "folder held by another run": (held, 0.1, ("learn", "adapt", "sweep", "convert")),
    "clock jumps by years": (clock_jumps, 0.04, ("learn", "adapt", "sweep", "convert")),
    "GPU out of memory (raised)": (out_of_memory, 0.1, ("learn", "adapt", "sweep", "convert")),
}


def main(arguments: list[str] | None = None) -> int:
    """Inject all faults, and print a table and every kind of problem."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--kills", type=int, default=50, help="kills per command; the numbers of the other faults are shares of it"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--fault", default="", help="part of a fault's name")
    parser.add_argument("--command", default="", help="only this command")
    options = parser.parse_args(arguments)
    failed = 0
    matplotlib.figure.Figure().subplots().figure.savefig(io.BytesIO())  # finds fonts
    with tempfile.TemporaryDirectory(prefix="consa-faults-") as folder:
        world = World.make(Path(folder))
        print(f"{datetime.date.today()}, {hardware()}, {versions()}")
        print(f"seconds undisturbed: { {verb: round(s, 2) for verb, s in world.seconds.items()} }")
        print("| fault | command | trials | as it should be | s |\n| --- | --- | ---: | ---: | ---: |", flush=True)
        for name, (fault, share, verbs) in FAULTS.items():
            if options.fault not in name:
                continue
            for verb in [verb for verb in verbs if options.command in verb]:
                began, random = time.monotonic(), Random(f"{options.seed} {name} {verb}")
                problems = list(fault(world, verb, random, max(1, round(share * options.kills))))
                good = problems.count("")
                failed += len(problems) - good
                seconds = time.monotonic() - began
                print(f"| {name} | {verb} | {len(problems)} | {good} | {seconds:.0f} |", flush=True)
                for problem, times in Counter(filter(None, problems)).items():
                    print(f"  {times} x {problem}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
