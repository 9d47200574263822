# SPDX-License-Identifier: Apache-2.0

"""Arguments that recipes share: prompts, judge and reward."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

from alphagrpo_ext.ranges import NonNegativeInt, PositiveInt, UnitFloat
from reward_models.dvreward import DVReward
from reward_models.holdout.arguments import HoldoutArguments
from reward_models.judges import JUDGES
from reward_models.judges.arguments import JudgeArguments
from reward_models.likelihood.arguments import LikelihoodArguments
from reward_models.prompts.tags import describe_tags


BUILT_IN_REWARDS = ("dvreward", "likelihood", "answer")
"""Rewards of recipes by name; others are imported."""

_CANNOT_CHANGE_ANSWERS = (
    "judge_max_concurrency",
    "judge_timeout",
    "judge_max_retries",
    "judge_max_answer_bytes",
    "judge_max_failed_frac",
)


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

    def make_checked_reward(
        self,
        rows: Mapping[str, Iterable[Mapping[str, Any]]],
        sizes: Sequence[tuple[int, int]],
        load_policy: Callable[[], tuple[Any, Any]],
    ) -> DVReward:
        """
        Build the reward, check that its judge can answer the questions of all rows about images of these sizes, and ask it one
        question. All processes call this together, before anything is painted.

        Args:
            rows (`Mapping[str, Iterable[Mapping]]`): Prompts with questions, by a name for messages.
            sizes (`Sequence[tuple[int, int]]`): Heights and widths of images in pixels, at least one.
            load_policy (`Callable`):
                Loads the model that paints and its processor. It is called only for a judge that is not
                [light][`Judge.is_light`], so that mistakes are found before a model is loaded.

        Raises:
            `ValueError`: If there is no such judge, or it cannot judge a row or a size. The message names the row.
            [`~reward_models.dvreward.JudgeFailedError`]: If the judge does not answer.
        """
        # The reward server uses this module, too, and does not need a trainer.
        from alphagrpo_ext.trainer.reward_functions import preflight_rewards

        reward = self.make_reward(None if JUDGES.get(self.judge).is_light else load_policy())
        reward.validate_named(rows)
        for size in dict.fromkeys(sizes):
            reward.validate_image_size(*size)
        preflight_rewards([reward], *sizes[0])
        return reward


@dataclass
class PromptArguments(HoldoutArguments, LikelihoodArguments, RewardArguments):
    """
    The prompts that a recipe trains and evaluates on, the judge and the reward (see [`RewardArguments`] and
    [`LikelihoodArguments`]), and a second judge for comparison (see [`HoldoutArguments`]); the help text of a field describes it.
    """

    train_file: str | None = field(
        default=None,
        metadata={
            "help": "Training prompts with questions: a file of JSON lines, a JSON array, CSV or TSV (whose columns of questions "
            "hold JSON lists) or a Parquet file, a folder, or a dataset. Without dvreward among the rewards, prompts need no "
            "questions, and plain text is read, too. Default: prompts of the shapes world. "
            f"{describe_tags()}"
        },
    )
    eval_file: str | None = field(
        default=None,
        metadata={
            "help": "Evaluation prompts, as those of train_file. Default: prompts of the shapes world, or no evaluation if "
            "there is a train_file."
        },
    )
    prompt_column: str | None = field(
        default=None,
        metadata={"help": "Name of the column of prompts in train_file and eval_file. Default: prompt."},
    )
    train_tasks: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Tasks that the training prompts are assigned to in turn, e.g. 'self_reflection reasoning_t2i'; a name that is "
            "given twice gets twice as many. For 'visual_question_answering', questions about scenes of the shapes world take the "
            "place of prompts. Default: --task for all prompts."
        },
    )
    num_train_prompts: PositiveInt = field(
        default=2048, metadata={"help": "Number of training prompts drawn from the shapes world."}
    )
    num_eval_prompts: PositiveInt = field(
        default=504, metadata={"help": "Number of evaluation prompts drawn from the shapes world."}
    )
    skip_broken_rows: bool = field(
        default=False,
        metadata={"help": "Leave out rows whose image cannot be read, and list them at the end, instead of stopping."},
    )
    eval_seeds: NonNegativeInt = field(
        default=2, metadata={"help": "Noise seeds per evaluation prompt. 0 skips the evaluations."}
    )
    eval_questions: NonNegativeInt = field(
        default=600,
        metadata={
            "help": "Yes/no questions about held-out scenes that the policy answers before and after a run on the shapes world, "
            "to see whether its understanding suffers. 0 skips them, and eval_seeds=0 too."
        },
    )
    eval_batch_size: PositiveInt = field(default=128, metadata={"help": "Samples per batch of an evaluation."})
    reward: list[str] = field(
        default_factory=lambda: ["dvreward"],
        metadata={
            "help": "Rewards of training: 'dvreward'; 'likelihood', how likely a frozen model that looks at the image finds the "
            "prompt, in nats per token, which needs no questions and compares images of one prompt only; 'answer', whether what follows the thought equals the "
            "answer in the row's column 'solution', of rows of the task visual_question_answering; or functions of your own "
            "as module:function, e.g. my_rewards:brightness for my_rewards.py in this folder. --reward_weights weighs them. "
            "Evaluations use DVReward where prompts have questions, and these functions elsewhere."
        },
    )
    formats: list[str] = field(
        default_factory=list,
        metadata={
            "help": "Rewards of the text's form beside these, e.g. 'think' or 'shapes_reflection'. They train texts alone, unless "
            "--separate_advantages false."
        },
    )
    verbose_logs: bool = field(
        default=False,
        metadata={"help": "Print all metrics of a log, and not one line; metrics.jsonl has them in any case."},
    )

    def __post_init__(self) -> None:
        if self.prompt_column is not None and not (self.train_file or self.eval_file):
            raise ValueError(
                f"prompt_column={self.prompt_column!r} needs train_file or eval_file, whose column it names"
            )
        RewardArguments.__post_init__(self)
        LikelihoodArguments.__post_init__(self)
        HoldoutArguments.__post_init__(self)

    @property
    def trains_on_dvreward(self) -> bool:
        """Whether training prompts need questions."""
        return "dvreward" in self.reward

    @property
    def guards_understanding(self) -> bool:
        """Whether questions about scenes of the shapes world are answered before and after the run."""
        return bool(self.eval_questions) and bool(self.eval_seeds) and self.train_file is None

    @property
    def evaluates(self) -> bool:
        """Whether the run is evaluated. The shapes world would say nothing about training prompts of another kind."""
        return bool(self.eval_seeds) and (self.eval_file is not None or self.train_file is None)

    @property
    def train_name(self) -> str:
        """What messages call the training prompts."""
        return f"train_file {self.train_file}" if self.train_file else "training prompts"

    @property
    def eval_name(self) -> str:
        """What messages call the evaluation prompts."""
        return f"eval_file {self.eval_file}" if self.eval_file else "evaluation prompts"
