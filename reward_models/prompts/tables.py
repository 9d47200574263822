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
_HEADER_WORDS = {
    *("prompt", "prompts", "text", "texts", "caption", "captions"),
    *("description", "descriptions", "instruction", "instructions"),
}
"""What columns of prompts are called. A line that has one of them as a cell is taken for a header."""
_DELIMITERS = {"\t": "TSV", ",": "CSV", ";": "CSV with semicolons"}
_EXAMPLE = '[{"question": "is there a cat ?", "tag": "Existence"}]'


def table_delimiter(path: Path, prompt_column: str | None = None) -> str | None:
    """
    Find the delimiter of a table by the file's first line that is not blank.

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): Name of the column of prompts, in any case. It may be the only column.

    Returns:
        `str`: `None` if the line is not a header. It is one if one of its cells is `prompt_column` or in [`PROMPT_COLUMNS`], or if
        one is another usual name of a column of prompts and all lines of the file have as many cells.
    """
    line = _first_line(path)
    names = {*_column_names(prompt_column), *PROMPT_COLUMNS}
    for delimiter in _DELIMITERS:
        cells = _cell_names(line, delimiter)
        if len(cells) > 1 and not names.isdisjoint(cells):
            return delimiter
    if prompt_column is not None and path.suffix.lower() != ".csv" and _cell_name(line) == _cell_name(prompt_column):
        # Prompts of a single column hold commas without quotes, but no tabs.
        return "\t"
    return next((delimiter for delimiter in _DELIMITERS if _has_header_word(path, line, delimiter)), None)


def is_regular_table(path: Path) -> bool:
    """Whether a file has a header that names prompts, and as many cells in every other line."""
    delimiter = table_delimiter(path)
    return delimiter is not None and _has_equal_lines(path, delimiter)


def check_no_header(path: Path) -> None:
    """
    Check that a text of one prompt per line does not begin with a header, which would be taken for a prompt.

    Raises:
        `ValueError`: If its first line that is not blank is the name of a column alone, or the header of a table in Markdown or
            with other cells between `|`.
    """
    line = _first_line(path)
    if _cell_name(line) in _HEADER_WORDS:
        raise ValueError(
            f"{path}: the first line {line[:80]!r} is the name of a column and not a prompt: --prompt_column {_cell_name(line)} "
            f"reads the prompts below it"
        )
    if _has_header_word(path, line, "|"):
        raise ValueError(
            f"{path}: the first line {line[:80]!r} is the header of a table with '|' between its cells, which is not read: save the "
            f"table as CSV or TSV. --prompt_column names its column of prompts"
        )


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
            The prompt has the name `prompt` instead of its own; a blank cell is `None`.

    Raises:
        `ValueError`: As in [`read_prompt_column`], or if a column is there twice.
    """
    table = _Table(path, prompt_column)
    place = table.prompt_place(prompt_column)
    own_name = table.header[place].strip()
    for where, cells, texts in table.texts():
        others = {name: text for name, text in texts.items() if name != own_name}
        yield where, {**others, "prompt": cells[place]}


def read_texts(path: Path) -> Iterator[tuple[str, dict[str, str | None]]]:
    """
    Read the rows of a CSV or TSV file that need not have a column of prompts.

    Yields:
        `tuple[str, dict[str, str | None]]`: The name of each row for error messages, and its cells by the names of the header. A
            blank cell is `None`.

    Raises:
        `ValueError`: If a line has another number of cells than the header, or if a column is there twice.
    """
    for where, _, texts in _Table(path, None).texts():
        yield where, texts


class _Table:
    """A table whose header is read at once, and whose rows are read later."""

    def __init__(self, path: Path, prompt_column: str | None) -> None:
        self.path = path
        self.delimiter = table_delimiter(path, prompt_column) or ("\t" if path.suffix.lower() == ".tsv" else ",")
        text = io.StringIO(read_text(path), newline="")
        self._reader = csv.reader(text, delimiter=self.delimiter, strict=True)
        with self._errors():
            self.header = next((cells for cells in self._reader if any(cell.strip() for cell in cells)), [])
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

    def texts(self) -> Iterator[tuple[str, list[str], dict[str, str | None]]]:
        """The name of each row that is not blank, its cells, and its cells by name, `None` for a blank one."""
        # Names as they are written, because a reward function has them as its arguments.
        names = [cell.strip() for cell in self.header]
        for name in filter(None, names):
            self.place(name.casefold())
        for where, cells in self.rows():
            yield where, cells, {name: cell.strip() or None for name, cell in zip(names, cells, strict=True) if name}

    @contextmanager
    def _errors(self) -> Iterator[None]:
        try:
            yield
        except csv.Error as error:
            raise ValueError(f"{self.path}, line {self._reader.line_num}: not a valid table ({error})") from error


def _first_line(path: Path) -> str:
    """The first line that is not blank and has not blank cells alone, or its beginning if it is long."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        lines = iter(lambda: file.readline(10_000), "")
        return next((line.strip("\n") for line in lines if line.strip(" \t\n,;")), "")


def _cell_name(cell: str) -> str:
    return cell.strip().strip('"').casefold()


def _cell_names(line: str, delimiter: str) -> list[str]:
    return [_cell_name(cell) for cell in line.split(delimiter)]


def _has_header_word(path: Path, line: str, delimiter: str) -> bool:
    """
    Whether one of several cells of a file's first line is a usual name of a column of prompts, and all lines have as many cells.
    The number of cells tells a table from prompts that hold commas.
    """
    cells = _cell_names(line, delimiter)
    return len(cells) > 1 and not _HEADER_WORDS.isdisjoint(cells) and _has_equal_lines(path, delimiter)


def _has_equal_lines(path: Path, delimiter: str) -> bool:
    """Whether a file has several lines, and all that are not blank have as many cells."""
    lines = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter)
    try:
        counts = [len(cells) for cells in lines if any(cell.strip() for cell in cells)]
    except csv.Error:
        return False
    return len(counts) > 1 and len(set(counts)) == 1


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
