"""The measurements of several allocations as one table: on the terminal, as JSON, CSV and figure."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from consa.evaluation.intervals import Estimate
from consa.files import JsonObject, png, write_files

NOTHING = Estimate(math.nan, math.nan, math.nan)
"""Where nothing is compared."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """The measurements of one allocation. Differences are to the dense model's loss, paired by sequence.

    Attributes:
        name: of the allocation.
        kind: "dense", "all-SWA", "learned", "adapted" or "other".
        sparsity: achieved share of units on SWA.
        cache_bytes: size of its KV cache with `Table.cache_tokens` tokens, in bytes.
        loss: mean cross-entropy in nats, from `Table.start` on.
        difference: of `loss`.
        to_first: of `loss`, but to the loss of the first allocation that was given; NaN for that one and the ends.
        recovered: share of the gap from all-SWA (of the same window) to dense that is closed; NaN without a gap.
        by_position: loss in each bucket of positions, by the bucket's first position.
        differences_by_position: of `by_position`.
        by_domain: loss in each domain of the text, from `Table.start` on; empty if there is only one domain.
        differences_by_domain: of `by_domain`.
        retrieval: task -> prompt length in tokens -> share of answers found.
        tasks: lm-eval's "task metric" -> value.
    """

    name: str
    kind: str
    sparsity: float
    cache_bytes: int
    loss: Estimate
    difference: Estimate
    recovered: float
    by_position: dict[int, Estimate]
    differences_by_position: dict[int, Estimate]
    by_domain: dict[str, Estimate]
    differences_by_domain: dict[str, Estimate]
    to_first: Estimate = NOTHING
    retrieval: dict[str, dict[int, float]] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)

    @property
    def retrieved(self) -> float:
        """Mean over retrieval tasks and lengths; NaN if none was asked."""
        values = [value for lengths in self.retrieval.values() for value in lengths.values()]
        return sum(values) / len(values) if values else math.nan

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Line:
        """Make the line of `Table.to_record` again."""

        def estimates(kind: str, key: Callable[[str], Any]) -> JsonObject:
            names = (f"by_{kind}", f"differences_by_{kind}")
            return {name: {key(part): _estimate(value) for part, value in record[name].items()} for name in names}

        return cls(
            **{name: record[name] for name in ("name", "kind", "sparsity", "cache_bytes")},
            **{name: _estimate(record[name]) for name in ("loss", "difference")},
            **estimates("position", int),
            **estimates("domain", str),
            recovered=_number(record["recovered"]),
            to_first=_estimate(record["to_first"]) if "to_first" in record else NOTHING,  # older tables lack it
            retrieval={
                task: {int(length): _number(share) for length, share in lengths.items()}
                for task, lengths in record["retrieval"].items()
            },
            tasks={metric: _number(value) for metric, value in record["tasks"].items()},
        )


class Section(NamedTuple):
    """A part of the table as text: what its numbers are, headings, and rows that begin with an allocation's name."""

    title: str
    columns: list[str]
    rows: list[list[str]]


@dataclass(frozen=True, kw_only=True)
class Table:
    """The measurements of all allocations, dense first.

    Attributes:
        start: first position whose loss counts for `Line.loss`.
        cache_tokens: number of tokens in the caches of `Line.cache_bytes`.
        lines: one for each allocation.
        how: JSON-able record of model, text, settings, versions and hardware.
    """

    start: int
    cache_tokens: int
    lines: tuple[Line, ...]
    how: Mapping[str, Any]

    def line(self, name: str) -> Line:
        """The line of that name."""
        return {line.name: line for line in self.lines}[name]

    @property
    def has_intervals(self) -> bool:
        """Whether there are confidence intervals, which takes text of several documents."""
        return not math.isnan(self.lines[0].difference.low)

    def section(self, title: str, columns: list[str], row: Callable[[Line], list[str]]) -> Section:
        """A part with a row for each allocation."""
        return Section(title, ["allocation", *columns], [[line.name, *row(line)] for line in self.lines])

    def sections(self) -> Iterator[Section]:
        """The parts of the table for the terminal."""
        dense, section = self.lines[0], self.section
        difference = "with 95 % confidence intervals of the difference to dense"
        if not self.has_intervals:
            difference = "and the difference to dense, without confidence intervals because the text is one document"
        yield section(
            f"Held-out loss (nats) from position {self.start} on, {difference}; KV cache with {self.cache_tokens}"
            " tokens, as a share of the dense model's",
            ["sparsity", "cache", "loss", "to dense", "recovered"],
            lambda line: [
                f"{line.sparsity:.4f}",
                f"{line.cache_bytes / dense.cache_bytes:.1%}",
                f"{line.loss.mean:.4f}",
                str(line.difference),
                number(line.recovered),
            ],
        )
        yield section(
            "Loss above the dense model's (nats), by first position",
            [str(first) for first in dense.by_position],
            lambda line: [f"{estimate.mean:z.4f}" for estimate in line.differences_by_position.values()],
        )
        first, *others = [line for line in self.lines if line.kind not in ("dense", "all-SWA")] or [dense]
        if compared := [[line.name, str(line.to_first)] for line in others if not math.isnan(line.to_first.mean)]:
            yield Section(f"Loss above that of {first.name} (nats)", ["allocation", "difference"], compared)
        if dense.by_domain:
            yield section(
                f"Loss above the dense model's (nats) from position {self.start} on, by domain",
                [domain or "(none)" for domain in dense.by_domain],
                lambda line: [str(estimate) for estimate in line.differences_by_domain.values()],
            )
        if dense.retrieval:
            yield section(
                "Share of hidden answers found, by task and prompt length in tokens",
                [f"{task} {length}" for task, lengths in dense.retrieval.items() for length in lengths],
                lambda line: [number(share, 2) for lengths in line.retrieval.values() for share in lengths.values()],
            )
        if dense.tasks:
            yield section(
                "Tasks of lm-eval", list(dense.tasks), lambda line: [number(v, 4) for v in line.tasks.values()]
            )

    def write(self, folder: Path, name: str = "eval") -> list[Path]:
        """Write `name`.json, .csv and .png into the folder, and return their paths."""
        content = {
            f"{name}.json": (json.dumps(self.to_record(), indent=1, allow_nan=False) + "\n").encode(),
            f"{name}.csv": self.to_csv().encode(errors="backslashreplace"),
            f"{name}.png": self.figure(),
        }
        return write_files(folder, content)

    def to_record(self) -> JsonObject:
        """The whole table, JSON-able; numbers that are not finite are None."""
        return json.loads(json.dumps(_without_nan(asdict(self))))

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> Table:
        """Make the table of `to_record` again; other records raise LookupError, TypeError or ValueError."""
        lines = tuple(Line.from_record(line) for line in record["lines"])
        if not lines:
            raise ValueError("the table has no lines")
        return cls(start=record["start"], cache_tokens=record["cache_tokens"], lines=lines, how=record.get("how", {}))

    def to_csv(self) -> str:
        """A row for each allocation; columns are named like "by_position.512.mean"."""
        return csv_of([_flat(_without_nan(asdict(line))) for line in self.lines])

    def figure(self) -> bytes:
        """Plot loss above the dense model's by position, and each retrieval task's accuracy by length, as PNG."""
        from matplotlib.figure import Figure

        tasks = self.lines[0].retrieval
        drawing = Figure(figsize=(5.5 + 3.5 * len(tasks), 4), layout="constrained")
        by_position, *by_length = drawing.subplots(1, 1 + len(tasks), squeeze=False)[0]
        for line in self.lines:
            style: Any = {"marker": "."} | ({"color": "#888888", "ls": "--"} if line is self.lines[0] else {})
            estimates = list(line.differences_by_position.values())
            firsts = range(len(estimates))
            (drawn,) = by_position.plot(firsts, [e.mean for e in estimates], label=line.name, **style)
            low, high = ([getattr(e, end) for e in estimates] for end in ("low", "high"))
            by_position.fill_between(firsts, low, high, color=drawn.get_color(), alpha=0.15, linewidth=0)
            for axes, (task, lengths) in zip(by_length, line.retrieval.items(), strict=True):
                axes.plot(list(lengths), list(lengths.values()), **style)
                axes.set_xscale("log", base=2)
                axes.set_xticks(list(lengths), [str(length) for length in lengths])
                axes.set(
                    title=task, xlabel="prompt length, tokens", ylabel="share of answers found", ylim=(-0.03, 1.03)
                )
        by_position.set_xticks(range(len(self.lines[0].by_position)), [str(f) for f in self.lines[0].by_position])
        by_position.set(title="by position", xlabel="first position", ylabel="loss above dense, nats (95 % CI)")
        by_position.legend(frameon=False, fontsize="small")
        return png(drawing)


def number(value: float | None, digits: int = 3) -> str:
    """Format a number; a dash stands for None and NaN."""
    return "-" if value is None or math.isnan(value) else f"{value:.{digits}f}"


def csv_of(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows of the same columns as CSV."""
    text = io.StringIO()
    writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)


def _estimate(record: Mapping[str, float | None]) -> Estimate:
    return Estimate(*(_number(record[name]) for name in ("mean", "low", "high")))


def _flat(record: Mapping[Any, Any], prefix: str = "") -> JsonObject:
    flat: JsonObject = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
