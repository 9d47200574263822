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
from alphagrpo_ext.ranges import check_number
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.shapes.text import is_reflection
from reward_models.dvreward import JudgeFailedError
from reward_models.endpoints.errors import ThrottledWarning
from reward_models.endpoints.preflight import ask_in_time
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

_PREFLIGHT_REFLECTION = ("a red circle", "The request was a red circle, but the circle is blue. Paint it red.")


class ReflectionStructure:
    """
    An asynchronous reward function of TRL: the share of properties that a reflection has as in `WANTED_VERDICT`, averaged
    over a sample's turns. A language model gives the verdict. A sample is `None` if one of its reflections has no verdict.

    Args:
        chat ([`~reward_models.endpoints.structured_output.StructuredChat`]): The language model.
        max_concurrency (`int`, *optional*, defaults to `64`): Largest number of reflections that are judged concurrently.
        max_failed_frac (`float`, *optional*, defaults to `0.5`):
            Share of a batch's reflections that may stay without a verdict, in [0, 1]. If more do, the reward function raises
            [`~reward_models.dvreward.JudgeFailedError`].
        name (`str`, *optional*, defaults to `"reflection_structure"`): Name of the reward function.

    Example:

    ```python
    >>> reward = ReflectionStructure(StructuredChat(OpenAIEndpoint("http://localhost:8000/v1")))
    ```
    """

    text_only = True
    always_applies = True
    """Every sample that wrote a text has a reflection, so a missing reward of it is a failure of the language model."""

    def __init__(
        self,
        chat: StructuredChat,
        max_concurrency: int = 64,
        max_failed_frac: float = 0.5,
        name: str = "reflection_structure",
    ) -> None:
        check_number("max_concurrency", max_concurrency, "[1, inf)")
        check_number("max_failed_frac", max_failed_frac, "[0, 1]")
        self.chat = chat
        self.max_concurrency = max_concurrency
        self.max_failed_frac = max_failed_frac
        self.__name__ = name
        self._failure_log = ThrottledWarning(logger)

    @property
    def run_settings(self) -> dict[str, Any]:
        """What a reward depends on, which a run that resumes keeps as it was."""
        return {"reward_model": {**self.chat.run_settings, "prompt": _verdict_request("{prompt}", "{reflection}")}}

    async def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any],
        texts: Sequence[list[str]] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        slots = asyncio.Semaphore(self.max_concurrency)

        async def judge_sample(prompt: Any, written: list[str]) -> list[float | Exception]:
            return await asyncio.gather(*(self._judge(prompt_text(prompt), text, slots) for text in written))

        samples = await asyncio.gather(*map(judge_sample, prompts, written_texts(completions, texts)))
        self._check_failures([share for shares in samples for share in shares])
        return [
            fmean(shares) if shares and not any(isinstance(share, Exception) for share in shares) else None
            for shares in samples
        ]

    async def preflight(self, height: int = 64, width: int = 64) -> None:
        """
        Check before a run that the language model judges, by one reflection. It may think first, so it has the time of a request.

        Args:
            height, width (`int`, *optional*, defaults to `64`): Size of images, which does not matter here.

        Raises:
            [`~reward_models.dvreward.JudgeFailedError`]: If there is no verdict. The message says what to change.
        """
        endpoint = self.chat.endpoint
        try:
            await ask_in_time(endpoint, lambda: self._ask(*_PREFLIGHT_REFLECTION), endpoint.timeout)
        except Exception as error:
            raise JudgeFailedError(
                f"the language model of the reward '{self.__name__}' gives no verdict, so nothing was started: {error}"
            ) from error
        finally:
            await self.chat.aclose()

    async def _judge(self, prompt: str, reflection: str, slots: asyncio.Semaphore) -> float | Exception:
        """The share of a reflection, or why it has none."""
        async with slots:
            try:
                verdict = await self._ask(prompt, reflection)
            except Exception as error:
                self._failure_log.warn(f"a reflection could not be judged and gets no reward: {error}")
                return error
        properties = ReflectionVerdict.model_fields
        return fmean(getattr(verdict, name) == getattr(WANTED_VERDICT, name) for name in properties)

    async def _ask(self, prompt: str, reflection: str) -> ReflectionVerdict:
        return await self.chat.ask(_verdict_request(prompt, reflection), ReflectionVerdict)

    def _check_failures(self, shares: Sequence[float | Exception]) -> None:
        errors = [share for share in shares if isinstance(share, Exception)]
        if len(errors) > self.max_failed_frac * len(shares):
            raise JudgeFailedError(
                f"the reward '{self.__name__}' has no verdict on {len(errors)} of {len(shares)} reflections, more than its "
                f"max_failed_frac={self.max_failed_frac} allows ({errors[-1]})"
            ) from errors[-1]


def _verdict_request(prompt: str, reflection: str) -> str:
    fields = "\n".join(f"- {name}: {field.description}" for name, field in ReflectionVerdict.model_fields.items())
    return _VERDICT_REQUEST.format(prompt=prompt, reflection=reflection, fields=fields)
