"""What was measured of several allocations, as one table: on the terminal, as JSON, CSV and figure."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from consa.evaluation.intervals import Estimate
from consa.files import png, write_atomically


@dataclass(frozen=True, kw_only=True)
class Line:
    """One allocation.

    Attributes:
        name: of the allocation.
        kind: "dense", "all-SWA", "learned", or "other".
        sparsity: achieved share of units on SWA.
        cache_bytes: its KV cache.
        loss: mean cross-entropy in nats, from `Table.start` on.
        difference: of that loss to the dense model's, paired by sequence.
        recovered: share of the gap from all-SWA (of the same window) to dense that it closes; NaN without a gap.
        by_position: loss in each bucket of positions, by its first position.
        differences_by_position: those of the same buckets to the dense model, paired.
        by_domain: loss in each of the text's domains, from `Table.start` on; empty if there is only one.
        differences_by_domain: those to the dense model, paired.
        retrieval: task -> length in tokens -> share of answers found.
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
    retrieval: dict[str, dict[int, float]] = field(default_factory=dict)
    tasks: dict[str, float] = field(default_factory=dict)

    @property
    def retrieved(self) -> float:
        """Mean over retrieval tasks and lengths; NaN if none was asked."""
        values = [value for lengths in self.retrieval.values() for value in lengths.values()]
        return sum(values) / len(values) if values else math.nan


@dataclass(frozen=True, kw_only=True)
class Table:
    """All allocations, dense first.

    Attributes:
        start: first position that counts for `Line.loss`.
        cache_tokens: in the caches of `Line.cache_bytes`.
        lines: one per allocation.
        how: JSON-able record of model, text, settings, versions and hardware.
    """

    start: int
    cache_tokens: int
    lines: tuple[Line, ...]
    how: dict[str, Any]

    def line(self, name: str) -> Line:
        """The line of that name."""
        return next(line for line in self.lines if line.name == name)

    def sections(self) -> Iterator[tuple[str, list[str], list[list[str]]]]:
        """Title, columns and rows of each part for the terminal, all as text."""
        dense = self.lines[0]

        def section(
            title: str, columns: list[str], row: Callable[[Line], list[str]]
        ) -> tuple[str, list[str], list[list[str]]]:
            return title, ["allocation", *columns], [[line.name, *row(line)] for line in self.lines]

        yield section(
            f"Held-out loss (nats) from position {self.start} on, with 95 % confidence intervals of the difference to"
            f" dense; KV cache at {self.cache_tokens} tokens",
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
            "Loss beyond the dense model's (nats), by first position",
            [str(first) for first in dense.by_position],
            lambda line: [f"{estimate.mean:.4f}" for estimate in line.differences_by_position.values()],
        )
        if dense.by_domain:
            yield section(
                f"Loss beyond the dense model's (nats) from position {self.start} on, by domain",
                [domain or "(none)" for domain in dense.by_domain],
                lambda line: [str(estimate) for estimate in line.differences_by_domain.values()],
            )
        if dense.retrieval:
            yield section(
                "Share of hidden answers found, by task and tokens of text",
                [f"{task} {length}" for task, lengths in dense.retrieval.items() for length in lengths],
                lambda line: [f"{v:.2f}" for lengths in line.retrieval.values() for v in lengths.values()],
            )
        if dense.tasks:
            yield section(
                "lm-eval",
                list(dense.tasks),
                lambda line: [f"{value:.4f}" for value in line.tasks.values()],
            )

    def write(self, folder: Path, name: str = "eval") -> list[Path]:
        """Write `name`.json, .csv and .png into the folder; returns their paths.

        Raises:
            ConsaError: the folder does not take them.
        """
        content = {
            ".json": self.to_json().encode(),
            ".csv": self.to_csv().encode(errors="backslashreplace"),
            ".png": self.figure(),
        }
        for suffix, data in content.items():
            write_atomically(folder / f"{name}{suffix}", data)
        return [folder / f"{name}{suffix}" for suffix in content]

    def to_json(self) -> str:
        """All of it; what is not a number there is null."""
        return json.dumps(_without_nan(asdict(self)), indent=1, allow_nan=False) + "\n"

    def to_csv(self) -> str:
        """A row per allocation; columns such as "by_position.512.mean"."""
        rows = [_flat(_without_nan(asdict(line))) for line in self.lines]
        text = io.StringIO()
        writer = csv.DictWriter(text, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        return text.getvalue()

    def figure(self) -> bytes:
        """Loss beyond the dense model's by position, and each retrieval task's accuracy by length, as PNG."""
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
                axes.set(title=task, xlabel="tokens of text", ylabel="answers found", ylim=(-0.03, 1.03))
        by_position.set_xticks(
            range(len(self.lines[0].by_position)), [str(f) for f in self.lines[0].by_position]
        )
        by_position.set(
            title="by position", xlabel="from position", ylabel="loss beyond dense, nats (95 % CI)"
        )
        by_position.legend(frameon=False, fontsize="small")
        return png(drawing)


def number(value: float | None) -> str:
    """A number for people; a dash where there is none."""
    return "-" if value is None or math.isnan(value) else f"{value:.3f}"


def _without_nan(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_nan(part) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [_without_nan(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _flat(record: dict[Any, Any], prefix: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        flat |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return flat
