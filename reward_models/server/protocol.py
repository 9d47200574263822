# SPDX-License-Identifier: Apache-2.0

"""Messages of the reward server as pydantic models, which are also its OpenAPI description."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from reward_models.endpoints.structured_output import UnicodeText


MAX_TEXT_LENGTH = 2**17
"""Largest number of characters of a prompt, a thought or a question. Models read less, and tokenizers take much memory for more."""

BoundedText = Annotated[UnicodeText, Field(max_length=MAX_TEXT_LENGTH)]


class StrictMessage(BaseModel):
    """Base class of requests: types are strict, and unknown fields are errors."""

    model_config = ConfigDict(strict=True, extra="forbid")


class ScoreItem(StrictMessage):
    """An image to score."""

    image: UnicodeText = Field(description="PNG, JPEG or WebP file in base64, bare or as a data URL.")
    prompt: BoundedText = Field(description="Prompt of the image.")
    # `from_row` checks these, because a type cannot express their rules.
    semantic_questions: Any = Field(description="List of {question, tag, is_valid?}, or that list as JSON.")
    quality_questions: Any = Field(description="Likewise.")


class ScoreRequest(StrictMessage):
    """Images to score."""

    # Without FailFast a list of a million wrong items would produce a million errors.
    items: Annotated[list[ScoreItem], FailFast()]


class ItemScore(BaseModel):
    """Score of one image, made from a [`~reward_models.dvreward.Score`]."""

    model_config = ConfigDict(from_attributes=True)

    reward: float | None = Field(description="Reward in [0, 1]; null if the image could not be scored.")
    semantic: list[float | None] = Field(description="P(yes) per valid semantic question; null without an answer.")
    quality: list[float | None] = Field(description="P(yes) per valid quality question; null without an answer.")
    strict_pass: bool | None = Field(description="Whether every answer is yes; null if the image could not be scored.")


class ScoreResponse(BaseModel):
    """One score per item."""

    scores: list[ItemScore]


class GenerateItem(StrictMessage):
    """An image to paint."""

    prompt: BoundedText = Field(description="Prompt of the image.")
    thought: BoundedText | None = Field(
        default=None, description="Text that the policy wrote before the image; with `image`, its reflection."
    )
    image: UnicodeText | None = Field(default=None, description="An image to refine, encoded as in ScoreItem.")
    seed: int | None = Field(default=None, ge=0, lt=2**63, description="Seed of the noise.")


class GenerateRequest(StrictMessage):
    """Images to paint."""

    items: Annotated[list[GenerateItem], FailFast()]


class GenerateResponse(BaseModel):
    """One PNG file in base64 per item."""

    images: list[str]


class RemoteRewardRequest(BaseModel):
    """OpenRLHF's request for rewards. Unknown fields are ignored, because later versions may add some."""

    model_config = ConfigDict(strict=True)

    query: Annotated[list[BoundedText], FailFast()] = Field(description="Prompt and completion with special tokens.")
    prompts: Annotated[list[BoundedText], FailFast()] = Field(description="The prompts as the policy received them.")
    labels: Annotated[list[UnicodeText], FailFast()] = Field(
        description="Records as JSON: prompt, semantic_questions and quality_questions."
    )


class RemoteRewardResponse(BaseModel):
    """OpenRLHF's rewards: `rewards` and `scores` are the same, in [0, 1]; every list has one value per query."""

    rewards: list[float]
    scores: list[float]
    extra_logs: dict[str, list[float]]
