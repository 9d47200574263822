# SPDX-License-Identifier: Apache-2.0

"""From a prompt to its questions: by a language model, or by the grammar of the shapes world."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any

from alphagrpo_ext.registry import Registry
from alphagrpo_ext.shapes import CATEGORIES, SPLITS, PromptSpec, prompts_of, specs_of, vocabulary
from alphagrpo_ext.shapes import quality_questions as shapes_quality_questions
from alphagrpo_ext.shapes import semantic_questions as shapes_semantic_questions
from reward_models.decomposition.requests import (
    CRITERIA,
    FACTS_SCHEMA,
    QUALITY_SCHEMA,
    VERDICTS_SCHEMA,
    facts_request,
    quality_request,
    verification_request,
)
from reward_models.endpoints.chat import ChatEndpoint
from reward_models.endpoints.endpoint import InvalidAnswerError
from reward_models.endpoints.structured_output import StructuredChat
from reward_models.prompts.questions import QUALITY_TAGS, SEMANTIC_TAGS, PromptRecord, Question, from_row


MAX_SEMANTIC_QUESTIONS = 64
MAX_QUALITY_QUESTIONS = 16

DECOMPOSERS = Registry("decomposer", "alphagrpo_ext.decomposers")


class DecompositionError(ValueError):
    """
    A prompt cannot be decomposed, and another try right away would not change that.

    Args:
        reason (`str`): The kind of failure in a few words, the same for all failures of the kind.
        detail (`str`): What is wrong with this prompt.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def failure_reason(error: Exception) -> str:
    """The kind of a failure in a few words, for a count of failures by kind."""
    if isinstance(error, DecompositionError):
        return error.reason
    if isinstance(error, InvalidAnswerError):
        return "unusable answer"
    if isinstance(error, TimeoutError):
        return "timeout"
    status_code = getattr(error, "status_code", None)
    return type(error).__name__ if status_code is None else f"HTTP status {status_code}"


@dataclass
class DecomposerArguments:
    """
    Which decomposer, and what it needs. The key of an endpoint comes from the environment variable `OPENAI_API_KEY` alone.

    Args:
        decomposer (`str`, *optional*):
            Who decomposes: `"openai"`, `"shapes"`, or a decomposer that another package registers. `None` takes `"openai"`
            for prompts that are given and `"shapes"` for those of the shapes world.
        base_url (`str`, *optional*):
            OpenAI-compatible endpoint. `None` takes the environment variable `OPENAI_BASE_URL`, or OpenAI itself.
        model (`str`, *optional*):
            Name of the model at the endpoint. `None` takes the only one that it serves.
        max_concurrency (`int`, *optional*, defaults to `64`):
            Prompts that are decomposed at once.
        timeout (`float`, *optional*, defaults to `120.0`):
            Seconds for one try of a request.
        max_retries (`int`, *optional*, defaults to `8`):
            Further tries of a request.
        max_tokens (`int`, *optional*, defaults to `4096`):
            Longest answer, in tokens; 0 leaves it to the endpoint.
        temperature (`float`, *optional*, defaults to `0.3`):
            Temperature of the answers. Only above 0 can another try differ from the one before.
        extra_body (`dict`, *optional*):
            Further fields of a request, as JSON.
    """

    decomposer: str | None = field(
        default=None,
        metadata={
            "help": "Who decomposes: 'openai', 'shapes' or a registered one. Default: 'openai' with an input, else 'shapes'."
        },
    )
    base_url: str | None = field(
        default=None, metadata={"help": "OpenAI-compatible endpoint, e.g. http://localhost:8000/v1."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Name of the model at the endpoint. Default: the only one that it serves."}
    )
    max_concurrency: int = field(default=64, metadata={"help": "Prompts that are decomposed at once."})
    timeout: float = field(default=120.0, metadata={"help": "Seconds for one try of a request."})
    max_retries: int = field(default=8, metadata={"help": "Further tries of a request."})
    max_tokens: int = field(default=4096, metadata={"help": "Longest answer, in tokens; 0 leaves it to the endpoint."})
    temperature: float = field(
        default=0.3, metadata={"help": "Temperature of the answers. Only above 0 can another try differ."}
    )
    extra_body: dict[str, Any] | str | None = field(
        default=None, metadata={"help": "Further fields of a request to the endpoint, as JSON."}
    )

    def __post_init__(self) -> None:
        if isinstance(self.extra_body, str):
            try:
                self.extra_body = json.loads(self.extra_body)
            except json.JSONDecodeError as error:
                raise ValueError(f"extra_body must be a JSON object, but is not JSON ({error})") from error
        if self.extra_body is not None and not isinstance(self.extra_body, dict):
            raise ValueError(f"extra_body must be a JSON object, but is {self.extra_body!r}")


class Decomposer(ABC):
    """
    Decomposes prompts into questions, many at once in one event loop. What goes wrong with a prompt is raised, as
    [`DecompositionError`] where nothing else fits.
    """

    @classmethod
    def from_arguments(cls, args: DecomposerArguments) -> Decomposer:
        """
        Build the decomposer from a recipe's arguments. The default takes none of them.

        Raises:
            `ValueError`: If something is missing or out of range; the message names the argument.
        """
        return cls()

    @abstractmethod
    async def decompose(self, prompt: str) -> PromptRecord:
        """
        Args:
            prompt (`str`): The prompt.

        Returns:
            `PromptRecord`: The prompt as it was, with at least one valid semantic question.

        Raises:
            [`DecompositionError`]: If the prompt cannot be decomposed.
        """

    async def aclose(self) -> None:
        """Release what the decomposer holds, e.g. network connections. The default does nothing."""
        return


@DECOMPOSERS.register("openai")
class OpenAIDecomposer(Decomposer):
    """
    Asks a language model behind an OpenAI-compatible endpoint, three times a prompt: for the facts in the prompt with a
    question each, for questions about how well the image is made, and whether each of these questions meets the `CRITERIA`.
    Questions that do not stay in the record and are not valid. See [`StructuredChat`] for how answers get their form.

    Args:
        base_url, model, api_key, max_concurrency, timeout, max_retries:
            As in [`ChatEndpoint`].
        max_tokens (`int`, *optional*, defaults to `4096`):
            Longest answer, in tokens. `None` leaves it to the endpoint.
        temperature (`float`, *optional*, defaults to `0.3`):
            Temperature of the answers. Only above 0 can another try differ from the one before.
        extra_body (`dict`, *optional*):
            Further fields of a request, e.g. `{"chat_template_kwargs": {"enable_thinking": False}}`.
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
        endpoint = ChatEndpoint(base_url, model, api_key, max_concurrency, timeout, max_retries)
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
            raise DecompositionError("empty prompt", "it has nothing to ask about")
        semantic = await self._ask(facts_request(prompt), "facts", FACTS_SCHEMA, read_facts)
        quality = await self._ask(quality_request(prompt), "quality", QUALITY_SCHEMA, read_quality_questions)
        verified = await self._ask(
            verification_request(prompt, semantic + quality),
            "verdicts",
            VERDICTS_SCHEMA,
            lambda answer: apply_verdicts(semantic + quality, answer),
        )
        record = PromptRecord(prompt, verified[: len(semantic)], verified[len(semantic) :])
        if not record.valid_semantic_questions:
            asked = "; ".join(question.question for question in semantic)
            raise DecompositionError("no valid semantic question", f"verification rejected all of them: {asked}")
        return record

    async def aclose(self) -> None:
        await self.chat.aclose()

    async def _ask(
        self, request: str, name: str, schema: dict[str, Any], read: Callable[[Any], tuple[Question, ...]]
    ) -> tuple[Question, ...]:
        return await self.chat.ask(request, name, schema, read, shows_answer=True)


@DECOMPOSERS.register("shapes")
class ShapesDecomposer(Decomposer):
    """Knows the grammar of the shapes world, and gives a prompt in it the world's own questions."""

    async def decompose(self, prompt: str) -> PromptRecord:
        spec = _shapes_specs().get(prompt)
        if spec is None:
            raise DecompositionError("not a prompt of the shapes world", _outside_grammar(prompt))
        return from_row(
            {
                "prompt": prompt,
                "semantic_questions": shapes_semantic_questions(spec),
                "quality_questions": shapes_quality_questions(),
            }
        )


def read_facts(answer: Mapping[str, Any]) -> tuple[Question, ...]:
    """
    The semantic questions in an answer that fits `FACTS_SCHEMA`, each once.

    Raises:
        [`InvalidAnswerError`]: If there is none, one that is no question, or more than `MAX_SEMANTIC_QUESTIONS`.
    """
    return _read_questions(answer["facts"], MAX_SEMANTIC_QUESTIONS)


def read_quality_questions(answer: Mapping[str, Any]) -> tuple[Question, ...]:
    """
    The quality questions in an answer that fits `QUALITY_SCHEMA`, each once.

    Raises:
        [`InvalidAnswerError`]: If there is none, one that is no question, or more than `MAX_QUALITY_QUESTIONS`.
    """
    return _read_questions(answer["questions"], MAX_QUALITY_QUESTIONS)


def apply_verdicts(questions: Sequence[Question], answer: Mapping[str, Any]) -> tuple[Question, ...]:
    """
    Questions as a verification leaves them: valid if they meet all `CRITERIA`, and with the corrected tag, unless that
    belongs to the other side.

    Args:
        questions (`Sequence[Question]`): What was verified.
        answer (`Mapping[str, Any]`): Fits `VERDICTS_SCHEMA`.

    Raises:
        [`InvalidAnswerError`]: If there is not exactly one verdict for each question.
    """
    verdicts = {verdict["number"]: verdict for verdict in answer["verdicts"]}
    if len(verdicts) != len(answer["verdicts"]) or verdicts.keys() != set(range(1, len(questions) + 1)):
        numbers = [verdict["number"] for verdict in answer["verdicts"]]
        raise InvalidAnswerError(f"the verdicts must be for questions 1 to {len(questions)}, but are for {numbers}")
    return tuple(_apply_verdict(question, verdicts[number]) for number, question in enumerate(questions, start=1))


def _apply_verdict(question: Question, verdict: Mapping[str, Any]) -> Question:
    side = SEMANTIC_TAGS if question.tag in SEMANTIC_TAGS else QUALITY_TAGS
    tag = verdict["tag"] if verdict["tag"] in side else question.tag
    return replace(question, tag=tag, is_valid=all(verdict[name] for name in CRITERIA))


def _read_questions(rows: Sequence[Mapping[str, Any]], maximum: int) -> tuple[Question, ...]:
    questions: dict[str, Question] = {}
    for row in rows:
        text = " ".join(row["question"].split())
        if not text.endswith(("?", "？")):
            raise InvalidAnswerError(f"{text[:200]!r} is no question: it does not end with a question mark")
        questions.setdefault(text.lower(), Question(text, row["tag"]))
    if not 1 <= len(questions) <= maximum:
        raise InvalidAnswerError(f"expected 1 to {maximum} different questions, got {len(questions)}")
    return tuple(questions.values())


@cache
def _shapes_specs() -> dict[str, PromptSpec]:
    # No two specs share a phrasing, so the table of all phrasings inverts the grammar.
    return {
        prompt: spec
        for category in CATEGORIES
        for split in SPLITS
        for spec in specs_of(category, split)
        for prompt in prompts_of(spec)
    }


def _outside_grammar(prompt: str) -> str:
    known = set(vocabulary())
    unknown = [word for word in prompt.split() if word not in known]
    if unknown:
        return f"the word {unknown[0]!r} is unknown there"
    example = next(iter(_shapes_specs()))
    return f"the words are known there, but not in this order; a prompt reads, for example, {example!r}"
