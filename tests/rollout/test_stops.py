# SPDX-License-Identifier: Apache-2.0

"""Turns that end after their text."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.trajectory import ImageSegment, TextSegment, Trajectory
from support.stopping import stop_after


CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=6,
    denoising=DenoisingConfig(4, 1.0, GuidanceConfig(text_scale=3.0, image_scale=1.5), window_start=1, window_size=2),
)
ROWS = [
    {"prompt": prompt, "image": Image.new("RGB", (24, 24), color)}
    for prompt, color in (("a red circle", "red"), ("a blue square", "blue"))
    for _ in range(4)
]

Sample = Callable[..., list[Trajectory]]


@pytest.fixture(scope="module")
def model(make_shapes_bagel: Callable[[], BagelModel]) -> BagelModel:
    return make_shapes_bagel()


@pytest.fixture
def sample(model: BagelModel, shapes_processor: BagelProcessor) -> Sample:
    """Two groups of four that reflect for two rounds, or some members of them; those that write one of `stops` end."""

    def sample(stops: Sequence[str] = (), members: Sequence[int] = range(8), config: RolloutConfig = CONFIG):
        task = stop_after(TASKS.get("self_reflection")(think=True, num_reflection_rounds=2), *stops)
        generate = RolloutGenerator(model, shapes_processor, task)
        return generate([ROWS[i] for i in members], [sample_generator(0, 0, i) for i in members], config)

    return sample


def texts_of(trajectories: Sequence[Trajectory], processor: BagelProcessor, turn: int = 0) -> list[str]:
    return [processor.decode_sampled(t.sampled_texts[turn : turn + 1]) for t in trajectories]


def assert_same(actual: Trajectory, expected: Trajectory) -> None:
    assert [t.token_ids for t in actual.sampled_texts] == [t.token_ids for t in expected.sampled_texts]
    for one, other in zip(actual.sampled_images, expected.sampled_images, strict=True):
        torch.testing.assert_close(one.latents, other.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.window.latents, other.window.latents, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(one.window.log_probs, other.window.log_probs, atol=1e-4, rtol=1e-4)


@pytest.mark.invariant
def test_samples_do_not_depend_on_those_that_stop(sample: Sample, shapes_processor: BagelProcessor) -> None:
    everybody = sample()
    texts = texts_of(everybody, shapes_processor)
    stopped = [i for i in range(8) if texts[i] in (texts[1], texts[2], texts[7])]
    assert len(stopped) < 8

    mixed = sample([texts[i] for i in stopped])

    for i, (trajectory, other) in enumerate(zip(mixed, everybody, strict=True)):
        if i not in stopped:
            assert_same(trajectory, other)
            continue
        image, request, text = trajectory.segments[-3:]
        assert isinstance(image, ImageSegment) and isinstance(request, TextSegment) and text.sampled
        assert text.token_ids == other.sampled_texts[0].token_ids
        assert trajectory.sampled_images == []
        assert trajectory.final_image is image.image
        assert trajectory.num_trained_steps == 2
    last = max(set(range(8)) - set(stopped))
    assert_same(sample(members=[last])[0], mixed[last])


def test_a_second_round_stops_at_the_image_of_the_first(sample: Sample, shapes_processor: BagelProcessor) -> None:
    everybody = sample()
    (first, second) = texts_of(everybody[:1], shapes_processor, 0) + texts_of(everybody[:1], shapes_processor, 1)
    assert first != second
    trajectory = sample([second])[0]
    assert [len(trajectory.sampled_texts), len(trajectory.sampled_images)] == [2, 1]
    assert trajectory.final_image is trajectory.sampled_images[0].image
    torch.testing.assert_close(
        trajectory.sampled_images[0].latents, everybody[0].sampled_images[0].latents, atol=1e-4, rtol=1e-4
    )


def test_nothing_is_painted_for_those_that_stop(
    model: BagelModel, sample: Sample, shapes_processor: BagelProcessor
) -> None:
    texts = texts_of(sample(), shapes_processor)
    with (work := WorkCounter()).of(model):
        trajectories = sample(texts)
    assert all(not trajectory.sampled_images for trajectory in trajectories)
    assert work.evaluations["denoise"] == 0
    stops = texts[:1]
    painting = len(texts) - texts.count(texts[0])
    with (work := WorkCounter()).of(model):
        sample(stops, config=replace(CONFIG, batch_size=8))
    with (expected := WorkCounter()).of(model):
        sample(members=[i for i in range(8) if texts[i] != texts[0]])
    assert 0 < painting < 8
    assert work.tokens["denoise/full"] == expected.tokens["denoise/full"]


def test_images_of_a_thought_stop_together(sample: Sample, shapes_processor: BagelProcessor) -> None:
    config = replace(CONFIG, branches_per_thought=2)
    everybody = sample(config=config)
    texts = texts_of(everybody, shapes_processor)
    assert texts[0] == texts[1] != texts[2]
    mixed = sample(texts[:1], config=config)
    for trajectory, other, text in zip(mixed, everybody, texts, strict=True):
        if text == texts[0]:
            assert not trajectory.sampled_images
        else:
            assert_same(trajectory, other)
