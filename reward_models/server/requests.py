# SPDX-License-Identifier: Apache-2.0

"""From the messages of the reward server to what it works on: every check that a type does not make."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

from alphagrpo_ext.reward_client.thought import thought_of
from alphagrpo_ext.rollout.task import prompt_text
from reward_models.files.image_decoding import EncodedImage, ImageLimits
from reward_models.painters.policy import PaintRequest
from reward_models.prompts.questions import PromptRecord, from_row
from reward_models.server.protocol import GenerateRequest, RemoteRewardRequest, ScoreRequest, check_unicode


@dataclass(frozen=True)
class RequestLimits:
    """
    What one request may hold.

    Args:
        image ([`ImageLimits`]): Largest image.
        max_items (`int`): Most items.
        max_questions (`int`): Most questions of an item.

    Raises:
        `ValueError`: If a limit is less than 1.
    """

    image: ImageLimits
    max_items: int
    max_questions: int

    def __post_init__(self) -> None:
        for name in ("max_items", "max_questions"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")

    def check_items(self, name: str, count: int) -> None:
        """
        Raises:
            `ValueError`: If the list called `name` is too long.
        """
        if count > self.max_items:
            raise ValueError(
                f"{name} has {count} entries, more than the {self.max_items} that the server takes at once"
            )


@dataclass(frozen=True)
class ScoreTask:
    """
    An image to score.

    Args:
        image ([`EncodedImage`]): The image.
        record ([`~reward_models.prompts.questions.PromptRecord`]): Its questions.
    """

    image: EncodedImage
    record: PromptRecord


@dataclass(frozen=True)
class PaintTask:
    """
    An image to paint, whose given image is not decoded yet.

    Args:
        request ([`~reward_models.painters.policy.PaintRequest`]): What to paint, without the given image.
        image ([`EncodedImage`], *optional*): The given image.
    """

    request: PaintRequest
    image: EncodedImage | None


@dataclass(frozen=True)
class RewardTask:
    """
    A completion to reward.

    Args:
        request ([`~reward_models.painters.policy.PaintRequest`]): The image that it stands for.
        record ([`~reward_models.prompts.questions.PromptRecord`]): The questions about that.
    """

    request: PaintRequest
    record: PromptRecord


def read_score_request(request: ScoreRequest, limits: RequestLimits) -> list[ScoreTask]:
    """
    Raises:
        `ValueError`: If an item is malformed or too large; the message names item and field.
    """
    limits.check_items("items", len(request.items))
    return [
        ScoreTask(
            _read_image(item.image, limits.image, f"items[{i}]"),
            read_record(
                {
                    "prompt": item.prompt,
                    "semantic_questions": item.semantic_questions,
                    "quality_questions": item.quality_questions,
                },
                limits.max_questions,
                f"items[{i}]",
            ),
        )
        for i, item in enumerate(request.items)
    ]


def read_generate_request(request: GenerateRequest, limits: RequestLimits) -> list[PaintTask]:
    """
    Raises:
        `ValueError`: If an item is malformed or too large; the message names item and field.
    """
    limits.check_items("items", len(request.items))
    return [
        PaintTask(
            PaintRequest(item.prompt, item.thought, seed=item.seed),
            None if item.image is None else _read_image(item.image, limits.image, f"items[{i}]"),
        )
        for i, item in enumerate(request.items)
    ]


def read_reward_request(request: RemoteRewardRequest, limits: RequestLimits) -> list[RewardTask]:
    """
    Raises:
        `ValueError`: If an entry is malformed or too large; the message names it.
    """
    lengths = {name: len(getattr(request, name)) for name in ("query", "prompts", "labels")}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"query, prompts and labels must be of one length, but have {lengths}")
    limits.check_items("query", lengths["query"])
    tasks = []
    for i, (query, prompt, label) in enumerate(zip(request.query, request.prompts, request.labels, strict=True)):
        record = read_label(label, limits.max_questions, f"labels[{i}]")
        thought = thought_of(query, prompt, f"query[{i}]")
        tasks.append(RewardTask(PaintRequest(_text_of(record, f"labels[{i}]"), thought), record))
    return tasks


def read_record(row: Any, max_questions: int, where: str) -> PromptRecord:
    """
    A record, from whatever JSON there is.

    Args:
        row (`Any`): See [`~reward_models.prompts.questions.from_row`].
        max_questions (`int`): Most questions, those that are not valid included.
        where (`str`): How error messages call it.

    Raises:
        `ValueError`: If it is malformed or too large; the message names the field.
    """
    try:
        record = from_row(row, where)
    except RecursionError as error:
        raise ValueError(f"{where}: it is nested too deeply") from error
    questions = record.semantic_questions + record.quality_questions
    if len(questions) > max_questions:
        raise ValueError(
            f"{where}: semantic_questions and quality_questions hold {len(questions)} questions, more than the "
            f"{max_questions} that the server takes"
        )
    for question in questions:
        _check_text(question.question, f"{where}: a question")
    return record


def read_label(label: str, max_questions: int, where: str) -> PromptRecord:
    """
    The record in OpenRLHF's `label`.

    Raises:
        `ValueError`: If it is not JSON, or as in [`read_record`].
    """
    try:
        row = json.loads(label)
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{where} must be the JSON of a record with prompt, semantic_questions and quality_questions ({error})"
        ) from error
    return read_record(row, max_questions, where)


def _read_image(text: str, limits: ImageLimits, where: str) -> EncodedImage:
    try:
        return EncodedImage.from_base64(text, limits)
    except ValueError as error:
        raise ValueError(f"{where}.image: {error}") from error


def _text_of(record: PromptRecord, where: str) -> str:
    try:
        text = prompt_text(record.prompt)
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError):
        text = None
    if not isinstance(text, str):
        raise ValueError(f"{where}: prompt must be a text, or messages with one of the user")
    _check_text(text, f"{where}: prompt")
    return text


def _check_text(text: str, where: str) -> None:
    try:
        check_unicode(text)
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
