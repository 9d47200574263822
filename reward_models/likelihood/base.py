# SPDX-License-Identifier: Apache-2.0

"""The contract of the frozen models that find prompts likely, and the registry that names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeAlias

from PIL import Image

from alphagrpo_ext.ranges import check_number
from alphagrpo_ext.registry import Registry
from reward_models.likelihood.arguments import LikelihoodArguments


if TYPE_CHECKING:
    import torch


LIKELIHOOD_SCORERS = Registry(
    "likelihood scorer",
    "alphagrpo_ext.likelihood_scorers",
    {
        "policy": "reward_models.likelihood.policy:PolicyScorer",
        "transformers": "reward_models.likelihood.transformers:TransformersScorer",
    },
)

PolicyLoader: TypeAlias = Callable[[], tuple[Any, Any]]
"""Gives a frozen policy and its processor."""


class LikelihoodScorer(ABC):
    """
    A frozen model that looks at an image and gives log-probabilities to an answer: a prefix and then the prompt.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The model's tokenizer.
        prefix (`str`, *optional*, defaults to `""`): What every answer begins with.
        instruction (`str`, *optional*): Request between the image and the answer; none if it is empty. By default
            `default_instruction`.
        batch_size (`int`, *optional*, defaults to `16`): Images per forward.
    """

    default_instruction: ClassVar[str] = ""

    def __init__(self, tokenizer: Any, prefix: str = "", instruction: str | None = None, batch_size: int = 16) -> None:
        check_number("batch_size", batch_size, "[1, inf)")
        self.tokenizer = tokenizer
        self.prefix = prefix
        self.instruction = self.default_instruction if instruction is None else instruction
        self.batch_size = batch_size

    @classmethod
    @abstractmethod
    def from_arguments(cls, args: LikelihoodArguments, policy: PolicyLoader | None = None) -> LikelihoodScorer:
        """
        Build the scorer from a recipe's arguments.

        Raises:
            `ValueError`: If an argument is missing. The message names it.
        """

    @property
    def run_settings(self) -> dict[str, Any]:
        """What the values depend on, which a run that resumes keeps as it was."""
        return {"scorer": type(self).__name__, "prefix": self.prefix, "instruction": self.instruction}

    def encode(self, text: str) -> list[int]:
        """Token ids of a text without special tokens."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    @abstractmethod
    def answer_log_probs(self, images: Sequence[Image.Image], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        """
        Log-probabilities of the tokens of one answer per image, `(tokens,)`, in one forward. A value must not depend on the
        other images.

        Args:
            images (`Sequence[PIL.Image.Image]`): At most `batch_size` images, RGB.
            answers (`Sequence[Sequence[int]]`): Token ids of the answer to each.
        """

    def log_probs(self, images: Sequence[Image.Image], prompts: Sequence[Sequence[int]]) -> list[list[float]]:
        """
        Log-probabilities of the tokens of one prompt per image, in nats, each under the image and the tokens before it.

        Args:
            images (`Sequence[PIL.Image.Image]`): The images, RGB.
            prompts (`Sequence[Sequence[int]]`): Token ids of the prompt of each, from [`~LikelihoodScorer.encode`].
        """
        prefix = self.encode(self.prefix) if self.prefix else []
        answers = [[*prefix, *prompt] for prompt in prompts]
        found: list[torch.Tensor] = []
        for start in range(0, len(images), self.batch_size):
            part = slice(start, start + self.batch_size)
            found += self.answer_log_probs(images[part], answers[part])
        return [values[len(prefix) :].tolist() for values in found]
