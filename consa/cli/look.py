"""Verbs that show what is there: one allocation, two side by side, a page about runs."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import Annotated

import typer

from consa.cli.options import number, text
from consa.cli.terminal import show
from consa.errors import ConsaError

WHICH = "Folder of a run, allocation.json, name of a published allocation, or folder that `consa convert` wrote."
Tokens = Annotated[int, number(help="Tokens in the KV cache whose size is shown (at least 1).")]


def inspect(
    allocation: Annotated[str, typer.Argument(metavar="ALLOCATION", help=WHICH)],
    *,
    tokens: Tokens = 32768,
    head_dim: Annotated[
        int | None, number(help="Head dimension, for the size of the KV cache. Default: as the folder says.")
    ] = None,
) -> None:
    """Show an allocation: a picture, window, sinks, sparsity, KV cache, margin, and where it came from."""
    _check_positive(tokens=tokens, head_dim=head_dim)
    from consa import picture
    from consa.report import facts

    known = facts.of(allocation, tokens=tokens, head_dim=head_dim)
    print(picture.characters(facts.read(allocation)[1], symbols=_symbols()))
    print()
    for label, value in known:
        print(f"{label:<10}{value}")


def compare(
    first: Annotated[str, typer.Argument(metavar="A", help=WHICH)],
    second: Annotated[str, typer.Argument(metavar="B", help="The same, of another allocation for the same model.")],
    *,
    tokens: Tokens = 32768,
) -> None:
    """Compare two allocations: settings, overlap, the units that differ, and their losses if runs measured them."""
    _check_positive(tokens=tokens)
    from consa.report import facts

    rows = list(facts.compared(first, second, tokens=tokens))
    show(["", "A", "B"], rows)
    print(facts.difference(first, second))


def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Folders of learn, adapt, eval or bench, or allocations.")
    ],
    *,
    out: Annotated[Path, text("FILE", "File for the page.")] = Path("report.html"),
    behaviour: Annotated[
        Path | None, text("FILE", "File that `consa behaviour` wrote, for runs without one of their own.")
    ] = None,
    figures: Annotated[
        Path | None, text("FOLDER", "Folder for every chart as SVG and PNG. Default: none are written.")
    ] = None,
) -> None:
    """Write one HTML page about runs: allocations, losses, behaviour, memory and speed. It needs no network."""
    from consa.behaviour.record import Behaviour
    from consa.report import page

    words = ["consa", "report", *map(str, runs), "--out", str(out)]
    words += ["--behaviour", str(behaviour)] if behaviour else []
    loaded = Behaviour.load(behaviour) if behaviour else None
    for path in page.write(runs, out, command=shlex.join(words), behaviour=loaded, figures=figures):
        print(path)


def _check_positive(**values: int | None) -> None:
    for name, value in values.items():
        if value is not None and value < 1:
            raise ConsaError(f"{name} must be an integer >= 1, got {value}")


def _symbols() -> str:
    """Block characters where the output can show them."""
    from consa.picture import ASCII, UNICODE

    try:
        UNICODE.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return ASCII
    return UNICODE
