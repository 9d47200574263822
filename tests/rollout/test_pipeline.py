# SPDX-License-Identifier: Apache-2.0

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

import alphagrpo_ext
from alphagrpo_ext.models.loading import PACKAGED_CHECKPOINTS
from alphagrpo_ext.rollout.pipeline import UnifiedPipeline


PROMPTS = ["a red circle on a white background", "two blue squares , on gray"]


@pytest.fixture(scope="module")
def pipe() -> UnifiedPipeline:
    return alphagrpo_ext.pipeline("bagel-shapes")


def pixels(images: list[Image.Image]) -> np.ndarray:
    return np.stack([np.asarray(image) for image in images])


def test_paints_a_prompt_in_the_size_that_the_model_was_trained_with(pipe: UnifiedPipeline) -> None:
    output = pipe(PROMPTS[0])

    assert [image.size for image in output.images] == [(24, 24)]
    assert output.texts[0].startswith("<think>")


def test_seeds_and_images_per_prompt(pipe: UnifiedPipeline) -> None:
    both = pipe(PROMPTS, num_images_per_prompt=2, seed=1)

    assert len(both.images) == 4
    assert (pixels(both.images) == pixels(pipe(PROMPTS, num_images_per_prompt=2, seed=1).images)).all()
    assert (pixels(both.images) != pixels(pipe(PROMPTS, num_images_per_prompt=2, seed=2).images)).any()
    assert (pixels(both.images[:1]) != pixels(both.images[1:2])).any()


def test_rounds_begin_with_the_image_that_is_painted_or_given(pipe: UnifiedPipeline) -> None:
    painted = pipe(PROMPTS[0], num_rounds=2)

    assert len(painted.refinements[0].steps) == 3
    assert painted.images[0] is painted.refinements[0].steps[-1].image

    given = Image.new("RGB", (24, 24), "white")
    refined = pipe(PROMPTS[0], given, num_rounds=1)
    assert refined.refinements[0].steps[0].image is given


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_timestep": 3}, "unknown settings of sampling: num_timestep; known are cfg_text_scale"),
        ({"num_images_per_prompt": 0}, "num_images_per_prompt must be at least 1, but is 0"),
        ({"image": Image.new("RGB", (24, 24))}, "set num_rounds to at least 1"),
        ({"image": [Image.new("RGB", (24, 24))] * 2, "num_rounds": 1}, "2 images are given for 1 prompts"),
    ],
)
def test_wrong_arguments_are_named(pipe: UnifiedPipeline, arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pipe(PROMPTS[0], **arguments)


def test_settings_of_a_checkpoint_come_before_those_of_its_family(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(PACKAGED_CHECKPOINTS["bagel-shapes"], folder)
    file = folder / "config.json"
    content = json.loads(file.read_text())
    content["sampling"] = {"task": "reasoning_t2i", "image_height": 16, "image_width": 20, "num_timesteps": 4}
    file.write_text(json.dumps(content))

    pipe = alphagrpo_ext.pipeline(folder)
    assert pipe.rollout("reasoning_t2i").denoising.num_timesteps == 4
    assert pipe.rollout("reasoning_t2i", num_timesteps=5).denoising.num_timesteps == 5
    # A task beside it keeps the guidance that it declares.
    assert pipe.rollout("self_reflection").denoising.guidance.image_scale == 2.0
    assert pipe(PROMPTS[0]).images[0].size == (20, 16)

    del content["sampling"]
    file.write_text(json.dumps(content))
    assert alphagrpo_ext.pipeline(folder).rollout("reasoning_t2i").size == (1024, 1024)
