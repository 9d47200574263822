# SPDX-License-Identifier: Apache-2.0

"""Answers of a language model that decomposes a prompt, as pydantic models."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Annotated, Any, Literal, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field

from reward_models.endpoints.structured_output import StructuredAnswer, UnicodeText
from reward_models.prompts.tags import QUALITY_TAGS, SEMANTIC_TAGS, match_tag


MAX_SEMANTIC_QUESTIONS = 64
MAX_QUALITY_QUESTIONS = 16


def _match_spelling(tags: Sequence[str], tag: Any) -> Any:
    return match_tag(tags, tag) if isinstance(tag, str) else tag


def _check_question(text: str) -> str:
    text = " ".join(text.split())
    if not text.endswith(("?", "？")):
        raise ValueError("a question must end with a question mark")
    return text


QuestionText = Annotated[UnicodeText, AfterValidator(_check_question)]
SemanticTag = Annotated[Literal[*SEMANTIC_TAGS], BeforeValidator(partial(_match_spelling, SEMANTIC_TAGS))]
QualityTag = Annotated[Literal[*QUALITY_TAGS], BeforeValidator(partial(_match_spelling, QUALITY_TAGS))]
AnyTag = Annotated[
    Literal[*SEMANTIC_TAGS, *QUALITY_TAGS], BeforeValidator(partial(_match_spelling, SEMANTIC_TAGS + QUALITY_TAGS))
]


class Fact(StructuredAnswer):
    """A fact that the prompt states, with a yes/no question about it."""

    fact: UnicodeText
    tag: SemanticTag
    question: QuestionText


class QualityQuestion(StructuredAnswer):
    """A yes/no question about the quality of the image."""

    tag: QualityTag
    question: QuestionText


Item = TypeVar("Item", Fact, QualityQuestion)


def _drop_repeated(maximum: int, items: list[Item]) -> list[Item]:
    different: dict[str, Item] = {}
    for item in items:
        different.setdefault(item.question.lower(), item)
    if not 1 <= len(different) <= maximum:
        raise ValueError(f"expected 1 to {maximum} different questions, got {len(different)}")
    return list(different.values())


class Facts(StructuredAnswer):
    """All facts that the prompt states."""

    facts: Annotated[list[Fact], AfterValidator(partial(_drop_repeated, MAX_SEMANTIC_QUESTIONS))]


class QualityQuestions(StructuredAnswer):
    """All questions about the quality of the image."""

    questions: Annotated[list[QualityQuestion], AfterValidator(partial(_drop_repeated, MAX_QUALITY_QUESTIONS))]


class Verdict(StructuredAnswer):
    """Whether the question with this number meets each criterion, and the tag that fits it best."""

    number: int
    required: bool = Field(description="Every good image that follows the prompt must get the answer yes.")
    nothing_added: bool = Field(
        description="The question brings in nothing that the prompt neither says nor strictly implies."
    )
    atomic: bool = Field(
        description="The question asks one thing. Nothing in it could be right while something else in it is wrong."
    )
    visible: bool = Field(description="Someone who sees only the image, and never reads the prompt, can answer.")
    distinct: bool = Field(description="No question before it asks the same.")
    tag: AnyTag


class Verdicts(StructuredAnswer):
    """One verdict per question."""

    verdicts: list[Verdict]


CRITERIA = {name: field.description for name, field in Verdict.model_fields.items() if field.annotation is bool}
"""Meaning of each criterion that a valid question meets, by the name of its field in [`Verdict`]."""
