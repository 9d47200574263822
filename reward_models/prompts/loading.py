# SPDX-License-Identifier: Apache-2.0

"""Loading of prompts, with or without questions, from files, datasets, or the shapes world."""

from __future__ import annotations

import logging
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from datasets import Dataset, Features, Image, List, Value, concatenate_datasets, load_dataset
from pyarrow import ArrowException

from alphagrpo_ext.image_rows import RowImage, broken_images, refuse_broken_images, refuse_images_column
from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.shapes.prompts import build_dataset
from reward_models.prompts.files import (
    decompose_command,
    file_kind,
    is_dataset_name,
    prompt_field,
    read_one_prompt,
    read_plain_text,
    read_rows,
    read_saved_dataset,
)
from reward_models.prompts.questions import PromptRecord, check_own_tags, from_row, paints_image
from reward_models.prompts.tables import read_prompt_column, read_text_rows
from reward_models.prompts.tags import TAGS


logger = logging.getLogger(__name__)

FAILED_SUFFIX = ".failed.jsonl"
"""Suffix of the file that lists the prompts that could not be decomposed. It is beside the file of records."""

_QUESTIONS = List({"question": Value("string"), "tag": Value("string"), "is_valid": Value("bool")})
EXTRA_FEATURES = {"task": Value("string"), "image": Image(), "category": Value("string")}
"""Optional columns of a prompt dataset."""
JUDGED_FEATURES = {**EXTRA_FEATURES, "solution": Value("string")}
"""Those of a dataset whose other rows have questions: a row of a task that paints nothing has an answer instead."""
# Images may be paths, or structs of bytes and path.
_CASTABLE = {"task": Value, "image": (Image, Value, Mapping), "category": Value, "solution": Value}


@dataclass(frozen=True)
class _FileRow:
    record: PromptRecord
    task: str | None
    image: str | None
    category: str | None
    solution: str | None
    where: str


def load_prompts(
    file: str | None,
    split: str,
    num_prompts: int,
    skipped: list[str] | None = None,
    prompt_column: str | None = None,
) -> Dataset:
    """
    Load prompts with their questions.

    Args:
        file (`str`, *optional*):
            A file of JSON lines, of a JSON array, in CSV, TSV or Parquet, a folder of JSON-lines files (all `*.jsonl` except
            `*.failed.jsonl`, in alphabetical order), a folder that `save_to_disk` wrote or that holds Parquet files, or the name
            of a dataset, whose split `"train"` is loaded. `None` for prompts of the shapes world. Rows are as in [`from_row`],
            with the optional columns `task`, `category` (strings) and `image`. A row whose task paints nothing has no questions, and
            its answer in the column `solution`. In CSV and TSV, a cell holds a list of questions
            as JSON. In JSON, CSV and TSV, `image` is a path relative to the folder of the file. In a dataset, it is a column of
            images or of paths.
        split (`str`):
            Split of the shapes world: `"train"` or `"evaluation"`.
        num_prompts (`int`):
            Number of prompts to draw from the shapes world.
        skipped (`list[str]`, *optional*):
            If given, rows whose image cannot be read are left out, and what is broken about each is appended to the list.
        prompt_column (`str`, *optional*):
            Name of the column of prompts in `file`, if it is not `prompt`. A column `prompt` beside it is dropped.

    Returns:
        `datasets.Dataset`: The columns `prompt`, `semantic_questions` and `quality_questions`, and those of `task`, `image`,
        `category` and `solution` that have values. Other columns are dropped, except in the shapes world. Images are decoded by
        [`~alphagrpo_ext.images.read_image`].

    Raises:
        `FileNotFoundError`: If `file` is a path that does not exist.
        `ValueError`: If a row is malformed or its image cannot be read, or if there are no rows. The message names the file and
            the line, or the dataset and the row. If the file has another format, the message names it. If a row has no
            questions, the message has the command that makes some.
    """
    if file is None:
        # The prompts belong to the task and not to a run, so they do not depend on the run's seed.
        return build_dataset(split, num_prompts, seed=0)
    if (dataset := _dataset(file)) is not None:
        dataset = _with_records(_with_prompt_column(dataset, file, prompt_column), file, prompt_column)
        places = [f"dataset {file}, row {index}" for index in range(len(dataset))]
    else:
        rows = [
            _file_row(_with_prompt(row, where, prompt_column), where, path, prompt_column)
            for path in _files(file)
            for where, row in read_rows(path, prompt_column)
        ]
        if not rows:
            raise ValueError(f"{file} has no records")
        check_own_tags((row.where, row.record) for row in rows)
        dataset, places = _file_dataset(rows, file), [row.where for row in rows]
    return _with_readable_images(dataset, file, places, skipped)


def load_unjudged_prompts(file: str, skipped: list[str] | None = None, prompt_column: str | None = None) -> Dataset:
    """
    Load prompts for reward functions that ask no questions.

    Args:
        file (`str`):
            A file, a folder, or the name of a dataset, in the formats of [`load_prompts`] and of [`read_prompts`]. Other columns
            than the prompt may have any values; those of CSV and TSV are texts. `task`, `category` and `image` are as in
            [`load_prompts`].
        skipped (`list[str]`, *optional*), prompt_column (`str`, *optional*): As in [`load_prompts`].

    Returns:
        `datasets.Dataset`: The column `prompt`, and the other columns as they are. Every row of the file is in it, in order.

    Raises:
        `FileNotFoundError`: If `file` is a path that does not exist.
        `ValueError`: If a prompt is missing or malformed, if an image cannot be read, if a column has values of several types,
            or if there are no rows. The message names the file and the line, or the dataset and the row.
    """
    path = Path(file)
    if _holds_texts(path):
        _refuse_column_of_text(file, prompt_column)
        rows = [(str(text), {"prompt": read_one_prompt(text)}) for text in sorted(path.glob("*.txt"))]
        dataset = _columns_dataset(rows, file)
    elif (dataset := _dataset(file)) is not None:
        dataset = _with_prompt_column(dataset, file, prompt_column)
        if not len(dataset):
            raise ValueError(f"dataset {file} has no records")
        rows = [(f"dataset {file}, row {i}", {"prompt": prompt}) for i, prompt in enumerate(dataset["prompt"])]
        dataset = _with_extra_features(dataset, file, EXTRA_FEATURES)
    else:
        rows = [found for path in _files(file) for found in _unjudged_rows(path, prompt_column)]
        dataset = _columns_dataset(rows, file)
    for where, row in rows:
        _check_prompt(row["prompt"], where)
    return _with_readable_images(dataset, file, [where for where, _ in rows], skipped)


def painted_prompts(dataset: Dataset, source: str) -> Dataset:
    """
    The rows whose task paints an image, for an evaluation of images.

    Args:
        dataset (`datasets.Dataset`): From [`load_prompts`].
        source (`str`): What the message calls it.

    Raises:
        `ValueError`: If there are none.
    """
    if "task" not in dataset.column_names:
        return dataset
    kept = [index for index, name in enumerate(dataset["task"]) if paints_image({"task": name})]
    if not kept:
        raise ValueError(f"{source} has no row whose task paints an image: all of them have answers")
    return dataset if len(kept) == len(dataset) else dataset.select(kept)


def has_questions(dataset: Dataset) -> bool:
    """Whether a row of [`load_unjudged_prompts`] has a question that a judge could be asked."""
    columns = [dataset[name] for name in TAGS if name in dataset.column_names]
    return any(questions not in (None, "") and str(questions) != "[]" for column in columns for questions in column)


def _unjudged_rows(path: Path, prompt_column: str | None) -> Iterator[tuple[str, dict[str, Any]]]:
    kind = file_kind(path, prompt_column)
    if kind == "text":
        yield from ((where, {"prompt": line.strip()}) for where, line in _prompts_of_file(path, prompt_column))
        return
    for where, row in read_text_rows(path, prompt_column) if kind == "table" else read_rows(path):
        if kind == "json array" and prompt_column is None and isinstance(row, str):
            yield where, {"prompt": row}
            continue
        if kind != "table":
            row = _with_prompt(row, where, prompt_column)
        prompt = prompt_field(row, where)
        others = {name: value for name, value in row.items() if name not in ("prompt", "Prompt")}
        _check_extra_texts(row, where)
        if (image := _image_path(row.get("image"), where, path.parent)) is not None:
            others["image"] = image
        yield where, {"prompt": prompt, **others}


def _check_prompt(prompt: Any, where: str) -> None:
    try:
        prompt_text(prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error


def _columns_dataset(rows: Sequence[tuple[str, Mapping[str, Any]]], file: str) -> Dataset:
    """A dataset of all columns that a row has; where another row does not have one, its value is `None`."""
    if not rows:
        raise ValueError(f"{file} has no records")
    columns = []
    for name in dict.fromkeys(name for _, row in rows for name in row):
        values = [row.get(name) for _, row in rows]
        feature = EXTRA_FEATURES.get(name)
        if feature is not None and all(value is None for value in values):
            continue
        try:
            columns.append(Dataset.from_dict({name: values}, Features({name: feature}) if feature else None))
        except (ArrowException, TypeError, OverflowError) as error:
            raise ValueError(f"{file}: the values of '{name}' are not all of one type ({error})") from error
    return concatenate_datasets(columns, axis=1)


def _file_dataset(rows: Sequence[_FileRow], file: str) -> Dataset:
    dataset = _records_dataset([row.record for row in rows], file)
    columns = {name: [getattr(row, name) for row in rows] for name in JUDGED_FEATURES}
    columns = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    if not columns:
        return dataset
    extras = Dataset.from_dict(columns, Features({name: JUDGED_FEATURES[name] for name in columns}))
    return concatenate_datasets([dataset, extras], axis=1)


def _with_readable_images(dataset: Dataset, file: str, places: Sequence[str], skipped: list[str] | None) -> Dataset:
    """Check all images, and leave broken ones out if that is asked for."""
    if "image" not in dataset.column_names:
        return dataset
    # Last, because joining columns makes a `datasets.Image` of it.
    dataset = dataset.cast_column("image", RowImage())
    faults = {index: f"{places[index]}: {fault}" for index, fault in broken_images(dataset).items()}
    if skipped is None:
        refuse_broken_images(
            list(faults.values()),
            "Repair the file, or leave such rows out: recipes that train or evaluate have --skip_broken_rows",
        )
        return dataset
    if not faults:
        return dataset
    if len(faults) == len(dataset):
        raise ValueError(f"{file}: none of the {len(dataset)} images can be read; the first: {faults[0]}")
    skipped += faults.values()
    logger.warning(
        "%s: %d of %d rows are left out, because their image cannot be read.", file, len(faults), len(dataset)
    )
    return dataset.select([index for index in range(len(dataset)) if index not in faults])


def read_prompts(source: str, prompt_column: str | None = None) -> list[str]:
    """
    Read prompts without questions.

    Args:
        source (`str`):
            A file, a folder, or the name of a dataset with a column `prompt`, whose split `"train"` is loaded. The format of a
            file is found by its content: plain text with one prompt per line, JSON lines or a JSON array of texts or of objects
            with a field `prompt` or `Prompt`, CSV or TSV with a column `prompt` or `text` in any case, or Parquet. A folder holds
            a saved dataset, or files `*.txt` of one prompt each, in alphabetical order. Text is in UTF-8. A text whose first line
            is the name of a column is refused.
        prompt_column (`str`, *optional*): Name of the column or field of prompts, if it has another one.

    Returns:
        `list[str]`: The distinct prompts in order, without surrounding blanks. Blank lines of a text file are skipped.

    Raises:
        `FileNotFoundError`: If `source` is a path that does not exist.
        `ValueError`: If a prompt is missing, blank or not a string, or if there are no prompts. The message names the place. If
            a file has another format, the message names it.
    """
    path = Path(source)
    if _holds_texts(path):
        _refuse_column_of_text(source, prompt_column)
        found = [(str(file), read_one_prompt(file)) for file in sorted(path.glob("*.txt"))]
    elif (dataset := _dataset(source, folders=True)) is not None:
        dataset = _with_prompt_column(dataset, source, prompt_column)
        found = [(f"dataset {source}, row {index}", prompt) for index, prompt in enumerate(dataset["prompt"])]
    else:
        found = _prompts_of_file(path, prompt_column)
    prompts = list(dict.fromkeys(_checked_prompt(prompt, where) for where, prompt in found))
    if not prompts:
        raise ValueError(f"{source} has no prompts")
    return prompts


def _prompts_of_file(path: Path, prompt_column: str | None) -> list[tuple[str, Any]]:
    kind = file_kind(path, prompt_column)
    if kind == "table":
        return read_prompt_column(path, prompt_column)
    if kind == "text":
        _refuse_column_of_text(str(path), prompt_column)
        lines = enumerate(read_plain_text(path).split("\n"), start=1)
        return [(f"{path}, line {number}", line) for number, line in lines if line.strip()]
    takes_texts = kind == "json array" and prompt_column is None
    return [
        (
            where,
            row
            if takes_texts and isinstance(row, str)
            else prompt_field(_with_prompt(row, where, prompt_column), where),
        )
        for where, row in read_rows(path)
    ]


def _holds_texts(path: Path) -> bool:
    """Whether a path is a folder of files `*.txt`, and of nothing else."""
    files = [file for file in path.iterdir() if file.is_file()] if path.is_dir() else []
    return bool(files) and all(file.suffix == ".txt" for file in files if not file.name.startswith("."))


def _dataset(source: str, folders: bool = False) -> Dataset | None:
    """A dataset that is saved or has a name, and with `folders` also what any folder holds; `None` for other sources."""
    if is_dataset_name(source):
        return _load_train_split(source)
    if (saved := read_saved_dataset(source)) is not None:
        return saved
    path = Path(source)
    is_parquet = path.is_dir() and not any(path.glob("*.jsonl")) and any(path.rglob("*.parquet"))
    return _load_train_split(source) if is_parquet or folders and path.is_dir() else None


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
        names = sorted(file.name for file in path.iterdir())[:5]
        raise ValueError(f"folder {source} has no files *.jsonl, and no saved dataset; it holds {names or 'nothing'}")
    return files


def _with_prompt(row: Any, where: str, prompt_column: str | None) -> Any:
    """A row of a file whose field of that name, if there is one to look for, is called `prompt`."""
    if prompt_column in (None, "prompt") or not isinstance(row, Mapping):
        return row
    if prompt_column not in row:
        raise ValueError(f"{where} has no column '{prompt_column}' (prompt_column); its columns are {list(row)}")
    return {name: value for name, value in row.items() if name != prompt_column} | {"prompt": row[prompt_column]}


def _with_prompt_column(dataset: Dataset, name: str, prompt_column: str | None) -> Dataset:
    """A dataset with a column `prompt`, which may have another name before."""
    columns = dataset.column_names
    column = prompt_column or "prompt"
    if column not in columns:
        advice = " (prompt_column)" if prompt_column else ""
        hint = "" if prompt_column else ". --prompt_column names another column of prompts"
        raise ValueError(f"dataset {name} has no column '{column}'{advice}; its columns are {columns}{hint}")
    if column == "prompt":
        return dataset
    if "prompt" in columns:
        dataset = dataset.remove_columns("prompt")
    return dataset.rename_column(column, "prompt")


def _refuse_column_of_text(source: str, prompt_column: str | None) -> None:
    if prompt_column is not None:
        raise ValueError(f"{source} is plain text, which has no column '{prompt_column}' (prompt_column)")


def _refuse_prompts_alone(columns: Container[str], where: str, source: str, prompt_column: str | None) -> None:
    """Raise an error with the command that makes questions, if there are prompts and no questions."""
    if "prompt" in columns and not any(name in columns for name in TAGS):
        raise ValueError(
            f"{where} has a prompt and no questions. Let a language model write them, and give the file of --output instead: "
            f"{decompose_command(source, prompt_column)}"
        )


def _file_row(row: Any, where: str, path: Path, prompt_column: str | None) -> _FileRow:
    if isinstance(row, Mapping):
        if paints_image(row):
            _refuse_prompts_alone(row, where, str(path), prompt_column)
        if "prompt" not in row:
            raise ValueError(f"{where} has no 'prompt'; its fields are {list(row)}. --prompt_column names another")
    record = _record(row, where)
    refuse_images_column(row, where)
    _check_extra_texts(row, where)
    image = _image_path(row.get("image"), where, path.parent)
    solution = row.get("solution")
    text = None if solution is None else str(solution)
    return _FileRow(record, row.get("task"), image, row.get("category"), text, where)


def _record(row: Any, where: str) -> PromptRecord:
    """The record of a row; without questions if its task paints nothing that they could be about."""
    if not isinstance(row, Mapping) or paints_image(row):
        return from_row(row, where)
    _check_prompt(row["prompt"], where)
    return PromptRecord(row["prompt"], (), ())


def _check_extra_texts(row: Mapping[str, Any], where: str) -> None:
    for name in ("task", "category"):
        if not isinstance(row.get(name), str | None):
            raise ValueError(f"{where}: {name} must be a string, got {row[name]!r}")


def _image_path(image: Any, where: str, folder: Path) -> str | None:
    if isinstance(image, Mapping):
        # `Dataset.to_json` writes an image with a known path in this form.
        image = image.get("path") or image
    if image is None:
        return None
    if not isinstance(image, str):
        raise ValueError(f"{where}: image must be the path of a file, got {str(image)[:100]}")
    # Whether the file is there is seen when the images are checked.
    return image if "://" in image else str(folder / image)


def _with_records(dataset: Dataset, name: str, prompt_column: str | None) -> Dataset:
    """Check the questions of a dataset and convert them to one format. Images stay undecoded."""
    _refuse_prompts_alone(dataset.column_names, f"dataset {name}", name, prompt_column)
    missing = [column for column in TAGS if column not in dataset.column_names]
    if missing:
        raise ValueError(f"dataset {name} has no column '{missing[0]}'; its columns are {dataset.column_names}")
    refuse_images_column(dataset.column_names, f"dataset {name}")
    rows = dataset.select_columns([column for column in ("prompt", "task", *TAGS) if column in dataset.column_names])
    records = [_record(row, f"dataset {name}, row {index}") for index, row in enumerate(rows)]
    if not records:
        raise ValueError(f"dataset {name} has no records")
    check_own_tags((f"dataset {name}, row {index}", record) for index, record in enumerate(records))
    extras = dataset.select_columns([column for column in JUDGED_FEATURES if column in dataset.column_names])
    extras = _with_extra_features(extras, name, JUDGED_FEATURES)
    checked = _records_dataset(records, f"dataset {name}")
    return concatenate_datasets([checked, extras], axis=1) if extras.column_names else checked


def _with_extra_features(dataset: Dataset, name: str, wanted_features: Mapping[str, Any]) -> Dataset:
    """A dataset whose columns of these names, if it has them, are of these types."""
    for column, wanted in wanted_features.items():
        if column not in dataset.column_names:
            continue
        feature = dataset.features[column]
        if not isinstance(feature, _CASTABLE[column]):
            raise ValueError(f"dataset {name}: column '{column}' must be of type {wanted}, but is {feature}")
        if feature != wanted:
            dataset = dataset.cast_column(column, wanted)
    return dataset


def _records_dataset(records: Sequence[PromptRecord], source: str) -> Dataset:
    prompts = [record.prompt for record in records]
    if len({isinstance(prompt, str) for prompt in prompts}) > 1:
        raise ValueError(f"{source}: prompts must be all text or all messages, but both occur")
    features = Features(dict.fromkeys(TAGS, _QUESTIONS))
    rows = [record.to_row() for record in records]
    questions = Dataset.from_dict({name: [row[name] for row in rows] for name in TAGS}, features)
    return concatenate_datasets([Dataset.from_dict({"prompt": prompts}), questions], axis=1)


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
