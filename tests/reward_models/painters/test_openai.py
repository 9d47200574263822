# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import base64
import io
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from reward_models.endpoints.endpoint import OpenAIEndpoint
from reward_models.painters.base import (
    ImageRequest,
    Painter,
    PainterArguments,
    PaintError,
    UnpaintableError,
)
from reward_models.painters.openai import OpenAIPainter, endpoint_prompt
from reward_models.server.arguments import ServerArguments
from support.loopback import serve


def paint(painter: Painter, *requests: ImageRequest) -> list[np.ndarray]:
    async def run() -> list[Image.Image]:
        try:
            return await painter.paint(requests)
        finally:
            await painter.aclose()

    return [np.asarray(image).astype(int) for image in asyncio.run(run())]


@dataclass
class ImagesEndpoint:
    """An images endpoint that paints the length of a prompt as red, and answers with `faults` first."""

    faults: list[tuple[int, Any]] = field(default_factory=list)
    bodies: list[dict[str, Any]] = field(default_factory=list)
    keys: list[str] = field(default_factory=list)
    running: int = 0
    peak: int = 0

    async def answer(self, request: Request) -> JSONResponse:
        body = await request.json()
        self.bodies.append(body)
        self.keys.append(request.headers["authorization"])
        if self.faults:
            status, content = self.faults.pop(0)
            return JSONResponse(content, status)
        self.running += 1
        self.peak = max(self.peak, self.running)
        await asyncio.sleep(0.02)
        self.running -= 1
        width, height = map(int, body["size"].split("x"))
        return JSONResponse(images_of(png(Image.new("RGB", (width, height), (len(body["prompt"]), 0, 0)))))

    @property
    def app(self) -> FastAPI:
        app = FastAPI()
        app.add_route("/v1/images/generations", self.answer, methods=["POST"])
        return app


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def images_of(data: bytes) -> dict[str, Any]:
    return {"created": 0, "data": [{"b64_json": base64.b64encode(data).decode()}]}


@pytest.fixture
def endpoint() -> ImagesEndpoint:
    return ImagesEndpoint()


@pytest.fixture
def url(endpoint: ImagesEndpoint) -> Iterator[str]:
    with serve(endpoint.app) as server:
        yield f"{server.url}/v1"


def test_openai_painter_asks_for_the_thought_and_keeps_the_order(endpoint: ImagesEndpoint, url: str) -> None:
    arguments = PainterArguments(
        painter="openai", painter_model="brush", painter_base_url=url, image_height=4, image_width=6
    )
    prompts = ["x" * (i + 1) for i in range(10)]
    requests = [ImageRequest("not this", f"<think> {prompt} </think>") for prompt in prompts]
    images = paint(arguments.make_painter(), *requests)
    assert [image.shape for image in images] == [(4, 6, 3)] * 10
    assert [image[0, 0].tolist() for image in images] == [[i + 1, 0, 0] for i in range(10)]
    assert sorted(body["prompt"] for body in endpoint.bodies) == prompts
    settings = {"model": "brush", "n": 1, "size": "6x4", "response_format": "b64_json"}
    assert all(body == {**settings, "prompt": body["prompt"]} for body in endpoint.bodies)
    assert set(endpoint.keys) == {"Bearer EMPTY"}
    assert 1 < endpoint.peak <= 10


def test_openai_painter_bounds_its_concurrency_and_takes_its_key_from_the_environment(
    endpoint: ImagesEndpoint, url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    monkeypatch.setenv("OPENAI_BASE_URL", url)
    assert (
        len(paint(OpenAIPainter(OpenAIEndpoint(max_concurrency=2), height=2, width=2), *[ImageRequest("x")] * 8)) == 8
    )
    assert endpoint.peak == 2
    assert set(endpoint.keys) == {"Bearer secret"}
    assert "model" not in endpoint.bodies[0]


def test_openai_painter_tries_again_after_faults_that_pass(endpoint: ImagesEndpoint, url: str) -> None:
    endpoint.faults = [(500, {}), (429, {})]
    (image,) = paint(OpenAIPainter(OpenAIEndpoint(url, "brush"), height=2, width=2), ImageRequest("abc"))
    assert image[0, 0, 0] == 3
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    "fault",
    [
        {"created": 0, "data": [{"b64_json": "!!!!"}]},
        {"created": 0, "data": [{"b64_json": None}]},
        {"created": 0, "data": []},
        images_of(b"hello"),
        images_of(png(Image.effect_noise((64, 64), 90))[:-30]),
    ],
    ids=["not base64", "null", "empty", "no image", "cut off"],
)
def test_an_image_that_cannot_be_read_is_asked_for_again(endpoint: ImagesEndpoint, url: str, fault: Any) -> None:
    endpoint.faults = [(200, fault)]
    (image,) = paint(
        OpenAIPainter(OpenAIEndpoint(url, "brush", max_retries=1), height=2, width=2), ImageRequest("abc")
    )
    assert image[0, 0, 0] == 3
    assert len(endpoint.bodies) == 2


def test_base64_may_be_broken_into_lines(endpoint: ImagesEndpoint, url: str) -> None:
    lines = base64.encodebytes(png(Image.effect_noise((64, 64), 90))).decode().replace("\n", " \r\n")
    endpoint.faults = [(200, {"created": 0, "data": [{"b64_json": lines}]})]
    (image,) = paint(
        OpenAIPainter(OpenAIEndpoint(url, "brush", max_retries=0), height=2, width=2), ImageRequest("abc")
    )
    assert image.shape == (64, 64, 3)


def test_an_image_of_the_requested_size_is_never_too_large(endpoint: ImagesEndpoint, url: str) -> None:
    arguments = PainterArguments(
        painter="openai", painter_model="brush", painter_base_url=url, image_height=1, image_width=4098
    )
    assert paint(arguments.make_painter(), ImageRequest("abc"))[0].shape == (1, 4098, 3)
    # 2,304 x 2,304 is within the side alone.
    limits = replace(arguments, image_height=2304, image_width=2304).make_painter().limits
    assert (limits.max_side, limits.max_pixels) == (4096, 2304 * 2304)


def test_a_larger_image_is_paid_for_once_and_accepted_within_the_limits_of_the_server(
    endpoint: ImagesEndpoint, url: str
) -> None:
    large = images_of(png(Image.new("RGB", (5000, 2))))
    arguments = ServerArguments(painter="openai", painter_model="brush", painter_base_url=url)
    endpoint.faults = [(200, large)]
    with pytest.raises(PaintError, match="5000 x 2 pixels, more than 4096 along a side.*image_height.*max_image_side"):
        paint(arguments.make_painter(), ImageRequest("abc"))
    assert len(endpoint.bodies) == 1
    endpoint.faults = [(200, large)]
    assert paint(replace(arguments, max_image_side=5000).make_painter(), ImageRequest("abc"))[0].shape == (2, 5000, 3)


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ((400, {"error": {"message": "forbidden words"}}), UnpaintableError, "request 0: .*forbidden words"),
        ((422, {"error": {"message": "odd size"}}), UnpaintableError, "request 0: .*odd size"),
        ((401, {"error": {"message": "no key"}}), PaintError, "request 0: .*answered 401 no key"),
        ((503, {}), PaintError, "request 0: .*answered 503 "),
        ((200, {"created": 0, "data": [{"url": "http://x/y.png"}]}), PaintError, "sent no b64_json"),
        ((200, {"created": 0}), PaintError, "sent no b64_json"),
        ((200, "hello"), PaintError, "the answer, field '': Input should be"),
        ((200, images_of(b"hello")), PaintError, "not a readable PNG, JPEG, WEBP file"),
        ((200, images_of(png(Image.new("RGB", (5000, 2))))), PaintError, "5000 x 2 pixels, more than 4096"),
    ],
)
def test_faults_of_the_endpoint_are_told_from_those_of_the_request(
    endpoint: ImagesEndpoint, url: str, fault: tuple[int, Any], error: type[Exception], message: str
) -> None:
    endpoint.faults = [fault]
    with pytest.raises(error, match=message):
        paint(OpenAIPainter(OpenAIEndpoint(url, "brush", max_retries=0), height=2, width=2), ImageRequest("abc"))


@pytest.mark.parametrize("field", ["response_format", "n"])
def test_a_field_that_is_refused_is_left_out(endpoint: ImagesEndpoint, url: str, field: str) -> None:
    """As by OpenAI's later models, which always send base64."""
    endpoint.faults = [(400, {"error": {"message": f"Unknown parameter: '{field}'.", "param": field}})]
    painter = OpenAIPainter(OpenAIEndpoint(url, "brush", max_retries=0), height=2, width=2)
    assert len(paint(painter, ImageRequest("abc"))) == len(paint(painter, ImageRequest("abcd"))) == 1
    assert [field in body for body in endpoint.bodies] == [True, False, False]


def test_fields_of_a_request_can_be_changed_and_left_out(endpoint: ImagesEndpoint, url: str) -> None:
    arguments = PainterArguments(
        painter="openai",
        painter_model="brush",
        painter_base_url=url,
        painter_extra_body='{"response_format": null, "n": null, "quality": "low", "size": "2x2"}',
    )
    paint(arguments.make_painter(), ImageRequest("abc"))
    assert endpoint.bodies == [{"model": "brush", "prompt": "abc", "quality": "low", "size": "2x2"}]
    with pytest.raises(ValueError, match="painter_extra_body must be a JSON object"):
        replace(arguments, painter_extra_body="[1]").make_painter()


def test_the_size_of_an_answer_is_bounded(endpoint: ImagesEndpoint, url: str) -> None:
    arguments = PainterArguments(
        painter="openai", painter_model="brush", painter_base_url=url, painter_max_answer_bytes=10_000
    )
    arguments.painter_max_retries = 0
    assert len(paint(arguments.make_painter(), ImageRequest("abc"))) == 1
    endpoint.faults = [(200, images_of(b"x" * 8_000))]
    with pytest.raises(PaintError, match="larger than 10000 bytes"):
        paint(arguments.make_painter(), ImageRequest("abc"))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (ImageRequest("a cat"), "a cat"),
        (ImageRequest("a cat", "<think> a black cat on a mat </think>"), "a black cat on a mat"),
        (ImageRequest("a cat", " <think> </think> "), "a cat"),
        (ImageRequest("a cat", "the tail is missing", Image.new("RGB", (2, 2))), "a cat\nthe tail is missing"),
        (ImageRequest("a cat", None, Image.new("RGB", (2, 2))), "a cat"),
    ],
)
def test_text_that_an_endpoint_gets(request_: ImageRequest, text: str) -> None:
    assert endpoint_prompt(request_) == text
