# SPDX-License-Identifier: Apache-2.0

"""Cosmos3's processor: texts to token ids and images to pixels, as the released pipelines prepare them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from PIL import Image
from transformers import PreTrainedTokenizerBase
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import smart_resize
from transformers.processing_utils import ProcessorMixin

from alphagrpo_ext.images import to_rgb
from alphagrpo_ext.models.contract import UnifiedProcessor
from alphagrpo_ext.models.cosmos3.chat_template import THOUGHT_END, opened_thought
from alphagrpo_ext.models.cosmos3.vision import MAX_PIXELS, MIN_PIXELS
from alphagrpo_ext.models.pixels import image_to_tensor
from alphagrpo_ext.models.preflight import check_field_ranges
from alphagrpo_ext.ranges import check_number
from alphagrpo_ext.trajectory import ImageSegment, Segment, TextSegment


# With NVIDIA's spelling.
COSMOS3_GENERATION_PROMPT = "You are a helpful assistant who will generate images from a give prompt."
COSMOS3_EDITING_PROMPT = "You are a helpful assistant who will edit images based on the user's instructions."
COSMOS3_THINKING_PROMPT = (
    "Before the image is made, think about the request: say what the image must show, how many of each thing, of what "
    "color, and where. The thought is enclosed within <think> </think> tags, and nothing follows it."
)
COSMOS3_REWRITING_PROMPT = (
    "Write one caption of the image that the user asks for: say what it must show, how many of each thing, of what color, "
    "and where. Answer with the caption alone."
)
COSMOS3_REFLECTION_PROMPT = (
    "This image was made for the request: {prompt}\n"
    "Compare the image with the request. Say what the request asks for, name what is wrong in the image or missing from "
    "it, and say exactly what must be changed. Then paint the corrected image."
)
RESOLUTION_SENTENCE = "This image is of {height}x{width} resolution."
NEGATIVE_RESOLUTION_SENTENCE = "This image is not of {height}x{width} resolution."


def with_sentence(text: str, sentence: str, size: tuple[int, int]) -> str:
    """A request with a sentence about the height and width of its image, joined as Diffusers' pipeline does."""
    height, width = size
    sentence = sentence.format(height=height, width=width)
    text = text.rstrip(".")
    return f"{text}. {sentence}" if text else sentence


class Cosmos3Processor(ProcessorMixin, UnifiedProcessor):
    """
    Tokenizer and image transforms of Cosmos3. The model puts the pieces of the tokenizer's chat template around texts.

    Args:
        tokenizer (`PreTrainedTokenizerBase`): The tokenizer.
        use_system_prompt (`bool`, *optional*, defaults to `True`):
            Whether contexts begin with one of the release's two system prompts.
        generation_system_prompt, editing_system_prompt (`str`, *optional*): The two system prompts.
        thinking_prompt (`str`, *optional*): What is added to the system prompt where the policy thinks before it paints.
        reflection_prompt (`str`, *optional*):
            Request to refine an image. The request that the image was made for replaces `{prompt}`.
        verdict_request (`str`, *optional*):
            What is added to it where a reflection may end without painting.
        keep_verdict, repaint_verdict (`str`, *optional*, defaults to `"<done/>"`, `"<edit/>"`):
            The two verdicts of a reflection. Without any, or if the second one comes last, the image is painted anew.
        thought_context (`str`, *optional*, defaults to `"in_place"`):
            `"in_place"` paints from the conversation that the thought ends. `"rewrite"` paints from a new conversation, whose
            request is the thought instead of the user's text, as the released models were trained with captions.
        rewriting_prompt (`str`, *optional*): What replaces `thinking_prompt` where thoughts are rewritten to requests.
        negative_prompt (`str`, *optional*, defaults to `""`): Request of the branch that guidance leads away from.
        min_pixels, max_pixels (`int`, *optional*): Area of an image in the vision tower.
        max_image_size (`int`, *optional*, defaults to `1024`): Longest side of an input image, in pixels.
        image_stride, vision_stride (`int`, *optional*, defaults to `32`):
            Pixels per latent token and per token of the vision tower. Sides of images are multiples of them.

    Raises:
        `ValueError`: If there is no such `thought_context`, if a size is no whole number or not positive (only `min_pixels` may
            be 0), or if `max_image_size` is less than `image_stride`.
    """

    thought_contexts = ("in_place", "rewrite")
    number_ranges = {
        "min_pixels": "[0, inf)",
        **dict.fromkeys(("max_pixels", "max_image_size", "image_stride", "vision_stride"), "[1, inf)"),
    }

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase | None = None,
        use_system_prompt: bool = True,
        generation_system_prompt: str = COSMOS3_GENERATION_PROMPT,
        editing_system_prompt: str = COSMOS3_EDITING_PROMPT,
        thinking_prompt: str = COSMOS3_THINKING_PROMPT,
        reflection_prompt: str = COSMOS3_REFLECTION_PROMPT,
        verdict_request: str = UnifiedProcessor.verdict_request,
        keep_verdict: str = UnifiedProcessor.keep_verdict,
        repaint_verdict: str = UnifiedProcessor.repaint_verdict,
        thought_context: str = "in_place",
        rewriting_prompt: str = COSMOS3_REWRITING_PROMPT,
        negative_prompt: str = "",
        min_pixels: int = MIN_PIXELS,
        max_pixels: int = MAX_PIXELS,
        max_image_size: int = 1024,
        image_stride: int = 32,
        vision_stride: int = 32,
        **kwargs: Any,
    ) -> None:
        if thought_context not in self.thought_contexts:
            raise ValueError(
                f"thought_context must be one of {', '.join(self.thought_contexts)}, but is {thought_context!r}"
            )
        self.thought_context = thought_context
        self.use_system_prompt = use_system_prompt
        self.generation_system_prompt = generation_system_prompt
        self.editing_system_prompt = editing_system_prompt
        self.thinking_prompt = thinking_prompt
        self.reflection_prompt = reflection_prompt
        self.verdict_request = verdict_request
        self.keep_verdict, self.repaint_verdict = keep_verdict, repaint_verdict
        self.rewriting_prompt = rewriting_prompt
        self.negative_prompt = negative_prompt
        self.min_pixels, self.max_pixels = min_pixels, max_pixels
        self.max_image_size = max_image_size
        self.image_stride, self.vision_stride = image_stride, vision_stride
        check_field_ranges(vars(self), self.number_ranges, {}, "", type(self).__name__, takes_none=False)
        check_number(f"max_image_size in {type(self).__name__}", max_image_size, f"[{image_stride}, inf)")
        super().__init__(tokenizer, **kwargs)

    def decode_sampled(self, texts: Sequence[TextSegment]) -> str:
        opened = opened_thought(self.tokenizer)
        if not opened:
            return super().decode_sampled(texts)
        return " ".join(opened + self.decode(text.content_ids) for text in texts)

    def text_segment(self, text: str) -> TextSegment:
        return TextSegment(self.tokenizer.encode(text, add_special_tokens=False))

    def system_segments(self, think: bool, edits: bool) -> list[TextSegment]:
        release = self.editing_system_prompt if edits else self.generation_system_prompt
        task = self.rewriting_prompt if self.thought_context == "rewrite" else self.thinking_prompt
        text = " ".join([release] * self.use_system_prompt + [task] * think)
        return [TextSegment(self.text_segment(text).token_ids, role="system")] if text else []

    def request_segment(self, text: str, size: tuple[int, int]) -> TextSegment:
        return self.text_segment(with_sentence(text, RESOLUTION_SENTENCE, size))

    def reflection_request(self, prompt: str, may_stop: bool = False) -> str:
        request = self.reflection_prompt.replace("{prompt}", prompt)
        return request + self.verdict_request if may_stop else request

    def branch_context(self, branch: str, context: Sequence[Segment], size: tuple[int, int]) -> list[Segment]:
        """
        As [`UnifiedProcessor.branch_context`] says. The negative branch has the format of a released prompt without a
        thought, and keeps the images.

        Raises:
            `ValueError`: If the branch is unknown.
        """
        if branch == "full":
            return list(context)
        if branch != "negative":
            raise ValueError(f"unknown guidance branch {branch!r}, available: full, negative")
        images = [segment for segment in context if isinstance(segment, ImageSegment)]
        request = self.text_segment(with_sentence(self.negative_prompt, NEGATIVE_RESOLUTION_SENTENCE, size))
        return [*self.system_segments(think=False, edits=bool(images)), *images, request]

    def painting_context(
        self, context: Sequence[Segment], thought: TextSegment, size: tuple[int, int]
    ) -> list[Segment]:
        """
        As [`UnifiedProcessor.painting_context`] says: the system prompt of a context without a thought, all images, and as the
        request what the policy wrote after the last `</think>`, with the sentence of the size.
        """
        images = [segment for segment in context if isinstance(segment, ImageSegment)]
        ids = self._caption_ids(thought.content_ids)
        text = self.decode(ids)
        sentence = RESOLUTION_SENTENCE.format(height=size[0], width=size[1])
        if text.strip():
            stop = "" if text.rstrip().endswith(".") else "."
            space = " " if stop or text == text.rstrip() else ""
            sentence = f"{stop}{space}{sentence}"
        request = TextSegment([*ids, *self.text_segment(sentence).token_ids])
        return [*self.system_segments(think=False, edits=bool(images)), *images, request]

    def _caption_ids(self, ids: list[int]) -> list[int]:
        """The ids after the last `</think>`, all of them if there is none."""
        end = self.text_segment(THOUGHT_END).token_ids
        starts = [start for start in range(len(ids) - len(end) + 1) if ids[start : start + len(end)] == end]
        return ids[starts[-1] + len(end) :] if starts else ids

    def resize_image(self, image: Image.Image) -> Image.Image:
        image, stride = to_rgb(image), self.image_stride
        scale = min(self.max_image_size / max(image.size), 1.0)
        limit = self.max_image_size // stride * stride
        size = tuple(min(max(stride, round(side * scale / stride) * stride), limit) for side in image.size)
        return image.resize(size, Image.Resampling.BICUBIC) if size != image.size else image

    def look(self, image: Image.Image) -> torch.Tensor:
        resized = self.resize_image(image)
        height, width = smart_resize(
            resized.height, resized.width, self.vision_stride, self.min_pixels, self.max_pixels
        )
        return image_to_tensor(resized.resize((width, height), Image.Resampling.BICUBIC))

    def question_pixels(self, image: Image.Image) -> torch.Tensor:
        return self.look(image)

    @torch.no_grad()
    def image_segment(self, image: Image.Image, model: Any) -> ImageSegment:
        resized = self.resize_image(image)
        pixels = image_to_tensor(resized)
        latents = model.encode_images(pixels[None].to(model.device))[0].cpu()
        grid = (resized.height // self.image_stride, resized.width // self.image_stride)
        return ImageSegment(latents, grid, self.look(resized), image=resized)
