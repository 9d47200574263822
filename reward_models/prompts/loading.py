# SPDX-License-Identifier: Apache-2.0

"""Prompts, with or without questions: from files, from datasets, or of the shapes world."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset

from alphagrpo_ext.shapes import build_dataset
from reward_models.prompts.questions import TAGS, PromptRecord, from_row, read_json_lines


JSON_LINES_SUFFIXES = (".jsonl", ".json")
FAILED_SUFFIX = ".failed.jsonl"
"""Ends the name of a file with prompts that could not be decomposed; it stands beside those that could."""

_QUESTIONS = List({"question": Value("string"), "tag": Value("string"), "is_valid": Value("bool")})
EXTRA_FEATURES = {"task": Value("string"), "image": Image(), "category": Value("string")}
"""Columns of a prompt dataset beside prompt and questions."""
# Images may be paths, or the structs of bytes and path in which files keep them.
_CASTABLE = {"task": Value, "image": (Image, Value, Mapping), "category": Value}


@dataclass(frozen=True)
class _FileRow:
    record: PromptRecord
    task: str | None
    image: str | None
    category: str | None


def load_prompts(file: str | None, split: str, num_prompts: int) -> Dataset:
    """
    Load prompts with their questions.

    Args:
        file (`str`, *optional*):
            Where they are: a JSON-lines file, a folder of such files (all `*.jsonl` in alphabetical order but for
            `*.failed.jsonl`), or the name of a dataset whose split `"train"` is taken. `None` takes prompts of the shapes
            world. A row is one of [`from_row`], with the optional columns `task`, `category` (strings) and `image`: in a
            file its path, seen from the file's folder; in a dataset a column of images or of paths.
        split (`str`):
            Of the shapes world: `"train"` or `"evaluation"`.
        num_prompts (`int`):
            Prompts drawn from the shapes world.

    Returns:
        `datasets.Dataset`: With the columns `prompt`, `semantic_questions` and `quality_questions`, and those of `task`,
        `image` and `category` that any row has. Other columns are dropped, except in the shapes world.

    Raises:
        `FileNotFoundError`: If `file` is a path and there is nothing.
        `ValueError`: If a row is malformed or there is none. The message names the file and the line, or the dataset and
        the row.
    """
    if file is None:
        # The draw of prompts is part of the task, not of a run, so it does not follow the run's seed.
        return build_dataset(split, num_prompts, seed=0)
    if _is_dataset_name(file):
        return _with_records(_load_train_split(file), file)
    rows = [_file_row(row, where, path.parent) for path in _files(file) for where, row in read_json_lines(path)]
    if not rows:
        raise ValueError(f"{file} has no records")
    dataset = _records_dataset([row.record for row in rows], file)
    columns = {name: [getattr(row, name) for row in rows] for name in EXTRA_FEATURES}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    if not columns:
        return dataset
    extras = Dataset.from_dict(columns, Features({name: EXTRA_FEATURES[name] for name in columns}))
    return concatenate_datasets([dataset, extras], axis=1)


def read_prompts(source: str) -> list[str]:
    """
    Read prompts without questions.

    Args:
        source (`str`):
            A file with one prompt a line, a JSON-lines file (`*.jsonl`, `*.json`) whose lines have a field `prompt`, or the
            name or folder of a dataset with a column `prompt`, whose split `"train"` is taken. Text is in UTF-8.

    Returns:
        `list[str]`: The prompts without surrounding blanks, each once, in order. Blank lines of a text file are skipped.

    Raises:
        `FileNotFoundError`: If `source` is a path and there is nothing.
        `ValueError`: If a prompt is missing, blank or no string, or if there is none. The message names it.
    """
    path = Path(source)
    if _is_dataset_name(source) or path.is_dir():
        dataset = _load_train_split(source)
        if "prompt" not in dataset.column_names:
            raise ValueError(f"dataset {source} has no column 'prompt'; its columns are {dataset.column_names}")
        found = [(f"dataset {source}, row {index}", prompt) for index, prompt in enumerate(dataset["prompt"])]
    elif path.suffix in JSON_LINES_SUFFIXES:
        found = [(where, _prompt_field(row, where)) for where, row in read_json_lines(path)]
    else:
        found = _text_lines(path)
    prompts = list(dict.fromkeys(_checked_prompt(prompt, where) for where, prompt in found))
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts


def _is_dataset_name(source: str) -> bool:
    """Whether this is the name of a dataset, as `name` or `owner/name`, and not a path."""
    if os.path.exists(source):
        return False
    parts = source.split("/")
    if len(parts) > 2 or "" in parts or source[0] in ".~" or Path(source).suffix in (*JSON_LINES_SUFFIXES, ".txt"):
        raise FileNotFoundError(f"there is no file or folder {source}")
    return True


def _load_train_split(name: str) -> Dataset:
    try:
        return load_dataset(name, split="train")
    except Exception as error:
        raise ValueError(
            f"{name} is neither a file nor a dataset with a split 'train' that can be loaded: {error}"
        ) from error


def _files(source: str) -> list[Path]:
    path = Path(source)
    if not path.is_dir():
        return [path]
    files = sorted(file for file in path.glob("*.jsonl") if not file.name.endswith(FAILED_SUFFIX))
    if not files:
        raise ValueError(f"folder {source} has no files *.jsonl")
    return files


def _file_row(row: Any, where: str, folder: Path) -> _FileRow:
    record = from_row(row, where)
    for name in ("task", "category"):
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{where}: {name} must be a string, got {row[name]!r}")
    image = _image_path(row.get("image"), where, folder)
    return _FileRow(record, row.get("task"), image, row.get("category"))


def _image_path(image: Any, where: str, folder: Path) -> str | None:
    if isinstance(image, Mapping):
        # As `Dataset.to_json` writes an image that it knows by its path.
        image = image.get("path") or image
    if image is None:
        return None
    if not isinstance(image, str):
        raise ValueError(f"{where}: image must be the path of a file, got {str(image)[:100]}")
    path = folder / image
    if not path.is_file():
        raise ValueError(f"{where}: there is no image {path}")
    return str(path)


def _with_records(dataset: Dataset, name: str) -> Dataset:
    """Check the questions of a dataset and bring them into one form; images stay as they are, undecoded."""
    missing = [column for column in ("prompt", *TAGS) if column not in dataset.column_names]
    if missing:
        raise ValueError(f"dataset {name} has no column '{missing[0]}'; its columns are {dataset.column_names}")
    rows = dataset.select_columns(["prompt", *TAGS])
    records = [from_row(row, f"dataset {name}, row {index}") for index, row in enumerate(rows)]
    if not records:
        raise ValueError(f"dataset {name} has no records")
    extras = dataset.select_columns([column for column in EXTRA_FEATURES if column in dataset.column_names])
    for column, feature in extras.features.items():
        if not isinstance(feature, _CASTABLE[column]):
            raise ValueError(
                f"dataset {name}: column '{column}' must be of type {EXTRA_FEATURES[column]}, but is {feature}"
            )
        if feature != EXTRA_FEATURES[column]:
            extras = extras.cast_column(column, EXTRA_FEATURES[column])
    checked = _records_dataset(records, f"dataset {name}")
    return concatenate_datasets([checked, extras], axis=1) if extras.column_names else checked


def _records_dataset(records: Sequence[PromptRecord], source: str) -> Dataset:
    prompts = [record.prompt for record in records]
    if len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError(f"{source}: prompts must be all text or all messages, but both occur")
    features = Features(dict.fromkeys(TAGS, _QUESTIONS))
    rows = [record.to_row() for record in records]
    questions = Dataset.from_dict({name: [row[name] for row in rows] for name in TAGS}, features)
    return concatenate_datasets([Dataset.from_dict({"prompt": prompts}), questions], axis=1)


def _prompt_field(row: Any, where: str) -> Any:
    if not isinstance(row, Mapping) or "prompt" not in row:
        raise ValueError(f"{where} has no field 'prompt'")
    return row["prompt"]


def _text_lines(path: Path) -> list[tuple[str, str]]:
    try:
        with open(path, encoding="utf-8-sig") as file:
            return [(f"{path}, line {number}", line) for number, line in enumerate(file, start=1) if line.strip()]
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not valid UTF-8 ({error})") from error


def _checked_prompt(prompt: Any, where: str) -> str:
    if not isinstance(prompt, str):
        raise ValueError(f"{where}: prompt must be a string, got {prompt!r}")
    if not prompt.strip():
        raise ValueError(f"{where}: prompt is blank")
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: prompt has half of a character ({error})") from error
    return prompt.strip()
