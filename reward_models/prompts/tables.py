# SPDX-License-Identifier: Apache-2.0

"""Tables of prompts: CSV and TSV files with a header, whose questions are JSON lists in cells."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from alphagrpo_ext.files import read_text
from reward_models.prompts.tags import TAGS


PROMPT_COLUMNS = ("prompt", "text")
"""Names of the column of prompts in a table, in any case; the first that there is."""
_DELIMITERS = {"\t": "TSV", ",": "CSV", ";": "CSV with semicolons"}
_EXAMPLE = '[{"question": "is there a cat ?", "tag": "Existence"}]'


def table_delimiter(path: Path, prompt_column: str | None = None) -> str | None:
    """The delimiter of a table, if the file's first line is a header that names prompts."""
    with open(path, "rb") as file:
        line = file.readline(10_000).decode("utf-8-sig", errors="replace").strip("\r\n")
    for delimiter in _DELIMITERS:
        cells = [cell.strip().strip('"').casefold() for cell in line.split(delimiter)]
        if len(cells) > 1 and any(name in cells for name in _column_names(prompt_column)):
            return delimiter
    return None


def table_kind(path: Path, prompt_column: str | None = None) -> str:
    """What a table is called in messages, by its delimiter."""
    return _DELIMITERS.get(table_delimiter(path, prompt_column), "CSV or TSV")


def read_prompt_column(path: Path, prompt_column: str | None = None) -> list[tuple[str, str]]:
    """
    Read the column of prompts of a CSV or TSV file with a header.

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): Name of the column, in any case. [`PROMPT_COLUMNS`] by default.

    Returns:
        `list[tuple[str, str]]`: The name of each row for error messages, and its prompt.

    Raises:
        `ValueError`: If there is no such column, or if a line has another number of cells than the header. The message names the
            file and the line.
    """
    table = _Table(path, prompt_column)
    column = table.prompt_place(prompt_column)
    return [(where, cells[column]) for where, cells in table.rows()]


def has_question_columns(path: Path, prompt_column: str | None = None) -> bool:
    """Whether a CSV or TSV file has a column of questions."""
    return any(name in _Table(path, prompt_column).names for name in TAGS)


def read_table_rows(path: Path, prompt_column: str | None = None) -> Iterator[tuple[str, dict[str, Any]]]:
    """
    Read the rows of a CSV or TSV file.

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): As in [`read_prompt_column`].

    Returns:
        `Iterator[tuple[str, dict[str, Any]]]`: The name of each row for error messages, and the row: the prompt under the name
        that was asked for (`prompt` by default), lists under the names of columns of questions, and the texts of other cells,
        `None` for a blank one. Names of columns are in lower case.

    Raises:
        `ValueError`: As in [`read_prompt_column`], if a column that is read is there twice, or, as the rows are read, if a cell
            of questions is not a list in JSON. The message names the file, the line and the column.
    """
    table = _Table(path, prompt_column)
    prompt = table.prompt_place(prompt_column)
    places = {name: table.place(name) for name in table.names if name}
    return (
        (where, _row(cells, places, where) | {prompt_column or "prompt": cells[prompt]})
        for where, cells in table.rows()
    )


def read_text_rows(path: Path, prompt_column: str | None = None) -> Iterator[tuple[str, dict[str, str | None]]]:
    """
    Read the rows of a CSV or TSV file, and all of their cells as text.

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): As in [`read_prompt_column`].

    Yields:
        `tuple[str, dict[str, str | None]]`: The name of each row for error messages, and its cells by the names of the header.
            The prompt has the name `prompt`; a blank cell is `None`.

    Raises:
        `ValueError`: As in [`read_prompt_column`], or if a column is there twice.
    """
    table = _Table(path, prompt_column)
    prompt = table.prompt_place(prompt_column)
    # Names as they are written, because a reward function has them as its arguments.
    names = [cell.strip() for cell in table.header]
    for name in names:
        table.place(name.casefold())
    for where, cells in table.rows():
        others = {name: cell.strip() or None for name, cell in zip(names, cells, strict=True) if name}
        yield where, {**others, "prompt": cells[prompt]}


class _Table:
    """A table whose header is read at once, and whose rows are read later."""

    def __init__(self, path: Path, prompt_column: str | None) -> None:
        self.path = path
        self.delimiter = table_delimiter(path, prompt_column) or ("\t" if path.suffix.lower() == ".tsv" else ",")
        text = io.StringIO(read_text(path), newline="")
        self._reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        with self._errors():
            self.header = next(self._reader, [])
        self.names = [cell.strip().casefold() for cell in self.header]

    def place(self, name: str) -> int:
        """Index of a column."""
        if self.names.count(name) > 1:
            raise ValueError(f"{self.path} has the column '{name}' more than once; its first line is {self.header}")
        return self.names.index(name)

    def prompt_place(self, prompt_column: str | None) -> int:
        """Index of the column of prompts."""
        wanted = _column_names(prompt_column)
        name = next((name for name in wanted if name in self.names), None)
        if name is None:
            raise ValueError(
                f"{self.path} is a table without a column {' or '.join(map(repr, wanted))}; its first line is {self.header}. "
                f"--prompt_column names another"
            )
        return self.place(name)

    def rows(self) -> Iterator[tuple[str, list[str]]]:
        """The name of each row that is not blank, and its cells."""
        with self._errors():
            for cells in self._reader:
                if not any(cell.strip() for cell in cells):
                    continue
                where = f"{self.path}, line {self._reader.line_num}"
                if len(cells) != len(self.header):
                    raise ValueError(
                        f"{where} has {len(cells)} cells, but the header has {len(self.header)}: quote cells that hold "
                        f"{self.delimiter!r}"
                    )
                yield where, cells

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {self._reader.line_num}: not a valid table ({error})") from error


def _column_names(prompt_column: str | None) -> tuple[str, ...]:
    return PROMPT_COLUMNS if prompt_column is None else (prompt_column.strip().casefold(),)


def _row(cells: list[str], places: dict[str, int], where: str) -> dict[str, Any]:
    return {
        name: _questions(cells[place], f"{where}, column '{name}'") if name in TAGS else cells[place].strip() or None
        for name, place in places.items()
    }


def _questions(cell: str, where: str) -> list[Any]:
    if not cell.strip():
        raise ValueError(f"{where}: the cell is blank: write [] where there are no questions")
    try:
        questions = json.loads(cell)
    except (ValueError, RecursionError) as error:
        python = "; this is Python's form of a list, so write cells by json.dumps" if cell.startswith("[{'") else ""
        raise ValueError(
            f"{where}: the cell is not a JSON list of questions, such as {_EXAMPLE} ({error}): {cell[:80]!r}{python}"
        ) from error
    if not isinstance(questions, list):
        raise ValueError(f"{where}: the cell is not a JSON list of questions, such as {_EXAMPLE}: {cell[:80]!r}")
    return questions
