# SPDX-License-Identifier: Apache-2.0

"""The contract of judges, and the registry that names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

from PIL import Image

from alphagrpo_ext.registry import Registry
from reward_models.judges.arguments import JudgeArguments


JUDGES = Registry(
    "judge",
    "alphagrpo_ext.judges",
    {
        "openai": "reward_models.judges.openai:OpenAIJudge",
        "policy": "reward_models.judges.policy:PolicyJudge",
        "server": "reward_models.judges.server:ServerJudge",
        "shapes": "reward_models.judges.shapes:ShapesJudge",
        "transformers": "reward_models.judges.transformers:TransformersJudge",
    },
)


class Judge(ABC):
    """
    Answers yes/no questions about images.

    A judge fails in one of two ways. A question that it could not get an answer for, say because the network timed out
    after its retries, is `None`. Anything worse may be raised: the caller logs it and treats the whole image as not
    scored. A failure is never an answer of 0.

    A judge is called for many images at once from one event loop. It may be used from another event loop later, so it
    should not tie itself to one when it is created.
    """

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> Judge:
        """
        Build the judge from a recipe's arguments. The default takes none of them.

        Args:
            args ([`JudgeArguments`]): The arguments.
            policy (`tuple[UnifiedModel, ProcessorMixin]`, *optional*): The model that is trained and its processor.

        Raises:
            `ValueError`: If something is missing; the message names the argument.
        """
        return cls()

    @abstractmethod
    async def answer(self, image: Image.Image, questions: Sequence[str]) -> list[float | None]:
        """
        Answer questions about one image.

        Args:
            image (`PIL.Image.Image`):
                The image.
            questions (`Sequence[str]`):
                At least one yes/no question.

        Returns:
            `list[float | None]`: For each question P(yes) in [0, 1], or `None` where no answer could be had. A judge
            without probabilities returns 0 and 1.
        """

    def validate_image_size(self, height: int, width: int) -> None:
        """
        Asked before training whether the judge takes images of this size, in pixels. The default takes any.

        Raises:
            `ValueError`: If it does not.
        """
        return

    async def aclose(self) -> None:
        """Release what the judge holds, e.g. network connections. The default does nothing."""
        return


class TextJudge(ABC):
    """
    Answers a request about texts with JSON: a language model behind an endpoint, say. As with [`Judge`], anything that
    goes wrong may be raised, and what was asked about is then not scored.
    """

    @abstractmethod
    async def complete(self, request: str, schema: dict[str, Any]) -> str:
        """
        Args:
            request (`str`): What is asked.
            schema (`dict[str, Any]`): JSON schema of the answer.

        Returns:
            `str`: JSON that fits the schema; the caller checks it.
        """
