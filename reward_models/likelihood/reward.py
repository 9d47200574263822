# SPDX-License-Identifier: Apache-2.0

"""
The likelihood reward: how likely a frozen model that looks at the image finds the prompt
(https://huggingface.co/papers/2607.11886).

Long and unusual prompts have lower values whatever the image is, so a value says something only beside those of other
images of the same prompt, as in the groups of GRPO. It says nothing about how well an image is made.

The reward is not asynchronous: while it scores with a policy whose adapter is switched off, nothing else may use that policy.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, pstdev
from typing import Any

from PIL import Image

from alphagrpo_ext.images import to_rgb
from alphagrpo_ext.messages import prompt_text
from alphagrpo_ext.ranges import check_number
from reward_models.dvreward import JudgeFailedError, completion_image
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.likelihood.base import LIKELIHOOD_SCORERS, LikelihoodScorer, PolicyLoader
from reward_models.likelihood.tokens import TOKEN_CHOICES, counted_tokens


_PREFLIGHT_PROMPT = "a red circle"


class LikelihoodReward:
    """
    A reward function for TRL: the mean of `log p(token | image, tokens before)` over the tokens of the prompt, in nats per
    token, at most 0. It reads the prompts and the images of the rollout, and needs no questions.

    Its values are compared within groups only. With other rewards beside it, `reward_weights` weighs them.

    Args:
        scorer ([`LikelihoodScorer`]): The frozen model.
        tokens (`str`, *optional*, defaults to `"all"`): Which tokens count; see [`counted_tokens`].
        max_failed_frac (`float`, *optional*, defaults to `0.5`):
            Share of a batch's images whose log-probabilities may be NaN or infinite, in [0, 1]. If there are more, the reward function
            raises [`~reward_models.dvreward.JudgeFailedError`].
        name (`str`, *optional*, defaults to `"likelihood"`): Name of the reward function, and prefix of its metrics.

    Example:

    ```python
    >>> reward = LikelihoodReward(PolicyScorer(*load_model("bagel-shapes")))
    >>> trainer = AlphaGRPOTrainer(..., reward_funcs=[DVReward("shapes"), reward])
    ```
    """

    always_applies = True
    """Every row has a prompt, so a missing reward of an image is a failure."""

    def __init__(
        self,
        scorer: LikelihoodScorer,
        tokens: str = "all",
        max_failed_frac: float = 0.5,
        name: str = "likelihood",
    ) -> None:
        if tokens not in TOKEN_CHOICES:
            raise ValueError(f"tokens must be one of {', '.join(TOKEN_CHOICES)}, but is {tokens!r}")
        check_number("max_failed_frac", max_failed_frac, "[0, 1]")
        self.scorer = scorer
        self.tokens = tokens
        self.max_failed_frac = max_failed_frac
        self.__name__ = name

    @classmethod
    def from_arguments(
        cls, args: LikelihoodArguments, policy: PolicyLoader | None = None, max_failed_frac: float = 0.5
    ) -> LikelihoodReward:
        """
        Build the reward with its frozen model.

        Args:
            args ([`LikelihoodArguments`]): A recipe's arguments.
            policy (`Callable[[], tuple[UnifiedModel, UnifiedProcessor]]`, *optional*):
                Gives the frozen policy and its processor. It is called only for a scorer that needs it.
            max_failed_frac (`float`, *optional*, defaults to `0.5`): As above.

        Raises:
            `ValueError`: If there is no such scorer, or an argument is missing. The message names it.
        """
        scorer = LIKELIHOOD_SCORERS.get(args.likelihood_scorer).from_arguments(args, policy)
        return cls(scorer, args.likelihood_tokens, max_failed_frac)

    @property
    def run_settings(self) -> dict[str, Any]:
        """What a reward depends on, which a run that resumes keeps as it was."""
        settings = {**self.scorer.run_settings, "tokens": self.tokens}
        return {name: value for name, value in settings.items() if value != ""}

    def __call__(
        self,
        prompts: Sequence[Any],
        completions: Sequence[Any] = (),
        completion_ids: Sequence[Any] | None = None,
        *,
        images: Sequence[Image.Image | Sequence[Image.Image] | None],
        log_metric: Callable[[str, float], None] | None = None,
        **kwargs: Any,
    ) -> list[float | None]:
        """
        Compute the reward of each completion, as TRL calls it. All sequences have one entry per completion.

        Args:
            prompts (`Sequence`): Texts, or conversations that end with the request.
            completions, completion_ids (`Sequence`): Ignored.
            images (`Sequence`): As in [`DVReward`].
            log_metric (`Callable`, *optional*):
                TRL's logger of metrics. Under the function's name: `failed_frac`, and `within_prompt_std`, the mean over prompts of
                the standard deviation over the images of a prompt. The mean over all rewards, which TRL logs, also follows from
                which prompts a batch has.

        Returns:
            `list[float | None]`: Nats per token; `None` for a completion without an image, or without finite values.

        Raises:
            `ValueError`: If the arguments are malformed, or no token of a prompt counts.
            [`~reward_models.dvreward.JudgeFailedError`]: If more than `max_failed_frac` of the images have no finite values.
        """
        if len(images) != len(prompts):
            raise ValueError(f"images has {len(images)} entries for {len(prompts)} prompts")
        texts = [self._text(prompt, f"sample {i}") for i, prompt in enumerate(prompts)]
        found = [completion_image(image, f"images[{i}]") for i, image in enumerate(images)]
        present = [i for i, image in enumerate(found) if image is not None]
        values = self._score([found[i] for i in present], [texts[i] for i in present])
        self._check_failures(values)
        rewards: list[float | None] = [None] * len(images)
        for i, value in zip(present, values, strict=True):
            rewards[i] = value
        if log_metric is not None and values:
            log_metric(f"{self.__name__}/failed_frac", fmean(value is None for value in values))
            deviation = within_prompt_std(texts, rewards)
            if deviation is not None:
                log_metric(f"{self.__name__}/within_prompt_std", deviation)
        return rewards

    def validate_dataset(self, dataset: Iterable[Mapping[str, Any]]) -> None:
        """
        Check the prompts of a whole dataset.

        Raises:
            `ValueError`: At the first prompt that is malformed, or of which no token counts. The message names the row.
        """
        columns = getattr(dataset, "column_names", None)
        if columns and "prompt" in columns:
            # Image columns stay undecoded.
            dataset = dataset.select_columns(["prompt"])
        for index, row in enumerate(dataset):
            where = f"row {index}"
            text = self._text(row["prompt"], where)
            try:
                counted_tokens(self.scorer.tokenizer, text, self.scorer.encode(text), self.tokens)
            except ValueError as error:
                raise ValueError(f"{where}: {error}") from error

    def preflight(self, height: int = 64, width: int = 64) -> None:
        """
        Check before a run that the model scores, by a blank image of this size in pixels.

        Raises:
            [`~reward_models.dvreward.JudgeFailedError`]: If it does not.
        """
        try:
            (value,) = self._score([Image.new("RGB", (width, height), "white")], [_PREFLIGHT_PROMPT])
        except Exception as error:
            raise JudgeFailedError(
                f"the model of the reward '{self.__name__}' ({type(self.scorer).__name__}) cannot score an image of {height} x "
                f"{width} pixels, so nothing was started: {type(error).__name__}: {error}"
            ) from error
        self._check_failures([value])

    def _text(self, prompt: Any, where: str) -> str:
        try:
            return prompt_text(prompt).strip()
        except ValueError as error:
            raise ValueError(f"{where}: {error}") from error

    def _score(self, images: Sequence[Image.Image], texts: Sequence[str]) -> list[float | None]:
        """Means over the tokens that count; `None` where one of these is NaN or infinite."""
        ids = [self.scorer.encode(text) for text in texts]
        counted = [
            counted_tokens(self.scorer.tokenizer, text, own, self.tokens) for text, own in zip(texts, ids, strict=True)
        ]
        found = self.scorer.log_probs([to_rgb(image) for image in images], ids)
        means = [
            fmean(value for value, counts in zip(values, own, strict=True) if counts)
            for values, own in zip(found, counted, strict=True)
        ]
        return [mean if math.isfinite(mean) else None for mean in means]

    def _check_failures(self, values: Sequence[float | None]) -> None:
        num_failed = sum(value is None for value in values)
        if num_failed > self.max_failed_frac * len(values):
            raise JudgeFailedError(
                f"{type(self.scorer).__name__} gave {num_failed} of {len(values)} images NaN or infinite log-probabilities, more "
                f"than judge_max_failed_frac={self.max_failed_frac} allows"
            )


def within_prompt_std(prompts: Sequence[str], rewards: Sequence[float | None]) -> float | None:
    """
    The standard deviation of the rewards of one prompt, averaged over the prompts with at least two of them; `None` without
    such a prompt. This is the part of a likelihood that training uses.
    """
    groups: dict[str, list[float]] = defaultdict(list)
    for prompt, reward in zip(prompts, rewards, strict=True):
        if reward is not None:
            groups[prompt].append(reward)
    deviations = [pstdev(group) for group in groups.values() if len(group) > 1]
    return fmean(deviations) if deviations else None
