# SPDX-License-Identifier: Apache-2.0

"""The contract of judges, and the registry that names them."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

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


PREFLIGHT_QUESTION = "is there a red circle ?"
"""Question of a check before a run. Every judge can answer it, the one of the shapes world included."""


class Judge(ABC):
    """
    Answers yes/no questions about images.

    A judge fails in one of two ways. If one question gets no answer, e.g. after a timeout and its retries, its answer is
    `None`. Any other failure may be raised: the caller logs it and the whole image is not scored. A failure is never an
    answer of 0.

    A judge is called for many images concurrently from one event loop. It may be used from another event loop later, so it
    must not bind itself to one when it is created.
    """

    is_light: ClassVar[bool] = False
    """Whether making the judge takes no model and reads no policy. A recipe then makes and checks it before it loads a model."""

    last_failure: str | None = None
    """Why the most recent question that got no answer got none."""
    # Running sum since the last `take_answer_mass`.
    _mass_sum: float = 0.0
    _num_masses: int = 0

    @classmethod
    def from_arguments(cls, args: JudgeArguments, policy: Any = None) -> Judge:
        """
        Build the judge from a recipe's arguments. The default uses none of them.

        Args:
            args ([`JudgeArguments`]): The arguments.
            policy (`tuple[UnifiedModel, ProcessorMixin]`, *optional*): The model in training and its processor.

        Raises:
            `ValueError`: If an argument is missing. The message names it.
        """
        return cls()

    @property
    def run_settings(self) -> dict[str, Any]:
        """
        What the answers depend on, which a run that resumes keeps as it was. It goes into checkpoints, so it holds no key. What may
        change is left out, e.g. an address. The default names nothing.
        """
        return {}

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
            `list[float | None]`: P(yes) in [0, 1] per question, or `None` for a question without an answer. A judge
            without probabilities returns 0 and 1.
        """

    def validate_image_size(self, height: int, width: int) -> None:
        """
        Check before training that the judge can read images of this size, in pixels. The default accepts any size.

        Raises:
            `ValueError`: If it cannot.
        """
        return

    def validate_question(self, question: str) -> None:
        """
        Check before training that the judge can answer a question. The default accepts any question.

        Raises:
            `ValueError`: If it cannot answer it about any image.
        """
        return

    async def preflight(self, image: Image.Image, seconds: float) -> None:
        """
        Check before a run that the judge answers: ask one question about a blank image. The default does nothing, which suits a
        judge in this process.

        Args:
            image (`PIL.Image.Image`): A blank image.
            seconds (`float`): Time for the check.

        Raises:
            Exception: If the judge cannot answer. The message names the address and says what to change.
        """
        return

    def take_answer_mass(self) -> float | None:
        """
        Return the mean of `p_yes + p_no` over the answers since the last call, in [0, 1]; `None` without such answers. A judge
        without probabilities has none.
        """
        mean = self._mass_sum / self._num_masses if self._num_masses else None
        self._mass_sum, self._num_masses = 0.0, 0
        return mean

    def _count_mass(self, mass: float) -> None:
        """Add an answer to [`take_answer_mass`]. To be called from the event loop."""
        self._mass_sum += mass
        self._num_masses += 1

    async def aclose(self) -> None:
        """Release resources of the judge, e.g. network connections. The default does nothing."""
        return
