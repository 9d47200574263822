# SPDX-License-Identifier: Apache-2.0

"""
Rows in files of the formats that people have: JSON lines, a JSON array, Parquet, a saved dataset, CSV, TSV, and plain text.

The format is found by the content. What is none of these is refused with the name of what it is.
"""

from __future__ import annotations

import csv
import io
import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alphagrpo_ext.file_formats import HEAD_SIZE, format_name
from alphagrpo_ext.files import read_json_lines


if TYPE_CHECKING:
    from datasets import Dataset


PROMPT_COLUMNS = ("prompt", "text")
"""Names of the column of prompts in a table, in any case; the first that there is."""
_DELIMITERS = {"\t": "TSV", ",": "CSV", ";": "CSV with semicolons"}

FileKind = Literal["json lines", "json array", "parquet", "table", "text"]


def file_kind(path: Path) -> FileKind:
    """
    Find the format of a file of prompts.

    Raises:
        `ValueError`: If the file has another format. The message names the file and the format, and says what to do.
    """
    with open(path, "rb") as file:
        head = file.read(HEAD_SIZE)
    found = format_name(head)
    if found == "a Parquet file":
        return "parquet"
    if found == "empty":
        raise ValueError(f"{path} has no records: the file is empty")
    if found is not None:
        raise ValueError(f"{path}: the file is {found}")
    if path.suffix.lower() in (".yaml", ".yml", ".toml", ".py", ".arrow"):
        raise ValueError(f"{path}: a file {path.suffix} is not read as prompts: write JSON lines, one row a line")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    if start.startswith(b"[") and _is_json_array(path):
        return "json array"
    if start.startswith((b"{", b"[")):
        return "json lines"
    if path.suffix.lower() in (".csv", ".tsv") or _delimiter(path) is not None:
        return "table"
    return "json lines" if path.suffix in (".jsonl", ".json") else "text"


def decompose_command(source: str, prompt_column: str | None = None) -> str:
    """The command that writes questions for prompts without any: a file beside a file or folder, or in this folder."""
    path = Path(source)
    output = f"{path.stem if path.is_file() else path.name}_questions.jsonl"
    output = str(path.with_name(output)) if path.exists() else output
    column = "" if prompt_column in (None, "prompt") else f" --prompt_column {shlex.quote(prompt_column)}"
    return (
        f"python recipes/decompose_prompts.py --input {shlex.quote(source)}{column} --output {shlex.quote(output)} "
        f"--base_url http://localhost:8000/v1 --model NAME"
    )


def read_rows(path: Path, prompt_column: str | None = None) -> Iterator[tuple[str, Any]]:
    """
    Read the rows of a file of JSON.

    Args:
        path (`Path`): JSON lines, or an array of rows.
        prompt_column (`str`, *optional*): Name of the column of prompts, for the message about a file without questions.

    Yields:
        `tuple[str, Any]`: The name of the row for error messages, and the row.

    Raises:
        `ValueError`: If the file has another format, or at the first line that is not JSON. The message names the file and the
            line.
    """
    kind = file_kind(path)
    if kind == "json array":
        for index, row in enumerate(json.loads(path.read_text(encoding="utf-8-sig"))):
            yield f"{path}, entry {index}", row
    elif kind == "json lines":
        try:
            yield from read_json_lines(path)
        except ValueError as error:
            if fault := _array_fault(path):
                raise ValueError(f"{path}: neither JSON lines nor a valid JSON array ({fault})") from error
            if keys := _object_keys(path):
                raise ValueError(
                    f"{path} holds one JSON object over several lines, with the keys {keys}: write JSON lines, one row a line, or "
                    f"an array of rows"
                ) from error
            raise
    else:
        command = decompose_command(str(path), prompt_column)
        delimiter = _DELIMITERS.get(_delimiter(path, prompt_column), "CSV or TSV")
        advice = {
            "table": f"the file is a {delimiter} table, and questions have no place in a table: write JSON lines, or let a "
            f"language model write questions for its prompts: {command}",
            "text": f"the file is plain text: write JSON lines, or let a language model write questions for its prompts: "
            f"{command}",
            "parquet": "the file is a Parquet file, which is not read here",
        }
        raise ValueError(f"{path}: {advice[kind]}")


def read_saved_dataset(source: str) -> Dataset | None:
    """
    Read a Parquet file, or a folder that `save_to_disk` wrote.

    Args:
        source (`str`): A path. Of several splits, `"train"` is read.

    Returns:
        `datasets.Dataset`: `None` if the source is neither.

    Raises:
        `ValueError`: If it cannot be read, or if there is no split `"train"`.
    """
    path = Path(source)
    is_saved = (path / "state.json").is_file() or (path / "dataset_dict.json").is_file()
    if not is_saved and not (path.is_file() and file_kind(path) == "parquet"):
        return None
    from datasets import DatasetDict, load_dataset, load_from_disk

    try:
        dataset = load_from_disk(path) if is_saved else load_dataset("parquet", data_files=str(path), split="train")
    except Exception as error:
        kind = "folder of save_to_disk" if is_saved else "Parquet file"
        raise ValueError(f"{source}: the {kind} cannot be read ({type(error).__name__}: {error})") from error
    if isinstance(dataset, DatasetDict):
        if "train" not in dataset:
            raise ValueError(
                f"{source} has no split 'train', but {list(dataset)}: give the folder of one, e.g. "
                f"{os.path.join(source, next(iter(dataset), 'train'))}"
            )
        return dataset["train"]
    return dataset


def read_prompt_column(path: Path, prompt_column: str | None = None) -> list[tuple[str, str | None]]:
    """
    Read the column of prompts of a CSV or TSV file with a header.

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): Name of the column, in any case. [`PROMPT_COLUMNS`] by default.

    Returns:
        `list[tuple[str, str | None]]`: The name of each row for error messages, and its prompt.

    Raises:
        `ValueError`: If there is no such column, or if a line has another number of cells than the header. The message names the
            file and the line.
    """
    delimiter = _delimiter(path, prompt_column) or ("\t" if path.suffix.lower() == ".tsv" else ",")
    reader = csv.reader(io.StringIO(read_text(path), newline=""), delimiter=delimiter, strict=True)
    try:
        header = next(reader, [])
        names = [cell.strip().casefold() for cell in header]
        wanted = _column_names(prompt_column)
        name = next((name for name in wanted if name in names), None)
        if name is None:
            raise ValueError(
                f"{path} is a table without a column {' or '.join(map(repr, wanted))}; its first line is {header}. "
                f"--prompt_column names another"
            )
        if names.count(name) > 1:
            raise ValueError(f"{path} has the column '{name}' more than once; its first line is {header}")
        column, rows = names.index(name), []
        for cells in reader:
            if not any(cell.strip() for cell in cells):
                continue
            where = f"{path}, line {reader.line_num}"
            if len(cells) != len(header):
                raise ValueError(
                    f"{where} has {len(cells)} cells, but the header has {len(header)}: quote cells that hold "
                    f"{delimiter!r}"
                )
            rows.append((where, cells[column]))
    except csv.Error as error:
        raise ValueError(f"{path}, line {reader.line_num}: not a valid table ({error})") from error
    return rows


def read_text(path: Path) -> str:
    """
    Read a text file in UTF-8.

    Raises:
        `ValueError`: If it is not UTF-8. The message names the file.
    """
    try:
        # Line ends stay as they are, because a cell of a table may hold them.
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error})") from error


def prompt_field(row: Any, where: str) -> Any:
    """
    The field `prompt` or `Prompt` of a row of JSON.

    Raises:
        `ValueError`: If there is no such field.
    """
    for name in ("prompt", "Prompt"):
        if isinstance(row, Mapping) and name in row:
            return row[name]
    raise ValueError(f"{where} has no field 'prompt'")


def _is_json_array(path: Path) -> bool:
    """Whether a file is one JSON array. A file of JSON lines may begin with `[`, too."""
    try:
        return isinstance(json.loads(path.read_text(encoding="utf-8-sig")), list)
    except ValueError:
        return False


def _array_fault(path: Path) -> str | None:
    """What is wrong with a file that begins like a JSON array and whose first line is no JSON."""
    with open(path, encoding="utf-8-sig", errors="replace") as file:
        text = file.read()
    first, _, _ = text.lstrip().partition("\n")
    try:
        json.loads(first if first.startswith("[") else "0")
        return None
    except ValueError:
        pass
    try:
        json.loads(text)
    except ValueError as error:
        return str(error)
    return None


def _object_keys(path: Path) -> list[str]:
    try:
        value = json.loads(path.read_text(encoding="utf-8-sig"))
    except ValueError:
        return []
    return list(value)[:20] if isinstance(value, dict) else []


def _column_names(prompt_column: str | None) -> tuple[str, ...]:
    return PROMPT_COLUMNS if prompt_column is None else (prompt_column.strip().casefold(),)


def _delimiter(path: Path, prompt_column: str | None = None) -> str | None:
    """The delimiter of a table, if the file's first line is a header that names prompts."""
    with open(path, "rb") as file:
        line = file.readline(10_000).decode("utf-8-sig", errors="replace").strip("\r\n")
    for delimiter in _DELIMITERS:
        cells = [cell.strip().strip('"').casefold() for cell in line.split(delimiter)]
        if len(cells) > 1 and any(name in cells for name in _column_names(prompt_column)):
            return delimiter
    return None
