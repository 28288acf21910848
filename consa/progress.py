"""Progress on stderr: a live bar on a terminal, elsewhere a plain line every ten seconds."""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from consa.training.refinement import Exchange

SECONDS_BETWEEN_LINES = 10


def note(text: str) -> None:
    """Say what begins now, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, *, began: float | None = None) -> Iterator[Callable[[int, str], None]]:
    """Show how far a long job is.

    Args:
        title: of the job.
        total: units of work, those done before included.
        began: when the first unit of this process began, by `time.monotonic`; now unless given.

    Yields:
        A function to call with the number of units done so far and a text about them, after each unit or more.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    began = time.monotonic() if began is None else began
    first = last_line = None

    def time_left(done: int) -> str:
        nonlocal first
        first = done - 1 if first is None else first  # a continued job does not begin at 0
        seconds = (time.monotonic() - began) / max(1, done - first) * (total - done)
        return f"{int(seconds) // 3600}:{int(seconds) // 60 % 60:02}:{int(seconds) % 60:02} left"

    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:

        def print_line(done: int, text: str) -> None:
            nonlocal last_line
            left, now = time_left(done), time.monotonic()
            if last_line is None or now - last_line >= SECONDS_BETWEEN_LINES or done == total:
                last_line = now
                note(f"{title} {done}/{total}  {text}  {left}")

        yield print_line
        return
    bar = Progress(
        TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[left]}")
    )
    task = bar.add_task(title, total=total, left="")
    live = Live(bar, console=console, refresh_per_second=4)

    def redraw(done: int, text: str) -> None:
        bar.update(task, completed=done, left=time_left(done))
        live.update(Group(bar, Text(f"  {text}")))
        live.start()  # not before there is something to show; the second time it does nothing

    try:
        yield redraw
    finally:
        live.stop()


def memory() -> str:
    """The most memory that this process has held so far: the GPU's if it uses one, else its own."""
    import torch

    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    unit = 1 if sys.platform == "darwin" else 1024
    return f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.1f} GiB"


class Display:
    """Shows a loop's steps, and then exchanges, as they are reported; writes the former for TensorBoard if asked to.

    Args:
        title: of the steps.
        num_steps: in all, those done before included.
        describe: text about a step's record, besides its loss.
        tensorboard: folder for the records, or None.
    """

    def __init__(
        self,
        title: str,
        num_steps: int,
        describe: Callable[[dict[str, float]], str],
        tensorboard: Path | None,
    ) -> None:
        self.title = title
        self.num_steps = num_steps
        self.describe = describe
        self.tensorboard = tensorboard
        self.shown = ExitStack()
        self.shown_title = ""
        self.since = time.monotonic()  # of the last report
        self.update: Callable[[int, str], None] | None = None
        self.writer: Any = None

    def __enter__(self) -> Display:
        return self

    def __exit__(self, *_: object) -> None:
        self.shown.close()
        if self.writer:
            self.writer.close()

    def on_step(self, record: dict[str, float]) -> None:
        """Show a step."""
        step = int(record["step"])
        text = (
            f"loss {record['loss']:.3f}, {self.describe(record)}, {record['tokens_per_second']:.0f} tokens/s"
        )
        self._show(self.title, self.num_steps, step, f"{text}, {memory()}")
        if self.tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            # What a killed run wrote past its last checkpoint is done again: purge it.
            self.writer = self.writer or SummaryWriter(str(self.tensorboard), purge_step=step)
            for name in record.keys() - {"step"}:
                self.writer.add_scalar(name, record[name], step)

    def on_exchange(self, budget: int, exchange: Exchange) -> None:
        """Show an evaluation of the refinement, which makes `budget` of them at most."""
        kind = "probe" if None in (exchange.closed, exchange.opened) else "exchange"
        text = f"loss {exchange.change:+.5f}: {kind} {'kept' if exchange.accepted else 'dropped'}"
        self._show("Refining", budget, exchange.evaluations, text)

    def _show(self, title: str, total: int, done: int, text: str) -> None:
        if title != self.shown_title:  # one bar at a time
            self.shown.close()
            self.shown_title = title
            self.update = self.shown.enter_context(progress(title, total, began=self.since))
        assert self.update
        self.update(done, text)
        self.since = time.monotonic()
