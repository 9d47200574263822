# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import base64
import io
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image

from alphagrpo_ext.flow import GuidanceConfig
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.pixels import tensor_to_image
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.rollout.generator import sample_generator
from reward_models.painters.openai import OpenAIPainter, endpoint_prompt
from reward_models.painters.policy import (
    PAINTERS,
    Painter,
    PainterArguments,
    PaintError,
    PaintRequest,
    UnpaintableError,
)
from reward_models.painters.policy import PolicyPainter as Policy
from support.loopback import serve


PROMPT = "draw a cross on a black background"
THOUGHT = "<think> black : red cross center </think>"
SIZE = 24
CONFIG = RolloutConfig(
    SIZE, SIZE, max_new_tokens=48, temperature=0.0, denoising=DenoisingConfig(6, 1.0, GuidanceConfig(1.0))
)
GUIDED = replace(
    CONFIG, denoising=DenoisingConfig(6, 1.0, GuidanceConfig(3.0, 2.0, (0.0, 1.0), renorm_type="text_channel"))
)


@pytest.fixture(scope="module")
def policy() -> tuple[Any, Any]:
    model, processor = load_model("bagel-shapes")
    return model.eval(), processor


@pytest.fixture
def flawed() -> Image.Image:
    """An image to refine: a black square with a gray edge."""
    image = Image.new("RGB", (SIZE, SIZE), (128, 128, 128))
    image.paste((0, 0, 0), (4, 4, 20, 20))
    return image


def paint(painter: Painter, *requests: PaintRequest) -> list[np.ndarray]:
    async def run() -> list[Image.Image]:
        try:
            return await painter.paint(requests)
        finally:
            await painter.aclose()

    return [np.asarray(image).astype(int) for image in asyncio.run(run())]


def assert_same_picture(actual: np.ndarray, expected: np.ndarray) -> None:
    """Another way to the same numbers may round them differently, by one step of eight bits."""
    assert np.abs(actual - expected).max() <= 1


def roll_out(policy: tuple[Any, Any], row: dict[str, Any], config: RolloutConfig, seed: int) -> tuple[str, np.ndarray]:
    """
    What the policy writes, likeliest token first, and what it paints then: the thought stays in the cache as it was
    sampled, and is never encoded. The noise is that of `seed`.
    """
    model, processor = policy
    task = TASKS.get("self_reflection" if row.get("image") else "reasoning_t2i")(think=True)
    context, grid = task.context(row, processor, model, config.size), config.grid(model)
    branches = model.guidance(config.denoising.guidance).branches
    cache = model.prefill(
        [processor.branch_context(name, context, config.size) for name in branches],
        group_size=1,
        capacity=model.text_slots(config.max_new_tokens) + model.image_slots(grid),
    )
    uniforms = torch.zeros(1, config.max_new_tokens)
    sampled = model.sample_text(cache, uniforms, temperature=0.0)
    assert sampled.ended == [True]
    noise = torch.randn(1, grid[0] * grid[1], model.latent_channels, generator=sample_generator(seed, 0, 0))
    latents, _ = denoise(model, cache, noise, grid, config.denoising)
    image = tensor_to_image(model.decode_latents(latents, grid)[0])
    return processor.decode(sampled.token_ids[0][:-1]), np.asarray(image).astype(int)


@pytest.mark.invariant
@pytest.mark.parametrize("config", [CONFIG, GUIDED], ids=["plain", "guided"])
@pytest.mark.parametrize("refines", [False, True])
def test_policy_paints_a_thought_as_it_does_after_sampling_it(
    policy: tuple[Any, Any], flawed: Image.Image, config: RolloutConfig, refines: bool
) -> None:
    image = flawed if refines else None
    thought, expected = roll_out(policy, {"prompt": PROMPT, "image": image}, config, seed=5)
    assert thought.startswith("<think>")
    request = PaintRequest(PROMPT, thought, image, seed=5)
    (actual,) = paint(Policy(*policy, config), request)
    assert_same_picture(actual, expected)
    others = [replace(request, thought=None), replace(request, thought=THOUGHT), replace(request, seed=6)]
    for other in paint(Policy(*policy, config), *others):
        assert np.abs(other - expected).max() > 8


@pytest.mark.parametrize("refines", [False, True])
def test_without_a_thought_policy_paints_as_the_task_without_thinking(
    policy: tuple[Any, Any], flawed: Image.Image, refines: bool
) -> None:
    image = flawed if refines else None
    task = TASKS.get("self_reflection" if refines else "reasoning_t2i")(think=False)
    row = {"prompt": PROMPT, "image": image}
    (trajectory,) = RolloutGenerator(*policy, task)([row], [sample_generator(7, 0, 0)], GUIDED)
    (actual,) = paint(Policy(*policy, GUIDED), PaintRequest(PROMPT, image=image, seed=7))
    assert (actual == np.asarray(trajectory.final_image)).all()


def test_same_seed_same_image_and_no_seed_another_each_time(policy: tuple[Any, Any]) -> None:
    seeded, free = PaintRequest(PROMPT, THOUGHT, seed=3), PaintRequest("draw a circle")
    first = paint(Policy(*policy, CONFIG), seeded, *[free] * 3)
    second = paint(Policy(*policy, CONFIG), seeded, *[free] * 3)
    assert (first[0] == second[0]).all()
    # Where a model is sure, different noise can end in the same pixels; that all six do is another matter.
    assert len({image.tobytes() for image in first[1:] + second[1:]}) > 3


@pytest.mark.parametrize("batch_size", [1, 3, None])
def test_requests_of_every_kind_are_painted_together_as_they_are_alone(
    policy: tuple[Any, Any], flawed: Image.Image, batch_size: int | None
) -> None:
    blue = "<think> white : blue circle top left </think>"
    requests = [
        PaintRequest(PROMPT, THOUGHT, seed=0),
        PaintRequest(PROMPT, THOUGHT, seed=0),
        PaintRequest(PROMPT, blue, seed=0),
        PaintRequest("two blue circles", seed=1),
        PaintRequest("a red square", "", seed=2),
        PaintRequest(PROMPT, blue, flawed, seed=3),
        PaintRequest("three green squares", None, flawed, seed=4),
        PaintRequest(
            "a yellow triangle", "<think> red : yellow triangle top left </think>", flawed.resize((60, 30)), seed=5
        ),
    ]
    together = paint(Policy(*policy, replace(GUIDED, batch_size=batch_size)), *requests)
    for request, actual in zip(requests, together, strict=True):
        assert actual.shape == (SIZE, SIZE, 3)
        assert_same_picture(actual, paint(Policy(*policy, GUIDED), request)[0])
    assert_same_picture(together[0], together[1])
    different = together[1:]
    assert all(np.abs(a - b).max() > 8 for i, a in enumerate(different) for b in different[:i])


def test_event_loop_goes_on_while_policy_paints(policy: tuple[Any, Any]) -> None:
    painter = Policy(*policy, replace(CONFIG, denoising=DenoisingConfig(60, 1.0, GuidanceConfig(1.0))))
    ticks = 0

    async def run() -> set[str]:
        nonlocal ticks
        task = asyncio.create_task(painter.paint([PaintRequest(PROMPT, THOUGHT, seed=i) for i in range(8)]))
        names = set()
        while not task.done():
            await asyncio.sleep(0.001)
            ticks += 1
            names |= {thread.name for thread in threading.enumerate()}
        await task
        await painter.aclose()
        return names

    names = asyncio.run(run())
    assert ticks > 3
    assert len([name for name in names if name.startswith("policy-painter")]) == 1


def test_cancelled_call_leaves_the_thread_to_the_next(
    policy: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model, painter = policy[0], Policy(*policy, replace(CONFIG, batch_size=1))
    batches = 0
    prefill = model.prefill

    def count(*args: Any, **kwargs: Any) -> Any:
        nonlocal batches
        batches += 1
        return prefill(*args, **kwargs)

    monkeypatch.setattr(model, "prefill", count)

    async def run() -> None:
        abandoned = asyncio.create_task(painter.paint([PaintRequest(f"red {i}", seed=i) for i in range(400)]))
        while batches < 2:
            await asyncio.sleep(0.001)
        abandoned.cancel()
        assert len(await painter.paint([PaintRequest(PROMPT, seed=0)])) == 1
        assert abandoned.cancelled()
        await painter.aclose()

    asyncio.run(run())
    assert batches < 200


def test_closed_painter_has_no_thread_left_and_paints_no_more(policy: tuple[Any, Any]) -> None:
    painter = Policy(*policy, CONFIG)
    paint(painter, PaintRequest(PROMPT))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("policy-painter")]
    with pytest.raises(RuntimeError, match="shutdown"):
        paint(painter, PaintRequest(PROMPT))


@pytest.mark.parametrize(
    "long", [PaintRequest(PROMPT, "red " * 600), PaintRequest("red " * 600), PaintRequest("red " * 510)]
)
def test_text_that_does_not_fit_the_model_is_named(policy: tuple[Any, Any], long: PaintRequest) -> None:
    with pytest.raises(UnpaintableError, match=r"request 1: .* more than the 512 of the model"):
        paint(Policy(*policy, CONFIG), PaintRequest(PROMPT), long)


def test_longest_thought_that_fits_is_painted(policy: tuple[Any, Any]) -> None:
    (image,) = paint(Policy(*policy, CONFIG), PaintRequest(PROMPT, "red " * 480, seed=0))
    assert image.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (25, 23)])
def test_images_of_any_shape_can_be_refined(policy: tuple[Any, Any], size: tuple[int, int]) -> None:
    (image,) = paint(Policy(*policy, CONFIG), PaintRequest(PROMPT, THOUGHT, Image.new("RGB", size), seed=0))
    assert image.shape == (SIZE, SIZE, 3)


def test_nothing_to_paint_is_no_image(policy: tuple[Any, Any]) -> None:
    assert paint(Policy(*policy, CONFIG)) == []


def test_arguments_make_the_painter_they_name() -> None:
    assert PainterArguments().make_painter() is None
    painter = PainterArguments(
        painter="policy", num_timesteps=6, cfg_text_scale=3.0, cfg_img_scale=2.0, painter_batch_size=4
    ).make_painter()
    assert isinstance(painter, Policy)
    guidance = GuidanceConfig(3.0, 2.0, (0.4, 1.0), "global")
    assert painter.config == RolloutConfig(SIZE, SIZE, denoising=DenoisingConfig(6, 1.0, guidance), batch_size=4)
    assert not painter.policy[0].training
    (image,) = paint(painter, PaintRequest(PROMPT, THOUGHT, seed=0))
    assert image.shape == (SIZE, SIZE, 3)
    with pytest.raises(UnknownNameError, match="unknown painter 'polcy'. Did you mean 'policy'"):
        PainterArguments(painter="polcy").make_painter()


def test_packages_can_add_painters() -> None:
    @PAINTERS.register("gray")
    class GrayPainter(Painter):
        @classmethod
        def from_arguments(cls, args: PainterArguments) -> GrayPainter:
            return cls()

        async def paint(self, requests: Any) -> list[Image.Image]:
            return [Image.new("RGB", (2, 2), "gray") for _ in requests]

    (image,) = paint(PainterArguments(painter="gray").make_painter(), PaintRequest("x"))
    assert (image == 128).all()
    assert PAINTERS.names() == ["gray", "openai", "policy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_height": 26}, "height=26 is no positive multiple"),
        ({"image_width": 240}, "more than the model's 6 per side"),
        ({"painter_batch_size": 0}, "painter_batch_size must be at least 1, but is 0"),
        ({"num_timesteps": 1}, "num_timesteps must be at least 2"),
        ({"cfg_renorm_type": "none"}, "unknown renorm_type 'none'"),
        ({"cfg_interval": [0.4]}, r"interval must be \(low, high\)"),
        ({"painter": "openai"}, "needs painter_model"),
        ({"painter": "openai", "painter_model": "m", "painter_max_concurrency": 0}, "max_concurrency must be"),
        ({"painter": "openai", "painter_model": "m", "painter_timeout": 0.0}, "timeout must be positive"),
        ({"painter": "openai", "painter_model": "m", "painter_max_retries": -1}, "max_retries must not be"),
        ({"painter": "openai", "painter_model": "m", "image_width": 0}, "width must be at least 1, but is 0"),
    ],
)
def test_bad_arguments_are_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PainterArguments(**{"painter": "policy", **changes}).make_painter()


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
    requests = [PaintRequest("not this", f"<think> {prompt} </think>") for prompt in prompts]
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
    assert len(paint(OpenAIPainter(height=2, width=2, max_concurrency=2), *[PaintRequest("x")] * 8)) == 8
    assert endpoint.peak == 2
    assert set(endpoint.keys) == {"Bearer secret"}
    assert "model" not in endpoint.bodies[0]


def test_openai_painter_tries_again_after_faults_that_pass(endpoint: ImagesEndpoint, url: str) -> None:
    endpoint.faults = [(500, {}), (429, {})]
    (image,) = paint(OpenAIPainter(url, "brush", height=2, width=2), PaintRequest("abc"))
    assert image[0, 0, 0] == 3
    assert len(endpoint.bodies) == 3


@pytest.mark.parametrize(
    ("fault", "error", "message"),
    [
        ((400, {"error": {"message": "forbidden words"}}), UnpaintableError, "request 0: .*forbidden words"),
        ((422, {"error": {"message": "odd size"}}), UnpaintableError, "request 0: .*odd size"),
        ((401, {"error": {"message": "no key"}}), PaintError, "request 0: AuthenticationError: .*no key"),
        ((503, {}), PaintError, "request 0: InternalServerError"),
        ((200, {"created": 0, "data": [{"url": "http://x/y.png"}]}), PaintError, "sent no b64_json"),
        ((200, {"created": 0}), PaintError, "sent no b64_json"),
        ((200, "hello"), PaintError, "sent no b64_json"),
        ((200, images_of(b"hello")), PaintError, "not a readable PNG, JPEG, WEBP file"),
        ((200, images_of(png(Image.new("RGB", (5000, 2))))), PaintError, "5000 x 2 pixels, more than 4096"),
    ],
)
def test_faults_of_the_endpoint_are_told_from_those_of_the_request(
    endpoint: ImagesEndpoint, url: str, fault: tuple[int, Any], error: type[Exception], message: str
) -> None:
    endpoint.faults = [fault]
    with pytest.raises(error, match=message):
        paint(OpenAIPainter(url, "brush", height=2, width=2, max_retries=0), PaintRequest("abc"))


@pytest.mark.parametrize(
    ("request_", "text"),
    [
        (PaintRequest("a cat"), "a cat"),
        (PaintRequest("a cat", "<think> a black cat on a mat </think>"), "a black cat on a mat"),
        (PaintRequest("a cat", " <think> </think> "), "a cat"),
        (PaintRequest("a cat", "the tail is missing", Image.new("RGB", (2, 2))), "a cat\nthe tail is missing"),
        (PaintRequest("a cat", None, Image.new("RGB", (2, 2))), "a cat"),
    ],
)
def test_text_that_an_endpoint_gets(request_: PaintRequest, text: str) -> None:
    assert endpoint_prompt(request_) == text
