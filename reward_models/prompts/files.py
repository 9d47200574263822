# SPDX-License-Identifier: Apache-2.0

"""
Rows in files of the formats that people have: JSON lines, a JSON array, Parquet, a saved dataset, CSV, TSV, and plain text.

The format is found by the content. What is none of these is refused with the name of what it is.
"""

from __future__ import annotations

import json
import os
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from alphagrpo_ext.file_formats import HEAD_SIZE, format_name
from alphagrpo_ext.files import read_json_lines, read_text
from reward_models.prompts.tables import (
    check_no_header,
    has_question_columns,
    is_regular_table,
    read_table_rows,
    table_delimiter,
    table_kind,
)


if TYPE_CHECKING:
    from datasets import Dataset


_FILE_SUFFIXES = (".jsonl", ".json", ".txt", ".csv", ".tsv", ".parquet", ".arrow", ".gz", ".zip", ".yaml", ".yml")

FileKind = Literal["json lines", "json array", "parquet", "table", "text"]


def file_kind(path: Path, prompt_column: str | None = None) -> FileKind:
    """
    Find the format of a file of prompts.

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): Name of the column of prompts in a table.

    Raises:
        `ValueError`: If the file has another format, or is a text that begins with a header. The message names the file and the
            format, and says what to do.
    """
    head = _head(path)
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
    if path.suffix.lower() in (".csv", ".tsv") or table_delimiter(path, prompt_column) is not None:
        return "table"
    if path.suffix.lower() in (".jsonl", ".json"):
        return "json lines"
    check_no_header(path)
    return "text"


def read_plain_text(path: Path) -> str:
    """
    Read a text in UTF-8 whose lines end with a line feed, a carriage return, or both. In the result, they end with a line feed.

    Raises:
        `ValueError`: If it is no text in UTF-8. The message names the file.
    """
    return read_text(path).replace("\r\n", "\n").replace("\r", "\n")


def read_one_prompt(path: Path) -> str:
    """
    Read a text file that holds one prompt.

    Raises:
        `ValueError`: If it is no text in UTF-8, or if it is a table of several prompts. The message names the file.
    """
    if file_kind(path) == "table" and is_regular_table(path):
        raise ValueError(f"{path} is a table of prompts, but in a folder of texts each file holds one prompt")
    return read_plain_text(path)


def is_dataset_name(source: str) -> bool:
    """
    Whether the source of prompts is the name of a dataset (`name` or `owner/name`) and not a path.

    Raises:
        `FileNotFoundError`: If it looks like a path, and does not exist.
    """
    if os.path.exists(source):
        return False
    parts = source.split("/")
    if len(parts) > 2 or "" in parts or source[0] in ".~" or Path(source).suffix in _FILE_SUFFIXES:
        raise FileNotFoundError(f"there is no file or folder {source}")
    return True


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
    Read the rows of a file: JSON lines, a JSON array, or a table with a column of questions (see [`read_table_rows`]).

    Args:
        path (`Path`): The file.
        prompt_column (`str`, *optional*): Name of the column of prompts in a table.

    Yields:
        `tuple[str, Any]`: The name of the row for error messages, and the row.

    Raises:
        `ValueError`: If the file has another format or no column of questions, or at the first line that is not valid. The
            message names the file and the line.
    """
    kind = file_kind(path, prompt_column)
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
    elif kind == "table" and has_question_columns(path, prompt_column):
        yield from read_table_rows(path, prompt_column)
    else:
        command = decompose_command(str(path), prompt_column)
        advice = {
            "table": f"the file is a {table_kind(path, prompt_column)} table without a column 'semantic_questions' or "
            f"'quality_questions', whose cells hold lists of questions as JSON. Let a language model write questions for its "
            f"prompts: {command}",
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
    if not is_saved and not (path.is_file() and format_name(_head(path)) == "a Parquet file"):
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


def _head(path: Path) -> bytes:
    with open(path, "rb") as file:
        return file.read(HEAD_SIZE)


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
