# SPDX-License-Identifier: Apache-2.0

"""A painter behind an OpenAI-compatible images endpoint."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, ClassVar

from PIL import Image

from reward_models.endpoints.answers import PaintedImages
from reward_models.endpoints.endpoint import OpenAIEndpoint, parse_extra_body
from reward_models.endpoints.errors import EndpointError, InvalidAnswerError
from reward_models.files.image_decoding import EncodedImage, ImageLimits, OversizedImageError
from reward_models.painters.base import (
    DEFAULT_PAINTER_MODEL,
    PAINTERS,
    ImageRequest,
    Painter,
    PainterArguments,
    PaintError,
    UnpaintableError,
)


_REFUSALS = (400, 422)


@PAINTERS.register("openai")
@dataclass(eq=False)
class OpenAIPainter(Painter):
    """
    Paints with a model behind an OpenAI-compatible images endpoint.

    The endpoint receives one text. Without an image to refine, that is the thought in place of the prompt, or the prompt if
    there is no thought or a blank one. The protocol has no image to refine: the endpoint paints a new image from prompt and
    reflection. It has no seeds either, so those are ignored.

    Args:
        endpoint ([`OpenAIEndpoint`]):
            The endpoint. If it has no `model`, the server chooses one.
        height, width (`int`, *optional*, defaults to `1024`):
            Requested size, in pixels. An image of another size is accepted within `limits`.
        extra_body (`dict`, *optional*):
            Further fields of a request. `None` as a value leaves a field out.
        limits ([`ImageLimits`], *optional*):
            Size limits of an image that the endpoint sends. They are raised as far as the requested size needs.

    Raises:
        `ValueError`: If an argument is out of range.
    """

    max_calls: ClassVar[int] = 16

    endpoint: OpenAIEndpoint
    height: int = 1024
    width: int = 1024
    extra_body: dict[str, Any] | None = None
    limits: ImageLimits = ImageLimits()

    def __post_init__(self) -> None:
        for name in ("height", "width"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, but is {getattr(self, name)}")
        self.limits = self.limits.including(self.width, self.height)

    @classmethod
    def from_arguments(cls, args: PainterArguments) -> OpenAIPainter:
        if args.painter_model == DEFAULT_PAINTER_MODEL:
            raise ValueError("painter 'openai' needs painter_model, the name of the model at the endpoint")
        endpoint = OpenAIEndpoint(
            args.painter_base_url,
            args.painter_model,
            max_concurrency=args.painter_max_concurrency,
            timeout=args.painter_timeout,
            max_retries=args.painter_max_retries,
            max_answer_bytes=args.painter_max_answer_bytes,
        )
        extra_body = parse_extra_body("painter_extra_body", args.painter_extra_body)
        return cls(endpoint, args.image_height, args.image_width, extra_body, args.image_limits)

    async def paint(self, requests: Sequence[ImageRequest]) -> list[Image.Image]:
        tasks = [asyncio.create_task(self._paint_one(request, index)) for index, request in enumerate(requests)]
        try:
            return await asyncio.gather(*tasks)
        finally:
            # After one failure the other images are not needed, and may cost money.
            for task in tasks:
                task.cancel()

    async def aclose(self) -> None:
        await self.endpoint.aclose()

    async def _paint_one(self, request: ImageRequest, index: int) -> Image.Image:
        try:
            return await self.endpoint.paint(
                partial(_read_image, limits=self.limits),
                endpoint_prompt(request),
                n=1,
                size=f"{self.width}x{self.height}",
                response_format="b64_json",
                extra_body=self.extra_body,
            )
        except EndpointError as error:
            kind = UnpaintableError if error.status_code in _REFUSALS else PaintError
            raise kind(f"request {index}: {error}") from error
        except InvalidAnswerError as error:
            raise PaintError(f"request {index}: {error}") from error
        except OversizedImageError as error:
            # The next image would be as large, and might cost money.
            raise PaintError(
                f"request {index}: from the images endpoint: {error}: ask for a smaller one (image_height and image_width), or "
                "raise the server's max_image_side and max_image_pixels"
            ) from error


def _read_image(answer: PaintedImages, limits: ImageLimits) -> Image.Image:
    if not answer.data or not answer.data[0].b64_json:
        raise InvalidAnswerError("the images endpoint sent no b64_json; it must support that response_format")
    try:
        return EncodedImage.from_base64(answer.data[0].b64_json, limits).decode()
    except OversizedImageError:
        raise
    except ValueError as error:
        raise InvalidAnswerError(f"the images endpoint sent an image that cannot be read: {error}") from error


def endpoint_prompt(request: ImageRequest) -> str:
    """
    Return the text that an images endpoint receives: the thought or else the prompt, or for an image to refine both prompt and
    reflection. The tags of a thought are removed.
    """
    thought = (request.thought or "").replace("<think>", " ").replace("</think>", " ").strip()
    if request.image is None:
        return thought or request.prompt
    return f"{request.prompt}\n{thought}".strip()
