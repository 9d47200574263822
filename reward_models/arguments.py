# SPDX-License-Identifier: Apache-2.0

"""Arguments that recipes share: prompts, judge and reward."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt, UnitFloat
from reward_models.dvreward import DVReward
from reward_models.holdout.arguments import HoldoutArguments
from reward_models.judges import JUDGES
from reward_models.judges.arguments import JudgeArguments


_CANNOT_CHANGE_ANSWERS = ("judge_max_concurrency", "judge_timeout", "judge_max_retries", "judge_max_failed_frac")


@dataclass
class RewardArguments(JudgeArguments):
    """
    The judge (see [`JudgeArguments`]), and how its answers become a reward; the help text of a field describes it.
    """

    judge_max_failed_frac: UnitFloat = field(
        default=0.5,
        metadata={"help": "Share of a batch's images that may stay without a score. If more fail, the run stops."},
    )
    aggregation: str = field(
        default="geometric", metadata={"help": "How answers become a reward: 'geometric', 'mean' or 'pooled'."}
    )

    def answer_settings(self) -> list[Any]:
        """Return the values of all arguments that can change an answer or a reward."""
        return [getattr(self, f.name) for f in fields(RewardArguments) if f.name not in _CANNOT_CHANGE_ANSWERS]

    def make_reward(self, policy: Any = None) -> DVReward:
        """
        Build the reward with its judge.

        Args:
            policy (`tuple[UnifiedModel, ProcessorMixin]`, *optional*):
                The model in training and its processor, for a judge that asks it.

        Raises:
            `ValueError`: If there is no such judge, or an argument is out of range.
        """
        judge = JUDGES.get(self.judge).from_arguments(self, policy)
        return DVReward(judge, aggregation=self.aggregation, max_failed_frac=self.judge_max_failed_frac)


@dataclass
class PromptArguments(HoldoutArguments, RewardArguments):
    """
    The prompts that a recipe trains and evaluates on, the judge and the reward (see [`RewardArguments`]), and a second judge
    for comparison (see [`HoldoutArguments`]); the help text of a field describes it.
    """

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training prompts with questions: a file of JSON lines, a folder of such files, or a dataset. Default: "
            "prompts of the shapes world."
        },
    )
    eval_file: str | None = field(
        default=None, metadata={"help": "Evaluation prompts with questions, in the formats of train_file."}
    )
    num_train_prompts: PositiveInt = field(
        default=2048, metadata={"help": "Number of training prompts drawn from the shapes world."}
    )
    num_eval_prompts: PositiveInt = field(
        default=504, metadata={"help": "Number of evaluation prompts drawn from the shapes world."}
    )
    eval_seeds: NonNegativeInt = field(
        default=2, metadata={"help": "Noise seeds per evaluation prompt. 0 skips the evaluations."}
    )
    eval_batch_size: PositiveInt = field(default=128, metadata={"help": "Samples per batch of an evaluation."})
    reward: list[str] = field(
        default_factory=lambda: ["dvreward"],
        metadata={
            "help": "Rewards of training: 'dvreward', or functions of your own as module:function, e.g. my_rewards:brightness "
            "for my_rewards.py in this folder. --reward_weights weighs them. Evaluations use DVReward."
        },
    )
    verbose_logs: bool = field(
        default=False,
        metadata={"help": "Print all metrics of a log, and not one line; metrics.jsonl has them in any case."},
    )

    def __post_init__(self) -> None:
        RewardArguments.__post_init__(self)
        HoldoutArguments.__post_init__(self)
