# SPDX-License-Identifier: Apache-2.0

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.models.work import WorkCounter
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.shapes.answering import question_rows
from alphagrpo_ext.shapes.text import UNDERSTANDING_SYSTEM_PROMPT
from alphagrpo_ext.trajectory import ImageSegment, TextSegment
from reward_models.answering.exact import ExactAnswer


NAME = "visual_question_answering"
CONFIG = RolloutConfig(
    height=24,
    width=24,
    max_new_tokens=40,
    temperature=0.0,
    denoising=DenoisingConfig(4, 1.0, GuidanceConfig(text_scale=3.0, image_scale=2.0), window_start=1, window_size=2),
)
ROWS = question_rows("evaluation", 28, seed=0)


@pytest.fixture(scope="module")
def policy() -> tuple[BagelModel, BagelProcessor]:
    return load_model("bagel-shapes")


def sample(
    policy: tuple[BagelModel, BagelProcessor], think: bool, rows: Sequence[dict[str, Any]] = ROWS, **tasks: Any
):
    task = tasks or TASKS.get(NAME)(think=think)
    return RolloutGenerator(*policy, task)(rows, [sample_generator(0, 0, i) for i in range(len(rows))], CONFIG)


@pytest.mark.parametrize("think", [True, False])
def test_layout_and_answers(policy: tuple[BagelModel, BagelProcessor], think: bool) -> None:
    with (work := WorkCounter()).of(policy[0]):
        trajectories = sample(policy, think)
    assert work.evaluations["denoise"] == 0
    *system, image, question, text = trajectories[0].segments
    assert [policy[1].decode(part.token_ids) for part in system] == [UNDERSTANDING_SYSTEM_PROMPT] * think
    assert isinstance(image, ImageSegment) and len(image.latents) == 0 and image.image.size == (24, 24)
    assert isinstance(question, TextSegment) and policy[1].decode(question.token_ids) == ROWS[0]["prompt"]
    assert text.sampled and text.ended and text.log_probs
    texts = [[policy[1].decode_sampled(t.sampled_texts)] for t in trajectories]
    assert all(("</think>" in own[0]) == think for own in texts)
    assert all(t.final_image is None and t.num_trained_steps == 2 for t in trajectories)
    # The packaged model answers most questions about held-out scenes.
    right = ExactAnswer()(completions=[], texts=texts, solution=[row["solution"] for row in ROWS])
    assert sum(right) / len(right) > 0.7


@pytest.mark.invariant
def test_answers_do_not_depend_on_the_batch(policy: tuple[BagelModel, BagelProcessor]) -> None:
    painting = {"task": "reasoning_t2i", "prompt": "a red circle on a white background"}
    names = {row["task"]: TASKS.get(row["task"])(think=False) for row in (painting, ROWS[0])}
    mixed = sample(policy, False, [painting, *ROWS[:3], painting], **names)
    alone = RolloutGenerator(*policy, names)(ROWS[1:2], [sample_generator(0, 0, 2)], replace(CONFIG, batch_size=1))
    assert [len(t.sampled_images) for t in mixed] == [1, 0, 0, 0, 1]
    assert mixed[2].sampled_texts[0].token_ids == alone[0].sampled_texts[0].token_ids


@pytest.mark.parametrize("think", [True, False])
def test_packed_forward_gives_the_log_probs_of_the_rollout(
    make_shapes_bagel: Callable[[], BagelModel], shapes_processor: BagelProcessor, think: bool
) -> None:
    model = make_shapes_bagel()
    task = TASKS.get(NAME)(think=think)
    config = replace(CONFIG, temperature=1.0, max_new_tokens=6)
    generators = [sample_generator(0, 0, i) for i in range(4)]
    trajectories = RolloutGenerator(model, shapes_processor, task)(ROWS[:4], generators, config)
    packed = model.pack(trajectories, CONFIG.denoising.guidance)
    with torch.no_grad():
        scored = model(**packed.inputs).log_probs
    recorded = torch.tensor([p for t in trajectories for text in t.sampled_texts for p in text.log_probs])
    torch.testing.assert_close(scored, recorded, atol=1e-4, rtol=1e-4)


def test_room_of_a_row(policy: tuple[BagelModel, BagelProcessor]) -> None:
    """Nothing is reserved for an image to paint."""
    model, processor = policy
    task = TASKS.get(NAME)(think=True)
    largest = task.max_positions(ROWS[0], processor, model, CONFIG)
    (trajectory,) = sample(policy, True, ROWS[:1])
    taken = model.num_positions(trajectory.segments)
    assert taken <= largest <= taken + CONFIG.max_new_tokens
