# SPDX-License-Identifier: Apache-2.0

"""
Texts and rewards of an episode of self-reflection, as functions that do not depend on OpenRLHF.

OpenRLHF does not show an agent the other episodes of its group. Rectification therefore takes 0, the lowest possible reward, where
the trainer takes the lowest reward of the group.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from alphagrpo_ext.openrlhf.environment import PluginConfig, Rectification
from alphagrpo_ext.reward_client.client import ImageScore


@dataclass(frozen=True)
class Turn:
    """
    Text that the policy wrote in one turn.

    Args:
        text (`str`): The text, without special tokens.
        is_ended (`bool`): Whether the policy ended the turn itself. If not, the turn was cut off.
    """

    text: str
    is_ended: bool


def feedback_text(turn: Turn, prompt: str, config: PluginConfig) -> str:
    """
    Write the text between a turn of the policy and its next one.

    Args:
        turn ([`Turn`]): The turn before the text.
        prompt (`str`): The prompt.
        config ([`PluginConfig`]): Templates.

    Returns:
        `str`: A text in the form of the chat template, with one image placeholder if the policy sees images.
    """
    placeholder = config.image_placeholder if config.policy_sees_images else ""
    # The prompt is inserted last, so that braces in it are not replaced.
    template = config.feedback_template.replace("{image}", placeholder).replace("{request}", config.request)
    return ("" if turn.is_ended else config.end_of_turn) + template.replace("{prompt}", prompt)


def turn_budget(num_tokens: int, turns_left: int, max_new_tokens: int | None) -> int:
    """
    Compute the maximum number of tokens of the next turn.

    Args:
        num_tokens (`int`): Number of tokens that are left for the episode.
        turns_left (`int`): Number of turns that are left for the policy, the next one included.
        max_new_tokens (`int`, *optional*): Limit of every turn.
    """
    share = max(num_tokens // max(turns_left, 1), 1)
    return share if max_new_tokens is None else min(share, max_new_tokens)


def is_false_positive(initial: ImageScore, final: ImageScore) -> bool:
    """
    Whether the last image is not better than the first, although the first had something to improve.

    Two images that both pass every question are not a false positive: the first image is the policy's own work, too, and it must
    not gain from a flaw that it can repair later.
    """
    return final.reward <= initial.reward and not (initial.strict_pass and final.strict_pass)


def rectified_reward(initial: ImageScore, final: ImageScore, rectification: Rectification) -> float:
    """
    Compute the reward of an episode with false-positive rectification (https://huggingface.co/papers/2605.12495): an episode
    that does not improve its first image gets no reward for its last one.

    `"minimum"` gives 0, where [`AlphaGRPOTrainer`] gives the lowest reward of the group. Neither leads to a positive advantage.
    The trainer's `"initial"` is not offered. An episode does not know its group, and the reward of its first image can be above
    the group's mean.

    Args:
        initial, final ([`ImageScore`]): Scores of the first and of the last image, which may be the same image.
        rectification (`str`): `"minimum"` or `"off"`; see [`PluginConfig`].

    Returns:
        `float`: The reward of the episode, in [0, 1].

    Raises:
        `ValueError`: If the rectification is unknown.
    """
    if rectification not in get_args(Rectification):
        raise ValueError(f"rectification must be one of {get_args(Rectification)}, but is {rectification!r}")
    return 0.0 if rectification == "minimum" and is_false_positive(initial, final) else final.reward


def episode_logs(initial: ImageScore, final: ImageScore) -> dict[str, float]:
    """Metrics of an episode. `semantic`, `quality` and `strict_pass` are those of the last image; rewards are not rectified."""
    return {
        "initial_reward": initial.reward,
        "final_reward": final.reward,
        "improved": float(final.reward > initial.reward),
        "false_positive": float(is_false_positive(initial, final)),
        **final.logs,
    }
