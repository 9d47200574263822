# SPDX-License-Identifier: Apache-2.0

"""The arguments that recipes share: prompts, judge and reward."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from reward_models.dvreward import DVReward
from reward_models.holdout.arguments import HoldoutArguments
from reward_models.judges import JUDGES
from reward_models.judges.arguments import JudgeArguments


_HOW_TO_ASK = ("judge_max_concurrency", "judge_timeout", "judge_max_retries", "judge_max_failed_frac")


@dataclass
class RewardArguments(JudgeArguments):
    """
    Who judges images (see [`JudgeArguments`]), and how answers become a reward.

    Args:
        judge_max_failed_frac (`float`, *optional*, defaults to `0.5`):
            Share of a batch's images that may stay without a score; more stops the run.
        aggregation (`str`, *optional*, defaults to `"geometric"`):
            How answers become a reward: `"geometric"`, `"mean"` or `"pooled"`.
    """

    judge_max_failed_frac: float = field(
        default=0.5,
        metadata={"help": "Share of a batch's images that may stay without a score; more stops the run."},
    )
    aggregation: str = field(
        default="geometric", metadata={"help": "How answers become a reward: 'geometric', 'mean' or 'pooled'."}
    )

    def answer_settings(self) -> list[Any]:
        """All values but those that cannot change an answer."""
        return [getattr(self, f.name) for f in fields(RewardArguments) if f.name not in _HOW_TO_ASK]

    def make_reward(self, policy: Any = None) -> DVReward:
        """
        Args:
            policy (`tuple[UnifiedModel, ProcessorMixin]`, *optional*):
                The model that is trained and its processor, for a judge that asks it.

        Raises:
            `ValueError`: If there is no such judge, or an argument is out of range.
        """
        judge = JUDGES.get(self.judge).from_arguments(self, policy)
        return DVReward(judge, aggregation=self.aggregation, max_failed_frac=self.judge_max_failed_frac)


@dataclass
class PromptArguments(HoldoutArguments, RewardArguments):
    """
    Which prompts a recipe trains and evaluates on; and who judges, see [`RewardArguments`] and [`HoldoutArguments`].

    Args:
        train_file, eval_file (`str`, *optional*):
            Prompts with questions: a file of JSON lines, a folder of such files, or a dataset. `None` takes the prompts of
            the shapes world.
        num_train_prompts, num_eval_prompts (`int`, *optional*, defaults to `2048` and `504`):
            Prompts drawn from the shapes world.
        eval_seeds (`int`, *optional*, defaults to `2`):
            Noise seeds every evaluation prompt is painted with. 0 skips the evaluations.
        eval_batch_size (`int`, *optional*, defaults to `128`):
            Samples that an evaluation paints at once.
    """

    train_file: str | None = field(
        default=None, metadata={"help": "Training prompts with questions: JSON lines, a folder of them, or a dataset."}
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Evaluation prompts with questions: JSON lines, a folder, or a dataset."}
    )
    num_train_prompts: int = field(default=2048, metadata={"help": "Training prompts drawn from the shapes world."})
    num_eval_prompts: int = field(default=504, metadata={"help": "Evaluation prompts drawn from the shapes world."})
    eval_seeds: int = field(default=2, metadata={"help": "Noise seeds of an evaluation; 0 skips the evaluations."})
    eval_batch_size: int = field(default=128, metadata={"help": "Samples that an evaluation paints at once."})

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        HoldoutArguments.__post_init__(self)
