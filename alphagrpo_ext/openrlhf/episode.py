# SPDX-License-Identifier: Apache-2.0

"""What an episode of self-reflection says to the policy and what it is worth, whoever runs it."""

from __future__ import annotations

from dataclasses import dataclass

from alphagrpo_ext.openrlhf.environment import PluginConfig
from alphagrpo_ext.reward_client.client import ImageScore


@dataclass(frozen=True)
class Turn:
    """
    What the policy wrote in one turn.

    Args:
        text (`str`): Without special tokens.
        is_ended (`bool`): Whether the policy wrote the end of the turn itself; otherwise it was cut off.
    """

    text: str
    is_ended: bool


def feedback_text(turn: Turn, prompt: str, config: PluginConfig) -> str:
    """
    What comes between a turn of the policy and its next one.

    Args:
        turn ([`Turn`]): The turn that it follows on.
        prompt (`str`): The request.
        config ([`PluginConfig`]): Has the texts.

    Returns:
        `str`: In the form of the chat template, with one image placeholder if the policy sees images, and none otherwise.
    """
    placeholder = config.image_placeholder if config.policy_sees_images else ""
    # The prompt last, so that braces in it are left alone.
    template = config.feedback_template.replace("{image}", placeholder).replace("{request}", config.request)
    return ("" if turn.is_ended else config.end_of_turn) + template.replace("{prompt}", prompt)


def turn_budget(num_tokens: int, turns_left: int, max_new_tokens: int | None) -> int:
    """
    Most tokens of the next turn.

    Args:
        num_tokens (`int`): Tokens that are left for the episode.
        turns_left (`int`): Turns of the policy that are to come, the next one included.
        max_new_tokens (`int`, *optional*): Limit of every turn.
    """
    share = max(num_tokens // max(turns_left, 1), 1)
    return share if max_new_tokens is None else min(share, max_new_tokens)


def is_false_positive(initial: ImageScore, final: ImageScore) -> bool:
    """
    Whether the last image is no better than the first although there was something to make better. Two images that both
    pass every question are not: the first is the policy's own work, and must not pay off more for having a flaw to repair.
    """
    return final.reward <= initial.reward and not (initial.strict_pass and final.strict_pass)


def rectified_reward(initial: ImageScore, final: ImageScore, rectification: str) -> float:
    """
    False-positive rectification (https://huggingface.co/papers/2605.12495) of one episode: without an improvement there is
    nothing to praise.

    OpenRLHF shows an agent no group, so `"minimum"` takes the least reward that there is, where [`AlphaGRPOTrainer`] takes
    the least of the group. Neither can lead to a positive advantage.

    Args:
        initial, final ([`ImageScore`]): Scores of the first and of the last image, which may be the same.
        rectification (`str`): `"minimum"`, `"initial"` or `"off"`; see [`PluginConfig`].

    Returns:
        `float`: The reward of the episode, in [0, 1].
    """
    if rectification == "off" or not is_false_positive(initial, final):
        return final.reward
    return initial.reward if rectification == "initial" else 0.0


def episode_logs(initial: ImageScore, final: ImageScore) -> dict[str, float]:
    """Metrics of an episode: `semantic`, `quality` and `strict_pass` are of the last image; rewards are not rectified."""
    return {
        "initial_reward": initial.reward,
        "final_reward": final.reward,
        "improved": float(final.reward > initial.reward),
        "false_positive": float(is_false_positive(initial, final)),
        **final.logs,
    }
