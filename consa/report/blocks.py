"""The parts of the page; page.html says how each becomes HTML."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field


class Block:
    """A part of a section. Its class name is the name of its macro in page.html."""

    @property
    def macro(self) -> str:
        """Name of the macro that renders it."""
        return type(self).__name__.lower()


@dataclass(frozen=True)
class Text(Block):
    """A paragraph."""

    text: str


@dataclass(frozen=True)
class Heading(Block):
    """A heading within a section."""

    text: str


@dataclass(frozen=True)
class Code(Block):
    """A command line."""

    text: str


@dataclass(frozen=True)
class Details(Block):
    """A long text that is shown on demand."""

    title: str
    text: str


@dataclass(frozen=True)
class Cards(Block):
    """Numbers that stand out, each with its label."""

    cards: list[tuple[str, str]]


@dataclass(frozen=True)
class Figure(Block):
    """A chart, by its number among the page's charts."""

    number: int
    title: str


@dataclass(frozen=True)
class Grid(Block):
    """Figures next to each other where the page is wide enough; more of them if they are small."""

    figures: list[Figure]
    small: bool = False


@dataclass(frozen=True)
class Table(Block):
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
    made: frozenset[str] = field(default_factory=frozenset[str])
    prose: bool = False


@dataclass(frozen=True)
class Section:
    """A section of the page.

    Attributes:
        title: its heading.
        blocks: its parts.
        run: number of the run that it belongs to; the slider shows the sections of one run. None for all runs.
    """

    title: str
    blocks: list[Block]
    run: int | None = None
