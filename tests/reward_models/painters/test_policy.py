# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import asyncio
import threading
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.pixels import tensor_to_image
from alphagrpo_ext.registry import UnknownNameError
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.rollout.generator import sample_generator
from reward_models.painters.base import (
    PAINTERS,
    ImageRequest,
    Painter,
    PainterArguments,
    UnpaintableError,
)
from reward_models.painters.policy import PolicyPainter as Policy


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


def paint(painter: Painter, *requests: ImageRequest) -> list[np.ndarray]:
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
    request = ImageRequest(PROMPT, thought, image, seed=5)
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
    (actual,) = paint(Policy(*policy, GUIDED), ImageRequest(PROMPT, image=image, seed=7))
    assert (actual == np.asarray(trajectory.final_image)).all()


def test_same_seed_same_image_and_no_seed_another_each_time(policy: tuple[Any, Any]) -> None:
    seeded, free = ImageRequest(PROMPT, THOUGHT, seed=3), ImageRequest("draw a circle")
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
        ImageRequest(PROMPT, THOUGHT, seed=0),
        ImageRequest(PROMPT, THOUGHT, seed=0),
        ImageRequest(PROMPT, blue, seed=0),
        ImageRequest("two blue circles", seed=1),
        ImageRequest("a red square", "", seed=2),
        ImageRequest(PROMPT, blue, flawed, seed=3),
        ImageRequest("three green squares", None, flawed, seed=4),
        ImageRequest(
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
        task = asyncio.create_task(painter.paint([ImageRequest(PROMPT, THOUGHT, seed=i) for i in range(8)]))
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
        abandoned = asyncio.create_task(painter.paint([ImageRequest(f"red {i}", seed=i) for i in range(400)]))
        while batches < 2:
            await asyncio.sleep(0.001)
        abandoned.cancel()
        assert len(await painter.paint([ImageRequest(PROMPT, seed=0)])) == 1
        assert abandoned.cancelled()
        await painter.aclose()

    asyncio.run(run())
    assert batches < 200


def test_closed_painter_has_no_thread_left_and_paints_no_more(policy: tuple[Any, Any]) -> None:
    painter = Policy(*policy, CONFIG)
    paint(painter, ImageRequest(PROMPT))
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("policy-painter")]
    with pytest.raises(RuntimeError, match="shutdown"):
        paint(painter, ImageRequest(PROMPT))


@pytest.mark.parametrize(
    "long", [ImageRequest(PROMPT, "red " * 600), ImageRequest("red " * 600), ImageRequest("red " * 510)]
)
def test_text_that_does_not_fit_the_model_is_named(policy: tuple[Any, Any], long: ImageRequest) -> None:
    with pytest.raises(UnpaintableError, match=r"request 1: .* more than the 512 of the model"):
        paint(Policy(*policy, CONFIG), ImageRequest(PROMPT), long)


def test_longest_thought_that_fits_is_painted(policy: tuple[Any, Any]) -> None:
    (image,) = paint(Policy(*policy, CONFIG), ImageRequest(PROMPT, "red " * 480, seed=0))
    assert image.shape == (SIZE, SIZE, 3)


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (25, 23)])
def test_images_of_any_shape_can_be_refined(policy: tuple[Any, Any], size: tuple[int, int]) -> None:
    (image,) = paint(Policy(*policy, CONFIG), ImageRequest(PROMPT, THOUGHT, Image.new("RGB", size), seed=0))
    assert image.shape == (SIZE, SIZE, 3)


def test_nothing_to_paint_is_no_image(policy: tuple[Any, Any]) -> None:
    assert paint(Policy(*policy, CONFIG)) == []


def test_arguments_make_the_painter_they_name() -> None:
    assert PainterArguments().make_painter() is None
    painter = PainterArguments(
        painter="policy", num_timesteps=6, cfg_text_scale=3.0, cfg_interval=[0.2, 1.0], painter_batch_size=4
    ).make_painter()
    assert isinstance(painter, Policy)
    expected = {
        "reasoning_t2i": GuidanceConfig(3.0, 1.0, (0.2, 1.0), "global"),
        "self_reflection": GuidanceConfig(3.0, 2.0, (0.2, 1.0), "text_channel"),
    }
    for name, guidance in expected.items():
        denoising = DenoisingConfig(6, 1.0, guidance)
        assert painter.configs[name] == RolloutConfig(SIZE, SIZE, denoising=denoising, batch_size=4)
    assert not painter.policy[0].training
    (image,) = paint(painter, ImageRequest(PROMPT, THOUGHT, seed=0))
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

    (image,) = paint(PainterArguments(painter="gray").make_painter(), ImageRequest("x"))
    assert (image == 128).all()
    assert PAINTERS.names() == ["gray", "openai", "policy"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image_height": 26}, "height=26 is no positive multiple"),
        ({"image_width": 240}, "image_height and image_width to at most 24"),
        ({"painter_batch_size": 0}, "painter_batch_size must be at least 1, but is 0"),
        ({"num_timesteps": 1}, "num_timesteps must be at least 2"),
        ({"cfg_renorm_type": "none"}, "unknown renorm_type 'none'"),
        ({"task_settings": '{"reasoning_t2i": {"cfg_scale": 1}}'}, "unknown setting 'cfg_scale'. Did you mean"),
        ({"task_settings": {"reasoning_t2i": {"image_width": 16}}}, "unknown setting 'image_width'"),
        ({"task_settings": {"self_reflection": {"num_timesteps": 1}}}, "num_timesteps must be at least 2"),
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
