# SPDX-License-Identifier: Apache-2.0

import asyncio
import copy
import random

import pytest
import torch
from PIL import Image

from alphagrpo_ext.flow.guidance import GuidanceConfig
from alphagrpo_ext.models.bagel import BagelModel, BagelProcessor
from alphagrpo_ext.models.bagel.generation import feed_tokens, prefill_sequences
from alphagrpo_ext.models.bagel.layout import BagelSequence
from alphagrpo_ext.models.fingerprint import weights_digest
from alphagrpo_ext.models.loading import load_model
from alphagrpo_ext.rollout import TASKS, RolloutConfig, RolloutGenerator
from alphagrpo_ext.rollout.denoising import DenoisingConfig
from alphagrpo_ext.rollout.generator import sample_generator
from alphagrpo_ext.shapes.judge import answer_questions
from alphagrpo_ext.shapes.prompts import prompt_rows, sample_scene, sample_spec, sample_violation, semantic_questions
from alphagrpo_ext.shapes.scene import render
from reward_models.arguments import RewardArguments
from reward_models.judges.policy import PolicyJudge


@pytest.fixture(scope="module")
def packaged() -> tuple[BagelModel, BagelProcessor]:
    model, processor = load_model("bagel-shapes", attn_implementation="eager")
    return model.eval(), processor


def area_under_roc(probabilities: list[float], labels: list[bool]) -> float:
    """How often a yes is likelier where the pixel judge says yes than where it says no."""
    p, is_yes = torch.tensor(probabilities), torch.tensor(labels)
    yes, no = p[is_yes][:, None], p[~is_yes][None]
    return ((yes > no).float().mean() + 0.5 * (yes == no).float().mean()).item()


def agreement(judge: PolicyJudge, images: list[Image.Image], questions: list[list[str]]) -> float:
    async def ask() -> list[list[float]]:
        return await asyncio.gather(*(judge.answer(image, qs) for image, qs in zip(images, questions, strict=True)))

    answers = [p for of_image in asyncio.run(ask()) for p in of_image]
    truth = [answer_questions(image, qs) for image, qs in zip(images, questions, strict=True)]
    return area_under_roc(answers, [answer >= 0.5 for of_image in truth for answer in of_image])


@pytest.mark.slow
def test_agrees_with_the_pixel_judge_on_rendered_images(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    rng = random.Random(0)
    images, questions = [], []
    for index in range(200):
        spec = sample_spec(rng, "evaluation")
        scene = sample_scene(spec, rng)
        images.append(render(scene if index % 2 else sample_violation(scene, spec, rng)))
        questions.append([question["question"] for question in semantic_questions(spec)])
    assert agreement(PolicyJudge(*packaged), images, questions) > 0.95


@pytest.mark.slow
def test_agrees_with_the_pixel_judge_on_its_own_images(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    rows = prompt_rows("evaluation", 70, seed=0)
    paint = RolloutGenerator(*packaged, TASKS.get("reasoning_t2i")(think=False))
    denoising = DenoisingConfig(11, 1.0, GuidanceConfig(text_scale=1.0))
    config = RolloutConfig(24, 24, denoising=denoising)
    trajectories = paint(rows, [sample_generator(0, 0, i) for i in range(len(rows))], config)
    images = [trajectory.final_image for trajectory in trajectories]
    questions = [[question["question"] for question in row["semantic_questions"]] for row in rows]
    assert agreement(PolicyJudge(*packaged), images, questions) > 0.9


def test_equals_a_forward_without_cache(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    model, processor = packaged
    rng = random.Random(1)
    spec = sample_spec(rng, "evaluation")
    image = render(sample_scene(spec, rng))
    questions = [question["question"] for question in semantic_questions(spec)] + ["is there a red circle ?"]
    yes, no = processor.tokenizer.convert_tokens_to_ids(["yes", "no"])
    expected = []
    for question in questions:
        sequence = BagelSequence(model.config)
        sequence.add_pixels(processor.vit_pixels(image))
        sequence.add_text(processor.encode_text(question))
        cache = prefill_sequences(model, [sequence]).with_slots(1, 1)
        logits = feed_tokens(model, cache, torch.tensor([model.config.bos_token_id]), torch.tensor([True]))[0]
        expected.append(torch.stack([logits[yes], logits[no]]).softmax(0)[0].item())
    for batch_size in (2, 32):
        assert PolicyJudge(*packaged, batch_size=batch_size).probabilities(image, questions) == pytest.approx(
            expected, abs=1e-5
        )


def test_judges_with_the_policy_that_is_trained(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    judge = RewardArguments(judge="policy").make_reward(packaged).judge
    assert judge.model is packaged[0]
    with pytest.raises(ValueError, match="needs judge_model"):
        RewardArguments(judge="policy").make_reward()


def test_a_named_model_judges_in_the_place_of_the_policy(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    judge = RewardArguments(judge="policy", judge_model="bagel-shapes").make_reward(packaged).judge
    own = {parameter.data_ptr() for parameter in judge.model.parameters()}
    assert not judge.model.training
    # A run keeps a digest of frozen weights: those of the policy change.
    assert judge.run_settings["weights"] == weights_digest(copy.deepcopy(packaged[0]).requires_grad_(False))
    assert judge.run_settings["weights"] != PolicyJudge(*packaged).run_settings["weights"]
    # Nothing is shared, so training the policy leaves the judge as it is.
    assert not own & {parameter.data_ptr() for parameter in packaged[0].parameters()}
    blank, questions = Image.new("RGB", (24, 24), "white"), ["is the background white ?"]
    assert judge.probabilities(blank, questions) == pytest.approx(
        PolicyJudge(*packaged).probabilities(blank, questions)
    )


def test_an_answer_of_too_little_mass_is_none(packaged: tuple[BagelModel, BagelProcessor]) -> None:
    blank = Image.new("RGB", (24, 24))
    sure = PolicyJudge(*packaged)
    assert asyncio.run(sure.answer(blank, ["is it red ?"])) != [None]
    mass = sure.take_answer_mass()
    assert 0.9 < mass < 0.9999
    judge = RewardArguments(judge="policy", judge_min_answer_mass=0.9999).make_reward(packaged).judge
    assert asyncio.run(judge.answer(blank, ["is it red ?"])) == [None]
    assert "no answer to 'is it red ?': yes and no hold 0.99" in judge.last_failure
