# SPDX-License-Identifier: Apache-2.0

from __future__ import annotations

import pytest

from alphagrpo_ext.openrlhf.environment import PluginConfig
from alphagrpo_ext.openrlhf.episode import Turn, episode_logs, feedback_text, rectified_reward, turn_budget
from alphagrpo_ext.reward_client.client import ImageScore


def score(reward: float, strict_pass: bool = False) -> ImageScore:
    return ImageScore(reward, (reward,), (reward,), strict_pass)


def test_feedback_continues_the_chat() -> None:
    config = PluginConfig(reflection_request="Fix {prompt}.")
    expected = (
        "\n<|im_start|>user\n<|vision_start|><|image_pad|><|vision_end|>Fix a {request}.<|im_end|>\n"
        "<|im_start|>assistant\n"
    )
    assert feedback_text(Turn("thought", is_ended=True), "a {request}", config) == expected
    assert feedback_text(Turn("thought", is_ended=False), "a {request}", config) == "<|im_end|>" + expected


def test_text_only_policy_gets_no_placeholder() -> None:
    text = feedback_text(Turn("thought", is_ended=True), "a cat", PluginConfig(policy_sees_images=False))
    assert "vision" not in text and "a cat" in text


def test_default_request_names_the_prompt() -> None:
    assert "a red cat" in feedback_text(Turn("thought", is_ended=True), "a red cat", PluginConfig())


@pytest.mark.parametrize(
    ("num_tokens", "turns_left", "max_new_tokens", "budget"),
    [(100, 2, None, 50), (100, 1, None, 100), (100, 2, 30, 30), (100, 2, 80, 50), (1, 3, None, 1), (5, 0, None, 5)],
)
def test_every_turn_has_room(num_tokens: int, turns_left: int, max_new_tokens: int | None, budget: int) -> None:
    assert turn_budget(num_tokens, turns_left, max_new_tokens) == budget


@pytest.mark.parametrize(
    ("initial", "final", "minimum", "off"),
    [
        (score(0.4), score(0.7), 0.7, 0.7),
        (score(0.7), score(0.7), 0.0, 0.7),
        (score(0.7), score(0.4), 0.0, 0.4),
        # A right image that stays right needed no improvement; one that is spoilt did not stay right.
        (score(0.95, True), score(0.9, True), 0.9, 0.9),
        (score(0.9, True), score(0.6), 0.0, 0.6),
    ],
)
def test_only_an_improvement_is_praised(initial: ImageScore, final: ImageScore, minimum: float, off: float) -> None:
    assert rectified_reward(initial, final, "minimum") == minimum
    assert rectified_reward(initial, final, "off") == off


def test_the_reward_of_the_first_image_is_not_offered_without_a_group() -> None:
    with pytest.raises(ValueError, match="rectification must be one of .*'minimum', 'off'.*, but is 'initial'"):
        rectified_reward(score(0.9), score(0.85), "initial")


def test_logs_are_not_rectified() -> None:
    assert episode_logs(score(0.7), score(0.4)) == {
        "initial_reward": 0.7,
        "final_reward": 0.4,
        "improved": 0.0,
        "false_positive": 1.0,
        "semantic": 0.4,
        "quality": 0.4,
        "strict_pass": 0.0,
    }
    assert episode_logs(score(0.4), score(0.7))["improved"] == 1.0
