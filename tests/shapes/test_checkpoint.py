# SPDX-License-Identifier: Apache-2.0

"""What the packaged checkpoint was taught, measured where it was not taught: on held-out combinations."""

import random

import pytest

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.shapes.prompts import sample_prompt, sample_scene, sample_spec, sample_violation, satisfies
from alphagrpo_ext.shapes.scene import render
from alphagrpo_ext.shapes.text import parse_thought
from reward_models.format import ShapesReflectionFormat


CONFIG = RolloutConfig(
    24, 24, max_new_tokens=48, temperature=0.0, denoising=DenoisingConfig(2, 1.0, GuidanceConfig(text_scale=1.0))
)


@pytest.fixture(scope="module")
def packaged() -> tuple[BagelModel, BagelProcessor]:
    model, processor = load_model("bagel-shapes", attn_implementation="eager")
    return model.eval(), processor


def test_reflections_plan_a_repair(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    """Given a flawed image, the policy says what is wrong in the form it was taught, and often plans what is right."""
    model, processor = packaged
    rng = random.Random(0)
    rows, specs = [], []
    for _ in range(120):
        spec = sample_spec(rng, "evaluation")
        flawed = sample_violation(sample_scene(spec, rng), spec, rng)
        rows.append({"prompt": sample_prompt(spec, rng), "image": render(flawed)})
        specs.append(spec)
    generate = RolloutGenerator(model, processor, TASKS.get("self_reflection")(think=True))
    trajectories = generate(rows, [sample_generator(0, 0, i) for i in range(len(rows))], CONFIG)
    texts = [processor.decode(trajectory.sampled_texts[0].content_ids) for trajectory in trajectories]
    assert sum(ShapesReflectionFormat()(completions=texts)) / len(texts) > 0.9
    plans = [parse_thought(text) for text in texts]
    right = [plan is not None and satisfies(plan, spec) for plan, spec in zip(plans, specs, strict=True)]
    assert sum(right) / len(right) > 0.5
