# SPDX-License-Identifier: Apache-2.0

"""What the reward does around its model, with a model of a few lines."""

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from datasets import Dataset
from PIL import Image

from alphagrpo_ext.trainer.reward_functions import preflight_rewards
from reward_models.dvreward import JudgeFailedError
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.likelihood.base import LikelihoodScorer
from reward_models.likelihood.reward import LikelihoodReward, within_prompt_std
from support.tiny_llava import make_tokenizer


class BrightnessScorer(LikelihoodScorer):
    """Every token is as likely as the image is bright; none is in a black image."""

    @classmethod
    def from_arguments(cls, args: LikelihoodArguments, policy: object = None) -> LikelihoodScorer:
        return cls(make_tokenizer())

    def answer_log_probs(self, images: Sequence[Image.Image], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        means = [np.asarray(image).mean() / 255 for image in images]
        return [
            torch.full((len(ids),), math.log(mean) if mean else -math.inf)
            for mean, ids in zip(means, answers, strict=True)
        ]


@pytest.fixture(scope="module")
def reward() -> LikelihoodReward:
    return LikelihoodReward(BrightnessScorer(make_tokenizer(), batch_size=2))


def gray(level: int) -> Image.Image:
    return Image.new("L", (8, 8), level)


def test_rewards_are_compared_within_prompts(reward: LikelihoodReward) -> None:
    logged: dict[str, float] = {}
    conversation = [{"role": "user", "content": "a cat"}]
    prompts = ["a cat", conversation, "a dog", "a dog", "a cow"]
    images = [gray(255), [gray(51)], gray(51), None, []]
    rewards = reward(prompts, images=images, log_metric=logged.__setitem__)
    low = pytest.approx(math.log(0.2), abs=1e-5)
    assert rewards == [pytest.approx(0, abs=1e-5), low, low, None, None]
    # Completions without an image are no failures.
    expected = {"likelihood/failed_frac": 0.0, "likelihood/within_prompt_std": -math.log(0.2) / 2}
    assert logged == pytest.approx(expected, abs=1e-5)
    assert within_prompt_std(["a", "b"], [0.0, 1.0]) is None


def test_images_without_finite_values_are_not_scored(reward: LikelihoodReward) -> None:
    assert reward(["a cat"] * 2, images=[gray(0), gray(255)]) == [None, pytest.approx(0, abs=1e-5)]
    with pytest.raises(JudgeFailedError, match="BrightnessScorer gave 2 of 2 images NaN or infinite"):
        reward(["a cat"] * 2, images=[gray(0), gray(0)])
    assert reward(["a cat"], images=[None]) == [None]


def test_malformed_arguments_are_refused(reward: LikelihoodReward) -> None:
    with pytest.raises(ValueError, match="images has 1 entries for 2 prompts"):
        reward(["a", "b"], images=[gray(1)])
    with pytest.raises(ValueError, match="sample 1: prompt is empty"):
        reward(["a", " "], images=[gray(1)] * 2)
    with pytest.raises(ValueError, match=r"images\[0\] must be a PIL image or None, got str"):
        reward(["a"], images=["a.png"])
    with pytest.raises(ValueError, match=r"images\[0\] holds 2 images; a reward scores one"):
        reward(["a"], images=[[gray(1), gray(2)]])
    with pytest.raises(ValueError, match="tokens must be one of all, content"):
        LikelihoodReward(reward.scorer, tokens="some")
    with pytest.raises(ValueError, match="max_failed_frac"):
        LikelihoodReward(reward.scorer, max_failed_frac=2)


def test_datasets_are_checked_before_a_run(reward: LikelihoodReward) -> None:
    rows = Dataset.from_dict({"prompt": ["a cat", "of the", ""], "image": [None] * 3})
    with pytest.raises(ValueError, match="row 2: prompt is empty"):
        reward.validate_dataset(rows)
    with pytest.raises(ValueError, match="row 1: the prompt 'of the' has no tokens that count"):
        LikelihoodReward(reward.scorer, "content").validate_dataset(rows)
    reward.validate_dataset(rows.select(range(2)))


def test_preflight_scores_a_blank_image(reward: LikelihoodReward, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = []

    def fail(images: Sequence[Image.Image], answers: Sequence[Sequence[int]]) -> list[torch.Tensor]:
        sizes.append(images[0].size)
        raise RuntimeError("out of memory")

    preflight_rewards([reward], 8, 16)
    monkeypatch.setattr(reward.scorer, "answer_log_probs", fail)
    with pytest.raises(JudgeFailedError, match="'likelihood' .* 8 x 16 pixels, .*: RuntimeError: out of memory"):
        preflight_rewards([reward], 8, 16)
    assert sizes == [(16, 8)]
