# SPDX-License-Identifier: Apache-2.0

"""Loading of prompts, with or without questions, from files, datasets, or the shapes world."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset

from alphagrpo_ext.files import read_json_lines
from alphagrpo_ext.shapes.prompts import build_dataset
from reward_models.prompts.questions import TAGS, PromptRecord, from_row


JSON_LINES_SUFFIXES = (".jsonl", ".json")
FAILED_SUFFIX = ".failed.jsonl"
"""Suffix of the file that lists the prompts that could not be decomposed. It is beside the file of records."""

_QUESTIONS = List({"question": Value("string"), "tag": Value("string"), "is_valid": Value("bool")})
EXTRA_FEATURES = {"task": Value("string"), "image": Image(), "category": Value("string")}
"""Optional columns of a prompt dataset."""
# Images may be paths, or structs of bytes and path.
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
            A JSON-lines file, a folder of such files (all `*.jsonl` except `*.failed.jsonl`, in alphabetical order), or the
            name of a dataset, whose split `"train"` is loaded. `None` for prompts of the shapes world. Rows are as in
            [`from_row`], with the optional columns `task`, `category` (strings) and `image`. In a file, `image` is a path
            relative to the folder of the file. In a dataset, it is a column of images or of paths.
        split (`str`):
            Split of the shapes world: `"train"` or `"evaluation"`.
        num_prompts (`int`):
            Number of prompts to draw from the shapes world.

    Returns:
        `datasets.Dataset`: The columns `prompt`, `semantic_questions` and `quality_questions`, and those of `task`, `image` and
        `category` that have values. Other columns are dropped, except in the shapes world.

    Raises:
        `FileNotFoundError`: If `file` is a path that does not exist.
        `ValueError`: If a row is malformed or if there are no rows. The message names the file and the line, or the dataset
        and the row.
    """
    if file is None:
        # The prompts belong to the task and not to a run, so they do not depend on the run's seed.
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
            A text file with one prompt per line, a JSON-lines file (`*.jsonl`, `*.json`) with a field `prompt`, or the name or
            folder of a dataset with a column `prompt`, whose split `"train"` is loaded. Text is in UTF-8.

    Returns:
        `list[str]`: The distinct prompts in order, without surrounding blanks. Blank lines of a text file are skipped.

    Raises:
        `FileNotFoundError`: If `source` is a path that does not exist.
        `ValueError`: If a prompt is missing, blank or not a string, or if there are no prompts. The message names the place.
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
    """Whether the source is the name of a dataset (`name` or `owner/name`) and not a path."""
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
        # `Dataset.to_json` writes an image with a known path in this form.
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
    """Check the questions of a dataset and convert them to one format. Images stay undecoded."""
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
        raise ValueError(f"{where}: prompt has an unpaired surrogate ({error})") from error
    return prompt.strip()
