"""Progress on stderr: a live bar on a terminal, and a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10


def note(text: str) -> None:
    """Print a line about what the program does now, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, *, began: float | None = None) -> Iterator[Callable[[int, str], None]]:
    """Show how far a long job has come.

    Args:
        title: name of the job.
        total: units of work in the whole job, including those that an earlier process finished.
        began: when this process began its first unit, by `time.monotonic`; the default is now.

    Yields:
        A function to call after one or more units, with the number of units done so far and a text about them.
    """
    from rich.console import Console, Group
    from rich.live import Live
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
    from rich.text import Text

    began = time.monotonic() if began is None else began
    first = last_line = None

    def time_left(done: int) -> str:
        nonlocal first
        first = done - 1 if first is None else first  # a resumed job does not begin at 0
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
        live.start()  # only once there is something to show; later calls do nothing

    try:
        yield redraw
    finally:
        live.stop()


def memory() -> str:
    """The most memory that this process has used so far: the GPU's if it uses one, else main memory."""
    import torch

    if torch.cuda.is_initialized():
        return f"{torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
    try:
        import resource
    except ImportError:  # Windows
        import psutil  # installed with accelerate

        peak = psutil.Process().memory_info().peak_wset  # pyright: ignore[reportAttributeAccessIssue]
    else:
        unit = 1 if sys.platform == "darwin" else 1024
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return f"{peak / 2**30:.1f} GiB"
