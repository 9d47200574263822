# SPDX-License-Identifier: Apache-2.0

"""A table as the runs behind each row, and its page."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmark_parts.tables import ResultTable
from table_parts.plan import Run


@dataclass(frozen=True)
class MeasuredRow:
    """
    A row of a table, or several that are read from the same files.

    Args:
        label (`str`): First cell.
        runs (`tuple[Run, ...]`): The runs that it needs.
        read (`Callable[[Sequence[Path]], list[list[str]]]`): From the folders of the runs to the lines of the row, with all cells.
    """

    label: str
    runs: tuple[Run, ...]
    read: Callable[[Sequence[Path]], list[list[str]]]

    def lines(self, num_columns: int) -> list[list[str]]:
        """The lines of the row, or one that says which runs are not finished."""
        missing = [run.name for run in self.runs if not run.finished]
        if missing:
            cells = [self.label, f"not finished: {', '.join(missing)}"]
            return [[*cells, *[""] * (num_columns - len(cells))]]
        return self.read([run.folder for run in self.runs])


def one_line(label: str, runs: Sequence[Run], cells: Callable[[Sequence[Path]], list[str]]) -> MeasuredRow:
    """A row of one line, whose cells behind the label are read from the folders of its runs."""
    return MeasuredRow(label, tuple(runs), lambda folders: [[label, *cells(folders)]])


@dataclass(frozen=True)
class MeasuredTable:
    """
    A table that is made of runs.

    Args:
        title (`str`): Its title.
        columns (`tuple[str, ...]`): Headers.
        rows (`tuple[MeasuredRow, ...]`): Its rows.
        note (`str`): What a reader needs to know beside the columns.
        draw (`Callable[[Path], None]`, *optional*): Draws a picture of finished runs into a PNG file.
    """

    title: str
    columns: tuple[str, ...]
    rows: tuple[MeasuredRow, ...]
    note: str
    draw: Callable[[Path], None] | None = None

    @property
    def runs(self) -> tuple[Run, ...]:
        return tuple(run for row in self.rows for run in row.runs)

    def to_markdown(self) -> str:
        """The table with its title and its note."""
        lines = [line for row in self.rows for line in row.lines(len(self.columns))]
        return f"{str(ResultTable(self.title, list(self.columns), lines, self.note)).strip()}\n"
