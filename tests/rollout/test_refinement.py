# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.rollout import Refinement, RolloutConfig, refine
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.shapes.scene import Scene, SceneObject, render


ROWS = [{"prompt": prompt} for prompt in ("a red circle", "two yellow triangles", "a blue square")]
CONFIG = RolloutConfig(
    24, 24, max_new_tokens=6, denoising=DenoisingConfig(4, 1.0, guidance=GuidanceConfig(text_scale=1.0))
)


def brightness(images: list, rows: list) -> list[float]:
    return [float(np.asarray(image).mean()) / 255 for image in images]


@pytest.fixture
def run(
    make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor
) -> Callable[..., list[Refinement]]:
    model = make_shapes_bagel()

    def run(rows: list[dict] = ROWS, **settings: Any) -> list[Refinement]:
        return refine(model, shapes_processor, rows, CONFIG, **settings)

    return run


def test_one_step_more_than_rounds(run: Callable[..., list[Refinement]]) -> None:
    for num_rounds in (0, 2):
        refinements = run(num_rounds=num_rounds)
        assert [len(r.steps) for r in refinements] == [num_rounds + 1] * 3
        assert all(step.reward is None for r in refinements for step in r.steps)
        assert all(r.best is r.steps[-1] for r in refinements)


def test_first_rounds_are_the_same_however_many_follow(run: Callable[..., list[Refinement]]) -> None:
    for one, two in zip(run(num_rounds=1), run(num_rounds=2), strict=True):
        assert [step.text for step in two.steps[:2]] == [step.text for step in one.steps]


def test_a_good_image_is_left_as_it_is(run: Callable[..., list[Refinement]]) -> None:
    firsts = sorted(r.steps[0].reward for r in run(num_rounds=0, scorer=brightness))
    refinements = run(num_rounds=2, scorer=brightness, stop_reward=firsts[1])
    for refinement in refinements:
        stopped = next((i for i, step in enumerate(refinement.steps) if step.reward >= firsts[1]), 2)
        assert len(refinement.steps) == stopped + 1
    assert min(len(r.steps) for r in refinements) == 1 < max(len(r.steps) for r in refinements)


def test_best_image_is_refined_and_found(run: Callable[..., list[Refinement]]) -> None:
    last, best = (run(num_rounds=3, scorer=brightness, keep_best=keep) for keep in (False, True))
    for refinement in (*last, *best):
        assert refinement.best.reward == max(step.reward for step in refinement.steps)
    assert any(a.steps[-1].reward != b.steps[-1].reward for a, b in zip(last, best, strict=True))


def test_an_image_that_is_given_is_the_first(run: Callable[..., list[Refinement]]) -> None:
    image = render(Scene((SceneObject(0, 0, "circle", "red"),), "white"))
    given, painted = run([{"prompt": "a red circle", "image": image}, ROWS[1]], num_rounds=1, scorer=brightness)
    assert given.steps[0].image is image and given.steps[0].text == ""
    assert given.steps[0].reward == brightness([image], [])[0]
    assert len(given.steps) == len(painted.steps) == 2


def test_without_a_scorer_nothing_is_best(run: Callable[..., list[Refinement]]) -> None:
    for settings in ({"keep_best": True}, {"stop_reward": 0.5}):
        with pytest.raises(ValueError, match="need a scorer"):
            run(**settings)
    with pytest.raises(ValueError, match="num_rounds must not be negative, but is -1"):
        run(num_rounds=-1)
