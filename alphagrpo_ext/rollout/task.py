# SPDX-License-Identifier: Apache-2.0

"""Tasks: what of a dataset row the policy sees before it acts, and how often it acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from PIL import Image

from alphagrpo_ext.images import read_image
from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.models.contract import UnifiedModel, UnifiedProcessor
from alphagrpo_ext.ranges import check_number
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.rollout.config import RolloutConfig
from alphagrpo_ext.rollout.settings import TaskSettings
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment


TASKS: Registry = Registry(
    "task",
    "alphagrpo_ext.tasks",
    {
        "image_editing": "alphagrpo_ext.rollout.tasks.image_editing:ImageEditing",
        "reasoning_t2i": "alphagrpo_ext.rollout.tasks.reasoning_t2i:ReasoningT2I",
        "self_reflection": "alphagrpo_ext.rollout.tasks.self_reflection:SelfReflection",
        "visual_question_answering": "alphagrpo_ext.rollout.tasks.visual_question_answering:VisualQuestionAnswering",
    },
)

PAINTING_TASK = "reasoning_t2i"
"""The task that paints from a prompt alone; it also paints the images that other tasks refine."""
REFLECTION_TASK = "self_reflection"
"""The task that refines such an image."""
ANSWERING_TASK = "visual_question_answering"
"""The task that answers a question about an image, and paints none."""


class Task(ABC):
    """
    A kind of request. Register one with `@TASKS.register("name")`.

    Args:
        think (`bool`): Whether the policy writes a thought before it paints or answers.
        num_reflection_rounds (`int`, *optional*, defaults to `1`):
            How often the policy refines an image, in tasks that refine.
        allow_stop (`bool`, *optional*, defaults to `False`):
            Whether a turn may end without painting, in tasks that refine.
        stop_threshold (`float`, *optional*):
            With `allow_stop`, the probability of that verdict from which a turn ends, in [0, 1], whatever the text says. `None`
            goes by the words.
    """

    needs_image: bool = False
    """Whether a row needs an `image` when the policy starts to act."""
    paints_initial_image: bool = False
    """Whether the policy paints the image of a row that has none, with the settings of [`PAINTING_TASK`]."""
    can_paint: bool = True
    """Whether a turn can end with an image, which reward functions then judge."""
    settings: ClassVar[TaskSettings] = TaskSettings()
    """The guidance, schedule, size and sampling of texts that this task needs; the run decides about the others."""

    def __init__(
        self,
        think: bool,
        num_reflection_rounds: int = 1,
        allow_stop: bool = False,
        stop_threshold: float | None = None,
    ) -> None:
        if num_reflection_rounds < 1:
            raise ValueError(f"num_reflection_rounds must be at least 1, but is {num_reflection_rounds}")
        self.think = think
        self.num_reflection_rounds = num_reflection_rounds
        if stop_threshold is not None:
            check_number("stop_threshold", stop_threshold, "[0, 1]")
            if not allow_stop:
                raise ValueError(f"stop_threshold={stop_threshold} needs allow_stop")
        self.allow_stop, self.stop_threshold = allow_stop, stop_threshold

    @property
    def num_turns(self) -> int:
        """How often the policy acts at most, which is to write, if it does, and to paint."""
        return 1

    @classmethod
    def starts_from_image(cls) -> bool:
        """Whether an image may be painted from a noised copy of the one that the policy looks at."""
        return cls.needs_image and cls.can_paint

    @property
    def writes(self) -> bool:
        """Whether the policy writes a text in each turn."""
        return self.think

    def paints(self, text: str, processor: UnifiedProcessor) -> bool:
        """
        Whether a turn goes on to paint after the policy wrote this text. If not, the trajectory ends with the text, and its
        last image is the one that the policy looked at. A turn without a text always paints.

        Args:
            text (`str`): What [`UnifiedProcessor.decode_sampled`] makes of the sampled text.
            processor ([`UnifiedProcessor`]): Knows the wordings of the model.
        """
        return True

    def which_paint(
        self,
        contexts: Sequence[Sequence[Segment]],
        texts: Sequence[TextSegment],
        processor: UnifiedProcessor,
        model: UnifiedModel,
    ) -> list[bool]:
        """
        Which of several turns go on to paint: by default those that [`~Task.paints`] says.

        Args:
            contexts (`Sequence[Sequence[Segment]]`): What each turn saw before its text.
            texts (`Sequence[TextSegment]`): The texts of the turns.
            processor ([`UnifiedProcessor`]), model ([`UnifiedModel`]): The policy's.
        """
        return [self.paints(processor.decode_sampled([text]), processor) for text in texts]

    def system_segments(self, processor: UnifiedProcessor) -> list[TextSegment]:
        """System prompt that the context begins with."""
        return processor.system_segments(self.think, edits=self.needs_image)

    @abstractmethod
    def context(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, size: tuple[int, int]
    ) -> list[Segment]:
        """
        What the policy sees of a dataset row when it starts to act. Consecutive rows with equal prompts share it.

        Args:
            row (`Mapping[str, Any]`): The row.
            processor ([`UnifiedProcessor`]), model ([`UnifiedModel`]): Turn texts and images into segments.
            size (`tuple[int, int]`): Height and width of the image to paint, in pixels.
        """

    def request(self, row: Mapping[str, Any], processor: UnifiedProcessor, size: tuple[int, int]) -> TextSegment:
        """What the policy is asked to do in each turn; arguments as in [`~Task.context`]."""
        return processor.request_segment(prompt_text(row["prompt"]), size)

    def max_positions(
        self, row: Mapping[str, Any], processor: UnifiedProcessor, model: UnifiedModel, config: RolloutConfig
    ) -> int:
        """
        Largest number of positions that a trajectory of this row can take. A given image counts as large as a painted
        one, so that no image is decoded.
        """
        image = ImageSegment(torch.empty(0, model.latent_channels), config.grid(model))
        texts = [TextSegment([0] * config.max_new_tokens, role="assistant")] * self.writes
        turn = [self.request(row, processor, config.size), *texts, *[image] * self.can_paint]
        given = [*self.system_segments(processor), *[image] * self.needs_image]
        return model.num_positions([*given, *turn * self.num_turns])


def context_image(row: Mapping[str, Any]) -> Image.Image:
    """
    The image of a dataset row, upright and in RGB.

    Raises:
        `ValueError`: If the row has none, or if it cannot be read.
    """
    image = row.get("image")
    if image is None:
        raise ValueError(
            f"a row of task '{row.get('task')}' needs an image in its column 'image', but has none: "
            f"{prompt_text(row['prompt'])!r}"
        )
    return read_image(image)
