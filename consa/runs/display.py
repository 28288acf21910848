"""Shows the steps of a training loop while it runs, and writes them for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from consa.errors import missing_extra
from consa.progress import memory, progress
from consa.training.refinement import Exchange

Record = dict[str, float]
"""The numbers of one step, by name."""


def board_of(folder: Path, *, wanted: bool) -> Path | None:
    """Return the folder for TensorBoard's files if they are wanted, after checking that it is installed."""
    if wanted and not find_spec("tensorboard"):
        raise missing_extra("tensorboard", "tensorboard")
    return folder / "tensorboard" if wanted else None


class Display(ExitStack):
    """Shows steps and then exchanges on stderr as a loop reports them.

    Args:
        title: of the steps.
        num_steps: of the whole run, including those of earlier processes.
        describe: returns a text about a step's record, besides its loss.
        board: folder for TensorBoard, or None.
    """

    def __init__(self, title: str, num_steps: int, describe: Callable[[Record], str], board: Path | None) -> None:
        super().__init__()
        self.title, self.num_steps, self.describe, self.board = title, num_steps, describe, board
        self._bar = self.enter_context(ExitStack())
        self._shown_title = ""
        self._since = time.monotonic()  # of the last report
        self._update: Callable[[int, str], None]
        self._writer: Any = None

    def on_step(self, record: Record) -> None:
        """Show a step."""
        step, speed = int(record["step"]), record["tokens_per_second"]
        parts = (f"loss {record['loss']:.3f}", self.describe(record), f"{speed:.0f} tokens/s", memory())
        self._show(self.title, self.num_steps, step, ", ".join(filter(None, parts)))
        if self.board:
            from torch.utils.tensorboard import SummaryWriter

            # A resumed run repeats the steps after its checkpoint: drop what the killed one wrote of them.
            self._writer = self._writer or self.enter_context(closing(SummaryWriter(str(self.board), purge_step=step)))
            for name in record.keys() - {"step"}:
                self._writer.add_scalar(name, record[name], step)

    def on_exchange(self, budget: int, exchange: Exchange) -> None:
        """Show an evaluation of the refinement, which makes at most `budget` of them."""
        kind = "probe" if None in (exchange.closed, exchange.opened) else "exchange"
        text = f"loss {exchange.change:+.5f}: {kind} {'kept' if exchange.accepted else 'dropped'}"
        self._show("Refining", budget, exchange.evaluations, text)

    def _show(self, title: str, total: int, done: int, text: str) -> None:
        if title != self._shown_title:  # one bar at a time
            self._bar.close()
            self._shown_title = title
            self._update = self._bar.enter_context(progress(title, total, began=self._since))
        self._update(done, text)
        self._since = time.monotonic()
