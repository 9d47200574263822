# SPDX-License-Identifier: Apache-2.0

"""A decomposer that asks a language model behind an OpenAI-compatible endpoint."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from reward_models.decomposition.answers import CRITERIA, Facts, QualityQuestions, Verdict, Verdicts
from reward_models.decomposition.base import DECOMPOSERS, Decomposer, DecomposerArguments, DecompositionError
from reward_models.decomposition.requests import (
    facts_request,
    quality_request,
    requests_version,
    verification_request,
)
from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.endpoints.errors import InvalidAnswerError
from reward_models.endpoints.structured_output import StructuredChat
from reward_models.prompts.questions import PromptRecord, Question
from reward_models.prompts.tags import QUALITY_TAGS, SEMANTIC_TAGS


@DECOMPOSERS.register("openai")
class OpenAIDecomposer(Decomposer):
    """
    Sends three requests per prompt: for the facts in the prompt with one question each, for questions about the quality of
    the image, and for a verdict on whether each of these questions meets the `CRITERIA`. A question that fails a criterion
    stays in the record and is marked as not valid. See [`StructuredChat`] for the format of the answers.

    Args:
        chat ([`StructuredChat`]): The language model.
    """

    def __init__(self, chat: StructuredChat) -> None:
        self.chat = chat

    @classmethod
    def from_arguments(cls, args: DecomposerArguments) -> OpenAIDecomposer:
        endpoint = OpenAIEndpoint(
            args.base_url,
            args.model,
            max_concurrency=args.max_concurrency,
            timeout=args.timeout,
            max_retries=args.max_retries,
            max_answer_bytes=args.max_answer_bytes,
        )
        return cls(StructuredChat(endpoint, args.max_tokens or None, args.temperature, args.extra_body))

    def settings(self) -> dict[str, str | None]:
        model = (self.chat.extra_body or {}).get("model", self.chat.endpoint.model)
        return {"model": model, "version of the requests": requests_version()}

    async def decompose(self, prompt: str) -> PromptRecord:
        if not prompt.strip():
            raise DecompositionError("empty prompt", "there is nothing to ask about")
        facts = await self.chat.ask(facts_request(prompt), Facts)
        quality = await self.chat.ask(quality_request(prompt), QualityQuestions)
        questions = tuple(Question(item.question, item.tag) for item in (*facts.facts, *quality.questions))
        verified = await self.chat.ask(
            verification_request(prompt, questions),
            Verdicts,
            lambda answer: apply_verdicts(questions, answer.verdicts),
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
