# SPDX-License-Identifier: Apache-2.0

"""
Self-reflection for OpenRLHF's multi-turn rollouts: `--train.agent_func_path alphagrpo_ext/openrlhf/agent_file.py`.

The policy writes a thought, and the reward server paints an image with it. The policy looks at the image and writes a
reflection, and the server refines the image by it, once per round. The reward of an episode is that of its last image. Settings
come from environment variables; see `environment.py`.

Rewards telescope. OpenRLHF adds up the rewards of all turns, so each turn returns the difference to the turn before. At any turn
the sum is the reward of an episode that ends there, and an episode that runs out of tokens does not get an accidental 0.

Turns share the token budget. OpenRLHF would let the first turn take all tokens of the episode, so [`TurnEngine`] gives each turn
an equal share of what is left. It also forbids image tokens in texts: OpenRLHF stops the whole run if a text has an image token
without an image.
"""

from __future__ import annotations

import logging
from copy import deepcopy
from functools import partial
from typing import Any

import torch
from openrlhf.utils.agent import AgentInstanceBase, MultiTurnAgentExecutor
from PIL import Image

from alphagrpo_ext.openrlhf.environment import PluginConfig
from alphagrpo_ext.openrlhf.episode import Turn, episode_logs, feedback_text, rectified_reward, turn_budget
from alphagrpo_ext.openrlhf.group_rewards import exact_in_a_group
from alphagrpo_ext.reward_client.client import (
    AsyncRewardClient,
    ImageScore,
    Label,
    PaintRequest,
    noise_seed,
    parse_label,
)
from alphagrpo_ext.reward_client.settings import variable


# Not `__name__`, because OpenRLHF gives the module a name of its own.
logger = logging.getLogger("alphagrpo_ext.openrlhf.agent_file")

FORBIDDEN_BIAS = -100.0
"""The lowest bias that vLLM accepts."""


class TurnEngine:
    """
    OpenRLHF's engine for one episode. It limits the tokens of each turn, forbids image tokens and records the turns.

    OpenRLHF tells an agent the text of a turn, but not whether the turn was cut off, so turns are recorded here.

    Args:
        engine: OpenRLHF's engine, with `async generate(ids, sampling_params, multi_modal_data=None)`.
        tokenizer: The policy's tokenizer or processor.
        config ([`PluginConfig`]): Limits of turns.
    """

    def __init__(self, engine: Any, tokenizer: Any, config: PluginConfig) -> None:
        self._engine = engine
        self._tokenizer = tokenizer
        self._config = config
        ids = (getattr(tokenizer, name, None) for name in ("image_token_id", "video_token_id"))
        self._forbidden = {token: FORBIDDEN_BIAS for token in ids if token is not None}
        self.turns: list[Turn] = []

    async def generate(self, ids: list[int], sampling_params: Any, multi_modal_data: Any = None) -> Any:
        turns_left = self._config.num_reflection_rounds + 1 - len(self.turns)
        sampling_params.max_tokens = turn_budget(sampling_params.max_tokens, turns_left, self._config.max_new_tokens)
        if self._forbidden:
            sampling_params.logit_bias = {**(sampling_params.logit_bias or {}), **self._forbidden}
        result = await self._engine.generate(ids, sampling_params, multi_modal_data=multi_modal_data)
        written = list(result.outputs[0].token_ids)
        is_ended = self._tokenizer.decode(written, skip_special_tokens=False).endswith(self._config.end_of_turn)
        self.turns.append(Turn(self._tokenizer.decode(written, skip_special_tokens=True).strip(), is_ended))
        return result


class ReflectionAgent(AgentInstanceBase):
    """
    Agent of one episode.

    Args:
        config ([`PluginConfig`]): Settings.
        client ([`AsyncRewardClient`]): Client of the reward server, which paints and scores.
        engine ([`TurnEngine`]): Engine that records what the policy wrote.
    """

    def __init__(self, config: PluginConfig, client: AsyncRewardClient, engine: TurnEngine) -> None:
        self._config = config
        self._client = client
        self._engine = engine
        self._label: Label | None = None
        self._image: Image.Image | None = None
        self._initial: ImageScore | None = None
        self._reward = 0.0

    async def reset(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """
        Read the label at the start of an episode.

        Raises:
            `ValueError`: If the label is malformed; see [`parse_label`].
        """
        self._label = parse_label(states["label"])
        return states

    async def step(self, states: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        """
        Paint the image of the policy's turn, score it, and show it to the policy unless this was the last turn.

        Returns:
            `dict[str, Any]`: The fields that OpenRLHF expects. `rewards` is the change of the episode's reward.

        Raises:
            [`RewardServerError`]: If the image could not be painted or scored, after all retries.
        """
        round_index = len(self._engine.turns) - 1
        turn = self._engine.turns[-1]
        prompt = self._label.prompt
        seed = noise_seed(self._config.seed, prompt, round_index)
        (self._image,) = await self._client.generate([PaintRequest(prompt, turn.text, self._image, seed)])
        (final,) = await self._client.score([self._image], [self._label])
        initial = self._initial = self._initial or final
        # Without a round there is no refinement that could be no better.
        rectification = self._config.rectification if self._config.num_reflection_rounds else "off"
        reward = exact_in_a_group(rectified_reward(initial, final, rectification))
        change, self._reward = reward - self._reward, reward
        done = round_index >= self._config.num_reflection_rounds
        return {
            # float64, so that the sum over turns equals the logged reward.
            "rewards": torch.tensor(change, dtype=torch.float64),
            "scores": reward,
            "environment_feedback": "" if done else feedback_text(turn, prompt, self._config),
            "environment_images": [self._image] if self._config.policy_sees_images and not done else None,
            "done": done,
            "extra_logs": episode_logs(initial, final),
        }


class AgentExecutor(MultiTurnAgentExecutor):
    """
    Executor of episodes of [`ReflectionAgent`]. OpenRLHF creates one per actor, without arguments.

    Raises:
        `ValueError`: If an environment variable has an invalid value; the message names it.
    """

    def __init__(self) -> None:
        super().__init__(ReflectionAgent)
        self.config = PluginConfig()
        self._client = AsyncRewardClient(self.config)

    async def execute(
        self,
        prompt: str,
        label: str,
        sampling_params: Any,
        max_length: int,
        hf_tokenizer: Any,
        llm_engine: Any,
        images: Any = None,
    ) -> dict[str, Any]:
        """
        Run one episode. See [`~openrlhf.utils.agent.MultiTurnAgentExecutor`].

        Raises:
            `ValueError`: If the policy cannot be shown images although the settings say so, or if the label is malformed.
            [`RewardServerError`]: If an image could not be painted or scored, after all retries.
        """
        num_images = self.config.num_reflection_rounds if self.config.policy_sees_images else 0
        if num_images and not hasattr(hf_tokenizer, "image_processor"):
            raise ValueError(
                f"the policy cannot be shown images: set --data.max_images_per_prompt to at least {num_images} for a "
                f"vision-language model, or {variable('policy_sees_images')}=false for a text-only one"
            )
        engine = TurnEngine(llm_engine, hf_tokenizer, self.config)
        episode = MultiTurnAgentExecutor(ReflectionAgent)
        # OpenRLHF creates the agent itself, without arguments.
        episode.agent_instance_cls = partial(ReflectionAgent, self.config, self._client, engine)
        try:
            # OpenRLHF changes the parameters during an episode and passes the same object to a whole group.
            return await episode.execute(
                prompt, label, deepcopy(sampling_params), max_length, hf_tokenizer, engine, images
            )
        except Exception as error:
            logger.error("an episode failed, which will stop the run: %s: %s", type(error).__name__, error)
            raise
