# SPDX-License-Identifier: Apache-2.0

"""Prompts with their yes/no questions: the record format, its validation, and its loading."""

import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.registry import UnknownNameError
from reward_models.prompts.files import read_rows
from reward_models.prompts.tags import TAGS, OwnTags, read_tag


@dataclass(frozen=True)
class Question:
    """
    An atomic yes/no question about an image. The answer "yes" means that the image is right.

    Args:
        question (`str`):
            The question.
        tag (`str`):
            Topic of the question, by which answers are logged: one of `SEMANTIC_TAGS` or `QUALITY_TAGS`, or another short name.
        is_valid (`bool`, *optional*, defaults to `True`):
            Whether the question is scored. A faulty question stays in the record but is not scored.
    """

    question: str
    tag: str
    is_valid: bool = True


@dataclass(frozen=True)
class PromptRecord:
    """
    A prompt with its questions.

    Args:
        prompt (`str` or `list[dict]`):
            The prompt, as text or as chat messages.
        semantic_questions (`tuple[Question, ...]`):
            Questions whether the image shows what the prompt asks for.
        quality_questions (`tuple[Question, ...]`):
            Questions whether the image is well made.
    """

    prompt: str | list[dict[str, Any]]
    semantic_questions: tuple[Question, ...]
    quality_questions: tuple[Question, ...]

    @property
    def valid_semantic_questions(self) -> tuple[Question, ...]:
        """The semantic questions that are scored."""
        return tuple(question for question in self.semantic_questions if question.is_valid)

    @property
    def valid_quality_questions(self) -> tuple[Question, ...]:
        """The quality questions that are scored."""
        return tuple(question for question in self.quality_questions if question.is_valid)

    @property
    def tags(self) -> list[tuple[str, str]]:
        """Field and tag of each question that is scored."""
        sides = zip(TAGS, (self.valid_semantic_questions, self.valid_quality_questions), strict=True)
        return [(field, question.tag) for field, questions in sides for question in questions]

    def to_row(self) -> dict[str, Any]:
        """The record as a dataset row, which [`from_row`] reads."""
        questions = {field: [asdict(question) for question in getattr(self, field)] for field in TAGS}
        return {"prompt": self.prompt, **questions}


def from_row(row: Mapping[str, Any], where: str = "row") -> PromptRecord:
    """
    Build a record from a dataset row and check every field.

    Args:
        row (`Mapping[str, Any]`):
            A row with the keys `prompt`, `semantic_questions` and `quality_questions`; other keys are ignored. Each of the
            last two is a list of `{"question": str, "tag": str, "is_valid": bool?}`, or such a list as a JSON string. One of
            them may be empty.
        where (`str`, *optional*, defaults to `"row"`):
            Name of the row for error messages, e.g. `"row 3"`.

    Returns:
        `PromptRecord`: The record, including questions that are not valid.

    Raises:
        `ValueError`: If the row is malformed or has no valid question. The message names the row and the field.
    """
    if not isinstance(row, Mapping):
        raise ValueError(f"{where}: expected a mapping, got {type(row).__name__}")
    missing = [field for field in ("prompt", *TAGS) if field not in row]
    if missing:
        raise ValueError(f"{where} has no '{missing[0]}'; its fields are {list(row)}")
    prompt = row["prompt"]
    try:
        prompt_text(prompt)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    record = PromptRecord(prompt, **{field: _parse_questions(row[field], field, where) for field in TAGS})
    if not record.valid_semantic_questions and not record.valid_quality_questions:
        raise ValueError(f"{where}: semantic_questions and quality_questions have no valid question between them")
    return record


def paints_image(row: Mapping[str, Any]) -> bool:
    """Whether the task that a row names, if it names one, paints an image, which questions can be about."""
    name = row.get("task")
    if not isinstance(name, str):
        return True
    # Rows of the reward server and of most files name none, and need no tasks.
    from alphagrpo_ext.rollout.task import TASKS

    try:
        return TASKS.get(name).can_paint
    except UnknownNameError:
        # The trainer says which tasks there are.
        return True


def check_own_tags(records: Iterable[tuple[str, PromptRecord]]) -> None:
    """
    Check that few tags of a file or dataset are not known ones, and warn of those that look like known ones; see [`OwnTags`].

    Args:
        records (`Iterable[tuple[str, PromptRecord]]`): The name of each row for messages, and its record.

    Raises:
        `ValueError`: If there are too many. The message names the row.
    """
    own_tags = OwnTags()
    for where, record in records:
        try:
            own_tags.add(record.tags, where)
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error


def load_records(path: str | PathLike[str]) -> list[PromptRecord]:
    """
    Load records from a file of JSON lines, whose blank lines are skipped, or of a JSON array.

    Args:
        path (`str` or `PathLike`):
            The file, in UTF-8, with one row (see [`from_row`]) per line.

    Raises:
        `ValueError`: If a line is not a valid row, or if there is none. The message names the file and the line. If the file has
            another format, the message names it.
    """
    records = [(where, from_row(row, where)) for where, row in read_rows(Path(path))]
    if not records:
        raise ValueError(f"{path} has no records")
    check_own_tags(records)
    return [record for _, record in records]


def validate_dataset(
    dataset: Iterable[Mapping[str, Any]],
    validate_question: Callable[[str], None] | None = None,
    own_tags: OwnTags | None = None,
) -> None:
    """
    Check every row of a dataset, so that a malformed row is found before training. Rows of a task that paints no image have no
    questions, and are passed over.

    Args:
        dataset (`datasets.Dataset`, `datasets.IterableDataset` or `Iterable[Mapping]`):
            The rows (see [`from_row`]). A streamed dataset is read to its end.
        validate_question (`Callable[[str], None]`, *optional*):
            Raises a `ValueError` for a question that cannot be answered. It is called for every valid question.
        own_tags ([`OwnTags`], *optional*):
            The tags of the run that are not known ones. The dataset's are added. By default the dataset is looked at by itself.

    Raises:
        `ValueError`: At the first malformed row. The message names its 0-based index.
    """
    own_tags = OwnTags() if own_tags is None else own_tags
    columns = getattr(dataset, "column_names", None)
    if columns and all(field in columns for field in ("prompt", *TAGS)):
        # Image columns stay undecoded.
        dataset = dataset.select_columns([name for name in ("prompt", "task", *TAGS) if name in columns])
    for index, row in enumerate(dataset):
        if not paints_image(row):
            continue
        record = from_row(row, f"row {index}")
        prompt = repr(str(record.prompt)[:80])
        try:
            # A stream is handed over row by row, so the index says little to a reader.
            own_tags.add(record.tags, f"prompt {prompt}")
            if validate_question is not None:
                for question in record.valid_semantic_questions + record.valid_quality_questions:
                    validate_question(question.question)
        except ValueError as error:
            raise ValueError(f"row {index} ({prompt}): {error}") from error


def _parse_questions(value: Any, field: str, where: str) -> tuple[Question, ...]:
    if isinstance(value, str):
        try:
            value = json.loads(value)
        except json.JSONDecodeError as error:
            raise ValueError(f"{where}: {field} is a string but not valid JSON ({error})") from error
    if not isinstance(value, (list, tuple)):
        hint = "; declare the column as a list of structs" if isinstance(value, Mapping) else ""
        raise ValueError(f"{where}: {field} must be a list of questions, got {type(value).__name__}{hint}")
    return tuple(_parse_question(item, field, f"{where}: {field}[{index}]") for index, item in enumerate(value))


def _parse_question(item: Any, field: str, where: str) -> Question:
    if not isinstance(item, Mapping):
        raise ValueError(f"{where} must be a mapping with 'question' and 'tag', got {type(item).__name__}")
    for key in ("question", "tag"):
        # `datasets` fills missing keys with None.
        if item.get(key) is None:
            raise ValueError(f"{where} has no '{key}'")
        if not isinstance(item[key], str):
            raise ValueError(f"{where}: '{key}' must be a string, got {item[key]!r}")
    question = item["question"].strip()
    is_valid = True if item.get("is_valid") is None else item["is_valid"]
    if not question:
        raise ValueError(f"{where}: 'question' is blank")
    tag = read_tag(field, item["tag"], where)
    try:
        question.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{where}: the text is not valid Unicode: it holds half a surrogate pair") from error
    if not isinstance(is_valid, bool):
        raise ValueError(f"{where}: 'is_valid' must be true or false, got {is_valid!r}")
    return Question(question, tag, is_valid)
