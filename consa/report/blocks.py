"""The parts of the page. The class of a part names the macro in page.html that renders it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Text(NamedTuple):
    """A paragraph."""

    text: str


class Heading(NamedTuple):
    """A heading within a section."""

    text: str


class Code(NamedTuple):
    """A command line."""

    text: str


class Details(NamedTuple):
    """A long text that is shown on demand."""

    title: str
    text: str


class Cards(NamedTuple):
    """Numbers that stand out, each after its label."""

    cards: list[tuple[str, str]]


class Figure(NamedTuple):
    """A chart, by its number among the page's charts."""

    number: int
    title: str


class Grid(NamedTuple):
    """Figures next to each other where the page is wide enough."""

    figures: list[Figure]
    small: bool = False


@dataclass(frozen=True)
class Table:
    """A table that scrolls by itself on a narrow page.

    Attributes:
        columns: their headings.
        rows: of as many cells; the first cell is the row's heading.
        caption: shown above.
        made: headings of rows that stand out.
        prose: whether the last column is prose.
    """

    columns: Sequence[str]
    rows: list[list[str]]
    caption: str = ""
    made: frozenset[str] = frozenset()
    prose: bool = False


Block = Text | Heading | Code | Details | Cards | Figure | Grid | Table


@dataclass(frozen=True)
class Section:
    """A section of the page; `run` is the number of the run whose section it is, for the slider."""

    title: str
    blocks: list[Block]
    run: int | None = None
