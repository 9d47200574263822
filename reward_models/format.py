# SPDX-License-Identifier: Apache-2.0

"""Rewards of the form of a text. They ignore the image and train the text alone."""

from __future__ import annotations

import asyncio
import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from statistics import fmean
from typing import Any

from pydantic import Field

from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.shapes.text import is_reflection
from reward_models.endpoints.structured_output import StructuredAnswer, StructuredChat


logger = logging.getLogger(__name__)

FORMATS = Registry("format reward", "alphagrpo_ext.formats")


def written_texts(completions: Sequence[Any], texts: Sequence[list[str]] | None) -> list[list[str]]:
    """
    The texts that each sample wrote, one per turn.

    Args:
        completions (`Sequence`): As TRL passes them: strings, or lists with the messages of a turn.
        texts (`Sequence[list[str]]`, *optional*): The texts, if the trainer knows them. Without it a completion is one turn.
    """
    if texts is not None:
        return list(texts)
    return [
        [completion if isinstance(completion, str) else "".join(part.get("content") or "" for part in completion)]
        for completion in completions
    ]


class FormatReward(ABC):
    """
    A reward function of TRL: the share of a sample's texts, one per turn, that have the right form. `text_only` keeps it out
    of the advantages of images.
    """

    text_only = True

    __name__: str
    """TRL takes the name of a reward function from its `__name__`."""

    @abstractmethod
    def has_form(self, text: str) -> bool:
        """Whether a text has the right form."""

    def __call__(
        self, completions: Sequence[Any], texts: Sequence[list[str]] | None = None, **kwargs: Any
    ) -> list[float | None]:
        return [
            fmean(map(self.has_form, written)) if written else None for written in written_texts(completions, texts)
        ]


@FORMATS.register("think")
class ThinkFormat(FormatReward):
    """Rewards a text that starts with `<think>`, ends with `</think>`, and has neither in between."""

    __name__ = "think_format"

    def has_form(self, text: str) -> bool:
        text = text.strip()
        if not (text.startswith("<think>") and text.endswith("</think>")):
            return False
        return text.count("<think>") == text.count("</think>") == 1


@FORMATS.register("shapes_reflection")
class ShapesReflectionFormat(FormatReward):
    """
    Rewards a reflection of the shapes world: a verdict that names at most two errors, each with its repair, or that there is
    no error, followed by the plan of a possible scene and nothing else.
    """

    __name__ = "reflection_format"

    def has_form(self, text: str) -> bool:
        return is_reflection(text)


class ReflectionVerdict(StructuredAnswer):
    """Properties of a reflection."""

    restates_request: bool = Field(description="The text says what the request asks for.")
    names_error: bool = Field(description="The text names what is wrong in the image, or says that nothing is.")
    commands_fix: bool = Field(description="The text says concretely what must be changed, or that nothing must be.")
    expands_prompt: bool = Field(
        description="The text adds subjects, styles or details that the request does not ask for."
    )
    has_junk: bool = Field(
        description="The text has repetitions, broken sentences or remarks that have nothing to do with the task."
    )


WANTED_VERDICT = ReflectionVerdict(
    restates_request=True, names_error=True, commands_fix=True, expands_prompt=False, has_junk=False
)
"""The verdict on a good reflection."""

_VERDICT_REQUEST = """\
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
    An asynchronous reward function of TRL: the share of properties that a reflection has as in `WANTED_VERDICT`, averaged
    over a sample's turns. A language model gives the verdict. A sample is `None` if one of its reflections has no verdict.

    Args:
        chat ([`~reward_models.endpoints.structured_output.StructuredChat`]): The language model.
        max_concurrency (`int`, *optional*, defaults to `64`): Largest number of reflections that are judged concurrently.
        name (`str`, *optional*, defaults to `"reflection_structure"`): Name of the reward function.

    Example:

    ```python
    >>> reward = ReflectionStructure(StructuredChat(OpenAIEndpoint("http://localhost:8000/v1")))
    ```
    """

    text_only = True

    def __init__(self, chat: StructuredChat, max_concurrency: int = 64, name: str = "reflection_structure") -> None:
        if max_concurrency < 1:
            raise ValueError(f"max_concurrency must be at least 1, got {max_concurrency}")
        self.chat = chat
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
            return fmean(shares) if shares and None not in shares else None

        return await asyncio.gather(*map(judge_sample, prompts, written_texts(completions, texts)))

    async def _judge(self, prompt: str, reflection: str, slots: asyncio.Semaphore) -> float | None:
        properties = ReflectionVerdict.model_fields
        fields = "\n".join(f"- {name}: {field.description}" for name, field in properties.items())
        request = _VERDICT_REQUEST.format(prompt=prompt, reflection=reflection, fields=fields)
        async with slots:
            try:
                verdict = await self.chat.ask(request, ReflectionVerdict)
            except Exception as error:
                logger.warning("a reflection could not be judged and gets no reward: %s", error)
                return None
        return fmean(getattr(verdict, name) == getattr(WANTED_VERDICT, name) for name in properties)
