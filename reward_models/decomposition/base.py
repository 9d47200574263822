# SPDX-License-Identifier: Apache-2.0

"""The contract of decomposers, which turn a prompt into questions, and the registry that names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from typing import Any

from alphagrpo_ext.ranges import NonNegativeFloat, NonNegativeInt, PositiveFloat, PositiveInt, check_ranges
from alphagrpo_ext.registry import Registry
from reward_models.endpoints.endpoint import parse_extra_body
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError
from reward_models.prompts.questions import PromptRecord


DECOMPOSERS = Registry(
    "decomposer",
    "alphagrpo_ext.decomposers",
    {
        "holistic": "reward_models.decomposition.holistic:HolisticDecomposer",
        "openai": "reward_models.decomposition.openai:OpenAIDecomposer",
        "shapes": "reward_models.decomposition.shapes:ShapesDecomposer",
    },
)

PROMPT_PLACE = "{prompt}"
"""Where a template has the prompt."""


class DecompositionError(ValueError):
    """
    Raised for a prompt that cannot be decomposed, where a retry would not help.

    Args:
        reason (`str`): Kind of the failure in a few words, the same for all failures of the kind.
        detail (`str`): What is wrong with this prompt.
    """

    def __init__(self, reason: str, detail: str) -> None:
        super().__init__(f"{reason}: {detail}")
        self.reason = reason
        self.detail = detail


def failure_reason(error: Exception) -> str:
    """Return the kind of a failure in a few words, so that failures can be counted by kind."""
    if isinstance(error, DecompositionError | EndpointError):
        return error.reason
    if isinstance(error, InvalidAnswerError):
        return "unusable answer"
    return "timeout" if isinstance(error, TimeoutError) else type(error).__name__


@dataclass
class DecomposerArguments:
    """
    Which decomposer to use, and its settings; the help text of a field describes it. The key of an endpoint comes from the
    environment variable `OPENAI_API_KEY` alone.
    """

    decomposer: str | None = field(
        default=None,
        metadata={
            "help": "Decomposer: 'openai', 'shapes', 'holistic' (one question about the whole prompt, without a model), or a "
            "registered one. Default: 'openai' with an input, else 'shapes'."
        },
    )
    base_url: str | None = field(
        default=None,
        metadata={
            "help": "OpenAI-compatible endpoint, e.g. http://localhost:8000/v1. Default: the environment variable "
            "OPENAI_BASE_URL, or OpenAI itself."
        },
    )
    model: str | None = field(
        default=None, metadata={"help": "Name of the model at the endpoint. Default: the only one that it serves."}
    )
    max_concurrency: PositiveInt = field(default=64, metadata={"help": "Prompts that are decomposed concurrently."})
    timeout: PositiveFloat = field(default=120.0, metadata={"help": "Seconds for one try of a request."})
    max_retries: NonNegativeInt = field(default=8, metadata={"help": "Further tries of a request."})
    max_tokens: NonNegativeInt = field(
        default=4096, metadata={"help": "Longest answer, in tokens. 0 leaves the limit to the endpoint."}
    )
    temperature: NonNegativeFloat = field(
        default=0.3, metadata={"help": "Temperature of the answers. At 0 a retry may get the same answer again."}
    )
    max_answer_bytes: int = field(
        default=2**20, metadata={"help": "Largest size of the endpoint's answer, before and after decompression."}
    )
    extra_body: dict[str, Any] | str | None = field(
        default=None,
        metadata={
            "help": "Further fields of a request to the endpoint, as JSON. A field that is null is left out, e.g. "
            '{"temperature": null}.'
        },
    )

    holistic_template: str = field(
        default=f"Does the image show exactly what this request asks for, with nothing wrong, missing or added? {PROMPT_PLACE}",
        metadata={
            "help": "Question of the decomposer 'holistic', with {prompt} in the place of the prompt. For prompts of the shapes "
            "world: 'is there {prompt} ?'"
        },
    )

    def __post_init__(self) -> None:
        if PROMPT_PLACE not in self.holistic_template:
            raise ValueError(f"holistic_template must contain {PROMPT_PLACE}, but is {self.holistic_template!r}")
        self.extra_body = parse_extra_body("extra_body", self.extra_body)
        check_ranges(self)


class Decomposer(ABC):
    """
    Decomposes prompts into questions, many concurrently in one event loop. A failure is raised: as [`DecompositionError`]
    if no other error describes it.
    """

    @classmethod
    def from_arguments(cls, args: DecomposerArguments) -> Decomposer:
        """
        Build the decomposer from a recipe's arguments. The default uses none of them.

        Raises:
            `ValueError`: If an argument is missing or out of range. The message names the argument.
        """
        return cls()

    def settings(self) -> dict[str, str | None]:
        """
        What the questions depend on besides the prompt, by name; `None` for what is not known before the first answer. A file of
        records has those of one decomposer with one set of settings. The default has none.
        """
        return {}

    @abstractmethod
    async def decompose(self, prompt: str) -> PromptRecord:
        """
        Decompose one prompt.

        Args:
            prompt (`str`): The prompt.

        Returns:
            `PromptRecord`: The unchanged prompt, with at least one valid semantic question.

        Raises:
            [`DecompositionError`]: If the prompt cannot be decomposed.
        """

    async def aclose(self) -> None:
        """Release resources of the decomposer, e.g. network connections. The default does nothing."""
        return
