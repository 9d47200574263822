# SPDX-License-Identifier: Apache-2.0

"""Results of the benchmark as text, JSON and pictures."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmark_parts.timing import Spread


if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True)
class ResultTable:
    """
    One result of the benchmark.

    Args:
        title (`str`): Title of the table.
        columns (`list[str]`): Headers.
        rows (`list[list]`): Cells, which are texts, numbers or [`Spread`]s.
        note (`str`, *optional*): Note under the table.
        draw (`Callable[[ResultTable], Figure]`, *optional*): Draws the table with matplotlib.
    """

    title: str
    columns: list[str]
    rows: list[list[Any]]
    note: str = ""
    draw: Callable[[ResultTable], Figure] | None = None

    def __str__(self) -> str:
        cells = [[f"{c:.3g}" if isinstance(c, float) else str(c) for c in row] for row in self.rows]
        lines = [" | ".join(row) for row in (self.columns, ["---"] * len(self.columns), *cells)]
        return "\n".join([f"### {self.title}", "", *(f"| {line} |" for line in lines), "", self.note])

    def to_json(self) -> dict[str, Any]:
        rows = [[asdict(c) if isinstance(c, Spread) else c for c in row] for row in self.rows]
        return {"title": self.title, "columns": self.columns, "rows": rows, "note": self.note}

    def column(self, name: str) -> list[Any]:
        """The cells under a header."""
        place = self.columns.index(name)
        return [row[place] for row in self.rows]

    def save_picture(self, folder: Path) -> Path | None:
        """Draw the table into a PNG file. Returns `None` if it has no picture or matplotlib is not installed."""
        if self.draw is None:
            return None
        try:
            import matplotlib  # noqa: F401
        except ImportError:
            return None
        name = self.title.lower().replace(": ", "_").replace(", ", "_").replace("'", "").replace(" ", "_")
        path = folder / f"{name}.png"
        self.draw(self).savefig(path)
        return path


def bars_of(column: str) -> Callable[[ResultTable], Figure]:
    """Make a function that draws a column as one bar per row, with the smallest and largest value."""

    def draw(table: ResultTable) -> Figure:
        from matplotlib.figure import Figure

        labels = [str(row[0]) for row in table.rows]
        values = [v if isinstance(v, Spread) else Spread(v, v, v) for v in table.column(column)]
        figure = Figure(figsize=(7, 0.8 + 0.35 * len(labels)), layout="constrained")
        axes = figure.subplots()
        axes.barh(labels, [v.median for v in values], xerr=_errors(values), color="tab:blue")
        axes.invert_yaxis()
        axes.set(xlabel=column, title=table.title, xlim=(0, None))
        return figure

    return draw


def curves(table: ResultTable) -> Figure:
    """Draw time and tokens relative to the first value, with one panel per dimension."""
    from matplotlib.figure import Figure

    dimensions = [(name, list(rows)) for name, rows in groupby(table.rows, key=lambda row: row[0])]
    figure = Figure(figsize=(2.6 * len(dimensions), 2.9), layout="constrained")
    value, time, tokens = (table.columns.index(name) for name in ("value", "time to the first", "tokens to the first"))
    for axes, (name, rows) in zip(figure.subplots(1, len(dimensions), squeeze=False)[0], dimensions, strict=True):
        places = [row[value] for row in rows]
        times = [row[time] for row in rows]
        axes.errorbar(places, [t.median for t in times], yerr=_errors(times), marker="o", capsize=3, label="time")
        axes.plot(places, [row[tokens] for row in rows], linestyle="--", color="tab:gray", label="tokens")
        axes.set(xlabel=name, xlim=(0, None), ylim=(0, None))
        axes.set_xticks(places)
    figure.axes[0].set(ylabel="relative to the first")
    figure.axes[0].legend(frameon=False)
    figure.suptitle(table.title)
    return figure


def _errors(values: list[Spread]) -> list[list[float]]:
    return [[v.median - v.low for v in values], [v.high - v.median for v in values]]
