# SPDX-License-Identifier: Apache-2.0

"""Rewards of how a text is built, whatever the image: they count for text alone."""

from __future__ import annotations

import asyncio
import json
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from alphagrpo_ext.registry import Registry
from alphagrpo_ext.rollout.task import prompt_text
from alphagrpo_ext.shapes.text import is_reflection
from reward_models.judges import TextJudge


logger = logging.getLogger(__name__)

FORMATS = Registry("format reward", "alphagrpo_ext.formats")


def completion_text(completion: str | list[dict[str, Any]]) -> str:
    """The text of a completion, as TRL passes it: a string, or the messages of a turn."""
    if isinstance(completion, str):
        return completion
    return "".join(message.get("content") or "" for message in completion)


def written_texts(completions: Sequence[Any], texts: Sequence[list[str]] | None) -> list[list[str]]:
    """What each sample wrote in each of its turns; without `texts`, which the trainer gives, a completion is one turn."""
    return [[completion_text(completion)] for completion in completions] if texts is None else list(texts)


class FormatReward(ABC):
    """
    A reward function of TRL: the share of a sample's texts, one a turn, that have the right form. `text_only` keeps it out
    of the advantages of images.
    """

    text_only = True

    def __init__(self, name: str) -> None:
        self.__name__ = name

    @abstractmethod
    def has_form(self, text: str) -> bool:
        """Whether a text is built as it should be."""

    def __call__(
        self, completions: Sequence[Any], texts: Sequence[list[str]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        return [
            sum(map(self.has_form, written)) / len(written) if written else None
            for written in written_texts(completions, texts)
        ]


@FORMATS.register("think")
class ThinkFormat(FormatReward):
    """Text that starts with `<think>`, ends with `</think>`, and has neither in between."""

    def __init__(self, name: str = "think_format") -> None:
        super().__init__(name)

    def has_form(self, text: str) -> bool:
        text = text.strip()
        if not (text.startswith("<think>") and text.endswith("</think>")):
            return False
        return text.count("<think>") == text.count("</think>") == 1


@FORMATS.register("shapes_reflection")
class ShapesReflectionFormat(FormatReward):
    """
    Reflections of the shapes world: a verdict that names at most two errors, each with its repair, or says that there is
    none, and then the plan of a possible scene; nothing else.
    """

    def __init__(self, name: str = "reflection_format") -> None:
        super().__init__(name)

    def has_form(self, text: str) -> bool:
        return is_reflection(text)


STRUCTURE = {
    "restates_request": (True, "The text says what the request asks for."),
    "names_error": (True, "The text names what is wrong in the image, or says that nothing is."),
    "commands_fix": (True, "The text says concretely what must be changed, or that nothing must be."),
    "expands_prompt": (False, "The text adds subjects, styles or details that the request does not ask for."),
    "has_junk": (
        False,
        "The text has repetitions, broken sentences or remarks that have nothing to do with the task.",
    ),
}
"""What a reflection is judged by: each property with the answer that is wanted, and its meaning."""

STRUCTURE_SCHEMA: dict[str, Any] = {
    "type": "object",
    "properties": {name: {"type": "boolean", "description": meaning} for name, (_, meaning) in STRUCTURE.items()},
    "required": list(STRUCTURE),
    "additionalProperties": False,
}

_STRUCTURE_REQUEST = """\
A model painted an image for a request. Then it looked at the image and wrote a reflection, from which it paints the image \
anew. Judge how the reflection is built, not whether it is right: you do not see the image.

Request:
{prompt}

Reflection:
{reflection}

Answer with one JSON object and nothing else. Its fields, all true or false:
{fields}"""


class ReflectionStructure:
    """
    A reward function of TRL, asynchronous: the share of the properties in [`STRUCTURE`] that a reflection has as wanted,
    by the verdict of a language model, averaged over a sample's turns. A sample with a reflection that has no verdict which
    fits [`STRUCTURE_SCHEMA`] is `None`.

    Args:
        judge ([`TextJudge`]): Who judges.
        max_concurrency (`int`, *optional*, defaults to `64`): Reflections that are with the judge at once.
        name (`str`, *optional*, defaults to `"reflection_structure"`): Name of the reward function.
    """

    text_only = True

    def __init__(self, judge: TextJudge, max_concurrency: int = 64, name: str = "reflection_structure") -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        self.judge = judge
        self.max_concurrency = max_concurrency
        self.__name__ = name

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        texts: Sequence[list[str]] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        slots = asyncio.Semaphore(self.max_concurrency)

        async def judge_sample(prompt: Any, written: list[str]) -> float | None:
            shares = await asyncio.gather(*(self._judge(prompt_text(prompt), text, slots) for text in written))
            return sum(shares) / len(shares) if shares and None not in shares else None

        return await asyncio.gather(*map(judge_sample, prompts, written_texts(completions, texts)))

    async def _judge(self, prompt: str, reflection: str, slots: asyncio.Semaphore) -> float | None:
        fields = "\n".join(f"- {name}: {meaning}" for name, (_, meaning) in STRUCTURE.items())
        request = _STRUCTURE_REQUEST.format(prompt=prompt, reflection=reflection, fields=fields)
        async with slots:
            try:
                verdict = parse_structure(await self.judge.complete(request, STRUCTURE_SCHEMA))
            except Exception as error:
                logger.warning("a reflection was not judged and gets no reward: %s", error)
                return None
        return sum(verdict[name] == wanted for name, (wanted, _) in STRUCTURE.items()) / len(STRUCTURE)


def parse_structure(answer: str) -> dict[str, bool]:
    """
    Read a verdict strictly.

    Raises:
        `ValueError`: If it is not one JSON object with exactly the fields of [`STRUCTURE`], each a boolean.
    """
    verdict = json.loads(answer)
    if not isinstance(verdict, dict) or verdict.keys() != STRUCTURE.keys():
        raise ValueError(
            f"the verdict must be an object with the fields {', '.join(STRUCTURE)}, but is {answer[:200]!r}"
        )
    for name, value in verdict.items():
        if not isinstance(value, bool):
            raise ValueError(f"field '{name}' of the verdict must be true or false, but is {value!r}")
    return verdict
