# SPDX-License-Identifier: Apache-2.0

"""BAGEL's processor: texts to token ids and images to pixels, as its inferencer prepares them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.images import to_rgb
from alphagrpo_ext.models.bagel.guidance import branch_context
from alphagrpo_ext.models.contract import UnifiedProcessor
from alphagrpo_ext.models.pixels import image_to_tensor
from alphagrpo_ext.models.preflight import check_field_ranges
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment


BAGEL_GENERATION_PROMPT = (
    "You should first think about the planning process in the mind and then generate the image. \n"
    "The planning process is enclosed within <think> </think> tags, i.e. <think> planning process here </think> "
    "image here"
)
BAGEL_UNDERSTANDING_PROMPT = (
    "You should first think about the reasoning process in the mind and then provide the user with the answer. \n"
    "The reasoning process is enclosed within <think> </think> tags, i.e. <think> reasoning process here </think> "
    "answer here"
)

BAGEL_REFLECTION_PROMPT = (
    "This image was made for the request: {prompt}\n"
    "Compare the image with the request. Say what the request asks for, name what is wrong in the image or missing from "
    "it, and say exactly what must be changed. Then paint the corrected image."
)


def resized_size(width: int, height: int, max_size: int, min_size: int, stride: int) -> tuple[int, int]:
    """
    Width and height after BAGEL's resize: the long side at most `max_size`, the short one at least `min_size` where
    that allows, both multiples of `stride`.

    Args:
        width, height (`int`): Size of the image.
        max_size, min_size, stride (`int`): Limits of the transform, in pixels.
    """

    def snap(scale: float, width: int, height: int) -> tuple[int, int]:
        sides = (round(width * scale), round(height * scale))
        return tuple(max(stride, round(side / stride) * stride) for side in sides)

    scale = min(max_size / max(width, height), 1.0)
    scale = max(scale, min_size / min(width, height))
    new_width, new_height = snap(scale, width, height)
    if max(new_width, new_height) > max_size:
        new_width, new_height = snap(max_size / max(new_width, new_height), new_width, new_height)
    return new_width, new_height


class BagelProcessor(ProcessorMixin, UnifiedProcessor):
    """
    Tokenizer and image transforms of BAGEL.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        generation_system_prompt, understanding_system_prompt (`str`, *optional*):
            System prompts that ask the model to think before it paints, or before it answers.
        reflection_prompt (`str`, *optional*):
            Request to refine an image. The request that the image was made for replaces `{prompt}`.
        verdict_request (`str`, *optional*):
            What is added to it where a reflection may end without painting.
        keep_verdict, repaint_verdict (`str`, *optional*, defaults to `"<done/>"`, `"<edit/>"`):
            The two verdicts of a reflection. Without any, or if the second one comes last, the image is painted anew.
        vae_max_size, vae_min_size, vae_stride (`int`, *optional*, defaults to `1024`, `512`, `16`):
            Limits of the resize of every input image.
        vit_max_size, vit_min_size, vit_stride (`int`, *optional*, defaults to `980`, `224`, `14`):
            Limits of the second resize, for the vision tower.

    Raises:
        `ValueError`: If a limit is no whole number, or not positive; only the smallest sizes may be 0.
    """

    number_ranges = {
        **dict.fromkeys(("vae_max_size", "vae_stride", "vit_max_size", "vit_stride"), "[1, inf)"),
        **dict.fromkeys(("vae_min_size", "vit_min_size"), "[0, inf)"),
    }

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        generation_system_prompt: str = BAGEL_GENERATION_PROMPT,
        understanding_system_prompt: str = BAGEL_UNDERSTANDING_PROMPT,
        reflection_prompt: str = BAGEL_REFLECTION_PROMPT,
        verdict_request: str = UnifiedProcessor.verdict_request,
        keep_verdict: str = UnifiedProcessor.keep_verdict,
        repaint_verdict: str = UnifiedProcessor.repaint_verdict,
        vae_max_size: int = 1024,
        vae_min_size: int = 512,
        vae_stride: int = 16,
        vit_max_size: int = 980,
        vit_min_size: int = 224,
        vit_stride: int = 14,
        **kwargs: Any,
    ) -> None:
        self.generation_system_prompt = generation_system_prompt
        self.understanding_system_prompt = understanding_system_prompt
        self.reflection_prompt = reflection_prompt
        self.verdict_request = verdict_request
        self.keep_verdict, self.repaint_verdict = keep_verdict, repaint_verdict
        self.vae_max_size, self.vae_min_size, self.vae_stride = vae_max_size, vae_min_size, vae_stride
        self.vit_max_size, self.vit_min_size, self.vit_stride = vit_max_size, vit_min_size, vit_stride
        check_field_ranges(vars(self), self.number_ranges, {}, "", type(self).__name__, takes_none=False)
        super().__init__(tokenizer, **kwargs)

    def encode_text(self, text: str) -> list[int]:
        """Token ids of a text, without delimiters."""
        return self.tokenizer.encode(text, add_special_tokens=False)

    def text_segment(self, text: str) -> TextSegment:
        return TextSegment(self.encode_text(text))

    def system_segments(self, think: bool, edits: bool) -> list[TextSegment]:
        return [TextSegment(self.encode_text(self.generation_system_prompt), role="system")] if think else []

    def answering_segments(self, think: bool) -> list[TextSegment]:
        return [TextSegment(self.encode_text(self.understanding_system_prompt), role="system")] if think else []

    def reflection_request(self, prompt: str, may_stop: bool = False) -> str:
        request = self.reflection_prompt.replace("{prompt}", prompt)
        return request + self.verdict_request if may_stop else request

    def branch_context(self, branch: str, context: Sequence[Segment], size: tuple[int, int]) -> list[Segment]:
        return branch_context(branch, context)

    def resize_image(self, image: Image.Image) -> Image.Image:
        image = to_rgb(image)
        size = resized_size(*image.size, self.vae_max_size, self.vae_min_size, self.vae_stride)
        return image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image

    def vit_pixels(self, resized: Image.Image) -> torch.Tensor:
        """Input `(3, height, width)` of the vision tower, from an image that [`resize_image`] has resized."""
        size = resized_size(*resized.size, self.vit_max_size, self.vit_min_size, self.vit_stride)
        return image_to_tensor(resized.resize(size, Image.Resampling.BICUBIC) if size != resized.size else resized)

    def look(self, image: Image.Image) -> torch.Tensor:
        return self.vit_pixels(self.resize_image(image))

    def question_pixels(self, image: Image.Image) -> torch.Tensor:
        # BAGEL answers from its vision tower alone.
        return self.look(image)

    @torch.no_grad()
    def image_segment(self, image: Image.Image, model: Any) -> ImageSegment:
        resized = self.resize_image(image)
        pixels = image_to_tensor(resized)
        latents = model.encode_images(pixels[None].to(model.device))[0].cpu()
        grid = (resized.height // model.latent_downsample, resized.width // model.latent_downsample)
        return ImageSegment(latents, grid, self.vit_pixels(resized), image=resized)
