# SPDX-License-Identifier: Apache-2.0

"""Repaints that start from a partly noised copy of the image that they look at."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.flow.timesteps import flow_timesteps
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig, denoise
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.shapes.scene import Scene, SceneObject, render
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory


GRID = (4, 4)
PICTURES = [render(Scene((SceneObject(0, 0, "circle", color),), "white")) for color in ("red", "blue")]
DENOISING = DenoisingConfig(num_timesteps=11, timestep_shift=1.0, guidance=GuidanceConfig(text_scale=1.0))
STARTED = replace(DENOISING, refine_strength=0.7)
CONFIG = RolloutConfig(height=24, width=24, max_new_tokens=6, denoising=STARTED)
"""Paints from time .7."""


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def evaluations(model: BagelModel, monkeypatch: pytest.MonkeyPatch) -> list[tuple[float, torch.Tensor]]:
    """Time and latents of every evaluation of the network from now on."""
    seen = []
    predict_velocity = model.predict_velocity

    def recording(cache: Any, latents: torch.Tensor, grid: tuple[int, int], t: torch.Tensor) -> torch.Tensor:
        seen.append((t.item(), latents))
        return predict_velocity(cache, latents, grid, t)

    monkeypatch.setattr(model, "predict_velocity", recording)
    return seen


@pytest.fixture
def sample(model: BagelModel, shapes_processor: BagelProcessor) -> Callable[..., list[Trajectory]]:
    """Samples one trajectory a row, in groups of two that look at the same picture."""

    def sample(
        config: RolloutConfig = CONFIG,
        task: str = "self_reflection",
        indices: Sequence[int] = range(4),
        pictures: Sequence[Any] = (PICTURES[0], PICTURES[0], PICTURES[1], PICTURES[1]),
        **settings: Any,
    ) -> list[Trajectory]:
        rows = [{"prompt": "a blue square", "image": pictures[i]} for i in indices]
        generate = RolloutGenerator(model, shapes_processor, TASKS.get(task)(think=True, **settings))
        return generate(rows, [sample_generator(0, 0, i) for i in indices], config)

    return sample


def looked_at(trajectory: Trajectory) -> ImageSegment:
    return next(segment for segment in trajectory.segments if isinstance(segment, ImageSegment))


def first_noise(trajectories: Sequence[Trajectory], config: RolloutConfig) -> torch.Tensor:
    """Initial noise of the first turn of the samples 0, 1, 2 ..."""
    noise = []
    for i, trajectory in enumerate(trajectories):
        generator = sample_generator(0, 0, i)
        torch.rand(config.max_new_tokens, generator=generator)
        shape = looked_at(trajectory).latents.shape
        noise.append(torch.randn(1 + config.denoising.window_size, *shape, generator=generator)[0])
    return torch.stack(noise)


@pytest.fixture
def paint(model: BagelModel) -> Callable[..., tuple[torch.Tensor, list]]:
    """Paints two images from the same noise, and the same images to start from, at every call."""

    def paint(config: DenoisingConfig, has_sources: bool = True) -> tuple[torch.Tensor, list]:
        cache = model.prefill([[TextSegment([20, 21])], [TextSegment([23])]], capacity=model.image_slots(GRID))
        generator = torch.Generator().manual_seed(0)
        noise = torch.randn(2, 2 + config.window_size, 16, model.latent_channels, generator=generator)
        sources = noise[:, 1] if has_sources else None
        return denoise(model, cache, noise[:, 0], GRID, config, noise[:, 2:], sources)

    return paint


@pytest.mark.parametrize(
    ("strength", "times"),
    [(1.0, range(10, 0, -1)), (0.95, range(9, 0, -1)), (0.7, range(7, 0, -1)), (0.65, range(6, 0, -1)), (0.1, [1])],
)
def test_path_begins_at_the_first_time_that_is_not_above(
    paint: Callable[..., tuple], evaluations: list, strength: float, times: Sequence[int]
) -> None:
    paint(replace(DENOISING, refine_strength=strength))
    assert [t for t, _ in evaluations] == pytest.approx([time / 10 for time in times])


def test_shift_is_part_of_the_schedule() -> None:
    config = DenoisingConfig(num_timesteps=16, timestep_shift=3.0, refine_strength=0.8)
    schedule = flow_timesteps(16, 3.0)
    assert schedule[6] > 0.8
    assert torch.equal(config.path().timesteps, schedule[7:])


def test_window_keeps_its_place_and_times(paint: Callable[..., tuple], evaluations: list) -> None:
    config = replace(STARTED, window_start=5, window_size=2, ode_solver="ab2", ode_steps=4)
    _, (window, _) = paint(config)
    # Two steps from .7 to .5, two in the window, two from .3 on.
    assert [t for t, _ in evaluations] == pytest.approx([0.7, 0.6, 0.5, 0.4, 0.3, 0.15], abs=1e-6)
    assert window.start == 5
    assert torch.equal(window.timesteps, flow_timesteps(11)[5:8])
    assert torch.equal(window.latents[0], evaluations[2][1][0])


def test_window_may_begin_at_the_start(paint: Callable[..., tuple], evaluations: list) -> None:
    _, (window, _) = paint(replace(STARTED, window_start=3, window_size=2))
    assert torch.equal(window.latents[0], evaluations[0][1][0])


def test_full_strength_is_noise_alone(paint: Callable[..., tuple]) -> None:
    config = replace(DENOISING, window_start=2, window_size=2)
    (latents, windows), (expected, expected_windows) = paint(config), paint(config, has_sources=False)
    assert torch.equal(latents, expected)
    assert torch.equal(windows[0].latents, expected_windows[0].latents)


def test_branches_of_guidance_are_those_of_the_path(model: BagelModel) -> None:
    guidance = GuidanceConfig(text_scale=3.0, interval=(0.75, 1.0))
    for strength, expected in ((1.0, 2), (0.7, 1)):
        config = replace(DENOISING, guidance=guidance, refine_strength=strength)
        assert len(config.branches(model.guidance(guidance))) == expected


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"refine_strength": 0.0}, r"refine_strength must be in \(0, 1\]"),
        ({"refine_strength": 1.2}, r"refine_strength must be in \(0, 1\]"),
        ({"refine_strength": float("nan")}, "refine_strength must be"),
        ({"refine_strength": 0.05}, "refine_strength=0.05 is below 0.1, .* raise refine_strength or num_timesteps"),
        (
            {"refine_strength": 0.7, "window_start": 2, "window_size": 2},
            r"from step 2 \(time 0.8\) lies before step 3 \(time 0.7\).* refine_strength=0.7: let windows begin at step 3",
        ),
    ],
)
def test_impossible_settings_raise(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        replace(DENOISING, **settings)


def test_path_without_an_image_to_start_from_raises(paint: Callable[..., tuple]) -> None:
    with pytest.raises(ValueError, match=r"refine_strength=0\.7 needs images"):
        paint(STARTED, has_sources=False)


@pytest.mark.parametrize("task", ["self_reflection", "image_editing"])
@pytest.mark.parametrize("scale", [1.0, 3.0])
def test_repaint_starts_from_the_image_that_it_looks_at(
    sample: Callable[..., list[Trajectory]], evaluations: list, task: str, scale: float
) -> None:
    guidance = GuidanceConfig(scale, 2.0, (0.0, 1.0), "text_channel")
    config = replace(CONFIG, denoising=replace(STARTED, guidance=guidance))
    trajectories = sample(config, task)
    images = torch.stack([looked_at(trajectory).latents for trajectory in trajectories])
    t, latents = evaluations[0]
    assert t == pytest.approx(0.7)
    torch.testing.assert_close(latents[:4], 0.3 * images + 0.7 * first_noise(trajectories, config))


def test_later_rounds_start_from_the_image_of_the_round_before(
    sample: Callable[..., list[Trajectory]], evaluations: list
) -> None:
    weak = replace(CONFIG, denoising=replace(DENOISING, refine_strength=0.1))
    trajectories = sample(weak, num_reflection_rounds=2)
    # One step a round: velocities aside, little more than a tenth of each image is noise.
    for (_, latents), round_ in zip(evaluations, (0, 1), strict=True):
        for i, trajectory in enumerate(trajectories):
            images = [segment for segment in trajectory.segments if isinstance(segment, ImageSegment)]
            distances = [(latents[i] - 0.9 * image.latents).std().item() for image in images]
            assert distances[round_] == pytest.approx(0.1, abs=0.02)


@pytest.mark.invariant
@pytest.mark.parametrize("forks", [1, 2])
def test_sample_is_the_same_in_any_batch(sample: Callable[..., list[Trajectory]], forks: int) -> None:
    config = replace(CONFIG, denoising=replace(STARTED, window_start=4, window_size=2), branches_per_thought=forks)
    together = sample(config)
    apart = [*sample(config, indices=[2, 3]), *sample(config, indices=[0, 1])]
    for trajectory, other in zip([*together[2:], *together[:2]], apart, strict=True):
        (image,), (same,) = trajectory.sampled_images, other.sampled_images
        torch.testing.assert_close(image.window.latents, same.window.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(image.latents, same.latents, atol=1e-4, rtol=1e-4)
    if forks == 2:
        first, second = (trajectory.sampled_images[0].window.latents for trajectory in together[:2])
        assert torch.equal(first[0], second[0])
        assert not torch.equal(first[1], second[1])


def test_objectives_of_the_forward_process_get_noised_copies_of_the_repaint(
    sample: Callable[..., list[Trajectory]], evaluations: list
) -> None:
    trajectories = sample(replace(CONFIG, denoising=replace(STARTED, forward_times=(0.9, 0.5))))
    assert evaluations[0][0] == pytest.approx(0.7)
    for trajectory in trajectories:
        (image,) = trajectory.sampled_images
        assert torch.equal(image.window.latents[-1], image.latents)
        assert image.window.timesteps.tolist() == pytest.approx([0.9, 0.5, 0.0])


def test_image_of_another_size_is_resized(sample: Callable[..., list[Trajectory]], evaluations: list) -> None:
    large = [picture.resize((48, 36)) for picture in PICTURES]
    weak = replace(CONFIG, denoising=replace(DENOISING, refine_strength=0.1))
    resized = sample(weak, pictures=[large[0], large[0], large[1], large[1]])
    (_, latents), expected = evaluations[0], sample(weak)
    assert resized[0].final_image.size == (24, 24)
    for start, trajectory in zip(latents, expected, strict=True):
        correlation = torch.corrcoef(torch.stack([start.flatten(), looked_at(trajectory).latents.flatten()]))[0, 1]
        assert correlation > 0.8


def test_first_images_are_painted_from_noise(
    model: BagelModel, shapes_processor: BagelProcessor, evaluations: list
) -> None:
    generate = RolloutGenerator(model, shapes_processor, TASKS.get("reasoning_t2i")(think=False))
    rows = [{"prompt": "a blue square"}]
    (image,), (expected,) = (
        generate(rows, [sample_generator(0, 0, 0)], config)
        for config in (CONFIG, replace(CONFIG, denoising=DENOISING))
    )
    assert evaluations[0][0] == 1
    assert torch.equal(image.sampled_images[0].latents, expected.sampled_images[0].latents)
