# SPDX-License-Identifier: Apache-2.0

"""The messages of the reward server, as JSON carries them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, FailFast, Field

from reward_models.dvreward import Score


MAX_DETAIL = 1000
"""Characters of an error message; messages quote what was sent, which may be large."""


def check_unicode(text: str) -> str:
    """
    The text, unless it holds half a surrogate pair: JSON can write that, but no model can read it.

    Raises:
        `ValueError`: If it does.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("the text is not valid Unicode: it holds half a surrogate pair") from error
    return text


Text = Annotated[str, AfterValidator(check_unicode)]


class ScoreItem(BaseModel):
    """
    Args:
        image (`str`): PNG, JPEG or WebP file in base64, bare or as a data URL.
        prompt (`str`): What the image was made for.
        semantic_questions, quality_questions (`list[dict]` or `str`): As in [`~reward_models.prompts.questions.from_row`].
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    image: Text
    prompt: Text
    # Checked by `from_row`, which knows more than a type says.
    semantic_questions: Any
    quality_questions: Any


class ScoreRequest(BaseModel):
    """
    Args:
        items (`list[ScoreItem]`): Images with their questions.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    # A list of a million errors would be no help to anybody.
    items: Annotated[list[ScoreItem], FailFast()]


class ItemScore(BaseModel):
    """
    Args:
        reward (`float` or `None`): In [0, 1]; `None` if the image could not be scored.
        semantic, quality (`list[float | None]`): P(yes) of the valid questions; `None` where there is no answer.
        strict_pass (`bool` or `None`): Whether every answer is yes.
    """

    reward: float | None
    semantic: list[float | None]
    quality: list[float | None]
    strict_pass: bool | None


class ScoreResponse(BaseModel):
    """
    Args:
        scores (`list[ItemScore]`): One an item.
    """

    scores: list[ItemScore]


class GenerateItem(BaseModel):
    """
    Args:
        prompt (`str`): What to paint.
        thought (`str`, *optional*): What the policy wrote before the image; with `image` its reflection.
        image (`str`, *optional*): An image to refine, as in [`ScoreItem`].
        seed (`int`, *optional*): Of the noise, in [0, 2^63).
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    prompt: Text
    thought: Text | None = None
    image: Text | None = None
    seed: int | None = Field(default=None, ge=0, lt=2**63)


class GenerateRequest(BaseModel):
    """
    Args:
        items (`list[GenerateItem]`): Images to paint.
    """

    model_config = ConfigDict(strict=True, extra="forbid")

    items: Annotated[list[GenerateItem], FailFast()]


class GenerateResponse(BaseModel):
    """
    Args:
        images (`list[str]`): PNG files in base64, one an item.
    """

    images: list[str]


class RemoteRewardRequest(BaseModel):
    """
    OpenRLHF's request for rewards. Fields that later versions may add are ignored.

    Args:
        query (`list[str]`): Prompt and completion, with special tokens.
        prompts (`list[str]`): The prompts as the policy got them.
        labels (`list[str]`): JSON of records: `prompt`, `semantic_questions` and `quality_questions`.
    """

    model_config = ConfigDict(strict=True)

    query: Annotated[list[Text], FailFast()]
    prompts: Annotated[list[Text], FailFast()]
    labels: Annotated[list[Text], FailFast()]


class RemoteRewardResponse(BaseModel):
    """
    OpenRLHF's rewards.

    Args:
        rewards, scores (`list[float]`): In [0, 1], both the same, one a query.
        extra_logs (`dict[str, list[float]]`): Metrics, one value a query.
    """

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]


def to_item_score(score: Score) -> ItemScore:
    """A [`~reward_models.dvreward.Score`] as it is sent."""
    return ItemScore(
        reward=score.reward,
        semantic=list(score.semantic),
        quality=list(score.quality),
        strict_pass=score.strict_pass,
    )


def printable(message: str) -> str:
    """A message that any client can read: valid Unicode, and not too long."""
    message = message.encode("utf-8", "backslashreplace").decode()
    return message if len(message) <= MAX_DETAIL else message[:MAX_DETAIL] + "..."


def describe_errors(errors: Sequence[Any]) -> str:
    """Fields that have the wrong type, from the errors of pydantic; what was sent is not repeated."""
    described = []
    for error in errors:
        # The first part says that it is the body.
        place = ".".join(str(part) for part in error["loc"][1:]) or "the body"
        described.append(f"{place}: {error['msg']}")
    return "; ".join(described)
