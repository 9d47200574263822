# SPDX-License-Identifier: Apache-2.0

"""
DVReward for OpenRLHF's single-turn rollouts: `--reward.remote_url alphagrpo_ext/openrlhf/reward_file.py`.

The policy's completion is a thought. The reward server paints the prompt with this thought and scores the image, and the score
is the completion's reward. Settings come from environment variables; see `environment.py`.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from functools import cache
from typing import Any

from alphagrpo_ext.openrlhf.environment import PluginConfig
from alphagrpo_ext.openrlhf.group_rewards import exact_in_a_group
from alphagrpo_ext.reward_client.client import PaintRequest, RewardClient, noise_seed, parse_label
from alphagrpo_ext.reward_client.thought import extract_thought


# Not `__name__`, because OpenRLHF gives the module a name of its own.
logger = logging.getLogger("alphagrpo_ext.openrlhf.reward_file")

# Read at import, so that a bad value stops the run when OpenRLHF loads the file, and not at the first reward.
CONFIG = PluginConfig()


def reward_func(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    """
    Compute rewards of completions. OpenRLHF calls it positionally, in a thread, with sequences of length 1.

    Args:
        queries (`Sequence[str]`): Prompt and completion, with special tokens.
        prompts (`Sequence[str]`): The prompts, as the policy was given them.
        labels (`Sequence[str]`): Prompts with questions, as JSON; see [`parse_label`].

    Returns:
        `dict[str, Any]`: `rewards` and `scores`, tensors of shape `(samples,)` in [0, 1], and `extra_logs`, a tensor of that
        shape for each of `semantic`, `quality` and `strict_pass`.

    Raises:
        [`RewardServerError`]: If an image could not be painted or scored, after all retries.
        `ValueError`: If an argument is malformed.
    """
    try:
        return _rewards(queries, prompts, labels)
    except Exception as error:
        # OpenRLHF logs the error at INFO, goes on without a reward and fails later, with a message that does not say why.
        logger.error(
            "no reward for a sample; this is why OpenRLHF stops with 'reward_model_group is required': %s: %s",
            type(error).__name__,
            error,
        )
        raise


@cache
def _client() -> RewardClient:
    return RewardClient(CONFIG)


def _rewards(queries: Sequence[str], prompts: Sequence[str], labels: Sequence[str]) -> dict[str, Any]:
    import torch

    records = [parse_label(label) for label in labels]
    thoughts = [extract_thought(query, prompt) for query, prompt in zip(queries, prompts, strict=True)]
    images = _client().generate(
        [
            PaintRequest(record.prompt, thought, seed=noise_seed(CONFIG.seed, record.prompt, 0))
            for record, thought in zip(records, thoughts, strict=True)
        ]
    )
    scores = _client().score(images, records)
    rewards = torch.tensor([exact_in_a_group(score.reward) for score in scores])
    logs = [score.logs for score in scores]
    return {
        "rewards": rewards,
        "scores": rewards,
        "extra_logs": {name: torch.tensor([log[name] for log in logs]) for name in logs[0]},
    }
