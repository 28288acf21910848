"""Shows the steps of a training loop while it runs, and writes them for TensorBoard and Weights & Biases."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Collection
from contextlib import ExitStack, closing
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from consa.errors import ConsaError, missing_extra
from consa.progress import memory, progress
from consa.training.refinement import Exchange

Record = dict[str, float]
"""The numbers of one step, by name."""


class TensorBoard:
    """Writes records for TensorBoard, into `folder`/tensorboard."""

    def __init__(self, folder: Path, first_step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        # A resumed run repeats the steps after its checkpoint: drop what the killed one wrote of them.
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=first_step)

    def write(self, record: Record) -> None:
        """Write the numbers of one step."""
        for name in record.keys() - {"step"}:
            self._writer.add_scalar(name, record[name], int(record["step"]))

    def close(self) -> None:
        """Write what is buffered."""
        self._writer.close()


class Wandb:
    """Sends records to Weights & Biases, as a run of the project consa that has the name of `folder`."""

    def __init__(self, folder: Path, first_step: int) -> None:
        import wandb  # pyright: ignore[reportMissingImports]

        # One id per folder, so that a resumed run goes on; wandb drops the steps that it has already.
        path = hashlib.sha256(str(folder.resolve()).encode(errors="surrogateescape")).hexdigest()[:16]
        self._run: Any = wandb.init(project="consa", name=folder.name, dir=str(folder), id=path, resume="allow")

    def write(self, record: Record) -> None:
        """Send the numbers of one step."""
        self._run.log({name: value for name, value in record.items() if name != "step"}, step=int(record["step"]))

    def close(self) -> None:
        """Send what is buffered."""
        self._run.finish()


BOARDS = {"tensorboard": TensorBoard, "wandb": Wandb}
"""Where records can be written besides metrics.jsonl: the package, which is also an extra of consa, and its class."""


def check_boards(names: Collection[str]) -> None:
    """Raise ConsaError unless all of these are in `BOARDS` and installed."""
    for name in names:
        if name not in BOARDS:
            raise ConsaError(f"boards must be some of {', '.join(BOARDS)}, got {name!r}")
        if not find_spec(name):
            raise missing_extra(name, name)


class Display(ExitStack):
    """Shows steps and then exchanges on stderr as a loop reports them.

    Args:
        title: of the steps.
        num_steps: of the whole run, including those of earlier processes.
        describe: returns a text about a step's record, besides its loss.
        folder: of the run.
        boards: names in `BOARDS` of what else takes the records.
    """

    def __init__(
        self, title: str, num_steps: int, describe: Callable[[Record], str], folder: Path, boards: Collection[str]
    ) -> None:
        super().__init__()
        self.title, self.num_steps, self.describe = title, num_steps, describe
        self.folder, self.boards = folder, boards
        self._bar = self.enter_context(ExitStack())
        self._shown_title = ""
        self._since = time.monotonic()  # of the last report
        self._update: Callable[[int, str], None]
        self._open: list[TensorBoard | Wandb] = []

    def on_step(self, record: Record) -> None:
        """Show a step."""
        step, speed = int(record["step"]), record["tokens_per_second"]
        parts = (f"loss {record['loss']:.3f}", self.describe(record), f"{speed:.0f} tokens/s", memory())
        self._show(self.title, self.num_steps, step, ", ".join(filter(None, parts)))
        if not self._open:
            self._open = [self.enter_context(closing(BOARDS[name](self.folder, step))) for name in self.boards]
        for board in self._open:
            board.write(record)

    def on_exchange(self, budget: int, exchange: Exchange) -> None:
        """Show an evaluation of the refinement, which makes at most `budget` of them."""
        alone = None in (exchange.closed, exchange.opened)
        tried = "one unit tried alone" if alone else f"exchange {'kept' if exchange.accepted else 'undone'}"
        text = f"loss {exchange.change:+.5f}, {tried}"
        self._show("Refining", budget, exchange.evaluations, text)

    def _show(self, title: str, total: int, done: int, text: str) -> None:
        if title != self._shown_title:  # one bar at a time
            self._bar.close()
            self._shown_title = title
            self._update = self._bar.enter_context(progress(title, total, began=self._since))
        self._update(done, text)
        self._since = time.monotonic()
