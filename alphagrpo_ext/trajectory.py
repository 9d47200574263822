# SPDX-License-Identifier: Apache-2.0

"""
Trajectories, the data structure that is passed from rollout to rewards and training: what a policy was given, and what
it did.

A trajectory is a list of segments in the order in which the model sees them. A segment is a text or an image, and is
either *given* (context) or *sampled* (an action that gets a policy gradient).

A sampled image stays as it was sampled: later segments see its latents, not those of the decoded image encoded once
more.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal, TypeAlias

import torch


if TYPE_CHECKING:
    from PIL import Image


@dataclass
class TextSegment:
    """
    A text, as the exact token ids that the model reads or has sampled. It is never decoded and encoded again.

    Args:
        token_ids (`list[int]`):
            Ids without the delimiters that a model family puts around a text. A sampled text that ended by itself
            carries its end token as the last id; one that was cut off at the length limit does not.
        sampled (`bool`, *optional*, defaults to `False`): Whether the policy sampled these ids.
        ended (`bool`, *optional*, defaults to `True`): For a sampled text, whether the last id is the end token.
        log_probs (`list[float]`, *optional*):
            Log-probability of every sampled id at rollout time, under the sampling temperature.
        role (`str`, *optional*, defaults to `"user"`):
            Who wrote the text: `"system"`, `"user"` or `"assistant"`, which is the policy. A sampled text always has
            the role `"assistant"`.
    """

    token_ids: list[int]
    sampled: bool = False
    ended: bool = True
    log_probs: list[float] | None = None
    role: Literal["system", "user", "assistant"] = "user"

    def __post_init__(self) -> None:
        if self.sampled:
            self.role = "assistant"

    @property
    def content_ids(self) -> list[int]:
        """The ids without the end token, which are between the delimiters in the context of later segments."""
        return self.token_ids[:-1] if self.sampled and self.ended else self.token_ids


@dataclass
class DenoisingWindow:
    """
    The K steps of a denoising path that were sampled by stochastic transitions, and so are actions. For an objective
    that trains on the forward process, it holds K noised copies of the image instead, followed by the image at time 0.

    Args:
        latents (`torch.Tensor` of shape `(K + 1, tokens, channels)`):
            States, fp32. A lower precision would move ratios outside the clip range.
        timesteps (`torch.Tensor` of shape `(K + 1,)`): Times of the states, falling from 1 (noise) towards 0 (image).
        start (`int`): Index of the first state in the schedule.
        log_probs (`torch.Tensor` of shape `(K,)`): Mean log-probability of each transition at rollout time.
    """

    latents: torch.Tensor
    timesteps: torch.Tensor
    start: int
    log_probs: torch.Tensor

    @property
    def num_steps(self) -> int:
        """Number K of steps."""
        return len(self.timesteps) - 1


@dataclass
class ImageSegment:
    """
    An image, as clean latents and, if later segments look at it, as pixels.

    Args:
        latents (`torch.Tensor` of shape `(tokens, channels)`):
            Clean latents in the model's token layout, fp32. `(0, channels)` for a given image that is only looked at.
        grid (`tuple[int, int]`): Rows and columns of latent tokens; their product is `tokens`.
        pixel_values (`torch.Tensor` of shape `(3, height, width)`, *optional*):
            The same image as input of the vision tower, in [-1, 1]. `None` if no later segment looks at it.
        image (`PIL.Image.Image`, *optional*): The image for judges and people.
        sampled (`bool`, *optional*, defaults to `False`): Whether the policy sampled this image.
        window (`DenoisingWindow`, *optional*): For a sampled image, the trained steps. `None` if there are none.
        guidance_contexts (`dict[str, list[Segment]]`, *optional*):
            For a sampled image, the context of each guidance branch. `"full"` is among them only if the image was painted
            from another context than the segments before it.
    """

    latents: torch.Tensor
    grid: tuple[int, int]
    pixel_values: torch.Tensor | None = None
    image: Image.Image | None = None
    sampled: bool = False
    window: DenoisingWindow | None = None
    guidance_contexts: dict[str, list[Segment]] = field(default_factory=dict)


Segment: TypeAlias = TextSegment | ImageSegment


@dataclass
class Trajectory:
    """
    One rollout: what the policy was given and what it sampled.

    Args:
        segments (`list[Segment]`): Given and sampled segments in the order in which the model sees them.
        task (`str`, *optional*): Name of the task that it was sampled for, whose guidance its images have.
        num_trained_steps (`int`, *optional*, defaults to `0`):
            Steps in the window of every image that is sampled with it, which a trajectory without a sampled image knows, too.
    """

    segments: list[Segment]
    task: str | None = None
    num_trained_steps: int = 0

    @property
    def sampled_texts(self) -> list[TextSegment]:
        """Sampled texts in their order."""
        return [segment for segment in self.segments if isinstance(segment, TextSegment) and segment.sampled]

    @property
    def sampled_images(self) -> list[ImageSegment]:
        """Sampled images in their order."""
        return [segment for segment in self.segments if isinstance(segment, ImageSegment) and segment.sampled]

    @property
    def result(self) -> ImageSegment | None:
        """
        The image that it results in: the one that the policy painted last or, if it ended without painting, the one that it
        could have painted anew. `None` if it answered a question: an image without latents was only looked at.
        """
        images = [s for s in self.segments if isinstance(s, ImageSegment) and len(s.latents)]
        return images[-1] if images else None

    @property
    def final_image(self) -> Image.Image | None:
        """The image that it results in, for judges and people."""
        return self.result.image if self.result else None
