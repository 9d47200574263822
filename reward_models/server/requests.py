# SPDX-License-Identifier: Apache-2.0

"""Conversion of the reward server's requests to images and questions, with the checks that types cannot express."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.reward_client.json_values import has_more_values
from alphagrpo_ext.reward_client.thought import extract_thought
from reward_models.endpoints.structured_output import check_unicode
from reward_models.files.image_decoding import EncodedImage, OversizedImageError
from reward_models.painters.base import ImageRequest
from reward_models.prompts.questions import PromptRecord, from_row
from reward_models.prompts.tags import TAGS
from reward_models.server.arguments import ServerArguments
from reward_models.server.protocol import MAX_TEXT_LENGTH, GenerateRequest, RemoteRewardRequest, ScoreRequest


MAX_JSON_LENGTH = 2**20
"""Largest number of characters of a label, or of questions that are sent as JSON in a text."""


def read_score_request(request: ScoreRequest, limits: ServerArguments) -> list[tuple[EncodedImage, PromptRecord]]:
    """
    Return each image with its record.

    Raises:
        `ValueError`: If an item is malformed or too large. The message names the item and the field.
    """
    _check_length("items", request.items, limits.max_items)
    pairs = []
    for i, item in enumerate(request.items):
        row = {name: getattr(item, name) for name in ("prompt", "semantic_questions", "quality_questions")}
        image = _read_image(item.image, limits, f"items[{i}].image")
        pairs.append((image, _read_record(row, limits, f"items[{i}]")))
    return pairs


def read_generate_request(
    request: GenerateRequest, limits: ServerArguments
) -> list[tuple[ImageRequest, EncodedImage | None]]:
    """
    Return each request for an image, and separately the image to refine, which is not decoded yet.

    Raises:
        `ValueError`: If an item is malformed or too large. The message names the item and the field.
    """
    _check_length("items", request.items, limits.max_items)
    return [
        (
            ImageRequest(_text_of_prompt(item.prompt, f"items[{i}]"), item.thought, seed=item.seed),
            None if item.image is None else _read_image(item.image, limits, f"items[{i}].image"),
        )
        for i, item in enumerate(request.items)
    ]


def read_reward_request(
    request: RemoteRewardRequest, limits: ServerArguments
) -> list[tuple[ImageRequest, PromptRecord]]:
    """
    Return the image that each completion asks for, with its record.

    Raises:
        `ValueError`: If an entry is malformed or too large. The message names the entry.
    """
    lengths = {name: len(getattr(request, name)) for name in ("query", "prompts", "labels")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"query, prompts and labels must have the same length, but have {lengths}")
    _check_length("query", request.query, limits.max_items)
    pairs = []
    for i, (query, prompt, label) in enumerate(zip(request.query, request.prompts, request.labels, strict=True)):
        record = _read_label(label, limits, f"labels[{i}]")
        thought = extract_thought(query, prompt, f"query[{i}]")
        pairs.append((ImageRequest(_text_of_prompt(record.prompt, f"labels[{i}]"), thought), record))
    return pairs


def _check_length(name: str, entries: list[Any], maximum: int) -> None:
    if len(entries) > maximum:
        raise ValueError(f"{name} has {len(entries)} entries, more than the {maximum} that the server takes at once")


def _read_image(text: str, limits: ServerArguments, where: str) -> EncodedImage:
    with _errors_name(where):
        try:
            return EncodedImage.from_base64(text, limits.image_limits)
        except OversizedImageError as error:
            raise ValueError(
                f"{error}: send a smaller one, or start the server with larger --max_image_side and --max_image_pixels"
            ) from error


def _read_label(label: str, limits: ServerArguments, where: str) -> PromptRecord:
    _check_json(label, limits, where)
    try:
        row = json.loads(label)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} must be the JSON of a record with prompt, semantic_questions and quality_questions ({error})"
        ) from error
    return _read_record(row, limits, where)


def _read_record(row: Any, limits: ServerArguments, where: str) -> PromptRecord:
    for name in TAGS:
        # Questions may be JSON in a string.
        if isinstance(row, Mapping) and isinstance(row.get(name), str):
            _check_json(row[name], limits, f"{where}: {name}")
    _check_lengths(row, where)
    try:
        record = from_row(row, where)
    except RecursionError as error:
        raise ValueError(f"{where}: it is nested too deeply") from error
    questions = record.semantic_questions + record.quality_questions
    if len(questions) > limits.max_questions:
        raise ValueError(
            f"{where}: semantic_questions and quality_questions hold {len(questions)} questions, more than the "
            f"{limits.max_questions} that the server takes"
        )
    with _errors_name(f"{where}: a question"):
        for question in questions:
            check_unicode(question.question)
    return record


def _check_json(text: str, limits: ServerArguments, where: str) -> None:
    """Check the size of JSON in a text before it is parsed."""
    if len(text) > MAX_JSON_LENGTH:
        raise ValueError(f"{where} has {len(text)} characters, more than the {MAX_JSON_LENGTH} that the server takes")
    if has_more_values(text.encode(errors="surrogatepass"), limits.max_record_values):
        raise ValueError(
            f"{where} is JSON with more than {limits.max_record_values} values, which is more than the server's "
            f"max_questions={limits.max_questions} needs: send fewer questions, and only their fields"
        )


def _check_lengths(row: Any, where: str) -> None:
    """Check the length of every text in a row, also of those that are not read. JSON in a text is checked by itself."""
    values = [row]
    while values:
        value = values.pop()
        if isinstance(value, Mapping):
            values += value.keys()
            values += (v for key, v in value.items() if not (value is row and key in TAGS and isinstance(v, str)))
        elif isinstance(value, list):
            values += value
        elif isinstance(value, str) and len(value) > MAX_TEXT_LENGTH:
            raise ValueError(
                f"{where}: a text in it has {len(value)} characters, more than the {MAX_TEXT_LENGTH} that the server takes"
            )


def _text_of_prompt(prompt: Any, where: str) -> str:
    with _errors_name(where):
        text = prompt_text(prompt)
    with _errors_name(f"{where}: prompt"):
        return check_unicode(text)


@contextmanager
def _errors_name(where: str) -> Iterator[None]:
    """Prefix the errors of a block with the place that they are about."""
    try:
        yield
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
