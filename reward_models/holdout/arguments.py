# SPDX-License-Identifier: Apache-2.0

"""Arguments of a reward that is logged and not trained on."""

from __future__ import annotations

from dataclasses import Field, dataclass, field, fields, make_dataclass
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

from alphagrpo_ext.ranges import check_ranges
from reward_models.dvreward import DVReward
from reward_models.judges import JUDGES
from reward_models.judges.arguments import JudgeArguments


if TYPE_CHECKING:
    from reward_models.holdout.callback import HoldoutCallback


def _holdout_field(judge_field: Field) -> tuple[str, Any, Field]:
    """The same argument for the hold-out judge."""
    help_text = f"Of the hold-out judge: {judge_field.metadata['help']}"
    value = field(default=judge_field.default, metadata={"help": help_text})
    return f"holdout_{judge_field.name}", get_type_hints(JudgeArguments, include_extras=True)[judge_field.name], value


_HoldoutJudgeArguments = make_dataclass(
    "_HoldoutJudgeArguments",
    [_holdout_field(judge_field) for judge_field in fields(JudgeArguments) if judge_field.name != "judge"],
)


@dataclass
class HoldoutArguments(_HoldoutJudgeArguments):
    """
    The hold-out judge, which scores images and is not trained on.

    Its settings are the arguments of [`JudgeArguments`] with the prefix `holdout_`, e.g. `holdout_judge_model`, and have the same
    defaults.

    Args:
        holdout_judge (`str`, *optional*):
            Name of a judge, as in `judge`; a judge of another kind is best. `None` for no hold-out reward.
        holdout_window (`int`, *optional*, defaults to `20`):
            Number of logs over which the two rewards are compared; see [`diverges`].
    """

    holdout_judge: str | None = field(
        default=None, metadata={"help": "Judge of a reward that is logged and not trained on, e.g. 'policy'."}
    )
    holdout_window: Annotated[int, "[4, inf)"] = field(
        default=20,
        metadata={"help": "Number of logs over which training and hold-out reward are compared, at least 4."},
    )

    def __post_init__(self) -> None:
        check_ranges(self)
        if self.holdout_judge is not None:
            self.holdout_judge_extra_body = self._judge_arguments().judge_extra_body

    def make_holdout_callbacks(self, aggregation: str = "geometric", policy: Any = None) -> list[HoldoutCallback]:
        """
        Make the callback that scores and warns. Without a `holdout_judge`, the list is empty.

        Args:
            aggregation (`str`, *optional*, defaults to `"geometric"`): How answers are combined into a reward.
            policy (`tuple[UnifiedModel, ProcessorMixin]`, *optional*): The model that is trained and its processor.

        Raises:
            `ValueError`: If there is no such judge, or if an argument of the judge is missing.
        """
        if self.holdout_judge is None:
            return []
        # The reward server uses this module, too, and does not need a trainer.
        from reward_models.holdout.callback import HoldoutCallback

        judge = JUDGES.get(self.holdout_judge).from_arguments(self._judge_arguments(), policy)
        reward = DVReward(judge, aggregation=aggregation, name="holdout")
        return [HoldoutCallback(reward, self.holdout_window)]

    def _judge_arguments(self) -> JudgeArguments:
        return JudgeArguments(**{f.name: getattr(self, f"holdout_{f.name}") for f in fields(JudgeArguments)})
