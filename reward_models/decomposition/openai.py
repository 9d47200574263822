# SPDX-License-Identifier: Apache-2.0

"""A decomposer that asks a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from reward_models.decomposition.answers import CRITERIA, Facts, QualityQuestions, Verdict, Verdicts
from reward_models.decomposition.base import DECOMPOSERS, Decomposer, DecomposerArguments, DecompositionError
from reward_models.decomposition.requests import facts_request, quality_request, verification_request
from reward_models.endpoints.endpoint import InvalidAnswerError, OpenAIEndpoint
from reward_models.endpoints.structured_output import StructuredChat
from reward_models.prompts.questions import QUALITY_TAGS, SEMANTIC_TAGS, PromptRecord, Question


@DECOMPOSERS.register("openai")
class OpenAIDecomposer(Decomposer):
    """
    Sends three requests per prompt: for the facts in the prompt with one question each, for questions about the quality of
    the image, and for a verdict on whether each of these questions meets the `CRITERIA`. A question that fails a criterion
    stays in the record and is marked as not valid. See [`StructuredChat`] for the format of the answers.

    Args:
        base_url, model, api_key, max_concurrency, timeout, max_retries:
            As in [`OpenAIEndpoint`].
        max_tokens, temperature, extra_body:
            As in [`StructuredChat`].
    """

    def __init__(
        self,
        base_url: str | None = None,
        model: str | None = None,
        api_key: str | None = None,
        max_concurrency: int = 64,
        timeout: float = 120.0,
        max_retries: int = 8,
        max_tokens: int | None = 4096,
        temperature: float = 0.3,
        extra_body: dict[str, Any] | None = None,
    ) -> None:
        endpoint = OpenAIEndpoint(base_url, model, api_key, max_concurrency, timeout, max_retries)
        self.chat = StructuredChat(endpoint, max_tokens, temperature, extra_body)

    @classmethod
    def from_arguments(cls, args: DecomposerArguments) -> OpenAIDecomposer:
        return cls(
            base_url=args.base_url,
            model=args.model,
            max_concurrency=args.max_concurrency,
            timeout=args.timeout,
            max_retries=args.max_retries,
            max_tokens=args.max_tokens or None,
            temperature=args.temperature,
            extra_body=args.extra_body,
        )

    async def decompose(self, prompt: str) -> PromptRecord:
        if not prompt.strip():
            raise DecompositionError("empty prompt", "there is nothing to ask about")
        facts = await self.chat.ask(facts_request(prompt), Facts, has_example=True)
        quality = await self.chat.ask(quality_request(prompt), QualityQuestions, has_example=True)
        questions = tuple(Question(item.question, item.tag) for item in (*facts.facts, *quality.questions))
        verified = await self.chat.ask(
            verification_request(prompt, questions),
            Verdicts,
            lambda answer: apply_verdicts(questions, answer.verdicts),
            has_example=True,
        )
        num_semantic = len(facts.facts)
        record = PromptRecord(prompt, verified[:num_semantic], verified[num_semantic:])
        if not record.valid_semantic_questions:
            asked = "; ".join(question.question for question in record.semantic_questions)
            raise DecompositionError("no valid semantic question", f"verification rejected all of them: {asked}")
        return record

    async def aclose(self) -> None:
        await self.chat.aclose()


def apply_verdicts(questions: Sequence[Question], verdicts: Sequence[Verdict]) -> tuple[Question, ...]:
    """
    Apply a verification to questions. A question is valid if it meets all `CRITERIA`. It gets the tag of its verdict,
    unless that is a quality tag for a semantic question or the reverse.

    Args:
        questions (`Sequence[Question]`): The verified questions.
        verdicts (`Sequence[Verdict]`): Verdicts in any order.

    Raises:
        [`InvalidAnswerError`]: If there is not exactly one verdict per question.
    """
    by_number = {verdict.number: verdict for verdict in verdicts}
    numbers = range(1, len(questions) + 1)
    if len(by_number) != len(verdicts) or by_number.keys() != set(numbers):
        given = [verdict.number for verdict in verdicts]
        raise InvalidAnswerError(f"the verdicts must be for questions 1 to {len(questions)}, but are for {given}")
    return tuple(
        _apply_verdict(question, by_number[number]) for number, question in zip(numbers, questions, strict=True)
    )


def _apply_verdict(question: Question, verdict: Verdict) -> Question:
    side = SEMANTIC_TAGS if question.tag in SEMANTIC_TAGS else QUALITY_TAGS
    tag = verdict.tag if verdict.tag in side else question.tag
    return replace(question, tag=tag, is_valid=all(getattr(verdict, name) for name in CRITERIA))
