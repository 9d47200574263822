# SPDX-License-Identifier: Apache-2.0

"""What a task is: from a dataset row to the segments that the policy sees before it acts."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from PIL import Image
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.models.contract import BRANCHES, UnifiedModel
from alphagrpo_ext.registry import Registry
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment


TASKS: Registry = Registry(
    "task",
    "alphagrpo_ext.tasks",
    {
        "image_editing": "alphagrpo_ext.rollout.tasks.image_editing:ImageEditing",
        "reasoning_t2i": "alphagrpo_ext.rollout.tasks.reasoning_t2i:ReasoningT2I",
        "self_reflection": "alphagrpo_ext.rollout.tasks.self_reflection:SelfReflection",
    },
)


@dataclass(frozen=True)
class TaskContexts:
    """
    Context of each guidance branch.

    Args:
        full (`list[Segment]`): All that was given.
        text_dropped (`list[Segment]`): The same without the last text.
        image_dropped (`list[Segment]`): The same without images.
    """

    full: list[Segment] = field(default_factory=list)
    text_dropped: list[Segment] = field(default_factory=list)
    image_dropped: list[Segment] = field(default_factory=list)

    def branch(self, name: str) -> list[Segment]:
        if name not in BRANCHES:
            raise ValueError(f"unknown guidance branch {name!r}, available: {', '.join(BRANCHES)}")
        return getattr(self, name)

    def after_turn(self, sampled: Sequence[Segment], request: TextSegment) -> TaskContexts:
        """
        Contexts of the turn that follows: what the policy wrote and painted is context now, and asked about.

        As in BAGEL's inferencer, what is dropped with the text is the last request alone, and what is left without images
        are the requests alone.

        Args:
            sampled (`Sequence[Segment]`): Texts and image of the turn, in order.
            request ([`TextSegment`]): What the policy is asked to do next.
        """
        past = [*self.full, *sampled]
        return TaskContexts(full=[*past, request], text_dropped=past, image_dropped=[*self.image_dropped, request])


class Task(ABC):
    """
    A kind of request. Register one with `@TASKS.register("name")`.

    Args:
        think (`bool`): Whether the policy writes a thought before it paints.
        num_reflection_rounds (`int`, *optional*, defaults to `1`):
            How often the policy refines an image, for a task that does.
    """

    needs_image: bool = False
    """Whether a row needs an `image` when the policy starts to act."""
    paints_initial_image: bool = False
    """Whether the policy paints the image of a row that has none."""

    def __init__(self, think: bool, num_reflection_rounds: int = 1) -> None:
        if num_reflection_rounds < 1:
            raise ValueError(f"num_reflection_rounds must be at least 1, but is {num_reflection_rounds}")
        self.think = think
        self.num_reflection_rounds = num_reflection_rounds

    @property
    def num_turns(self) -> int:
        """How often the policy acts: writes, if it thinks, and paints."""
        return 1

    @abstractmethod
    def contexts(self, row: Mapping[str, Any], processor: ProcessorMixin, model: UnifiedModel) -> TaskContexts:
        """Contexts of one dataset row. Rows with equal prompts, one after the other, share them."""

    def request(self, row: Mapping[str, Any], processor: ProcessorMixin) -> TextSegment:
        """What the policy is asked to do in each turn."""
        return processor.text_segment(prompt_text(row["prompt"]))

    def max_positions(self, row: Mapping[str, Any], processor: ProcessorMixin, max_new_tokens: int) -> int:
        """Largest number of positions that a trajectory of this row can take: a token one, an image at most two."""
        texts = [len(processor.encode_text(processor.generation_system_prompt))] if self.think else []
        texts += [len(self.request(row, processor).token_ids)] * self.num_turns
        texts += [max_new_tokens] * (self.num_turns if self.think else 0)
        num_images = self.num_turns + self.needs_image
        return sum(length + 2 for length in texts) + 2 * num_images


def context_image(row: Mapping[str, Any]) -> Image.Image:
    """
    The image of a dataset row.

    Raises:
        `ValueError`: If the row has none.
    """
    image = row.get("image")
    if not isinstance(image, Image.Image):
        raise ValueError(
            f"a row of task '{row.get('task')}' needs an image in its column 'image', but has {image!r}: "
            f"{prompt_text(row['prompt'])!r}"
        )
    return image


def image_request_contexts(image: ImageSegment, request: TextSegment, system: list[TextSegment]) -> TaskContexts:
    """
    Contexts of a request about an image, as in BAGEL's inferencer: without the text remain system prompt and image,
    without the image system prompt and request.
    """
    return TaskContexts(
        full=[*system, image, request], text_dropped=[*system, image], image_dropped=[*system, request]
    )


def prompt_text(prompt: str | list[dict[str, Any]]) -> str:
    """
    The request in a dataset's `prompt`: a string, or the last user message of a conversation.

    Raises:
        `ValueError`: If there is no such text.
    """
    if isinstance(prompt, str):
        return prompt
    for message in reversed(prompt):
        if message.get("role") == "user":
            content = message.get("content")
            if isinstance(content, str):
                return content
            texts = [part["text"] for part in content or [] if part.get("type") == "text"]
            if texts:
                return texts[-1]
    raise ValueError(f"the prompt has no user message with text: {prompt!r}")
