"""Progress on stderr: a line that changes on a terminal, and a plain line every ten seconds elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

SECONDS_BETWEEN_LINES = 10
WIDTH = 79


def note(text: str) -> None:
    """Print a line about what the program does now, on stderr."""
    print(text, file=sys.stderr, flush=True)


@contextmanager
def progress(title: str, total: int, *, began: float | None = None) -> Iterator[Callable[[int, str], None]]:
    """Show how far a long job has come, in one line of at most `WIDTH` characters.

    Args:
        title: name of the job.
        total: units of work in the whole job, including those that an earlier process finished.
        began: when this process began its first unit, by `time.monotonic`; the default is now.

    Yields:
        A function to call before the first unit or after one or more, with the number of units done so far and a text.
    """
    from rich.console import Console
    from rich.live import Live
    from rich.text import Text

    began = time.monotonic() if began is None else began
    first = last_line = None

    def line(done: int, text: str) -> str:
        nonlocal first
        first = max(0, done - 1) if first is None else first  # a resumed job does not begin at 0
        per_unit = (time.monotonic() - began) / max(1, done - first)
        left = f", {duration(per_unit * (total - done))} left" if done > first else ""
        return shortened(f"{title} {done}/{total}{left}: {text}")

    console = Console(stderr=True)
    if not sys.stderr.isatty() or console.is_dumb_terminal:

        def print_line(done: int, text: str) -> None:
            nonlocal last_line
            content, now = line(done, text), time.monotonic()
            if last_line is None or now - last_line >= SECONDS_BETWEEN_LINES or done == total:
                last_line = now
                note(content)

        yield print_line
        return
    live = Live(console=console, refresh_per_second=4)

    def redraw(done: int, text: str) -> None:
        live.update(Text(line(done, text), no_wrap=True, overflow="ellipsis"))
        live.start()  # only once there is something to show; later calls do nothing

    try:
        yield redraw
    finally:
        live.stop()


def shortened(line: str) -> str:
    """The line, cut to the width of a terminal."""
    return line if len(line) <= WIDTH else f"{line[: WIDTH - 3]}..."


def duration(seconds: float) -> str:
    """A time to wait in one or two units: 45s, 12m, 3h 05m."""
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes}m" if minutes else f"{rest}s"
    return f"{minutes // 60}h {minutes % 60:02}m"


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
